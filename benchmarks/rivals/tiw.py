"""TIW-DSM (Kim et al., "Training unbiased diffusion models from biased dataset", ICLR 2024).

A time-dependent discriminator d(z_t, t, y) tells a small balanced reference set from the biased images; the density
ratio is w^t = d / (1 - d). The denoiser is then fitted to the biased images alone by weighted denoising score matching
with a corrected score,

    E_{z_0 biased, e, t} w^t(z_t, y) || s_theta(z_t, t, y) - grad log p(z_t | z_0) - grad log w^t(z_t, y) ||^2,

whose minimiser is the score of the balanced distribution: weighting alone cannot move it, since w^t depends on z_t
only. The released code subtracts the correction, takes the gradient of d in place of log w^t, and multiplies losses
(B, C, H, W) by weights (B, 1, 1, 1, 1, 1, 1), so that every image is weighted by the batch's mean weight. Here all
three follow the paper. As there, the discriminator is a small head on frozen features of a pretrained network: those
of the base's middle block, which have seen z_t, t and y. It is trained on pairs of one caption, so that w^t is
conditional on it; a tenth of them show no caption. The released code fits the denoiser to both sets, with weights
2 d = p_balanced / ((p_biased + p_balanced) / 2); here the reference teaches the discriminator only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from methods import Fitted, World
from torch import Tensor, nn

from invdiff import FinetuneConfig
from invdiff.data.captioned import CaptionedImages
from invdiff.data.encode import EncodedImages, as_encoded
from invdiff.errors import DataError
from invdiff.models.families.base import Condition, to
from invdiff.models.frozen import FrozenDenoiser
from invdiff.models.load import load_pipeline
from invdiff.models.schedule import NoiseSchedule
from invdiff.seeds import generator
from invdiff.training.checkpoint import TrainingRun
from invdiff.training.finetune import fitting_rate, save, train_denoiser
from rivals.keeping import WORK, finish, finished, settings_of

Reader: TypeAlias = Callable[[Tensor, Tensor, Condition], Tensor]
"""What is said of noisy latents (B, C, H, W) at timesteps (B,) under a condition, such as log w^t, (B,)."""


def corrected(
    log_ratio: Reader,
    schedule: NoiseSchedule,
    noisy_latents: Tensor,
    timesteps: Tensor,
    target: Tensor,
    condition: Condition,
) -> tuple[Tensor, Tensor]:
    """The target with the score grad log p(z_t | z_0) + grad log w^t, and log w^t, (B,), both without gradient.

    With z_t = alpha z_0 + sigma e, another score means noise e - sigma grad log w^t and latents
    z_0 + sigma^2 / alpha grad log w^t; targets of every prediction type are linear in both.
    """
    z = noisy_latents.detach().requires_grad_()
    with torch.enable_grad():
        log_weights = log_ratio(z, timesteps, condition)
        (gradient,) = torch.autograd.grad(log_weights.sum(), z)
    alpha, sigma = alpha_sigma(schedule, timesteps)
    shift = schedule.target(sigma**2 / alpha.clamp_min(1e-3) * gradient, -sigma * gradient, timesteps)
    return target + shift, log_weights.detach()


def alpha_sigma(schedule: NoiseSchedule, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """The shares of signal and noise in z_t, (B, 1, 1, 1) each."""
    one, zero = (of(len(timesteps), 1, 1, 1, device=timesteps.device) for of in (torch.ones, torch.zeros))
    return schedule.add_noise(one, zero, timesteps), schedule.add_noise(zero, one, timesteps)


def ratio_loss(
    log_ratio: Reader, schedule: NoiseSchedule, pairs: tuple[Tensor, Tensor], condition: Condition, rng: Any
) -> Tensor:
    """Cross-entropy of d = sigmoid(log w^t) on biased and balanced latents, (B, C, H, W) each, a caption a pair.

    Both of a pair have the same timestep, so that the ratio is that of the latents alone.
    """
    biased, balanced = pairs
    latents = torch.cat([biased, balanced])
    timesteps = torch.randint(schedule.num_train_timesteps, (len(biased),), generator=rng).repeat(2).to(latents.device)
    noise = torch.randn(latents.shape, generator=rng).to(latents.device)
    twice = {name: values.repeat(2, *[1] * (values.ndim - 1)) for name, values in condition.items()}
    logits = log_ratio(schedule.add_noise(latents, noise, timesteps), timesteps, twice)
    labels = torch.cat([torch.zeros(len(biased)), torch.ones(len(balanced))]).to(latents.device)
    return F.binary_cross_entropy_with_logits(logits, labels)


class Discriminator(nn.Module):
    """log w^t = alpha_t h(features), (B,), with h a head of two layers, the logit of d.

    `features` are (B, size). The latents' correction is sigma^2 / alpha grad log w^t, 15 times grad h at the noisiest
    timestep of Stable Diffusion but for the factor alpha, with which the true log w^t vanishes there as well.
    """

    def __init__(self, features: Reader, size: int, schedule: NoiseSchedule, width: int = 256) -> None:
        super().__init__()
        self._features, self._schedule = features, schedule
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.head = nn.Sequential(nn.Linear(size, width), nn.SiLU(), nn.Linear(width, 1))

    def forward(self, noisy_latents: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """Logits of d, (B,)."""
        logits = self.head(self._features(noisy_latents, timesteps, condition))[:, 0]
        return alpha_sigma(self._schedule, timesteps)[0].flatten() * logits


@dataclass(frozen=True)
class TIW:
    """The base fine-tuned by TIW-DSM with the steps and the batch of the biased model."""

    reference: float = 0.05
    """Size of the balanced reference set, as a share of the training images."""
    discriminator_steps: int = 1000
    """Steps of the discriminator, of batches of the same size."""
    learning_rate: float = 1e-3
    """The discriminator's."""
    largest_weight: float = 10.0
    """w^t is clipped to it, which changes no minimiser: any positive function of z_t has the same."""

    @property
    def supervision(self) -> str:
        """A few balanced images; nobody says what is balanced in them."""
        return f"balanced images, {self.reference:.0%} of the training set's number"

    def fit(self, world: World, folder: Path) -> Fitted:
        """Train the discriminator, then the denoiser."""
        pipe: Any = load_pipeline(world.base, dtype=torch.float32)
        settings = settings_of(self, world, pipe)
        figures = finished(folder, settings)
        if figures is not None:
            pipe = load_pipeline(folder)
        else:
            figures = finish(folder, settings, self._train(pipe, world, folder, settings))
        steps, size = world.finetuning.steps, world.finetuning.batch_size
        passes = 6.0 * steps + 2.0 * self.discriminator_steps  # the gradient of log w^t costs as much as a step
        return Fitted(pipe, parameters=int(figures["parameters"]), forwards=passes * size, about=figures)

    def reference_set(self, world: World) -> CaptionedImages:
        """The balanced images that it is given, without labels."""
        size = max(1, round(self.reference * len(world.data)))
        chosen = torch.randperm(len(world.balanced), generator=generator("reference", world.seed))[:size]
        return replace(world.balanced.select(chosen.sort().values), attributes={})

    def _train(self, pipe: Any, world: World, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
        biased = as_encoded(pipe, world.data, world.cache)
        reference = as_encoded(pipe, self.reference_set(world), world.cache)
        schedule, device, size = NoiseSchedule(pipe.scheduler), pipe.unet.device, world.finetuning.batch_size
        conditions = to(biased.conditions, device)
        paired = Pairs(biased, reference)
        config = replace(world.finetuning, seed=world.seed)
        rate = config.learning_rate or fitting_rate(pipe.unet.num_parameters())
        config = replace(config, learning_rate=rate)
        means: list[Tensor] = []

        with FrozenDenoiser(load_pipeline(world.base, dtype=torch.float32)) as frozen:
            channels = frozen.family.shape(frozen.module).feature_channels

            def middle(noisy_latents: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
                _, features = frozen.predict(noisy_latents, timesteps, condition)
                return F.layer_norm(features.mean(dim=(2, 3)), (channels,))

            discriminator = Discriminator(middle, channels, schedule).to(device)

            def ratio_loss_at(step: int) -> Tensor:
                rng = generator("discriminator", world.seed, step)
                latents, captions = paired.draw(size, rng)
                captions[torch.rand(size, generator=rng) < config.caption_dropout] = biased.null_id
                condition = {name: values[captions.to(device)] for name, values in conditions.items()}
                pairs = latents[0].to(device), latents[1].to(device)
                return ratio_loss(discriminator, schedule, pairs, condition, rng)

            def aim(noisy_latents: Tensor, timesteps: Tensor, captions: Tensor, target: Tensor) -> tuple[Any, Any]:
                condition = {name: values[captions.to(device)] for name, values in conditions.items()}
                batch = noisy_latents, timesteps, target, condition
                target, log_weights = corrected(discriminator, schedule, *batch)
                weights = log_weights.exp()
                means.append(weights.mean())
                return target, weights.clamp_max(self.largest_weight)

            of_head = FinetuneConfig(
                steps=self.discriminator_steps, learning_rate=self.learning_rate, ema_decay=0.99, mixed_precision="no"
            )
            TrainingRun(discriminator.head, of_head, folder / WORK / "discriminator", settings).minimise(
                ratio_loss_at, "discriminator"
            )
            discriminator.requires_grad_(False)
            train_denoiser(
                pipe, biased, config, folder / WORK / "denoiser", settings, train_text_encoder=False, aim=aim
            )
        save(pipe, folder, half_precision=False)
        trained = [*pipe.unet.parameters(), *discriminator.head.parameters()]
        # Under the biased distribution the mean of a density ratio is 1.
        mean = torch.stack(means).mean().item() if means else None
        return {
            "parameters": sum(weight.numel() for weight in trained),
            "reference": len(reference),
            "mean ratio": mean,
        }


class Pairs:
    """Draws a biased and a balanced image of the same caption."""

    def __init__(self, biased: EncodedImages, reference: EncodedImages) -> None:
        self._biased, self._reference = biased, reference
        captions = [reference.captions[caption] for caption in reference.caption_ids.tolist()]
        self._rows = [
            torch.tensor([row for row, caption in enumerate(captions) if caption == wanted])
            for wanted in biased.captions
        ]
        missing = [caption for caption, rows in zip(biased.captions, self._rows, strict=True) if not len(rows)]
        if missing:
            raise DataError(
                f"Expected a balanced image of every caption, found none of {missing[0]!r} among {len(captions)}. "
                "Raise `reference`."
            )

    def draw(self, size: int, rng: torch.Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Biased and balanced latents, (size, C, H, W) each, and the captions' numbers, (size,)."""
        rows = torch.randint(len(self._biased), (size,), generator=rng)
        captions, uniforms = self._biased.caption_ids[rows].clone(), torch.rand(size, generator=rng)
        of = zip(captions.tolist(), uniforms.tolist(), strict=True)
        others = torch.stack([self._rows[caption][int(uniform * len(self._rows[caption]))] for caption, uniform in of])
        return (self._biased.latents[rows], self._reference.latents[others]), captions
