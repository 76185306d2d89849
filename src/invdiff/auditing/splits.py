"""The decision of the max phase: which split of a prompt's images is believed, by separation and stability.

Labels are never read. A hidden group is a split of a prompt's images that is *separated* (a gap in the scores, not a
cut through one broad hump), *stable* (independent noises find the same images) and *unbalanced* (an even split is a
style, such as facing left or right). A split that passes all three is a candidate, and the candidate of the largest
stability times separation decides its prompt. Where none passes, nothing is found.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import adjusted_rand_score

from ..config import AuditConfig
from .evidence import Score
from .partition import exact_groups, gradient_groups
from .result import Candidate


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
        return self.candidate.stability * self.candidate.separation


def ranked_splits(scores: list[Score], config: AuditConfig) -> list[Split]:
    """The splits of one prompt's images by each score, into each number of groups; of solver `auto` best first."""
    if config.solver != "auto":
        return [split(score, config.num_groups or 2, config) for score in scores]
    sizes = [config.num_groups] if config.num_groups else range(2, config.max_groups + 1)
    splits = [split(score, size, config) for score in scores for size in sizes]
    return sorted(splits, key=lambda one: (-one.candidate.accepted, -one.merit))


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
    balance = shares.min() * num_groups / 2
    accepted = stability >= config.min_stability and depth >= config.min_separation and balance <= config.max_balance
    candidate = Candidate(
        evidence=score.evidence,
        num_groups=num_groups,
        shares=[round(float(share), 4) for share in shares],
        stability=round(stability, 4),
        separation=round(depth, 4),
        accepted=bool(accepted),
    )
    return Split(candidate, weights, score)


def deciding_splits(ranked: dict[int, list[Split]], config: AuditConfig) -> tuple[int, dict[int, Split]]:
    """E of the audit, and the split that decides each prompt under which a hidden group is found.

    Environments are shared by all prompts, so E is the number of groups that serves most prompts, and of these the
    one of most merit. A prompt is decided by its best split into E groups; where none of them is accepted, by the
    best into fewer; else the score of its best is cut again into E groups, so that a finding is never dropped.

    Args:
        ranked: For each prompt, what `ranked_splits` returned.
        config: Its solvers other than `auto` accept any split.
    """
    accepted = {
        prompt: [one for one in splits if one.candidate.accepted or config.solver != "auto"]
        for prompt, splits in ranked.items()
    }
    accepted = {prompt: splits for prompt, splits in accepted.items() if splits}
    num_groups = config.num_groups or 2
    if accepted and not config.num_groups and config.solver == "auto":
        served: dict[int, list[float]] = {}
        for splits in accepted.values():
            for size in {one.candidate.num_groups for one in splits}:
                best = max(one.merit for one in splits if one.candidate.num_groups == size)
                served.setdefault(size, []).append(best)
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
    if best.separation < config.min_separation:
        return (
            f"no hidden group: the best split, by {best.evidence}, cuts through one hump "
            f"(separation {best.separation:.2f}, at least {config.min_separation:g} is needed)"
        )
    if best.stability < config.min_stability:
        return (
            f"no hidden group: the best split, by {best.evidence}, changes with the noise "
            f"(stability {best.stability:.2f}, at least {config.min_stability:g} is needed)"
        )
    shares = ", ".join(f"{share:.0%}" for share in best.shares)
    return (
        f"no hidden group: the clearest split, by {best.evidence}, is balanced ({shares}): a style, not a spurious "
        "attribute"
    )


def separation(scores: NDArray[Any], labels: NDArray[Any]) -> float:
    """How empty the gaps between neighbouring groups are, the smallest over neighbours, in [0, 1].

    The core of a group is the shortest interval that holds half of it. Between the cores of two neighbours a
    window of half the sparser core's width slides; one minus the least density it meets, relative to the
    density of that core, is the depth of the valley. A cut through one hump, or the tail of one, leaves
    no room between the cores, and has depth 0. No bandwidth is chosen.

    Args:
        scores: (n,).
        labels: (n,) groups, rising with the score.
    """
    ordered = np.sort(scores)
    depths = []
    if len(np.unique(labels)) <= labels.max():
        return 0.0  # a group is empty
    for group in range(labels.max()):
        cores = [_core(np.sort(scores[labels == side])) for side in (group, group + 1)]
        low_end, high_start = cores[0][1], cores[1][0]
        start, end, density = min(cores, key=lambda core: core[2])
        window = 0.5 * (end - start)
        room = high_start - low_end - window
        if room <= 0 or window <= 0:
            depths.append(0.0)
            continue
        starts = low_end + room * np.linspace(0, 1, 200)
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
    width = float(ordered[start + half] - ordered[start])
    return float(ordered[start]), float(ordered[start + half]), half / width if width > 0 else np.inf
