"""Fairness metrics: how unevenly a prompt's images fall into the classes of a sensitive attribute, and their floors.

`METRICS` is the table of metrics. Counts are images by their most probable class, or sums of the annotator's class
probabilities (the softmax form, fractional). With finitely many images a metric of a fair sampler is not at its fair
value: read it beside `metric_floor` and `intervals.interval`. None of the metrics here has an unbiased estimate.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from math import comb

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import entr, gammaln, rel_entr
from scipy.stats import binom, multinomial

from ...errors import EvaluationError

FloatArray = NDArray[np.float64]

MAX_ENUMERATED = 20_000  # tables of counts up to which `metric_floor` sums over all of them
BATCH = 20_000
RELATIVE_ERROR = 0.005
ABSOLUTE_ERROR = 1e-4  # `metric_floor` draws batches until its standard error is below either


def bias(p: FloatArray, target: FloatArray) -> FloatArray:
    """Mean over pairs of groups of |p_i - p_j|.

    The Bias of Shen et al., "Finetuning text-to-image diffusion models for fairness" (ICLR 2024). Of sorted shares,
    the k-th smallest enters 2k - K - 1 times.
    """
    num_groups = p.shape[-1]
    signs = 2 * np.arange(1, num_groups + 1) - num_groups - 1
    return np.asarray(np.sort(p, axis=-1) @ signs / (num_groups * (num_groups - 1) / 2), dtype=np.float64)


def fairness_discrepancy(p: FloatArray, target: FloatArray) -> FloatArray:
    """Euclidean distance of the shares to the target, |p - t|.

    Choi et al., "Fair generative modeling via weak supervision" (ICML 2020), and Teo et al., "On measuring fairness
    in generative models" (NeurIPS 2023).
    """
    return np.asarray(np.linalg.norm(p - target, axis=-1))


def parity_gap(p: FloatArray, target: FloatArray) -> FloatArray:
    """Largest share less the smallest, max p - min p: Fairlearn's demographic parity difference."""
    return np.asarray(p.max(axis=-1) - p.min(axis=-1))


def kl_to_target(p: FloatArray, target: FloatArray) -> FloatArray:
    """Kullback-Leibler divergence of the shares from the target in nats, sum p log(p / t)."""
    return np.asarray(rel_entr(p, target).sum(axis=-1))


def normalised_entropy(p: FloatArray, target: FloatArray) -> FloatArray:
    """Entropy of the shares over its maximum, H(p) / log K."""
    return np.asarray(entr(p).sum(axis=-1) / np.log(p.shape[-1]))


def worst_group_ratio(p: FloatArray, target: FloatArray) -> FloatArray:
    """Smallest share over the largest, min p / max p: Fairlearn's demographic parity ratio."""
    return np.asarray(p.min(axis=-1) / p.max(axis=-1))


@dataclass(frozen=True)
class Metric:
    """A fairness metric of one prompt's shares."""

    formula: Callable[[FloatArray, FloatArray], FloatArray]  # of shares (..., groups) and a target (groups,): (...)
    fair_value: int  # the value of shares that equal the target: 0 or 1
    takes_target: bool  # whether it measures against any target; the others measure evenness
    label: str  # its name for people, and which value is fair

    def limits(self, target: FloatArray) -> tuple[float, float]:
        """Least and greatest value: all metrics here are extreme at the target and the vertices."""
        ends = np.append(self.formula(np.eye(len(target)), target), float(self.fair_value))
        return float(ends.min()), float(ends.max())


METRICS: Mapping[str, Metric] = {
    metric.formula.__name__: metric
    for metric in (
        Metric(bias, 0, False, "Bias: 0 is even, 2/K is always one of K classes"),
        Metric(fairness_discrepancy, 0, True, "distance of the shares to the target: 0 is on target"),
        Metric(parity_gap, 0, False, "largest share less the smallest: 0 is even"),
        Metric(kl_to_target, 0, True, "divergence from the target, nats: 0 is on target"),
        Metric(normalised_entropy, 1, False, "entropy over its maximum: 1 is even"),
        Metric(worst_group_ratio, 1, False, "smallest share over the largest: 1 is even"),
    )
}


def target_shares(target: ArrayLike | None, num_groups: int) -> FloatArray:
    """Target shares, (groups,), that sum to 1; even when None."""
    return shares_of(np.ones(num_groups) if target is None else np.asarray(target, dtype=np.float64))


def shares_of(x: FloatArray) -> FloatArray:
    """Shares along the last axis, (..., groups): counts or probabilities over their sum."""
    return x / x.sum(axis=-1, keepdims=True)


