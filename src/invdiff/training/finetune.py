"""Fit a diffusion model to captioned images: the paper's first step, and how the bundled model is made."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from torch import nn

from ..config import ArchitectureConfig, FinetuneConfig
from ..data.captioned import CaptionedImages
from ..data.encode import EncodedImages, encode
from ..diffusion import NoiseSchedule, per_sample_loss
from ..files import write_json
from ..pipelines import load_pipeline
from ..progress import progress_bar
from ..seeds import generator
from .checkpoint import TrainingState, load_checkpoint, save_checkpoint
from .optimization import make_accelerator, moving_average, set_learning_rate
from .scratch import build_pipeline, train_autoencoder


def finetune(
    data: CaptionedImages,
    output_dir: str | Path,
    *,
    base: str | Path | None = None,
    architecture: ArchitectureConfig | None = None,
    config: FinetuneConfig | None = None,
    progress: bool = True,
) -> DiffusionPipeline:
    """Fit a text-to-image pipeline to captioned images and save it to `output_dir`.

    With a `base`, its denoiser is trained and everything else stays frozen, as in the paper. Without one,
    a small Stable Diffusion model is trained from nothing: its vocabulary, autoencoder, text encoder and UNet.
    Work in progress is kept in `output_dir/.work`; a killed run goes on from its last checkpoint.

    Raises:
        DataError: The images cannot be used.
        ModelError: `base` is not a pipeline that can be trained.
        ConfigError: `output_dir` holds an unfinished run with other settings.
    """
    config = config or FinetuneConfig()
    output_dir = Path(output_dir)
    work = output_dir / ".work"
    accelerator = make_accelerator(config.mixed_precision)
    if base is None:
        architecture = architecture or ArchitectureConfig()
        pipe: Any = build_pipeline(data.captions, architecture, seed=config.seed)
        pipe.to(accelerator.device)
        train_autoencoder(
            pipe.vae,
            data,
            architecture.resolution,
            accelerator,
            config,
            checkpoint_dir=work / "autoencoder",
            progress=progress,
        )
    else:
        pipe = load_pipeline(base, device=accelerator.device, dtype=torch.float32)
    encoded = encode(pipe, data, work / "latents", progress=progress)
    train_denoiser(
        pipe,
        encoded,
        accelerator,
        config,
        train_text_encoder=base is None,
        checkpoint_dir=work / "denoiser",
        progress=progress,
    )
    save(pipe, output_dir, half_precision=config.half_precision_weights)
    write_json(
        output_dir / "finetune.json",
        {
            "base": None if base is None else str(base),
            "settings": config.to_dict(),
            "images": len(encoded),
            "data_fingerprint": data.fingerprint,
        },
    )
    shutil.rmtree(work)
    return pipe


def train_denoiser(
    pipe: Any,
    encoded: EncodedImages,
    accelerator: Accelerator,
    config: FinetuneConfig,
    *,
    train_text_encoder: bool,
    checkpoint_dir: Path,
    progress: bool = True,
) -> None:
    """Minimise the denoising loss over images, timesteps and noise, with caption dropout and EMA.

    Leaves the averaged weights in `pipe`.
    """
    device = accelerator.device
    schedule = NoiseSchedule(pipe.scheduler)
    trained = nn.ModuleDict({"unet": pipe.unet})
    if train_text_encoder:
        trained["text_encoder"] = pipe.text_encoder
    trained.to(device=device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    average = moving_average(trained, config.ema_decay)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    state = TrainingState(trained, optimizer, average)
    settings: dict[str, Any] = config.to_dict() | {"data": encoded.data_fingerprint}
    start = load_checkpoint(checkpoint_dir, state, settings)
    tokens = tokenize(pipe, [*encoded.captions, ""]).to(device)
    embeds = torch.cat([encoded.prompt_embeds, encoded.null_embeds[None]]).to(device)
    null_id = len(encoded.captions)

    with progress_bar("denoiser", config.steps, start=start, enabled=progress) as bar:
        for step in range(start, config.steps):
            set_learning_rate(optimizer, config.learning_rate, step, config.steps)
            rng = generator("finetune", config.seed, step)
            rows = torch.randint(len(encoded), (config.batch_size,), generator=rng)
            latents = encoded.latents[rows]
            noise = torch.randn(latents.shape, generator=rng)
            timesteps = torch.randint(schedule.num_train_timesteps, (len(rows),), generator=rng)
            captions = encoded.caption_ids[rows].clone()
            captions[torch.rand(len(rows), generator=rng) < config.caption_dropout] = null_id

            latents, noise, timesteps = latents.to(device), noise.to(device), timesteps.to(device)
            noisy_latents = schedule.add_noise(latents, noise, timesteps)
            with accelerator.autocast():
                if train_text_encoder:
                    needed, inverse = captions.unique(return_inverse=True)
                    prompt_embeds = pipe.text_encoder(tokens[needed.to(device)])[0][inverse.to(device)]
                else:
                    prompt_embeds = embeds[captions.to(device)]
                model_pred = pipe.unet(noisy_latents, timesteps, prompt_embeds).sample
            loss = per_sample_loss(model_pred, schedule.target(latents, noise, timesteps)).mean()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(trained.parameters(), config.max_gradient_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            average.update_parameters(trained)
            if (step + 1) % config.checkpoint_every == 0:
                save_checkpoint(checkpoint_dir, step + 1, state, settings)
            bar.advance(loss=loss)

    trained.load_state_dict(average.module.state_dict())
    trained.to(memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]


def tokenize(pipe: Any, captions: list[str]) -> torch.Tensor:
    """Return padded token ids, shape (len(captions), max_tokens)."""
    return pipe.tokenizer(
        captions,
        padding="max_length",
        max_length=pipe.tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids


def save(pipe: Any, output_dir: Path, *, half_precision: bool) -> None:
    """Save a pipeline, optionally with 16-bit denoiser and autoencoder.

    The text encoder stays in 32 bits: transformers, unlike diffusers, loads weights in the type it finds.
    """
    if half_precision:
        pipe.unet.half()
        pipe.vae.half()
    pipe.save_pretrained(output_dir)
    if half_precision:
        pipe.unet.float()
        pipe.vae.float()
