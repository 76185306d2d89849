"""The paper's module with further shifts inside the denoiser, so that the model itself draws what they ask for.

Beside the model, a light network must draw a rare group's pixels alone. Here the output of each residual block of the
middle and of the way up is shifted too, by a narrow block that reads it and the module's condition (time, Phi(y), e).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from methods import Fitted, Guided, World
from torch import nn

from invdiff import TrainConfig
from invdiff.errors import ConfigError, ModelError
from invdiff.guidance.backends import BACKENDS
from invdiff.guidance.base import Rows
from invdiff.guidance.module import GuidanceModule
from invdiff.models.families import DenoiserCall, Family
from invdiff.models.families.base import to
from invdiff.models.frozen import FrozenDenoiser, Hook

NARROW = 64
"""Channels of a block between the two maps that lead from and to the features."""


class InnerShift(nn.Module):
    """A shift of features (rows, channels, height, width) under a condition (rows, condition_dim); zero at first."""

    def __init__(self, channels: int, condition_dim: int) -> None:
        super().__init__()
        self.norm, self.down = nn.GroupNorm(8, channels), nn.Conv2d(channels, NARROW, 1)
        self.modulation, self.mix = nn.Linear(condition_dim, 2 * NARROW), nn.Conv2d(NARROW, NARROW, 3, padding=1)
        self.up = nn.Conv2d(NARROW, channels, 1)
        for parameter in self.up.parameters():
            nn.init.zeros_(parameter)

    def forward(self, features: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """The shift, as large as the features."""
        scale, shift = self.modulation(condition)[:, :, None, None].chunk(2, dim=1)
        hidden = self.down(self.norm(features.to(condition.dtype))) * (1 + scale) + shift
        return self.up(F.silu(self.mix(F.silu(hidden)))).to(features.dtype)


class InnerModule(GuidanceModule):
    """`inner`: dotted path of each residual block that is shifted, to its channels; the rest as `GuidanceModule`."""

    def __init__(self, *, inner: Mapping[str, int] | None = None, **others: Any) -> None:
        super().__init__(**others)
        self.register_to_config(inner=dict(inner or {}))
        dim = 4 * self.config["width"]
        self.shifts = nn.ModuleList(InnerShift(channels, dim) for channels in self.config["inner"].values())
        self._condition: torch.Tensor | None = None
        self._strength: float | torch.Tensor = 1.0

    @staticmethod
    def _get_init_keys(input_class: Any) -> set[str]:  # diffusers reads a signature, which names `inner` alone
        return set(GuidanceModule._get_init_keys(GuidanceModule)) | {"inner"}

    @classmethod
    def fitting(cls, family: Family, denoiser: Any, *, width: int = 0) -> dict[str, Any]:  # type: ignore[override]
        """Also the residual blocks of the middle and of the way up of a UNet."""
        inner = {
            path: block.conv2.out_channels
            for path, block in denoiser.named_modules()
            if path.startswith(("mid_block.", "up_blocks.")) and ".resnets." in path and hasattr(block, "conv2")
        }
        if not inner:
            raise ModelError(f"Expected residual blocks of a UNet, found none in {type(denoiser).__name__}.")
        found = super().fitting(family, denoiser, width=width)
        return found | {"inner": dict(sorted(inner.items()))}  # as JSON keeps them

    def guided(self, frozen: FrozenDenoiser, call: DenoiserCall, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """The shifted prediction, features included, and the middle features; see `Guidance`."""
        latents, timesteps, groups = (
            value.to(frozen.device) for value in (call.noisy_latents, call.timesteps, rows.environments)
        )
        condition, close = to(call.condition, frozen.device, torch.float32), self._shifting(frozen.module)
        try:
            self._condition = self.conditions(timesteps, self.encode(condition), groups)
            self._strength = rows.strength(latents)
            found = frozen.predict(call.noisy_latents, call.timesteps, call.condition)
        finally:
            close()
        model_pred, features = (values.float() for values in found)
        shift = self.forward(latents, timesteps, condition, model_pred, features, groups)
        return model_pred + rows.strength(shift) * shift, features

    def install(self, denoiser: nn.Module, family: Family) -> Callable[[], None]:
        """Hook the denoiser and its blocks; see `Guidance`."""
        closes = super().install(denoiser, family), self._shifting(denoiser)
        self._denoiser = [denoiser]  # in a list, so that it is no part of the module
        return lambda: [close() for close in closes] and None

    def before(self, arguments: dict[str, Any], rows: Rows | None) -> dict[str, Any]:
        """The condition of the shifts, for a call that begins; see `Guidance`."""
        super().before(arguments, rows)
        self._condition = None
        if rows is not None:
            call = self._family.read(self._denoiser[0], dict(arguments))
            self.follow(call.noisy_latents.device)
            condition = to(call.condition, call.noisy_latents.device, self.conv_in.weight.dtype)
            with torch.no_grad():
                groups = rows.environments.to(call.noisy_latents.device)
                self._condition = self.conditions(call.timesteps, self.encode(condition), groups)
            self._strength = rows.strength(call.noisy_latents)
        return {}

    def _shifting(self, denoiser: nn.Module) -> Callable[[], None]:
        def hook(shift: InnerShift) -> Hook:
            def add(layer: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor | None:
                if self._condition is None:
                    return None
                return output + self._strength * shift(output, self._condition)

            return Hook(add)

        handles = [
            denoiser.get_submodule(path).register_forward_hook(hook(shift))
            for path, shift in zip(self.config["inner"], self.shifts, strict=True)
        ]

        def close() -> None:
            self._condition = None
            for handle in handles:
                handle.remove()

        return close


@dataclass(frozen=True)
class GuidedInside(Guided):
    """Our guidance with `InnerModule` in place of the backend `module`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.config.get("backend") != "module":
            raise ConfigError(f"Expected backend 'module', got {self.config.get('backend', 'auto')!r}.")

    def through_the_model(self, config: TrainConfig) -> bool:
        """As far as the shifts are deep, which is counted as the whole."""
        return True

    def fit(self, world: World, folder: Path) -> Fitted:
        """Train it, or read it where it was trained."""
        with patch.dict(BACKENDS, {"module": InnerModule}):
            return super().fit(world, folder)
