"""The frozen denoiser as audit and training use it: predictions and inner features, without gradient."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, Protocol, cast

import torch
from torch import nn

from ..errors import ModelError
from ..files import fingerprint, weights_digest
from .families import Condition, Family, family_that_draws
from .families.base import to
from .load import check_fused, check_plain, denoiser_of
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
    """A pipeline's denoiser with its middle features, inside a `with` block; afterwards it is as it was."""

    def __init__(self, pipe: Any, *, upper: bool = False, distilled_guidance: float = 1.0) -> None:
        """Read the middle features of each forward pass; with `upper`, the last two blocks' too: see `take_upper`."""
        self.family, self.upper = family_that_draws(pipe), upper
        self.family.distilled_guidance = distilled_guidance
        self.module = cast(Any, denoiser_of(pipe))
        check_plain(pipe)
        check_fused(pipe)
        self.schedule, self.device = NoiseSchedule(pipe.scheduler), torch.device(pipe._execution_device)
        self.dtype = self.module.dtype  # that it computes in, whatever its weights are stored in
        blocks = self.family.upper_blocks
        last = [f"{blocks}.{index}" for index in range(len(getattr(self.module, blocks)))][-2:] if upper else []
        paths = (self.family.shape(self.module).feature_path, *last)
        self._features, *self._upper = (FeatureCapture(self.module, self.family, path) for path in paths)
        self._was_training = self.module.training
        self.module.eval()
        self._weights = [weight for weight in self.module.parameters() if weight.requires_grad]
        self.module.requires_grad_(False)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that name the denoiser; see `denoiser_fingerprint`."""
        return fingerprint(weights_digest(self.module), self.schedule.key)

    @torch.no_grad()
    def __call__(
        self, noisy_latents: torch.Tensor, timesteps: torch.Tensor, condition: Condition
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Prediction (B, C, H, W) and middle features (B, D, H', W'), without gradient."""
        return self.predict(noisy_latents, timesteps, condition)

    def predict(
        self, noisy_latents: torch.Tensor, timesteps: torch.Tensor, condition: Condition
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same with the gradient of what hooks add; the denoiser's own weights have none.

        `ModelError` where layerwise casting would take away the weights that the backward pass needs.
        """
        hooks = (getattr(part, "_diffusers_hook", None) for part in self.module.modules())
        if torch.is_grad_enabled() and any(of and of.get_hook("layerwise_casting") for of in hooks):
            raise ModelError(
                "Expected a model without layerwise casting to train adapters or tokens in: gradients go through "
                "it. Found it cast layer by layer; load it without, or train with backend 'module'."
            )
        noisy_latents, condition = noisy_latents.to(self.device, self.dtype), to(condition, self.device, self.dtype)
        model_pred = self.family.predict(self.module, noisy_latents, timesteps.to(self.device), condition)
        return model_pred, self.family.on_grid(self._features.take(), noisy_latents)

    def take_upper(self, noisy_latents: torch.Tensor) -> list[torch.Tensor]:
        """What the last two blocks gave in the forward pass of these latents, (B, channels, height, width) each."""
        return [self.family.on_grid(block.take(), noisy_latents) for block in self._upper]

    def __enter__(self) -> FrozenDenoiser:
        return self

    def __exit__(self, *exception: object) -> None:
        for capture in (self._features, *self._upper):
            capture.close()
        self.module.train(self._was_training)
        for weight in self._weights:
            weight.requires_grad_(True)


class Hook:
    """A forward hook that stays with the module it was registered on: copies and pickles of the module have none."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """Call what was hooked."""
        return self._call(*arguments, **keywords)

    def __reduce__(self) -> tuple[Any, ...]:
        return Hook, (do_nothing,)


def do_nothing(*arguments: Any, **keywords: Any) -> None:
    """Stand in for a hook in copies of its module."""


class FeatureCapture:
    """Record the output of one block of a denoiser, at a dotted path such as "down_blocks.1", at each forward pass."""

    def __init__(self, denoiser: nn.Module, family: Family, path: str) -> None:
        self._value: torch.Tensor | None = None
        self._family, self._path = family, path
        self._handle = denoiser.get_submodule(path).register_forward_hook(Hook(self._record))

    def _record(self, block: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self._value = self._family.hidden_states(output).clone()  # later parts may overwrite it in place

    def take(self) -> torch.Tensor:
        """The activations of the last forward pass, once; `ModelError` where the block did not run since."""
        if self._value is None:
            raise ModelError(
                f"The denoiser ran without its block {self._path!r}, so there are no features to guide with. "
                "A caching or layer-skipping wrapper may bypass it: disable it while the module is attached."
            )
        value, self._value = self._value, None
        return value

    def close(self) -> None:
        """Stop recording."""
        self._handle.remove()
        self._value = None
