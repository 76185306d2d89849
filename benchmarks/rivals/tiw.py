"""TIW-DSM (Kim et al., "Training unbiased diffusion models from biased dataset", ICLR 2024).

A time-dependent discriminator d(z_t, t, y) tells a small balanced reference set from the biased images; the density
ratio is w^t = d / (1 - d). The denoiser is then fitted to the biased images alone by weighted denoising score matching
with a corrected score,

    E_{z_0 biased, e, t} w^t(z_t, y) || s_theta(z_t, t, y) - grad log p(z_t | z_0) - grad log w^t(z_t, y) ||^2,

whose minimiser is the score of the balanced distribution: weighting alone cannot move it, since w^t depends on z_t
only. The released code subtracts the correction, takes the gradient of d in place of log w^t, and multiplies losses
(B, C, H, W) by weights (B, 1, 1, 1, 1, 1, 1), so that every image is weighted by the batch's mean weight. Here all
three follow the paper. The discriminator is taught by pairs of one caption, so that w^t is conditional on it; as often
as the denoiser, it sees none. With `mixture`, as in the released code, the denoiser is shown both sets, equally often,
and the ratio is to their mixture, 2 d. The paper's discriminator is a head on frozen features of a pretrained
classifier. On those of our base's middle block a head parts nothing within 150 steps, and its gradient, 1.7 times as
large as the target, is noise; a small convolutional network on z_t is used in their place.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from methods import Fitted, World, tuning_of
from torch import Tensor, nn

from invdiff import FinetuneConfig
from invdiff.data.captioned import CaptionedImages
from invdiff.data.encode import EncodedImages, ShardedTensor, as_encoded
from invdiff.errors import DataError
from invdiff.models.families.base import Condition, to
from invdiff.models.load import load_pipeline
from invdiff.models.schedule import NoiseSchedule
from invdiff.seeds import generator
from invdiff.training.checkpoint import TrainingRun
from invdiff.training.finetune import fitting_rate, save, train_denoiser
from rivals.keeping import WORK, fitted_once, settings_of

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


def of_mixture(log_ratio: Reader) -> Reader:
    """The log of the ratio of the balanced density to the even mixture of both: log 2 d, of d = sigmoid(log w^t)."""
    return lambda *given: F.logsigmoid(log_ratio(*given)) + math.log(2)


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
    """log w^t = alpha_t h(z_t, t, y), (B,): three convolutions, modulated by the timestep and the caption.

    The latents' correction is sigma^2 / alpha grad log w^t, 15 times grad h at the noisiest timestep of Stable
    Diffusion but for the factor alpha, with which the true log w^t vanishes there as well.
    """

    def __init__(
        self, channels: int, prompt_dim: int, schedule: NoiseSchedule, *, width: int = 24, dropout: float = 0.5
    ) -> None:
        super().__init__()
        self._schedule = schedule
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first = nn.Conv2d(channels, width, 3, padding=1)
            self.second = nn.Conv2d(width, width, 3, padding=1, stride=2)
            self.third = nn.Conv2d(width, width, 3, padding=1)
            self.modulation = nn.Linear(prompt_dim + 8, 2 * width)
            self.out, self.dropout = nn.Linear(width, 1), nn.Dropout(dropout)

    def forward(self, noisy_latents: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """Logits of d, (B,)."""
        angles = math.pi * timesteps[:, None] / self._schedule.num_train_timesteps * timesteps.new_tensor([1, 2, 4, 8])
        known = [angles.sin(), angles.cos()]
        if "prompt_embeds" in condition:
            embeds = condition["prompt_embeds"].mean(dim=1)
            known.append(F.layer_norm(embeds, embeds.shape[1:]))
        gain, shift = self.modulation(torch.cat(known, dim=1))[:, :, None, None].chunk(2, dim=1)
        hidden = F.silu(self.second(F.silu(self.first(noisy_latents))) * (1 + gain) + shift)
        hidden = F.silu(self.third(self.dropout(hidden))).mean(dim=(2, 3))
        return alpha_sigma(self._schedule, timesteps)[0].flatten() * self.out(self.dropout(hidden))[:, 0]


@dataclass(frozen=True)
class TIW:
    """The base fine-tuned by TIW-DSM with the steps and the batch of the biased model."""

    reference: float = 0.05
    """Size of the balanced reference set, as a share of the training images."""
    discriminator_steps: int = 400
    """Steps of the discriminator, of as many pairs as the denoiser's batch has images."""
    learning_rate: float = 3e-3
    weight_decay: float = 3.0
    """The discriminator's: with less, or after more steps, it remembers 150 images, and w^t of others is 0."""
    largest_weight: float = 10.0
    """w^t is clipped to it, which changes no minimiser: any positive function of z_t has the same."""
    mixture: bool = False
    """Whether the denoiser is fitted to reference images as often as to biased ones, not to the latter alone."""
    weighted: bool = True
    """Whether losses have the ratio's weights and correction; without, `mixture` is the control of what they do."""

    @property
    def supervision(self) -> str:
        """A few balanced images; nobody says what is balanced in them."""
        return f"balanced images, {self.reference:.0%} of the training set's number"

    def fit(self, world: World, folder: Path) -> Fitted:
        """Train the discriminator, then the denoiser."""
        pipe: Any = load_pipeline(world.base, dtype=torch.float32)
        settings = settings_of(self, world, pipe)
        figures = fitted_once(folder, settings, lambda: self._train(pipe, world, folder, settings))
        pipe, images = load_pipeline(folder), tuning_of(world).steps * tuning_of(world).batch_size
        # The discriminator costs next to nothing: 0.02 million weights.
        return Fitted(pipe, parameters=int(figures["parameters"]), forwards=3.0 * images, about=figures)

    def reference_set(self, world: World) -> CaptionedImages:
        """The balanced images that it is given, without labels."""
        size = max(1, round(self.reference * len(world.data)))
        chosen = torch.randperm(len(world.balanced), generator=generator("reference", world.seed))[:size]
        return replace(world.balanced.select(chosen.sort().values), attributes={})

    def _train(self, pipe: Any, world: World, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
        biased = as_encoded(pipe, world.data, world.cache)
        reference = as_encoded(pipe, self.reference_set(world), world.cache)
        tuning, schedule, device = tuning_of(world), NoiseSchedule(pipe.scheduler), pipe.unet.device
        conditions = to(biased.conditions, device)
        paired = Pairs(biased, reference)
        rate = tuning.learning_rate or fitting_rate(pipe.unet.num_parameters())
        config = replace(tuning, learning_rate=rate)
        means: list[Tensor] = []
        sizes = pipe.unet.config.in_channels, pipe.unet.config.cross_attention_dim
        discriminator = Discriminator(*sizes, schedule).to(device)
        log_ratio = of_mixture(discriminator) if self.mixture else discriminator
        shown, chances = paired.mixture() if self.mixture else (biased, None)

        def condition_of(captions: Tensor) -> Condition:
            return {name: values[captions.to(device)] for name, values in conditions.items()}

        def ratio_loss_at(step: int) -> Tensor:
            rng = generator("discriminator", world.seed, step)
            latents, captions = paired.draw(config.batch_size, rng)
            captions[torch.rand(len(captions), generator=rng) < config.caption_dropout] = biased.null_id
            pairs = latents[0].to(device), latents[1].to(device)
            return ratio_loss(discriminator, schedule, pairs, condition_of(captions), rng)

        def aim(noisy_latents: Tensor, timesteps: Tensor, captions: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
            batch = noisy_latents, timesteps, target, condition_of(captions)
            target, log_weights = corrected(log_ratio, schedule, *batch)
            means.append(log_weights.exp().mean())
            return target, log_weights.exp().clamp_max(self.largest_weight)

        options: dict[str, Any] = {"weight_decay": self.weight_decay, "ema_decay": 0.9, "mixed_precision": "no"}
        of_ratio = FinetuneConfig(steps=self.discriminator_steps, learning_rate=self.learning_rate, **options)
        if self.weighted:
            run = TrainingRun(discriminator, of_ratio, folder / WORK / "discriminator", settings)
            run.minimise(ratio_loss_at, "discriminator")
        discriminator.eval().requires_grad_(False)
        work, options = folder / WORK / "denoiser", {"chances": chances, "aim": aim if self.weighted else None}
        train_denoiser(pipe, shown, config, work, settings, train_text_encoder=False, **options)
        save(pipe, folder, half_precision=False)
        trained = [*pipe.unet.parameters(), *(discriminator.parameters() if self.weighted else [])]
        # Under the distribution of what is shown the mean of a density ratio is 1.
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
        rows: dict[str, list[int]] = {caption: [] for caption in biased.captions}
        for row, caption in enumerate(reference.caption_ids.tolist()):
            rows.get(reference.captions[caption], []).append(row)
        for caption, of in rows.items():
            if not of:
                raise DataError(
                    f"Expected a balanced image of every caption, found none of {caption!r}. Raise `reference`."
                )
        self._rows = list(rows.values())

    def draw(self, size: int, rng: torch.Generator) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Biased and balanced latents, (size, C, H, W) each, and the captions' numbers, (size,)."""
        rows = torch.randint(len(self._biased), (size,), generator=rng)
        captions, uniforms = self._biased.caption_ids[rows].clone(), torch.rand(size, generator=rng)
        pairs = zip((self._rows[caption] for caption in captions.tolist()), uniforms.tolist(), strict=True)
        others = [of[int(uniform * len(of))] for of, uniform in pairs]
        return (self._biased.latents[rows], self._reference.latents[others]), captions

    def mixture(self) -> tuple[EncodedImages, Tensor]:
        """Both sets as one, and chances (N,) by which half of what is drawn is balanced, captions as in the other."""
        biased, rows = self._biased, torch.tensor([row for of in self._rows for row in of])
        captions = torch.arange(len(self._rows)).repeat_interleave(torch.tensor([len(of) for of in self._rows]))
        share = torch.bincount(biased.caption_ids) / len(biased)
        both = replace(
            biased,
            latents=ShardedTensor([biased.latents[:], self._reference.latents[rows]]),
            caption_ids=torch.cat([biased.caption_ids, captions]),
            names=[*biased.names, *(self._reference.names[row] for row in rows.tolist())],
        )
        even = torch.full((len(biased),), 1 / len(biased))
        return both, torch.cat([even, (share / torch.bincount(captions))[captions]])
