"""The forward process of a pipeline's scheduler: noisy latents, training targets, per-sample losses."""

import json
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler
from scipy.special import logit

from ..errors import ModelError

FLOW = "flow_prediction"


class NoiseSchedule:
    """The forward process and prediction type that a denoiser was trained with.

    Variance preserving, z_t = sqrt(alpha_bar_t) z_0 + sqrt(1 - alpha_bar_t) e, or the straight path of rectified flow
    (Esser et al. 2024), z_t = (1 - sigma) z_0 + sigma e with sigma = t / num_train_timesteps. `log_snr` is
    log(signal^2 / noise^2) at each timestep, falling, at the ends infinite; "flow_prediction" is the velocity e - z_0.
    """

    def __init__(self, scheduler: Any) -> None:
        """Read the schedule from any diffusers scheduler, by what it was configured with, not how it samples."""
        config = scheduler.config
        self.prediction_type: str = config.get("prediction_type", "epsilon")
        if type(scheduler).__name__.startswith("FlowMatch") or (
            config.get("use_flow_sigmas") and self.prediction_type == FLOW
        ):
            self.prediction_type = FLOW
            self.num_train_timesteps: int = config["num_train_timesteps"]
            self.key = json.dumps({"flow": True, "num_train_timesteps": self.num_train_timesteps})
            self.log_snr = 2 * logit(1 - np.arange(self.num_train_timesteps) / self.num_train_timesteps)
            return
        if not hasattr(scheduler, "alphas_cumprod"):
            raise ModelError(
                "Expected a scheduler with a beta schedule (DDIM, DDPM, Euler, DPM++, ...) or a flow-matching one "
                f"(FlowMatchEuler, ...), got {type(scheduler).__name__}, which is neither."
            )
        if self.prediction_type not in ("epsilon", "v_prediction", "sample"):
            raise ModelError(
                "Expected prediction type epsilon, v_prediction or sample (or flow_prediction with "
                f"use_flow_sigmas), got {self.prediction_type!r} from {type(scheduler).__name__}."
            )
        # Sampling-only options of the pipeline's own scheduler must not leak into training.
        names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
        shared = {name: config[name] for name in names if name in config}
        rescaled = bool(config.get("rescale_betas_zero_snr", False))
        options = shared | {"prediction_type": self.prediction_type, "rescale_betas_zero_snr": rescaled}
        self._process: Any = DDPMScheduler.from_config(options)
        self.num_train_timesteps = self._process.config["num_train_timesteps"]
        self.key = json.dumps(options, sort_keys=True, default=repr)
        # Now, since diffusers moves the betas to the device of the latents that noise is added to.
        self.log_snr = logit(self._process.alphas_cumprod.double().numpy())  # alpha_bar is the signal's share, squared

    def timestep_at(self, log_snr: float) -> int:
        """The timestep of the nearest log signal-to-noise ratio, in every schedule the same noise: Kingma 2021."""
        return int(np.abs(np.nan_to_num(self.log_snr, posinf=1e3, neginf=-1e3) - log_snr).argmin())

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """z_t (B, C, H, W) of latents and noise (B, C, H, W) at integer timesteps (B,)."""
        if self.prediction_type == FLOW:
            sigma = (timesteps.to(latents) / self.num_train_timesteps).reshape(-1, *[1] * (latents.ndim - 1))
            return (1 - sigma) * latents + sigma * noise
        return self._process.add_noise(latents, noise, timesteps)

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The denoiser's training target, (B, C, H, W), in its own prediction type."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return latents
        if self.prediction_type == FLOW:
            return noise - latents
        return self._process.get_velocity(latents, noise, timesteps)


def per_sample_loss(model_pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error over all but the first dimension, in float32, shape (B,)."""
    return (model_pred.float() - target.float()).square().flatten(1).mean(dim=1)
