"""Features of a denoiser's blocks, as the audit keeps them and its judge reads them."""

from functools import lru_cache

import torch
import torch.nn.functional as F
from diffusers.utils.torch_utils import randn_tensor

from ..seeds import generator
from .families import Condition
from .frozen import Denoiser, FrozenDenoiser

MOST_MIDDLE, MOST_UPPER = 1536, 1024
"""Numbers that are kept of the middle block, and of each of the last two, at each noise level; more are projected to
as many. With two levels an image takes at most 14 KB."""
GRID = 8  # side to which the grids of the last two blocks are pooled, where they are larger
LARGEST = 6e4  # features are kept in 16 bits, of which this is about the largest


def read_features(
    denoiser: Denoiser, noisy_latents: torch.Tensor, timesteps: torch.Tensor, condition: Condition
) -> list[torch.Tensor]:
    """What is kept of the middle block, (batch, D), and of each of the last two where they are read, (batch, G).

    Of the middle block, the means of the whole and of its left and right half; of the others, their grids.
    """
    middle = denoiser(noisy_latents, timesteps, condition)[1].float()  # (batch, D, height, width)
    half = max(1, middle.shape[3] // 2)
    parts = (middle, middle[..., :half], middle[..., -half:])
    kept = [_kept(torch.cat([part.mean(dim=(2, 3)) for part in parts], dim=1), MOST_MIDDLE)]
    if isinstance(denoiser, FrozenDenoiser) and (blocks := denoiser.take_upper(noisy_latents)):
        pooled = [F.adaptive_avg_pool2d(of.float(), (min(GRID, of.shape[2]), min(GRID, of.shape[3]))) for of in blocks]
        grids = [_kept(block.flatten(1), MOST_UPPER) for block in pooled]
        most = max(grid.shape[1] for grid in grids)
        kept += [F.pad(grid, (0, most - grid.shape[1])) for grid in grids]
    return kept


def _kept(values: torch.Tensor, most: int) -> torch.Tensor:
    """Values (batch, D) as they are kept: at most `most` random projections of them, in 16 bits, on the CPU."""
    if values.shape[1] > most:
        values = values @ _projection(values.shape[1], most).to(values.device)
    return values.where(values.isinf(), values.clamp(-LARGEST, LARGEST)).half().cpu()


@lru_cache(maxsize=4)
def _projection(size: int, to: int) -> torch.Tensor:
    return torch.randn(size, to, generator=generator("projection", size, to)) / to**0.5


def add_noise(
    denoiser: Denoiser, latents: torch.Tensor, log_snr: float, rng: torch.Generator | list[torch.Generator]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noisy latents, timesteps (batch,) and the denoiser's target at a log signal-to-noise ratio.

    Noise is that of one generator, or of one for each image.
    """
    schedule = denoiser.schedule
    noise = randn_tensor(latents.shape, generator=rng).to(denoiser.device)
    timesteps = torch.full((len(latents),), schedule.timestep_at(log_snr), device=denoiser.device)
    latents = latents.to(denoiser.device)
    return schedule.add_noise(latents, noise, timesteps), timesteps, schedule.target(latents, noise, timesteps)
