"""The frozen denoiser as audit and training use it: predictions and inner features, without gradient."""

from __future__ import annotations

from functools import cached_property
from typing import Any, Protocol

import torch

from ..files import fingerprint, weights_digest
from .families import Condition, family_of
from .families.base import to
from .features import FeatureCapture
from .load import check_plain, denoiser_of
from .schedule import NoiseSchedule


class Denoiser(Protocol):
    """The frozen model alone, or guided by a module."""

    schedule: NoiseSchedule
    device: torch.device

    @property
    def fingerprint(self) -> str:
        """16 hex digits that name it."""

    def __call__(
        self, noisy_latents: torch.Tensor, timesteps: torch.Tensor, condition: Condition
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Prediction (B, C, H, W) and middle features (B, D, H', W') of noisy latents (B, C, H, W)."""


def denoiser_fingerprint(pipe: Any) -> str:
    """16 hex digits that name a denoiser by all its weights and by the noise it was trained with."""
    return fingerprint(weights_digest(denoiser_of(pipe)), NoiseSchedule(pipe.scheduler).key)


class FrozenDenoiser:
    """A pipeline's denoiser with its middle features; use as a context manager or call `close()`."""

    def __init__(self, pipe: Any) -> None:
        self.family = family_of(pipe)
        self.module: Any = denoiser_of(pipe)
        check_plain(pipe)
        self.family.check_plain_input(self.module)
        self.schedule = NoiseSchedule(pipe.scheduler)
        self.device = torch.device(pipe._execution_device)
        self.dtype = next(self.module.parameters()).dtype
        self._features = FeatureCapture(
            self.module,
            self.family.shape(self.module).feature_path,
            lambda output: self.family.hidden_states(output).clone(),
        )
        self._was_training = self.module.training
        self.module.eval()

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that name the denoiser; see `denoiser_fingerprint`."""
        return fingerprint(weights_digest(self.module), self.schedule.key)

    @torch.no_grad()
    def __call__(
        self, noisy_latents: torch.Tensor, timesteps: torch.Tensor, condition: Condition
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Prediction (B, C, H, W) and middle features (B, D, H', W'), without gradient."""
        noisy_latents = noisy_latents.to(self.device, self.dtype)
        model_pred = self.family.predict(
            self.module, noisy_latents, timesteps.to(self.device), to(condition, self.device, self.dtype)
        )
        return model_pred, self.family.on_grid(self._features.take(), noisy_latents)

    def close(self) -> None:
        """Stop reading features."""
        self._features.close()
        self.module.train(self._was_training)

    def __enter__(self) -> FrozenDenoiser:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
