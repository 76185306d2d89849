"""The min phase of the game: mean group loss plus lambda times the variance of group losses.

The environment invariance constraint of InvDiff (Hou et al., KDD 2025), as the risk-variance penalty of
V-REx (Krueger et al., ICML 2021). Group losses are moving means over many batches: within one batch a small
group has few images or none, and its variance would be noise.
"""

from __future__ import annotations

import torch


def invariant_objective(group_losses: torch.Tensor, penalty: float) -> torch.Tensor:
    """Return mean_e L_e + lambda * Var_e(L_e), averaged over prompts.

    Args:
        group_losses: L_e, (E,) or (prompts, E).
        penalty: lambda.
    """
    return (group_losses.mean(dim=-1) + penalty * group_losses.var(dim=-1, unbiased=False)).mean()


def objective_weights(group_losses: torch.Tensor, penalty: float) -> torch.Tensor:
    """Return E * d(objective)/d(L_e) = 1 + 2 lambda (L_e - mean L), the weight of each group's samples.

    Weighting the samples' losses by it, with each group drawn equally often, gives the gradient of
    `invariant_objective` at the moving means. It never falls below zero: unlearning a group is no aim.

    Args:
        group_losses: (..., E).
        penalty: lambda.

    Returns:
        The same shape, averaging 1 over groups where none is clipped.
    """
    deviation = group_losses - group_losses.mean(dim=-1, keepdim=True)
    return (1 + 2 * penalty * deviation).clamp_min(0)


class MovingGroupLosses:
    """Exponential moving means of the loss of each group of each prompt, corrected for their short memory.

    Args:
        shape: (prompts, E).
        momentum: Decay per update of a group.
    """

    def __init__(self, shape: tuple[int, int], momentum: float) -> None:
        self.momentum = momentum
        self.totals = torch.zeros(shape)
        self.counts = torch.zeros(shape)

    def update(self, prompts: torch.Tensor, groups: torch.Tensor, losses: torch.Tensor) -> None:
        """Fold in a batch: prompts and groups (B,) integers, losses (B,), all on the CPU."""
        cells = prompts * self.totals.shape[1] + groups
        sums = torch.zeros(self.totals.numel()).index_add_(0, cells, losses.float())
        counts = torch.zeros(self.totals.numel()).index_add_(0, cells, torch.ones(len(losses)))
        seen = (counts > 0).view_as(self.totals)
        self.totals[seen] = self.momentum * self.totals[seen] + sums.view_as(self.totals)[seen]
        self.counts[seen] = self.momentum * self.counts[seen] + counts.view_as(self.totals)[seen]

    def means(self) -> torch.Tensor:
        """Return L_e, (prompts, E); a group not seen yet takes the mean of the seen ones of its prompt."""
        means = self.totals / self.counts.clamp_min(1e-12)
        seen = (self.counts > 0).float()
        fallback = (means * seen).sum(1, keepdim=True) / seen.sum(1, keepdim=True).clamp_min(1)
        return torch.where(self.counts > 0, means, fallback)

    def state(self) -> dict[str, list[list[float]]]:
        """Return the running sums as JSON types."""
        return {"totals": self.totals.tolist(), "counts": self.counts.tolist()}

    def load(self, state: dict[str, list[list[float]]]) -> None:
        """Put back what `state` returned."""
        self.totals, self.counts = torch.tensor(state["totals"]), torch.tensor(state["counts"])
