"""What the frozen model makes of a training batch: the one large cost of a step."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..config import TrainConfig
from ..data.encode import EncodedImages
from ..models.families import Condition
from ..models.families.base import to
from ..models.frozen import FrozenDenoiser
from .batches import GroupBalancedSampler
from .optimization import Precision


@dataclass(frozen=True)
class FrozenBatch:
    """A batch and the frozen model's output on it. Several processes share the batch: each has its part of it."""

    prompts: torch.Tensor
    """(batch,) the prompt of each image; of the whole batch, on the CPU."""
    environments: torch.Tensor
    """(batch, factors) the groups; of the whole batch, on the CPU."""
    condition: Condition
    """What Phi reads, of `part` rows, in 32 bits."""
    noisy_latents: torch.Tensor
    """(part, channels, height, width), z_t."""
    timesteps: torch.Tensor
    """(part,)."""
    target: torch.Tensor
    """(part, channels, height, width), what the denoiser should output."""
    model_pred: torch.Tensor
    """(part, channels, height, width), f(z_t, t, y)."""
    features: torch.Tensor
    """(part, feature_channels, height', width')."""


def draw_batch(
    frozen: FrozenDenoiser,
    data: EncodedImages,
    sampler: GroupBalancedSampler,
    config: TrainConfig,
    precision: Precision,
    rng: torch.Generator,
) -> FrozenBatch:
    """Draw images, captions, noise and noise levels, and run the frozen model on this process's part of them."""
    device, schedule = frozen.device, frozen.schedule
    rows, environments = sampler.draw(config.batch_size, rng)
    captions = data.caption_ids[rows].clone()
    captions[torch.rand(len(rows), generator=rng) < config.caption_dropout] = data.null_id
    noise = torch.randn((len(rows), *data.latents.shape[1:]), generator=rng)
    # Content is decided at high noise: a level is drawn in proportion to its height.
    levels = torch.rand(len(rows), generator=rng).sqrt()
    # A root may round up to 1, which is no timestep any more.
    timesteps = (levels * schedule.num_train_timesteps).long().clamp(max=schedule.num_train_timesteps - 1)

    part = precision.part(len(rows))
    latents, noise = data.latents[rows[part]].to(device), noise[part].to(device)
    timesteps, condition = timesteps[part].to(device), to(data.condition(captions[part]), device, torch.float32)
    noisy_latents = schedule.add_noise(latents, noise, timesteps)
    with precision.autocast():
        model_pred, features = frozen(noisy_latents, timesteps, condition)
    return FrozenBatch(
        prompts=sampler.prompt_ids[rows],
        environments=environments,
        condition=condition,
        noisy_latents=noisy_latents,
        timesteps=timesteps,
        target=schedule.target(latents, noise, timesteps),
        model_pred=model_pred.float(),
        features=features.float(),
    )
