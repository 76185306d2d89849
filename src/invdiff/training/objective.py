"""The min phase of the game: the loss of one training step, and the objective that it descends.

InvDiff (Hou et al., KDD 2025, arXiv 2412.08480) asks that the guided model predict every group equally well, the
environment invariance constraint. It is taken here as the risk-variance penalty of V-REx (Krueger et al., ICML 2021):

    J = mean_e L_e + lambda * Var_e(R_e),    L_e, R_e the means over images i of group e of l_i and R_i

with l_i the denoising loss of the guided model relative to the frozen model's typical loss at the same timestep, and
R_i its excess: less the loss, without gradient, of the null caption under the same guidance, z_t, t and noise. What a
caption contributes must be equal in every group, however hard its images are; docs/method.md compares references.
The penalty alone is zero too where guidance makes the model ignore captions, which only L_e forbids, and lambda is 0
unless asked for: groups are drawn equally often, so the minimiser of mean_e L_e is the balanced score already.
Symbols: z_t noisy latents, y caption, e group (environment), f frozen denoiser, g_psi the guidance module.
"""

from __future__ import annotations

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from ..data.encode import EncodedImages
from ..distributed import mine
from ..models.families import Condition
from ..models.frozen import Denoiser
from ..models.schedule import per_sample_loss
from ..seeds import generator
from .batches import Batch

LEVELS = 16  # timesteps at which the typical loss is measured
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

    `guidance` is called as a `Guided`. The gradient is that of `invariant_objective` at the moving means before this
    batch, whose own losses would bias it; they are updated afterwards. `typical` is `typical_losses`,
    (num_train_timesteps,), on the device.
    """
    # Each image counts in L_e and R_e of the factor and group that it was drawn for, under its prompt.
    cells = batch.factors * (len(moving.totals) // batch.environments.shape[1]) + batch.prompts
    groups = batch.environments.gather(1, batch.factors[:, None])[:, 0]

    def losses_under(condition: Condition) -> torch.Tensor:
        with accelerator.autocast():
            # f~(z_t, t, y, e); training is at full strength, Delta = 1.
            model_pred = guidance(batch.noisy_latents, batch.timesteps, condition, batch.rows)
        # l_i = mean of (target - f~)^2, relative to the typical loss at its timestep.
        return per_sample_loss(model_pred, batch.target) / typical[batch.timesteps]

    losses = losses_under(batch.condition)
    excess = torch.zeros_like(losses)
    if penalty > 0:
        with torch.no_grad():
            excess = losses.detach() - losses_under(batch.null_condition)
    # Those of all processes.
    found = accelerator.gather(torch.stack([losses.detach(), excess], dim=1)).cpu()
    # grad J = mean_i w_e(i) grad l_i, each group drawn equally often; where the caption is null, R_i = 0. What is held
    # to the frozen model has weight 1, and counts in no L_e.
    weights = objective_weights(moving.means()[..., 1], penalty)[cells, groups].where(batch.captioned, 1.0)
    counted = ~batch.preserved
    moving.update(cells[counted], groups[counted], found[counted])
    return (weights[batch.part].to(losses.device) * losses).mean(), found[:, 0]


def invariant_objective(group_losses: torch.Tensor, excess_losses: torch.Tensor, penalty: float) -> torch.Tensor:
    """J = mean_e L_e + lambda * Var_e(R_e), averaged over prompts; L and R are (E,) or (prompts, E)."""
    return (group_losses.mean(dim=-1) + penalty * excess_losses.var(dim=-1, unbiased=False)).mean()


def objective_weights(excess_losses: torch.Tensor, penalty: float) -> torch.Tensor:
    """The weight of each group's images, w_e = E * dJ / dL_e = 1 + 2 lambda (R_e - mean_e R_e).

    Both are (..., E). A weight is never below zero: to unlearn a group is not intended.
    """
    deviation = excess_losses - excess_losses.mean(dim=-1, keepdim=True)
    return (1 + 2 * penalty * deviation).clamp_min(0)


class MovingGroupLosses(nn.Module):
    """L_e and R_e as exponential moving means for each group of each cell, corrected for their short memory.

    A cell is a factor under a prompt. Columns that a factor of fewer groups lacks take the mean, and weigh nothing.
    Moving, since a small group has few images or none in one batch, and the variance over groups would be noise.
    """

    totals: torch.Tensor
    counts: torch.Tensor

    def __init__(self, shape: tuple[int, int], momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("totals", torch.zeros(*shape, 2))
        self.register_buffer("counts", torch.zeros(*shape, 1))

    def update(self, cells: torch.Tensor, groups: torch.Tensor, losses: torch.Tensor) -> None:
        """Add a batch: cells and groups, integers (batch,), and l_i and R_i, (batch, 2), all on the CPU."""
        seen = torch.zeros(self.counts.shape[:2], dtype=torch.bool).index_put_((cells, groups), torch.tensor(True))
        for kept, added in ((self.totals, losses.float()), (self.counts, torch.ones(len(losses), 1))):
            sums = torch.zeros_like(kept).index_put_((cells, groups), added, accumulate=True)
            kept[seen] = self.momentum * kept[seen] + sums[seen]

    def means(self) -> torch.Tensor:
        """L_e and R_e, (cells, E, 2); a group not seen yet takes the mean of the seen ones of its cell."""
        means = self.totals / self.counts.clamp_min(1e-12)
        seen = self.counts > 0
        fallback = (means * seen).sum(1, keepdim=True) / seen.sum(1, keepdim=True).clamp_min(1)
        return torch.where(seen, means, fallback)


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
    means = dict(gather_object([(timestep, mean_loss(timestep)) for timestep in mine(known)]))
    logs = np.interp(np.arange(timesteps), known, np.log(np.maximum([means[timestep] for timestep in known], 1e-12)))
    return torch.from_numpy(np.exp(logs)).float()
