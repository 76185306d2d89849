"""What the frozen model makes of training batches: the one large cost of a step, paid once and, if asked, reused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch

from ..config import TrainConfig
from ..data.encode import EncodedImages
from ..denoiser import FrozenDenoiser
from ..families import Condition
from ..families.base import to
from .batches import GroupBalancedSampler
from .optimization import Precision


@dataclass(frozen=True)
class FrozenBatch:
    """A batch and the frozen model's output on it. Several processes share the batch: each has its part of it."""

    prompts: torch.Tensor
    """(batch,) the prompt of each image; of the whole batch, on the CPU."""
    environments: torch.Tensor
    """(batch, factors) the groups; of the whole batch, on the CPU."""
    captions: torch.Tensor
    """(part,) rows of `EncodedImages.conditions`."""
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

    def condition(self, data: EncodedImages) -> Condition:
        """Return what Phi reads, in 32 bits."""
        return to(data.condition(self.captions), self.noisy_latents.device, torch.float32)


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
    timesteps = (levels * schedule.num_train_timesteps).long()

    part = precision.part(len(rows))
    latents, noise = data.latents[rows[part]].to(device), noise[part].to(device)
    timesteps, captions = timesteps[part].to(device), captions[part]
    noisy_latents = schedule.add_noise(latents, noise, timesteps)
    with precision.autocast():
        condition = to(data.condition(captions), device, torch.float32)
        model_pred, features = frozen(noisy_latents, timesteps, condition)
    return FrozenBatch(
        prompts=sampler.prompt_ids[rows],
        environments=environments,
        captions=captions,
        noisy_latents=noisy_latents,
        timesteps=timesteps,
        target=schedule.target(latents, noise, timesteps),
        model_pred=model_pred.float(),
        features=features.float(),
    )


class FrozenPool:
    """The newest batches, mixed anew at each step: each pass of the frozen model serves `reuse` steps.

    As many batches as each serves steps are kept, the oldest replaced every `reuse` steps, and each place of a step's
    batch is filled from one of them at random. With `reuse` 1 every step has a batch of its own. What a step sees
    follows from its number alone, so that a killed run goes on to the same result.

    Args:
        draw: Draws batch number n.
        reuse: Steps that one pass serves.
    """

    def __init__(self, draw: Callable[[int], FrozenBatch], reuse: int) -> None:
        self._draw = draw
        self._reuse = reuse
        self._batches: dict[int, FrozenBatch] = {}

    def batch(self, step: int, part: Callable[[int], slice], rng: torch.Generator) -> FrozenBatch:
        """Return the batch of a step.

        Args:
            step: From 0.
            part: The part of a whole batch of that size which this process has.
            rng: Draws the mixture, the same in every process.
        """
        oldest = step // self._reuse
        wanted = range(oldest, oldest + self._reuse)
        kept = {number: batch for number, batch in self._batches.items() if number in wanted}
        self._batches = {number: kept.get(number) or self._draw(number) for number in wanted}
        batches = list(self._batches.values())
        if len(batches) == 1:
            return batches[0]
        size = len(batches[0].prompts)
        choice = torch.randint(len(batches), (size,), generator=rng)
        mine = choice[part(size)]
        mixed = {}
        for field in fields(FrozenBatch):
            values = torch.stack([getattr(batch, field.name) for batch in batches])
            chosen = (choice if values.shape[1] == size else mine).to(values.device)
            mixed[field.name] = values[chosen, torch.arange(values.shape[1], device=values.device)]
        return FrozenBatch(**mixed)
