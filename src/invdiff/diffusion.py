"""The forward process of a pipeline's scheduler: noisy latents, training targets, per-sample losses."""

from __future__ import annotations

import json
from typing import Any

import torch
from diffusers import DDPMScheduler

from .errors import ModelError


class NoiseSchedule:
    """The forward process and prediction type that a denoiser was trained with.

    Attributes:
        prediction_type: `"epsilon"`, `"v_prediction"` or `"sample"`.
        num_train_timesteps: The number of noise levels; timesteps run from 0 to this, exclusive.
        key: What tells this schedule from others.
    """

    def __init__(self, scheduler: Any) -> None:
        """Read the schedule from any diffusers scheduler that has a variance-preserving beta schedule.

        Raises:
            ModelError: The scheduler has none, for example because it is a flow-matching scheduler.
        """
        if not hasattr(scheduler, "alphas_cumprod"):
            raise ModelError(
                "Expected a scheduler with a beta schedule (DDIM, DDPM, Euler, DPM++, ...), "
                f"got {type(scheduler).__name__}, which has none."
            )
        # Sampling-only options of the pipeline's own scheduler must not leak into training.
        names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
        shared = {name: scheduler.config[name] for name in names if name in scheduler.config}
        self.prediction_type: str = scheduler.config.get("prediction_type", "epsilon")
        if self.prediction_type not in ("epsilon", "v_prediction", "sample"):
            raise ModelError(
                "Expected prediction type epsilon, v_prediction or sample, "
                f"got {self.prediction_type!r} from {type(scheduler).__name__}."
            )
        rescaled = bool(scheduler.config.get("rescale_betas_zero_snr", False))
        options = shared | {"prediction_type": self.prediction_type, "rescale_betas_zero_snr": rescaled}
        self._process: Any = DDPMScheduler.from_config(options)
        self.num_train_timesteps: int = self._process.config["num_train_timesteps"]
        self.key = json.dumps(options, sort_keys=True, default=repr)

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Return z_t for latents and noise (B, C, H, W) and integer timesteps (B,)."""
        return self._process.add_noise(latents, noise, timesteps)

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Return what the denoiser should output, (B, C, H, W), in its own prediction type."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return latents
        return self._process.get_velocity(latents, noise, timesteps)


def per_sample_loss(model_pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the mean squared error over all but the first dimension, in float32, shape (B,)."""
    return (model_pred.float() - target.float()).square().flatten(1).mean(dim=1)
