"""Cuts of one prompt's images by a score: which are worth making, and the evidence for each. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import adjusted_rand_score

from ..config import AuditConfig
from .decide import fit_humps, fit_mixture, halves, log_e_value, num_modes, rand_low, share_intervals
from .result import NOT_TESTED, Candidate
from .scores import LEAST_PARTED, Score, first_axis

MOST_TESTED = 8  # cuts of a prompt that are tested, the likeliest; others are refused, and count in the control
LEAST_DIFFERENCE = 0.2  # of shares between prompts, or within one: less is not worth correcting, whatever its p-value
_Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Cut:
    """A candidate and its groups."""

    candidate: Candidate
    score: Score
    weights: _Array
    """W of the prompt's images, (n, E), columns rising with the score; empty where the cut was not tested."""
    intervals: list[tuple[float, float]] = field(default_factory=list)
    """95% interval of each share."""


def is_mixed(cut: Cut, features: _Array, distinct: NDArray[np.bool_], needed: float, rng: np.random.Generator) -> bool:
    """Whether the rare group of a margin is itself of two humps, along its first principal axis of features (n, d)."""
    rare = cut.weights.argmax(axis=1) == int(cut.weights.sum(axis=0).argmin())
    if (rare & distinct).sum() < 2 * LEAST_PARTED:
        return False
    own = features[rare]
    rotations = halves(distinct[rare], rng)
    return log_e_value(lambda known: [own @ first_axis(own[known])], own @ first_axis(own), 2, rotations) >= needed


def too_few(num_images: int, config: AuditConfig) -> bool:
    """Whether a prompt has too few images to judge any split of them."""
    return num_images < max(config.min_images, 4)


def weigh(scores: Sequence[Score], distinct: _Array, config: AuditConfig, rng: np.random.Generator) -> list[Cut]:
    """Every cut of one prompt's images by a score, with what it is worth; those worth it with their e-values."""
    drafts = []
    for score in scores:
        values, once = score.mean, score.mean[distinct]  # of copies one decides where to cut
        # A margin or contrast has two ends: what usually comes with the prompt, and what not.
        sizes = range(2, 3 if score.of_prompt else config.max_groups + 1)
        for size in ([config.num_groups] if config.num_groups else sizes) if np.ptp(once) > 0 else ():
            mixture = fit_mixture(once, size)
            parted = num_modes(mixture) == size  # else neighbours only describe the slope of one hump
            if size == 2 or parted:
                drafts.append((float(mixture.rand_index()), score, values, mixture))
            if not parted:
                break
    rotations, tested, cuts = halves(distinct, rng), 0, []
    for worth, score, values, mixture in sorted(drafts, key=lambda draft: -draft[0]):
        size, lowest, refusal, shares = len(mixture.means), worth, "", mixture.shares
        weights, intervals, agreement, log_e = np.empty((0, 0)), list[tuple[float, float]](), 0.0, NOT_TESTED
        if mixture.shares.min() < config.min_share:
            refusal = f"a group of {mixture.shares.min():.1%} is too small (at least {config.min_share:.1%})"
        elif worth >= config.min_rand and tested == MOST_TESTED:
            refusal = f"not among the {MOST_TESTED} clearest"
        elif worth < config.min_rand or (lowest := rand_low(values[distinct], mixture, rng)) < config.min_rand:
            refusal = "the groups overlap too much to part them"
        else:
            tested += 1
            humps = fit_humps(values[distinct], mixture)
            weights = (humps or mixture).posterior(values)
            shares, intervals = weights.mean(axis=0), share_intervals(weights)
            if score.of_prompt and (np.ptp(shares) < LEAST_DIFFERENCE or min(high for _, high in intervals) >= 0.5):
                refusal = "the groups are even: a style, not a spurious attribute"
            mixture = humps.gaussians if humps else mixture
            log_e = max(log_e_value(score.learn, values, size, rotations), NOT_TESTED)
            # Of the groups that the versions of a score give, each cut on its own.
            draws = score.draws[:, distinct]
            labels = [fit_mixture(draw, size, quick=True).posterior(draw).argmax(axis=1) for draw in draws]
            agreement = float(np.mean([adjusted_rand_score(a, b) for a, b in combinations(labels, 2)] or [0.0]))
        figures = (round(agreement, 4), round(float(mixture.separation), 4), round(lowest, 4), round(log_e, 4))
        candidate = Candidate(score.evidence, size, [round(float(share), 4) for share in shares], *figures, refusal)
        cuts.append(Cut(candidate, score, weights, intervals))
    return cuts
