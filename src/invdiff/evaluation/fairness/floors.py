"""Floors: the expected fairness metrics of a perfectly fair sampler with finitely many images."""

from __future__ import annotations

from functools import lru_cache
from itertools import combinations
from math import comb

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import entr, gammaln, rel_entr, xlogy
from scipy.stats import binom

from ...errors import EvaluationError
from .metrics import METRICS, FloatArray, find_metric

MAX_ENUMERATED = 20_000
"""Tables of counts up to which `metric_floor` sums over all of them."""
BATCH = 20_000
RELATIVE_ERROR = 0.005
ABSOLUTE_ERROR = 1e-4
"""`metric_floor` draws batches until its standard error is below either."""


def metric_floor(
    metric: str, num_images: ArrayLike, num_groups: int, *, target: ArrayLike | None = None, seed: int = 0
) -> float:
    """Expected value of a metric for a sampler that draws the groups from the target.

    Exact for bias, for KL and entropy (a sum over groups of binomial expectations), for two groups (a binomial
    sum) and where at most 20,000 tables of counts are possible. Else a Monte Carlo mean whose standard error is
    below 0.5% of it or below 1e-4. It is the multinomial floor: softmax sums spread less, so theirs is lower
    (for a metric that is 1 when fair: nearer 1).

    Args:
        metric: A name in `METRICS`.
        num_images: Images per prompt, N: one number for all prompts, or (prompts,).
        num_groups: Groups K.
        target: Shares that the sampler draws from, (groups,), for a metric that takes a target; even when None.
        seed: Seed of the Monte Carlo.

    Raises:
        EvaluationError: Fewer than two groups, a number of images that is not a whole number above zero, an unknown
            metric, or a target that does not fit.
    """
    chosen = find_metric(metric)
    if num_groups < 2:
        raise EvaluationError(f"Expected at least two groups, got {num_groups}: fairness compares groups.")
    numbers = np.atleast_1d(np.asarray(num_images, dtype=np.float64))
    if numbers.size == 0 or not np.all(np.isfinite(numbers) & (numbers >= 1) & (numbers == np.floor(numbers))):
        raise EvaluationError(
            f"Expected a whole number of images above zero for every prompt, got {num_images!r}. "
            "Leave out prompts without images."
        )
    t = tuple(chosen.target(target, num_groups).tolist())
    distinct, prompts = np.unique(numbers.astype(np.int64), return_counts=True)
    floors = [_expected_value(metric, int(number), t, seed) for number in distinct]
    return float(np.average(floors, weights=prompts))


@lru_cache(maxsize=1024)
def _expected_value(name: str, num_images: int, shares_drawn: tuple[float, ...], seed: int) -> float:
    """Expected value of the metric over multinomial draws from the target; an evaluation asks again and again."""
    metric, target, num_groups = METRICS[name], np.array(shares_drawn), len(shares_drawn)
    if name == "bias":
        return _expected_pair_difference(num_images, num_groups)
    if name in ("kl_to_target", "normalised_entropy"):
        return _expected_sum_over_groups(name, num_images, target)
    if comb(num_images + num_groups - 1, num_groups - 1) <= MAX_ENUMERATED or num_groups == 2:
        tables = _tables(num_images, num_groups)
        log_choose = gammaln(num_images + 1) - gammaln(tables + 1).sum(axis=1)
        weights = np.exp(log_choose + xlogy(tables, target).sum(axis=1))
        return float(weights @ metric.formula(tables / num_images, target))
    generator = np.random.default_rng(seed)
    draws, total, squares = 0, 0.0, 0.0
    while True:
        values = metric.formula(generator.multinomial(num_images, target, size=BATCH) / num_images, target)
        draws, total, squares = draws + BATCH, total + values.sum(), squares + (values**2).sum()
        mean = total / draws
        error = np.sqrt(max(squares / draws - mean**2, 0.0) / draws)
        if error <= max(RELATIVE_ERROR * mean, ABSOLUTE_ERROR):
            return float(mean)


def _expected_pair_difference(num_images: int, num_groups: int) -> float:
    """Expected Bias of even groups, in closed form.

    For one pair of groups, n_i + n_j = T is Binomial(N, 2 / K), and given T the difference n_i - n_j is the position
    of a simple random walk after T steps, whose mean distance from zero is 2 m C(2m, m) / 4^m with m = ceil(T / 2).
    """
    totals = np.arange(num_images + 1)
    half = (totals + 1) // 2
    log_choose = gammaln(2 * half + 1) - 2 * gammaln(half + 1)
    distance = 2 * half * np.exp(log_choose - half * np.log(4.0))
    return float(binom.pmf(totals, num_images, 2 / num_groups) @ distance) / num_images


def _expected_sum_over_groups(name: str, num_images: int, target: FloatArray) -> float:
    """KL and entropy are sums over groups, and each group's count is Binomial(N, t_k)."""
    counts = np.arange(num_images + 1)
    p = counts / num_images
    distinct, groups = np.unique(target[target > 0], return_counts=True)
    kl = name == "kl_to_target"
    terms = [binom.pmf(counts, num_images, t) @ (rel_entr(p, t) if kl else entr(p)) for t in distinct]
    return float(np.dot(terms, groups)) / (1.0 if kl else float(np.log(len(target))))


def _tables(num_images: int, num_groups: int) -> NDArray[np.int64]:
    """All counts of `num_images` in `num_groups`, (tables, groups), by stars and bars."""
    if num_groups == 2:
        first = np.arange(num_images + 1)
        return np.stack([first, num_images - first], axis=1)
    end = num_images + num_groups - 1
    bars = np.array(list(combinations(range(end), num_groups - 1)))
    edges = np.pad(bars, ((0, 0), (1, 1)), constant_values=((0, 0), (-1, end)))
    return np.diff(edges, axis=1) - 1
