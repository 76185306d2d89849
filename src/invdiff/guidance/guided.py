"""A denoiser with its guidance, as one that can be audited again."""

from __future__ import annotations

import torch

from ..files import fingerprint
from ..models.families import Condition
from ..models.families.base import to
from ..models.frozen import FrozenDenoiser
from .environments import EnvironmentMix
from .module import GuidanceModule


class GuidedDenoiser:
    """f~ = f + g_psi, with environments drawn uniformly: what later rounds of the max-min game measure."""

    def __init__(self, frozen: FrozenDenoiser, module: GuidanceModule) -> None:
        self.schedule = frozen.schedule
        self.device = frozen.device
        self._frozen = frozen
        self._module = module.to(frozen.device)
        self._mix = EnvironmentMix("uniform", module.num_groups)
        weights = (value.cpu().contiguous().numpy().tobytes() for value in module.state_dict().values())
        self.fingerprint = fingerprint(frozen.fingerprint, *weights)

    @torch.no_grad()
    def __call__(
        self, noisy_latents: torch.Tensor, timesteps: torch.Tensor, condition: Condition
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return guided prediction (B, C, H, W) and the frozen middle features (B, D, H', W')."""
        model_pred, features = self._frozen(noisy_latents, timesteps, condition)
        shift = self._module(
            noisy_latents.to(self.device),
            timesteps.to(self.device),
            to(condition, self.device, torch.float32),
            model_pred.float(),
            features.float(),
            self._mix.rows(noisy_latents).to(self.device),
        )
        return model_pred + shift.to(model_pred.dtype), features
