"""Put the losses of all timesteps on one scale.

At high noise, where an image's content is decided, a denoiser's loss is tens of times smaller than at low noise,
and so would be what guidance learns there. Losses are therefore taken relative to the frozen model's own mean
loss at their timestep. This also frees lambda of the model's units.
"""

from __future__ import annotations

import numpy as np
import torch

from ..data.encode import EncodedImages
from ..denoiser import Denoiser
from ..diffusion import per_sample_loss
from ..seeds import generator

LEVELS = 16
IMAGES_PER_LEVEL = 64


def typical_losses(denoiser: Denoiser, data: EncodedImages, *, seed: int) -> torch.Tensor:
    """Return the frozen model's mean loss at every timestep, (num_train_timesteps,), on the CPU.

    Measured at `LEVELS` timesteps on a few images each, and interpolated in the logarithm.
    """
    schedule = denoiser.schedule
    rng = generator("typical losses", seed)
    known = np.linspace(0, schedule.num_train_timesteps - 1, LEVELS).round().astype(int)
    means = []
    for timestep in known:
        rows = torch.randint(len(data), (IMAGES_PER_LEVEL,), generator=rng)
        latents = data.latents[rows].to(denoiser.device)
        noise = torch.randn(latents.shape, generator=rng).to(denoiser.device)
        timesteps = torch.full((len(rows),), int(timestep), device=denoiser.device)
        noisy_latents = schedule.add_noise(latents, noise, timesteps)
        model_pred, _ = denoiser(noisy_latents, timesteps, data.condition(data.caption_ids[rows]))
        means.append(per_sample_loss(model_pred, schedule.target(latents, noise, timesteps)).mean().item())
    logs = np.interp(np.arange(schedule.num_train_timesteps), known, np.log(np.maximum(means, 1e-12)))
    return torch.from_numpy(np.exp(logs)).float()