def per_prompt(metric: str, counts: ArrayLike, *, target: ArrayLike | None = None) -> FloatArray:
    """A metric's value for each prompt, (prompts,), of counts, (prompts, groups), and a target, (groups,), or even."""
    p = shares_of(checked_counts(counts))
    return METRICS[metric].formula(p, target_shares(target, p.shape[1]))


def squared_discrepancy_unbiased(counts: ArrayLike, target: ArrayLike | None = None) -> float:
    """Unbiased estimate of the mean over prompts of the squared distance of the shares to a target.

    The U-statistic sum_k n_k (n_k - 1) / (N (N - 1)) - 2 t_k n_k / N + t_k^2 of whole counts (prompts, groups), at
    least two images for each prompt. Unlike the plug-in it averages to zero for a fair sampler, so a single value may
    well be negative.
    """
    table = checked_counts(counts)
    t = target_shares(target, table.shape[1])
    numbers = table.sum(axis=1, keepdims=True)
    squares = table * (table - 1) / (numbers * (numbers - 1))
    return float((squares - 2 * t * table / numbers + t**2).sum(axis=1).mean())


def checked_counts(counts: ArrayLike) -> FloatArray:
    """Counts as float64, (prompts, groups); what is no table of images of each prompt is an `EvaluationError`."""
    array = np.asarray(counts, dtype=np.float64)
    if array.ndim != 2 or array.shape[0] < 1 or array.shape[1] < 2:
        raise EvaluationError(f"Expected counts of shape (prompts, groups), at least (1, 2), got {array.shape}.")
    bad = np.flatnonzero(~(np.isfinite(array) & (array >= 0)).all(axis=1) | (array.sum(axis=1) == 0))
    if len(bad):
        raise EvaluationError(f"Expected counts of zero or more, not all zero, got {array[bad[0]]}, row {bad[0]}.")
    return array


def metric_floor(metric: str, num_images: ArrayLike, num_groups: int, *, target: ArrayLike | None = None) -> float:
    """Expected value of a metric for a sampler that draws the groups from the target, (groups,), even when None.

    Exact for bias, for two groups (a binomial sum) and where at most 20,000 tables of counts are possible. Else a
    Monte Carlo mean whose standard error is below 0.5% of it or below 1e-4. It is the multinomial floor: softmax sums
    spread less, so theirs is nearer to the fair value. `num_images` is one number for all prompts, or (prompts,).
    """
    t = tuple(target_shares(target, num_groups).tolist())
    distinct, prompts = np.unique(np.asarray(num_images).astype(np.int64), return_counts=True)
    floors = [_expected_value(metric, int(number), t) for number in distinct]
    return float(np.average(floors, weights=prompts))


@lru_cache(maxsize=1024)
def _expected_value(name: str, num_images: int, shares_drawn: tuple[float, ...]) -> float:
    """Expected value of the metric over multinomial draws from the target; an evaluation asks again and again."""
    metric, target, num_groups = METRICS[name], np.array(shares_drawn), len(shares_drawn)
    counts = np.arange(num_images + 1)
    if name == "bias":
        # For one pair of groups, n_i + n_j = T is Binomial(N, 2 / K), and given T the difference n_i - n_j is the
        # position of a simple random walk after T steps, whose mean distance from zero is 2 m C(2m, m) / 4^m with
        # m = ceil(T / 2).
        half = (counts + 1) // 2
        log_choose = gammaln(2 * half + 1) - 2 * gammaln(half + 1)
        distance = 2 * half * np.exp(log_choose - half * np.log(4.0))
        return float(binom.pmf(counts, num_images, 2 / num_groups) @ distance) / num_images
    places = num_images + num_groups - 1
    if comb(places, num_groups - 1) <= MAX_ENUMERATED or num_groups == 2:
        bars = np.array(list(combinations(range(places), num_groups - 1)))  # all tables of counts, by stars and bars
        tables = np.diff(bars, axis=1, prepend=-1, append=places) - 1
        return float(multinomial.pmf(tables, num_images, target) @ metric.formula(tables / num_images, target))
    generator = np.random.default_rng(0)
    draws, total, squares = 0, 0.0, 0.0
    while True:
        values = metric.formula(generator.multinomial(num_images, target, size=BATCH) / num_images, target)
        draws, total, squares = draws + BATCH, total + values.sum(), squares + (values**2).sum()
        mean = total / draws
        error = np.sqrt(max(squares / draws - mean**2, 0.0) / draws)
        if error <= max(RELATIVE_ERROR * mean, ABSOLUTE_ERROR):
            return float(mean)
