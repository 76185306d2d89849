"""Confidence intervals of means and shares of images, and of fairness metrics, that hold at the fair point too.

Metrics of counts are biased upwards where they have a kink or a flat bottom, so a plain bootstrap of many prompts
never covers 0, and no honest interval is narrower than about that bias (Cai & Low, Annals of Statistics 2011). So the
intervals here are bias-aware: value - B - S to value + B' + S', where, at shares that each prompt's counts do not
reject (`plausible_shares`), B and B' are the largest mean bias of the plug-in upwards and downwards and S and S' its
largest spread, both by Monte Carlo, and the ends are clipped to what the metric can be. B' is there because Jensen's
inequality rules out a downward bias for convex metrics only, and the ratio is neither convex nor concave.

Measured coverage of nominal 95% intervals is at least 0.955 (docs/evaluation.md). Spread at the smoothed shares alone
covers 0.91, and so do farthest shares on the line through the target, which stops at the first group without images.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import chdtri, ndtri, stdtrit
from scipy.stats import binomtest

from .metrics import METRICS, FloatArray, Metric, checked_counts, shares_of, target_shares

CONFIDENCE = 0.95  # nominal coverage of every interval
ENOUGH_RESAMPLES = 200
MAX_DRAWS = 10_000  # prompts times resamples beyond which prompts get fewer each, down to 200: means average out
BISECTIONS = 15


def mean_interval(values: ArrayLike, *, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Student's t interval of the mean of (N,) values, such as CLIP-T."""
    array = np.asarray(values, dtype=np.float64)
    half = float(stdtrit(len(array) - 1, (1 + confidence) / 2) * array.std(ddof=1) / np.sqrt(len(array)))
    return float(array.mean()) - half, float(array.mean()) + half


def share_interval(successes: int, total: int) -> tuple[float, float]:
    """Wilson's (1927) score interval of a share, `successes` of `total` images, such as accuracy.

    It stays within [0, 1] and has width even where all images agree. For precision, recall and coverage it holds the
    balls of the other set fixed, so it is too narrow where that set is small.
    """
    low, high = binomtest(successes, total).proportion_ci(CONFIDENCE, method="wilson")
    return float(low), float(high)


