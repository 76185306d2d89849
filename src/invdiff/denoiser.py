"""The frozen denoiser as audit and training use it: predictions and inner features, without gradient."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from .diffusion import NoiseSchedule
from .features import FeatureCapture
from .files import fingerprint, weights_digest
from .pipelines import denoiser_of


class Denoiser(Protocol):
    """What predicts: the frozen model alone, or guided by a module."""

    schedule: NoiseSchedule
    device: torch.device
    fingerprint: str

    def __call__(
        self, noisy_latents: torch.Tensor, timesteps: torch.Tensor, prompt_embeds: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return prediction (B, C, H, W) and middle features (B, D, H', W')."""


def denoiser_fingerprint(pipe: Any) -> str:
    """Return 16 hex digits that name a denoiser by all its weights and by the noise it was trained with."""
    return fingerprint(weights_digest(denoiser_of(pipe)), NoiseSchedule(pipe.scheduler).key)


class FrozenDenoiser:
    """A pipeline's denoiser with its middle features; use as a context manager or call `close()`."""

    def __init__(self, pipe: Any, feature_path: str = "mid_block") -> None:
        self.module = denoiser_of(pipe)
        self.schedule = NoiseSchedule(pipe.scheduler)
        self.device = torch.device(pipe._execution_device)
        self.dtype = next(self.module.parameters()).dtype
        self.fingerprint = denoiser_fingerprint(pipe)
        self._features = FeatureCapture(self.module, feature_path)
        self._was_training = self.module.training
        self.module.eval()

    @torch.no_grad()
    def __call__(
        self, noisy_latents: torch.Tensor, timesteps: torch.Tensor, prompt_embeds: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return prediction (B, C, H, W) and middle features (B, D, H', W'), both detached."""
        output = self.module(
            noisy_latents.to(self.device, self.dtype),
            timesteps.to(self.device),
            encoder_hidden_states=prompt_embeds.to(self.device, self.dtype),
            return_dict=False,
        )
        return output[0], self._features.take()

    def close(self) -> None:
        """Stop reading features."""
        self._features.close()
        self.module.train(self._was_training)

    def __enter__(self) -> FrozenDenoiser:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
