"""Put the losses of all timesteps on one scale.

At high noise, where an image's content is decided, a denoiser's loss is tens of times smaller than at low noise,
and so would be what guidance learns there. Losses are therefore taken relative to the frozen model's own mean
loss at their timestep. This also frees lambda of the model's units.
"""

from __future__ import annotations

import numpy as np
import torch

from ..data.encode import EncodedImages
from ..distributed import gather, mine
from ..models.frozen import Denoiser
from ..models.schedule import per_sample_loss
from ..seeds import generator

LEVELS = 16
IMAGES_PER_LEVEL = 64


def typical_losses(
    denoiser: Denoiser, data: EncodedImages, *, images: torch.Tensor | None = None, batch_size: int, seed: int
) -> torch.Tensor:
    """Return the frozen model's mean loss at every timestep, (num_train_timesteps,), on the CPU.

    Measured at `LEVELS` timesteps on a few images each, shared among processes, and interpolated in the logarithm.

    Args:
        denoiser: The frozen model.
        data: Has the images.
        images: (n,) rows of those that training may see; all of them unless given.
        batch_size: Images in each forward.
        seed: Of the images chosen and the noise.
    """
    timesteps = denoiser.schedule.num_train_timesteps
    rows = torch.arange(len(data)) if images is None else images
    known = np.linspace(0, timesteps - 1, LEVELS).round().astype(int).tolist()
    means = dict(
        gather((timestep, _mean_loss(denoiser, data, rows, timestep, batch_size, seed)) for timestep in mine(known))
    )
    logs = np.interp(np.arange(timesteps), known, np.log(np.maximum([means[timestep] for timestep in known], 1e-12)))
    return torch.from_numpy(np.exp(logs)).float()


def _mean_loss(
    denoiser: Denoiser, data: EncodedImages, images: torch.Tensor, timestep: int, batch_size: int, seed: int
) -> float:
    rng = generator("typical losses", seed, timestep)
    rows = images[torch.randint(len(images), (IMAGES_PER_LEVEL,), generator=rng)]
    noise = torch.randn((len(rows), *data.latents.shape[1:]), generator=rng)
    losses = []
    for batch, noises in zip(rows.split(batch_size), noise.split(batch_size), strict=True):
        latents, noises = data.latents[batch].to(denoiser.device), noises.to(denoiser.device)
        timesteps = torch.full((len(batch),), timestep, device=denoiser.device)
        noisy_latents = denoiser.schedule.add_noise(latents, noises, timesteps)
        model_pred, _ = denoiser(noisy_latents, timesteps, data.condition(data.caption_ids[batch]))
        losses.append(per_sample_loss(model_pred, denoiser.schedule.target(latents, noises, timesteps)))
    return torch.cat(losses).mean().item()
