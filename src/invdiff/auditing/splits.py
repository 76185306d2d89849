"""The max phase of the game: from one score per image to W, and which split of a prompt's images is believed.

W (N, E) has its rows on the simplex. With the group losses L_e = sum_i W_ie s_i / sum_i W_ie, where s is a per-image
loss, a contrast of losses, or any other evidence of one dimension, two solvers maximise the dispersion of {L_e}:
`exact_groups`, by dynamic programming, and `gradient_groups`, as in InvDiff (Hou et al., KDD 2025).

Labels are never read. A split of a prompt's images is believed if it is *separated* (a gap in the scores), *stable*
(independent noises find the same images) and *unbalanced* (an even split is a style, such as facing left or right);
the one of the largest stability times separation decides. Where none passes, nothing is found.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score

from ..config import AuditConfig
from ..errors import AuditError
from .evidence import Score
from .result import Candidate


def exact_groups(scores: NDArray[Any], num_groups: int, *, min_share: float = 0.0) -> NDArray[Any]:
    """The partition of scores (N,) of largest dispersion, as labels (N,) that rise with the score.

    Optimal groups are intervals of the sorted scores (Fisher 1958), found by dynamic programming with divide and
    conquer over cut points, O(E N log N). No group has less than `min_share` of the images.
    """
    count = len(scores)
    least = max(1, math.ceil(min_share * count))
    if least * num_groups > count:
        raise AuditError(
            f"Expected at least {least * num_groups} images for {num_groups} groups of at least {least}, got {count}. "
            "Ask for fewer groups or a smaller share."
        )
    order = np.argsort(scores, kind="stable")
    ordered = scores[order].astype(np.float64)
    sums = np.concatenate([[0.0], np.cumsum(ordered - ordered.mean())])
    # best[j]: largest gain of splitting the first j scores into the groups so far. A group's gain is its part of the
    # between-group variance, times N: (sum of its scores)^2 / its size.
    best = np.where(np.arange(count + 1) == 0, 0.0, -np.inf)
    cuts = np.zeros((num_groups, count + 1), dtype=np.int64)
    for group, cut in enumerate(cuts):
        previous, best = best, np.full(count + 1, -np.inf)
        # Each task: stops low..high - 1, whose best cut lies in first..last.
        tasks = [((group + 1) * least, count + 1, group * least, count - least)]
        while tasks:
            low, high, first, last = tasks.pop()
            if low >= high:
                continue
            stop = (low + high) // 2
            starts = np.arange(first, min(last, stop - least) + 1)
            totals = previous[starts] + (sums[stop] - sums[starts]) ** 2 / (stop - starts)
            chosen = int(totals.argmax())
            best[stop], cut[stop] = totals[chosen], starts[chosen]
            tasks += [(low, stop, first, int(starts[chosen])), (stop + 1, high, int(starts[chosen]), last)]
    labels, stop = np.empty(count, dtype=np.int64), count
    for group in reversed(range(num_groups)):
        start = cuts[group, stop]
        labels[order[start:stop]] = group
        stop = start
    return labels


def gradient_groups(
    scores: NDArray[Any], num_groups: int, *, omega: float = 0.1, steps: int = 300, seed: int = 0
) -> NDArray[Any]:
    """W (N, E) of scores (N,) by gradient ascent on its logits, as in InvDiff; columns rise with L_e.

    Maximises Var_e(L_e) + omega * H(m) of standardised scores, with m the groups' shares and H their entropy.
    """
    standard = torch.from_numpy((scores - scores.mean()) / scores.std()).float()
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
    return final[:, np.argsort(final.T @ scores / final.sum(axis=0), kind="stable")]


@dataclass(frozen=True)
class Split:
    """A candidate and its groups."""

    candidate: Candidate
    weights: NDArray[Any]
    """W of the prompt's images, (n, E), columns rising with the score."""
    score: Score

    @property
    def merit(self) -> float:
        """Splits are ranked by it."""
        return self.candidate.agreement * self.candidate.separation


def split(score: Score, num_groups: int, config: AuditConfig) -> Split:
    """Cut a score into the groups of largest dispersion, and judge the cut."""

    def cut(values: NDArray[Any]) -> NDArray[Any]:
        if config.solver == "gradient":
            return gradient_groups(values, num_groups, omega=config.omega, seed=config.seed)
        return np.eye(num_groups)[exact_groups(values, num_groups, min_share=config.min_share)]

    mean = score.mean
    weights = cut(mean)
    shares = weights.mean(axis=0)
    stability = 0.0
    if len(score.draws) >= 2:
        first, second = (cut(score.draws[half::2].mean(axis=0)).argmax(axis=1) for half in (0, 1))
        stability = float(adjusted_rand_score(first, second))
    depth = separation(mean, weights.argmax(axis=1))
    rounded, refusal = [round(float(share), 4) for share in shares], ""
    if shares.min() * num_groups / 2 > config.max_balance:
        refusal = f"is balanced ({', '.join(f'{share:.0%}' for share in shares)}): a style, not a spurious attribute"
    for fault, name, found, least in (
        ("changes with the noise", "agreement", stability, config.min_stability),
        ("cuts through one hump", "separation", depth, config.min_separation),
    ):
        if found < least:
            refusal = f"{fault} ({name} {found:.2f}, at least {least:g} is needed)"
    figures = (round(stability, 4), round(depth, 4), 0.0, 0.0)
    candidate = Candidate(score.evidence, num_groups, rounded, *figures, refusal)
    return Split(candidate, weights, score)


