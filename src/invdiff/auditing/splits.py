"""Choose among all evidence by separation and stability, never by labels, or find nothing.

A hidden accident is a split of a prompt's images that is *separated* (a gap in the scores, not a cut through
one broad hump), *stable* (independent noises find the same images) and *unbalanced* (a split near half and
half is style: facing left or right). What passes all three is a candidate; the best one is taken.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import skew
from sklearn.decomposition import PCA, FastICA
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import adjusted_rand_score

from ..config import AuditConfig
from .partition import exact_groups, gradient_groups, one_hot
from .result import Candidate

NUM_COMPONENTS = (4, 8, 12)
"""Whitened dimensions that components are looked for in."""
IMAGES_PER_DIMENSION = 40
"""Images that each of these dimensions takes. Among fewer, FastICA finds directions in which mere noise falls apart:
with 131 images in twelve dimensions it passed every threshold in 10 of 20 sets of normally distributed features, with
this rule in none of 60 at 160 and 200 images (`tests/test_auto.py` repeats it)."""


@dataclass(frozen=True)
class Score:
    """One score per image under two or more independent noises."""

    evidence: str
    draws: np.ndarray
    """(draws, n)."""

    @property
    def mean(self) -> np.ndarray:
        """Return the mean over draws, standardised robustly, (n,)."""
        mean = self.draws.mean(axis=0)
        low, middle, high = np.quantile(mean, [0.25, 0.5, 0.75])
        return (mean - middle) / max(high - low, 1e-12)


@dataclass(frozen=True)
class Split:
    """A candidate and the groups it stands for."""

    candidate: Candidate
    weights: np.ndarray
    """W of the prompt's images, (n, E), columns rising with the score."""
    score: Score

    @property
    def merit(self) -> float:
        """Return what candidates are ranked by."""
        return self.candidate.stability * self.candidate.separation


def consider(score: Score, num_groups: int, config: AuditConfig) -> Split:
    """Cut a score into groups of largest dispersion, by the solver that is asked for, and judge the cut."""
    mean = score.mean
    weights = _cut(mean, num_groups, config)
    labels = weights.argmax(axis=1)
    shares = weights.mean(axis=0)
    stability = 0.0
    if len(score.draws) >= 2:
        halves = [half.mean(axis=0) for half in (score.draws[0::2], score.draws[1::2])]
        first, second = (_cut(half, num_groups, config).argmax(axis=1) for half in halves)
        stability = float(adjusted_rand_score(first, second))
    depth = separation(mean, labels)
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


def _cut(values: np.ndarray, num_groups: int, config: AuditConfig) -> np.ndarray:
    """Return W (n, E) of one-dimensional scores, columns rising with the score."""
    if config.solver == "gradient":
        return gradient_groups(values, num_groups, omega=config.omega, seed=config.seed)
    return one_hot(exact_groups(values, num_groups, min_share=config.min_share), num_groups)


def separation(scores: np.ndarray, labels: np.ndarray) -> float:
    """Return how empty the gaps between neighbouring groups are, the smallest over neighbours, in [0, 1].

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


def _core(ordered: np.ndarray) -> tuple[float, float, float]:
    """Return start, end and density (points per unit) of the shortest interval holding half the points."""
    half = max(1, len(ordered) // 2)
    if len(ordered) <= half:
        return float(ordered[0]), float(ordered[-1]), np.inf
    start = int((ordered[half:] - ordered[:-half]).argmin())
    width = float(ordered[start + half] - ordered[start])
    return float(ordered[start]), float(ordered[start + half]), half / width if width > 0 else np.inf


def component_scores(features: np.ndarray, source: str, *, seed: int) -> list[Score]:
    """Return independent components of features as scores.

    Each hidden factor of drawn or photographed content is close to one direction of the features, but seldom
    among the largest: whitening and FastICA find directions by shape, not by size. Two shapes are looked for:
    peaked or flat (logcosh), and skewed, since a factor with a rare side is skewed whatever its share, while its
    kurtosis vanishes near a share of 21%. With too few whitened dimensions a factor is not in them, with too
    many it falls apart, so several numbers are tried and the separation of the best split decides. Components are
    fitted on the mean over draws, then every draw is projected.

    Args:
        features: (n, draws, D), draws under independent noise.
        source: What the features are, for people.
        seed: Seed of FastICA.

    Returns:
        None for fewer than `IMAGES_PER_DIMENSION` images in each of the fewest dimensions.
    """
    n, draws, width = features.shape
    sizes = [size for size in NUM_COMPONENTS if size * IMAGES_PER_DIMENSION <= n]
    if draws < 2 or not sizes:
        return []
    centred = features - features.mean(axis=0)
    scale = centred.std(axis=(0, 1))
    varies = scale > 1e-9 * max(float(np.abs(features).max()), 1e-12)
    if not varies.any():
        return []
    centred, width = centred[:, :, varies] / scale[varies], int(varies.sum())
    most = min(max(sizes), width)
    pca = PCA(most, whiten=True, random_state=seed).fit(centred.mean(axis=1))
    fitted = pca.transform(centred.mean(axis=1))
    whitened = pca.transform(centred.reshape(n * draws, width))
    scores = []
    for size in sorted({min(size, most) for size in sizes}):
        for shape, options in SHAPES.items():
            ica = FastICA(whiten="unit-variance", max_iter=300, tol=1e-3, random_state=seed, **options)
            with warnings.catch_warnings(), np.errstate(all="ignore"):
                warnings.simplefilter("ignore", ConvergenceWarning)  # what does not settle will not be stable
                warnings.simplefilter("ignore", RuntimeWarning)
                try:
                    ica.fit(fitted[:, :size])
                except ValueError:  # no direction of this shape is left: its update is 0 / 0
                    continue
            projected = ica.transform(whitened[:, :size]).reshape(n, draws, -1)
            for component in range(projected.shape[2]):
                values = projected[:, :, component].T
                sign = 1.0 if skew(values.mean(axis=0)) >= 0 else -1.0  # the rarer group scores high
                name = f"{source}, {shape} component {component + 1} of {size}"
                scores.append(Score(name, sign * values))
    return scores


def _squares(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return x^2 and its mean derivative: FastICA's contrast for skewness (Hyvarinen and Oja 2000)."""
    return values**2, (2 * values).mean(axis=-1)


SHAPES: dict[str, dict[str, Any]] = {
    "peaked": {"fun": "logcosh", "algorithm": "parallel"},
    "skewed": {"fun": _squares, "algorithm": "deflation"},
}
"""Kinds of components, and how FastICA is told to look for them."""
