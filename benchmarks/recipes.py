"""One training step at the shape of Stable Diffusion 1.5: ours, and that of the reference implementation.

    python benchmarks/recipes.py ours --steps 4

benchmarks/cost.py runs each in a process of its own, so that each has its own peak of memory. Weights and data are
random numbers. Both run in the same arithmetic: full precision on a CPU, bf16 autocast over float32 weights on a GPU.
"""

import argparse
import json
import resource
import tempfile
import time
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import psutil
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from invdiff import TrainConfig
from invdiff.auditing.result import Audit
from invdiff.data.encode import EncodedImages
from invdiff.guidance.backends import BACKENDS
from invdiff.models.families import family_of
from invdiff.models.frozen import FrozenDenoiser
from invdiff.models.load import default_device, load_pipeline
from invdiff.models.schedule import NoiseSchedule, per_sample_loss
from invdiff.training import checkpoint, train

SD15 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}  # the rest is diffusers' default


def sd15_pipeline(dtype: torch.dtype = torch.float32) -> StableDiffusionPipeline:
    """Return Stable Diffusion 1.5 with random weights and without a tokenizer."""
    torch.manual_seed(0)
    text = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768
    )
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            sample_size=512,
        ),
        text_encoder=CLIPTextModel(text).eval(),
        tokenizer=None,
        unet=UNet2DConditionModel(**SD15),
        scheduler=DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(default_device(), dtype)


def measured_steps(ends: list[float], before: int, trained: int) -> dict[str, Any]:
    """Return the figures of a recipe from the times at which its steps ended; the first is warm-up."""
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    return {
        "step_seconds": spread([end - start for start, end in pairwise(ends)]),
        "peak_bytes": peak,
        "resident_after_imports_bytes": before,
        "trained_parameters": trained,
    }


def our_recipe(steps: int, batch_size: int, resolution: int, backend: str, base: str) -> dict[str, Any]:
    """Run `run_round` itself, on cached latents and prompt embeddings that are random numbers.

    Left out is what is done once before the steps: encoding, and the typical loss of each timestep. With `base`, a
    pipeline's folder, images are of its size, and memory is counted above the loaded pipeline.
    """
    loaded = load_pipeline(base) if base else None
    before = psutil.Process().memory_info().rss
    pipe = loaded or sd15_pipeline()
    side = pipe.unet.config["sample_size"] if base else resolution // 8
    images, prompt = 8, family_of(pipe).null_condition(pipe)["prompt_embeds"] if base else torch.empty(1, 77, 768)
    data = EncodedImages(
        latents=torch.randn(images, pipe.unet.config["in_channels"], side, side),  # type: ignore[arg-type]
        captions=["a caption"],
        caption_ids=torch.zeros(images, dtype=torch.long),
        conditions={"prompt_embeds": torch.randn(2, *prompt.shape[1:])},
        names=[f"{image}.png" for image in range(images)],
        source_index=torch.arange(images),
        model_fingerprint="",
        data_fingerprint="",
        resolution=resolution,
    )
    groups = np.eye(2, dtype=np.float32)[np.arange(images) % 2]
    scores, prompts = np.zeros((1, images), np.float32), np.zeros(images, np.int64)
    found = Audit((groups,), scores, prompts, [], [], data.names, 0.0, {})
    # The first step is warm-up; the last, left out as well, writes a checkpoint.
    config = TrainConfig(backend=backend, steps=steps + 2, batch_size=batch_size)  # type: ignore[arg-type]
    ends: list[float] = []

    class Stopwatch:
        def advance(self, **_: object) -> None:
            ends.append(synchronised_clock())

    module = BACKENDS[backend].for_pipeline(pipe)
    with (
        tempfile.TemporaryDirectory() as folder,
        FrozenDenoiser(pipe) as frozen,
        patch.object(checkpoint, "progress_bar", lambda *_, **__: nullcontext(Stopwatch())),
        patch.object(train, "typical_losses", lambda *_, **__: torch.ones(1000)),
    ):
        module.to(frozen.device)
        train.run_round(module, frozen, data, found, config, 0, Path(folder), {}, progress=False)
    return measured_steps(ends[:-1], before, module.num_parameters())


def reference_recipe(steps: int, batch_size: int, resolution: int) -> dict[str, Any]:
    """Train as InvDiff's released code does (Hundredl/InvDiff, train_text_to_image.py, EpsilonWithDelta).

    Images and captions are encoded in every step; a second UNet of the same size is trained, with gradient
    checkpointing and AdamW, and the two outputs are mixed. Left out, in its favour: reading and cutting the images.
    """
    before = psutil.Process().memory_info().rss
    pipe = sd15_pipeline()
    device, schedule, mix = pipe.device, NoiseSchedule(pipe.scheduler), 0.4
    accelerator = checkpoint.accelerator_for("auto", device)
    encoding = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    vae, text_encoder = pipe.vae.to(encoding), pipe.text_encoder.to(encoding)
    for frozen in (vae, text_encoder, pipe.unet):
        frozen.requires_grad_(False)
    delta = UNet2DConditionModel(**SD15).to(device)
    nn.init.zeros_(delta.conv_out.weight)
    for unet in (pipe.unet, delta):
        unet.enable_gradient_checkpointing()
        unet.train()
    optimizer = accelerator.prepare_optimizer(torch.optim.AdamW(delta.parameters(), lr=1e-4, weight_decay=1e-2))

    pixels = torch.rand(batch_size, 3, resolution, resolution, device=device) * 2 - 1
    tokens = torch.randint(49407, (batch_size, 77), device=device)
    groups = nn.functional.one_hot(torch.arange(batch_size, device=device) % 2, 2).float()
    ends = []
    for _ in range(steps + 1):
        latents = vae.encode(pixels.to(encoding)).latent_dist.sample() * vae.config.scaling_factor
        embeds = text_encoder(tokens, return_dict=False)[0]
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, schedule.num_train_timesteps, (batch_size,), device=device)
        noisy_latents = schedule.add_noise(latents, noise, timesteps)
        with accelerator.autocast():
            plain, learnt = (
                unet(noisy_latents, timesteps, embeds, return_dict=False)[0] for unet in (pipe.unet, delta)
            )
        losses = per_sample_loss(mix * learnt + (1 - mix) * plain, schedule.target(latents, noise, timesteps))
        present = groups.sum(dim=0) > 0
        group_losses = (losses @ groups / groups.sum(dim=0).clamp_min(1))[present]
        loss = group_losses.mean() + (group_losses.var() if len(group_losses) > 1 else 0)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(delta.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ends.append(synchronised_clock())
    return measured_steps(ends, before, sum(parameter.numel() for parameter in delta.parameters()))


RECIPES = {"ours": our_recipe, "reference": reference_recipe}


def synchronised_clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def spread(values: list[float]) -> dict[str, float]:
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
    return {"median": median, "lower_quartile": low, "upper_quartile": high}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=RECIPES)
    parser.add_argument("--steps", type=int, default=4, help="steps to time, after one to warm up")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--resolution", type=int, default=512, help="pixels")
    parser.add_argument("--backend", choices=BACKENDS, default="module", help="of ours")
    parser.add_argument("--base", default="", help="of ours: a pipeline in place of Stable Diffusion 1.5's shape")
    arguments = parser.parse_args()
    own = {"backend": arguments.backend, "base": arguments.base} if arguments.recipe == "ours" else {}
    print(json.dumps(RECIPES[arguments.recipe](arguments.steps, arguments.batch_size, arguments.resolution, **own)))


if __name__ == "__main__":
    main()