def ranked_splits(scores: list[Score], config: AuditConfig) -> list[Split]:
    """The splits of one prompt's images by each score, into each number of groups; of solver `auto` best first."""
    if config.solver != "auto":
        return [split(score, config.num_groups or 2, config) for score in scores]
    sizes = [config.num_groups] if config.num_groups else range(2, config.max_groups + 1)
    splits = [split(score, size, config) for score in scores for size in sizes]
    return sorted(splits, key=lambda one: (-one.candidate.accepted, -one.merit))


def deciding_splits(ranked: dict[int, list[Split]], config: AuditConfig) -> tuple[int, dict[int, Split]]:
    """E of the audit, and the split that decides each prompt under which a hidden group is found.

    E is what serves most prompts, of these the one of most merit. A prompt takes its best accepted split into E
    groups, else into fewer, else that of its best score cut into E. `ranked` holds the result of `ranked_splits` by
    prompt.
    """
    any_split = config.solver != "auto"
    accepted = {
        prompt: found
        for prompt, splits in ranked.items()
        if (found := [one for one in splits if one.candidate.accepted or any_split])
    }
    num_groups = config.num_groups or 2
    if accepted and not config.num_groups and not any_split:
        served: dict[int, list[float]] = defaultdict(list)
        for splits in accepted.values():
            for size, merit in {one.candidate.num_groups: one.merit for one in reversed(splits)}.items():
                served[size].append(merit)
        num_groups = max(served, key=lambda size: (len(served[size]), sum(served[size]), -size))
    deciding = {}
    for prompt, splits in accepted.items():
        fitting = [one for one in splits if one.candidate.num_groups == num_groups]
        fitting += [one for one in splits if one.candidate.num_groups < num_groups]
        deciding[prompt] = fitting[0] if fitting else split(splits[0].score, num_groups, config)
    return num_groups, deciding


def too_few(num_images: int, config: AuditConfig) -> bool:
    """Whether a prompt has too few images to judge any split of them."""
    return num_images < max(config.min_images, 4)


def why_not(num_images: int, splits: list[Split], config: AuditConfig) -> str:
    """The reason, in words, why no hidden group is found under a prompt: the threshold that its best split misses."""
    if too_few(num_images, config):
        return f"too few images to judge ({num_images}; at least {config.min_images} are needed)"
    if not splits:
        return "no hidden group: nothing that was measured varies between the images"
    best = splits[0].candidate
    return f"no hidden group: the best split, by {best.evidence}, {best.refusal}"


def separation(scores: NDArray[Any], labels: NDArray[Any]) -> float:
    """How empty the gaps between neighbouring groups are, the smallest over neighbours, in [0, 1].

    The core of a group is the shortest interval that holds half of it. One minus the least density in a window of half
    the sparser core's width that slides between two cores, relative to that core's density, is the depth of the
    valley: 0 where one hump was cut. Groups `labels` (n,) rise with `scores` (n,).
    """
    if len(np.unique(labels)) <= labels.max():
        return 0.0  # a group is empty
    ordered = np.sort(scores)
    cores = [_core(np.sort(scores[labels == group])) for group in range(labels.max() + 1)]
    depths = []
    for low, high in pairwise(cores):
        start, end, density = min(low, high, key=lambda core: core[2])
        window = 0.5 * (end - start)
        room = high[0] - low[1] - window
        if room <= 0 or window <= 0:
            return 0.0
        starts = low[1] + room * np.linspace(0, 1, 200)
        inside = np.searchsorted(ordered, starts + window, "left") - np.searchsorted(ordered, starts, "right")
        # Two points more than were seen: in small groups an empty window can be luck.
        valley = (inside.min() + 2) / window
        depths.append(max(0.0, 1 - valley / density))
    return float(min(depths))


def _core(ordered: NDArray[Any]) -> tuple[float, float, float]:
    """Start, end and density (points per unit) of the shortest interval that holds half the points."""
    half = max(1, len(ordered) // 2)
    if len(ordered) <= half:
        return float(ordered[0]), float(ordered[-1]), np.inf
    start = int((ordered[half:] - ordered[:-half]).argmin())
    first, last = float(ordered[start]), float(ordered[start + half])
    return first, last, half / (last - first) if last > first else np.inf


def align_columns(
    groups: dict[int, tuple[NDArray[Any], NDArray[Any]]], num_groups: int, features: NDArray[Any]
) -> dict[int, NDArray[Any]]:
    """W (n, E) of each prompt with its columns in such order that a column means the same under every prompt.

    Groups are matched by the offset of their mean features from the prompt's own mean; the first prompt's are ordered
    by frequency. `groups` holds for each prompt its images (n,), indices into `features` (N, D), and their W.
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
