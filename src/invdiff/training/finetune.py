"""Fit a diffusion model to captioned images: the paper's first step, and how the bundled model is made."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import nn

from ..config import ArchitectureConfig, FinetuneConfig
from ..data.captioned import CaptionedImages
from ..data.encode import EncodedImages, encode, model_fingerprint
from ..distributed import refuse_several_processes
from ..errors import ConfigError, ModelError
from ..files import fingerprint, read_json, write_json
from ..models.families import family_of
from ..models.families.unet import StableDiffusion
from ..models.frozen import denoiser_fingerprint
from ..models.load import default_device, load_pipeline
from ..models.schedule import NoiseSchedule, per_sample_loss
from ..progress import progress_bar
from ..seeds import derived_seed, generator
from .checkpoint import TrainingRun, check_same_settings
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
    Work in progress is kept in `output_dir/.work`; an interrupted run continues from its last checkpoint to the same
    result, and a finished one is read back.

    Raises:
        DataError: The images cannot be used.
        ModelError: `base` is not a pipeline that can be trained.
        ConfigError: `output_dir` holds a run with other settings, data or base; or settings contradict.
    """
    refuse_several_processes("finetune")
    config = config or FinetuneConfig()
    output_dir = Path(output_dir)
    finished, work = output_dir / "finetune.json", output_dir / ".work"
    if base is not None and architecture is not None:
        raise ConfigError("Expected either a base or an architecture, got both: a base has its own shape.")
    if base is None and config.fresh_denoiser:
        raise ConfigError("Expected a base for fresh_denoiser=True, got none: without one, all weights are new.")
    settings: dict[str, Any] = config.to_dict() | {"data": data.fingerprint}
    if base is None:
        architecture = architecture or ArchitectureConfig()
        settings |= {f"architecture.{name}": value for name, value in architecture.to_dict().items()}
        pipe: Any = build_pipeline(data.captions, architecture, seed=config.seed)
        pipe.to(default_device())
    else:
        pipe = load_base(base)
        # The weights, since another base may lie in the same place, and the same base in another.
        settings["base"] = fingerprint(model_fingerprint(pipe), denoiser_fingerprint(pipe))
    if finished.is_file():
        check_same_settings(output_dir, read_json(finished)["settings"], settings)
        shutil.rmtree(work, ignore_errors=True)
        return load_pipeline(output_dir, device=pipe.device)

    options: dict[str, Any] = {"settings": settings, "progress": progress}
    if architecture is not None:
        train_autoencoder(
            pipe.vae, data, architecture.resolution, config, checkpoint_dir=work / "autoencoder", **options
        )
    elif config.fresh_denoiser:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derived_seed("fresh denoiser", config.seed))
            pipe.unet = UNet2DConditionModel.from_config(pipe.unet.config).to(pipe.unet.device)
    encoded = encode(pipe, data, work / "latents", progress=progress)
    train_denoiser(pipe, encoded, config, train_text_encoder=base is None, checkpoint_dir=work / "denoiser", **options)
    save(pipe, output_dir, half_precision=config.half_precision_weights)
    write_json(finished, {"base": None if base is None else str(base), "images": len(encoded), "settings": settings})
    shutil.rmtree(work)
    return pipe


def load_base(base: str | Path) -> Any:
    """Load a pipeline to train, in float32.

    Raises:
        ModelError: There is none, or it is no Stable Diffusion 1.x or 2.x.
    """
    pipe = load_pipeline(base, dtype=torch.float32)
    family = family_of(pipe)
    if type(family) is not StableDiffusion:
        raise ModelError(
            f"Expected a base of {StableDiffusion.title}, got {family.title}. Fine-tune others with diffusers' own "
            "training scripts; audit, train and generate take the result."
        )
    return pipe


def train_denoiser(
    pipe: Any,
    encoded: EncodedImages,
    config: FinetuneConfig,
    *,
    train_text_encoder: bool,
    checkpoint_dir: Path,
    settings: dict[str, Any],
    progress: bool = True,
) -> None:
    """Minimise the denoising loss over images, timesteps and noise, with caption dropout.

    Leaves the averaged weights in `pipe`.
    """
    device = pipe.unet.device
    schedule = NoiseSchedule(pipe.scheduler)
    trained = nn.ModuleDict({"unet": pipe.unet})
    if train_text_encoder:
        trained["text_encoder"] = pipe.text_encoder
    trained.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    run = TrainingRun(trained, config, checkpoint_dir, settings, device=device)
    tokens = pipe.tokenizer(  # (captions + 1, max_tokens)
        [*encoded.captions, ""],
        padding="max_length",
        max_length=pipe.tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids.to(device)
    embeds = encoded.conditions["prompt_embeds"].to(device)
    images_of = torch.bincount(encoded.caption_ids).double()
    chances = images_of[encoded.caption_ids] ** (config.caption_power - 1)

    with progress_bar("denoiser", config.steps, start=run.start, enabled=progress) as bar:
        for step in range(run.start, config.steps):
            rng = generator("finetune", config.seed, step)
            rows = torch.multinomial(chances, config.batch_size, replacement=True, generator=rng)
            latents = encoded.latents[rows]
            noise = torch.randn(latents.shape, generator=rng)
            timesteps = torch.randint(schedule.num_train_timesteps, (len(rows),), generator=rng)
            captions = encoded.caption_ids[rows].clone()
            captions[torch.rand(len(rows), generator=rng) < config.caption_dropout] = encoded.null_id

            latents, noise, timesteps = latents.to(device), noise.to(device), timesteps.to(device)
            noisy_latents = schedule.add_noise(latents, noise, timesteps)
            with run.accelerator.autocast():
                if train_text_encoder:
                    needed, inverse = captions.unique(return_inverse=True)
                    prompt_embeds = pipe.text_encoder(tokens[needed.to(device)])[0][inverse.to(device)]
                else:
                    prompt_embeds = embeds[captions.to(device)]
                model_pred = pipe.unet(noisy_latents, timesteps, prompt_embeds).sample
            loss = per_sample_loss(model_pred, schedule.target(latents, noise, timesteps)).mean()
            run.descend(loss, step)
            run.save_if_due(step)
            bar.advance(loss=loss)
    run.finish()
    trained.to(memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]


def save(pipe: Any, output_dir: Path, *, half_precision: bool) -> None:
    """Save a pipeline, optionally with 16-bit denoiser and autoencoder.

    The text encoder stays in 32 bits: transformers, unlike diffusers, loads weights in the type it finds.
    """
    for network in (pipe.unet, pipe.vae) if half_precision else ():
        network.half()
    pipe.save_pretrained(output_dir)
    for network in (pipe.unet, pipe.vae) if half_precision else ():
        network.float()
