"""The min phase of the game: the loss of one training step, and the objective that it descends.

InvDiff (Hou et al., KDD 2025, arXiv 2412.08480) asks that the guided model predict every group equally well, the
environment invariance constraint. It is taken here as the risk-variance penalty of V-REx (Krueger et al., ICML 2021):

    J = mean_e L_e + lambda * Var_e(L_e),    L_e the mean over images i of group e of l_i

with l_i the denoising loss of the guided model relative to the frozen model's typical loss at the same timestep.
Symbols: z_t noisy latents, y caption, e group (environment), f frozen denoiser, g_psi the guidance module.
"""

from __future__ import annotations

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from ..data.encode import EncodedImages
from ..distributed import gather, mine
from ..models.frozen import Denoiser
from ..models.schedule import per_sample_loss
from ..seeds import generator
from .batches import Batch

LEVELS = 16
"""Timesteps at which the typical loss is measured."""
IMAGES_PER_LEVEL = 64


def step_loss(
    guidance: nn.Module,
    batch: Batch,
    typical: torch.Tensor,
    moving: MovingGroupLosses,
    penalty: float,
    accelerator: Accelerator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of one step, a scalar, and l_i of every image of the whole batch, (batch,), without gradient.

    `guidance` is called as a `Guided`. The gradient is that of `invariant_objective` at the moving group losses, which
    are updated with this batch. `typical` is `typical_losses`, (num_train_timesteps,), on the device.
    """
    # Each image counts in L_e of the factor and group that it was drawn for, under its prompt.
    cells = batch.factors * (len(moving.totals) // batch.environments.shape[1]) + batch.prompts
    groups = batch.environments.gather(1, batch.factors[:, None])[:, 0]
    with accelerator.autocast():
        # f~(z_t, t, y, e); training is at full strength, Delta = 1.
        model_pred = guidance(batch.noisy_latents, batch.timesteps, batch.condition, batch.rows)
    # l_i = mean of (target - f~)^2, relative to the typical loss at its timestep.
    losses = per_sample_loss(model_pred.float(), batch.target) / typical[batch.timesteps]
    # L_e, over the images of all processes.
    all_losses = accelerator.gather(losses.detach())
    moving.update(cells, groups, all_losses.cpu())
    # grad J = mean_i w_e(i) grad l_i, each group drawn equally often, with w_e = E dJ / dL_e.
    weights = objective_weights(moving.means(), penalty)[cells, groups]
    return (weights[batch.part].to(losses.device) * losses).mean(), all_losses


def invariant_objective(group_losses: torch.Tensor, penalty: float) -> torch.Tensor:
    """J = mean_e L_e + lambda * Var_e(L_e), averaged over prompts; L_e is (E,) or (prompts, E), lambda the penalty."""
    return (group_losses.mean(dim=-1) + penalty * group_losses.var(dim=-1, unbiased=False)).mean()


def objective_weights(group_losses: torch.Tensor, penalty: float) -> torch.Tensor:
    """The weight of each group's images, w_e = E * dJ / dL_e = 1 + 2 lambda (L_e - mean_e L_e).

    Both are (..., E). A weight is never below zero: to unlearn a group is not intended.
    """
    deviation = group_losses - group_losses.mean(dim=-1, keepdim=True)
    return (1 + 2 * penalty * deviation).clamp_min(0)


class MovingGroupLosses(nn.Module):
    """L_e as exponential moving means for each group of each cell, (cells, E), corrected for their short memory.

    A cell is a factor under a prompt. Columns that a factor of fewer groups lacks take the mean, and weigh nothing.

    Moving, since a small group has few images or none in one batch, and the variance over groups would be noise.
    """

    totals: torch.Tensor
    counts: torch.Tensor

    def __init__(self, shape: tuple[int, int], momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("totals", torch.zeros(shape))
        self.register_buffer("counts", torch.zeros(shape))

    def update(self, cells: torch.Tensor, groups: torch.Tensor, losses: torch.Tensor) -> None:
        """Add a batch: cells and groups, integers (batch,), and losses (batch,), all on the CPU."""
        places = cells, groups
        sums = torch.zeros_like(self.totals).index_put_(places, losses.float(), accumulate=True)
        counts = torch.zeros_like(self.counts).index_put_(places, torch.ones(len(losses)), accumulate=True)
        seen = counts > 0
        self.totals[seen] = self.momentum * self.totals[seen] + sums[seen]
        self.counts[seen] = self.momentum * self.counts[seen] + counts[seen]

    def means(self) -> torch.Tensor:
        """L_e, (cells, E); a group not seen yet takes the mean of the seen ones of its cell."""
        means = self.totals / self.counts.clamp_min(1e-12)
        seen = (self.counts > 0).float()
        fallback = (means * seen).sum(1, keepdim=True) / seen.sum(1, keepdim=True).clamp_min(1)
        return torch.where(self.counts > 0, means, fallback)


def typical_losses(
    denoiser: Denoiser, data: EncodedImages, images: torch.Tensor, *, batch_size: int, seed: int
) -> torch.Tensor:
    """The frozen model's mean loss at every timestep, (num_train_timesteps,), float32 on the CPU.

    It puts the losses of all timesteps on one scale: at high noise a loss is tens of times smaller than at low noise.
    Measured at `LEVELS` timesteps on a few of the `images`, (n,) rows of `data`, and interpolated in the logarithm.
    """
    schedule, device = denoiser.schedule, denoiser.device

    def mean_loss(timestep: int) -> float:
        rng = generator("typical losses", seed, timestep)
        rows = images[torch.randint(len(images), (IMAGES_PER_LEVEL,), generator=rng)]
        noise = torch.randn((len(rows), *data.latents.shape[1:]), generator=rng)
        losses = []
        for batch, noises in zip(rows.split(batch_size), noise.split(batch_size), strict=True):
            latents, noises = data.latents[batch].to(device), noises.to(device)
            timesteps = torch.full((len(batch),), timestep, device=device)
            noisy_latents = schedule.add_noise(latents, noises, timesteps)
            model_pred, _ = denoiser(noisy_latents, timesteps, data.condition(data.caption_ids[batch]))
            losses.append(per_sample_loss(model_pred, schedule.target(latents, noises, timesteps)))
        return torch.cat(losses).mean().item()

    timesteps = schedule.num_train_timesteps
    known = np.linspace(0, timesteps - 1, LEVELS).round().astype(int).tolist()
    means = dict(gather((timestep, mean_loss(timestep)) for timestep in mine(known)))
    logs = np.interp(np.arange(timesteps), known, np.log(np.maximum([means[timestep] for timestep in known], 1e-12)))
    return torch.from_numpy(np.exp(logs)).float()