def interval(
    metric: str, counts: ArrayLike, *, target: ArrayLike | None = None, num_resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Bias-aware 95% interval, lower and upper end, for a metric's mean over prompts of counts, (prompts, groups).

    Sums of class probabilities are taken for counts: they spread less than counts do, so the interval is wide. More
    than ten prompts take fewer than `num_resamples` draws each, down to 200. The target, (groups,), is even when None.
    """
    table = checked_counts(counts)
    numbers = np.rint(table.sum(axis=1)).astype(np.int64)
    t = target_shares(target, table.shape[1])
    resamples = resamples_for(num_resamples, len(table))
    generator = np.random.default_rng(seed)

    def draw(p: FloatArray) -> FloatArray:
        return generator.multinomial(numbers, p, size=(resamples, len(p))) / numbers[:, None]

    p = shares_of(table)
    plausible = plausible_shares(p, target=t, rates=np.eye(len(t)), numbers=numbers, worth=numbers)
    return bias_aware(METRICS[metric], p, plausible, draw, target=t, degrees=int((numbers - 1).sum()))


def plausible_shares(
    p: FloatArray, *, target: FloatArray, rates: FloatArray, numbers: ArrayLike, worth: ArrayLike
) -> FloatArray:
    """Four shares for each prompt, (4, prompts, groups), that its counts do not reject and the plug-in is worst at.

    The last on the way to the target, and to all images in the group that most exceeds it, that Pearson's chi-square
    does not reject; the shares with groups tied that do not differ significantly, where metrics have their kinks; and
    the shares smoothed by z^2 pseudo-counts (Agresti & Coull, American Statistician 1998).

    `rates`, (groups, classes), say how often each group is seen as each class; `numbers`, (prompts,), are images
    behind the seen classes, and `worth`, (prompts,), images of known group that would tell the shares `p` as
    precisely.
    """
    n, known = (np.asarray(x, dtype=np.float64)[:, None] for x in (numbers, worth))
    z = float(ndtri((1 + CONFIDENCE) / 2))
    critical = float(chdtri(p.shape[1] - 1, 1 - CONFIDENCE))
    smooth = (known * p + z**2 / len(target)) / (known + z**2)
    largest = np.eye(len(target))[(p - target).argmax(axis=1)]
    seen = p @ rates

    def last_accepted(end: FloatArray) -> FloatArray:
        """The last shares from `p` straight to `end` that the images seen do not reject, by bisection."""
        inside, outside = np.zeros_like(n), np.full_like(n, 2.0)
        for _ in range(BISECTIONS):
            middle = (inside + outside) / 2
            true = np.maximum(p + np.minimum(middle, 1.0) * (end - p), 0.0) @ rates
            with np.errstate(divide="ignore", invalid="ignore"):
                terms = np.where(seen == true, 0.0, (seen - true) ** 2 / true)
            keep = n * terms.sum(axis=1, keepdims=True) <= critical
            inside, outside = np.where(keep, middle, inside), np.where(keep, outside, middle)
        return p + np.minimum(inside, 1.0) * (end - p)

    candidates = np.stack([last_accepted(target), last_accepted(largest), _tied(p, smooth, known, z), smooth])
    return shares_of(np.maximum(candidates, 0.0))


def bias_aware(
    metric: Metric,
    p: FloatArray,
    candidates: FloatArray,
    draw: Callable[[FloatArray], FloatArray],
    *,
    target: FloatArray,
    degrees: int,
) -> tuple[float, float]:
    """Interval of the metric's mean over shares `p` by the largest bias and spread at any of the candidates.

    Those are `plausible_shares`; `draw` simulates estimates, (resamples, prompts, groups), of true shares.
    """
    simulated = np.stack([metric.formula(draw(shares), target) for shares in candidates])
    mean = simulated.mean(axis=1)
    deviation = simulated - mean[:, None]
    bias = mean - metric.formula(candidates, target)
    upward, downward = np.maximum(bias.max(axis=0), 0).mean(), np.maximum(-bias.min(axis=0), 0).mean()
    tail = (1 - CONFIDENCE) / 2
    multiplier = float(stdtrit(max(degrees, 1), 1 - tail))

    def spread(kinds: list[int], sign: int) -> float:
        """Largest spread of the mean with all prompts at one kind of candidate, or each at its most variable."""
        chosen = deviation[kinds]
        worst = chosen.var(axis=1).argmax(axis=0)
        mixed = np.take_along_axis(chosen, worst[None, None], axis=0)
        means = sign * np.concatenate([chosen, mixed]).mean(axis=2)
        # The quantile sees skewness, the standard deviation what few resamples or coarse counts hide from it.
        return float(np.maximum(multiplier * means.std(axis=1, ddof=1), np.quantile(means, 1 - tail, axis=1)).max())

    # As in a score interval: at the end nearer the fair value the spread of shares nearer to it counts, at the other
    # end that of shares farther from it, and at both that of the smoothed ones.
    nearer, farther = [0, 3], [1, 3]
    below, above = (nearer, farther) if metric.fair_value == 0 else (farther, nearer)
    value = metric.formula(p, target).mean()
    ends = (value - upward - spread(below, 1), value + downward + spread(above, -1))
    low, high = np.clip(ends, *metric.limits(target))
    return float(low), float(high)


def resamples_for(num_resamples: int, num_prompts: int) -> int:
    """Draws that each prompt gets, of at most `num_resamples`."""
    return min(num_resamples, max(ENOUGH_RESAMPLES, MAX_DRAWS // num_prompts))


def _tied(p: FloatArray, smooth: FloatArray, n: FloatArray, z: float) -> FloatArray:
    """`p` with every chain of neighbouring shares that do not differ significantly replaced by its mean."""
    order = p.argsort(axis=1)
    ranked, steady = np.take_along_axis(p, order, axis=1), np.take_along_axis(smooth, order, axis=1)
    gaps = np.diff(steady, axis=1)
    variance = (steady[:, 1:] + steady[:, :-1] - gaps**2) / n
    differs = np.diff(ranked, axis=1) > z * np.sqrt(variance)
    chain = np.pad(differs.cumsum(axis=1), ((0, 0), (1, 0)))
    member = chain[:, :, None] == np.arange(p.shape[1])
    sums, sizes = (member * ranked[:, :, None]).sum(axis=1), member.sum(axis=1)
    tied = np.empty_like(p)
    np.put_along_axis(tied, order, np.take_along_axis(sums / np.maximum(sizes, 1), chain, axis=1), axis=1)
    return tied
