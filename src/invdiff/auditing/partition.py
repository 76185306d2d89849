"""From one score per image to the group indicator matrix W: the max phase of the game.

W (N, E) has its rows on the simplex. Group loss L_e = sum_i W_ie s_i / sum_i W_ie, where s is a per-image
loss, a contrast of losses, or any other evidence of one dimension. Two solvers maximise the dispersion of
{L_e}: `exact_groups`, by dynamic programming, and `gradient_groups`, as in InvDiff (Hou et al., KDD 2025).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from ..errors import AuditError


def group_losses(scores: NDArray[Any], group_weights: NDArray[Any]) -> NDArray[Any]:
    """Group losses L_e = sum_i W_ie s_i / sum_i W_ie, (E,); NaN for a group without images."""
    mass = group_weights.sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return group_weights.T @ scores / mass


def exact_groups(scores: NDArray[Any], num_groups: int, *, min_share: float = 0.0) -> NDArray[Any]:
    """The partition of largest dispersion, as labels (N,) that rise with the score.

    Optimal groups of one-dimensional scores are intervals of the sorted scores, so dynamic programming over
    cut points finds the maximum (Fisher 1958; for two groups this is Otsu's threshold). Divide and conquer on
    the monotone cut points makes it O(E N log N).

    Args:
        scores: (N,).
        num_groups: E, at least 1.
        min_share: Smallest share of the images that a group may have.

    Raises:
        AuditError: Scores are not finite, or there are too few images for that many groups.
    """
    count = len(scores)
    least = max(1, math.ceil(min_share * count))
    if not np.isfinite(scores).all():
        raise AuditError(f"Expected finite scores, got {int((~np.isfinite(scores)).sum())} that are not.")
    if num_groups < 1 or least * num_groups > count:
        raise AuditError(
            f"Expected at least {least * num_groups} images for {num_groups} groups of at least {least}, got {count}. "
            "Ask for fewer groups or a smaller share."
        )
    order = np.argsort(scores, kind="stable")
    ordered = scores[order].astype(np.float64)
    ordered = ordered - ordered.mean()
    sums = np.concatenate([[0.0], np.cumsum(ordered)])

    def gain(start: NDArray[Any], stop: int) -> NDArray[Any]:
        # A group's part of the between-group variance, times N: (sum of its scores)^2 / its size.
        return (sums[stop] - sums[start]) ** 2 / (stop - start)

    # best[j]: largest gain of splitting the first j scores into the groups so far.
    stops = np.arange(count + 1)
    best = np.full(count + 1, -np.inf)
    best[least:] = (sums[least:] - sums[0]) ** 2 / np.maximum(stops[least:], 1)
    cuts = []
    for groups in range(2, num_groups + 1):
        previous, best = best, np.full(count + 1, -np.inf)
        cut = np.zeros(count + 1, dtype=np.int64)
        # Each task: stops low..high - 1, whose best cut lies in first..last.
        tasks = [(groups * least, count + 1, (groups - 1) * least, count - least)]
        while tasks:
            low, high, first, last = tasks.pop()
            if low >= high:
                continue
            stop = (low + high) // 2
            starts = np.arange(first, min(last, stop - least) + 1)
            totals = previous[starts] + gain(starts, stop)
            chosen = int(totals.argmax())
            best[stop], cut[stop] = totals[chosen], starts[chosen]
            tasks.append((low, stop, first, int(starts[chosen])))
            tasks.append((stop + 1, high, int(starts[chosen]), last))
        cuts.append(cut)

    labels = np.empty(count, dtype=np.int64)
    stop = count
    for group in range(num_groups - 1, -1, -1):
        start = int(cuts[group - 1][stop]) if group > 0 else 0
        labels[order[start:stop]] = group
        stop = start
    return labels


def gradient_groups(
    scores: NDArray[Any], num_groups: int, *, omega: float = 0.1, steps: int = 300, seed: int = 0
) -> NDArray[Any]:
    """W (N, E) by gradient ascent on its logits, as in InvDiff; columns rise with L_e.

    Maximises Var_e(L_e) + omega * H(m), with m the groups' shares and H their entropy: without the second
    term the largest dispersion is that of one group with a single image. Scores are standardised first, so
    that omega means the same for any model.

    Args:
        scores: (N,).
        num_groups: E.
        omega: The dispersion degree: the larger, the more equal the groups.
        steps: Steps of Adam.
        seed: Seed of the initial logits.

    Raises:
        AuditError: Scores are not finite or do not vary.
    """
    spread = scores.std()
    if not np.isfinite(spread) or spread == 0:
        raise AuditError("Expected finite scores that vary, got scores that do not. Use more images.")
    standard = torch.from_numpy((scores - scores.mean()) / spread).float()
    start = torch.randn(len(scores), num_groups, generator=torch.Generator().manual_seed(seed))
    logits = (0.1 * start).requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for _ in range(steps):
        weights = logits.softmax(dim=1)
        mass = weights.sum(dim=0)
        losses = weights.T @ standard / mass
        share = mass / len(standard)
        entropy = -(share * share.clamp_min(1e-12).log()).sum()
        objective = losses.var(unbiased=False) + omega * entropy
        optimizer.zero_grad()
        (-objective).backward()
        optimizer.step()
    final = logits.detach().softmax(dim=1).double().numpy()
    return final[:, np.argsort(group_losses(scores, final), kind="stable")]


def align_columns(
    groups: dict[int, tuple[NDArray[Any], NDArray[Any]]], num_groups: int, features: NDArray[Any]
) -> dict[int, NDArray[Any]]:
    """W (n, E) of each prompt with its columns in such order that a column means the same under every prompt.

    Groups are compared by the offset of their mean features from the prompt's own mean. The first prompt's groups are
    ordered from most to least frequent, and the others' follow. A prompt of fewer than E groups has empty columns.

    Args:
        groups: For each prompt its images (n,), indices into `features`, and their W.
        num_groups: E.
        features: (N, D).
    """
    aligned: dict[int, NDArray[Any]] = {}
    reference: NDArray[Any] | None = None
    for prompt, (rows, weights) in groups.items():
        weights = np.pad(weights, ((0, 0), (0, num_groups - weights.shape[1])))
        mass, values = weights.sum(axis=0), features[rows].astype(np.float64)
        means = (weights.T @ values) / np.maximum(mass, 1e-12)[:, None]
        offsets = np.where(mass[:, None] > 0, means - means[mass > 0].mean(axis=0), 0.0)
        offsets = offsets / np.maximum(values.std(axis=0), 1e-12)
        offsets /= np.maximum(np.linalg.norm(offsets, axis=1, keepdims=True), 1e-12)
        if reference is None:
            order = np.argsort(-mass, kind="stable")
            reference = offsets[order]
        else:
            order = linear_sum_assignment(-reference @ offsets.T)[1]
        aligned[prompt] = weights[:, order]
    return aligned


def rarest(mass: NDArray[Any]) -> int:
    """The group of least mass among those that have any; `mass` is (E,)."""
    return int(np.where(mass > 0, mass, np.inf).argmin())
