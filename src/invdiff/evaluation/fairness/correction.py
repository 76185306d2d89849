"""Correction of counts for an annotator's errors, from its confusion matrix on held-out images.

Annotated shares are q = M^T p, where the annotator calls class k class j at rate M_kj. Solving for p is the "matrix
method" (Buonaccorsi, "Measurement Error", 2010; Forman, "Quantifying counts and costs via classification", 2008). It
rests on the rates being the same in generated as in held-out images, which nothing here can check.
"""

import numpy as np
from numpy.typing import ArrayLike

from ...errors import EvaluationError
from .intervals import bias_aware, plausible_shares, resamples_for
from .metrics import METRICS, FloatArray, checked_counts, shares_of, target_shares

MAX_CONDITION = 20.0  # condition number of the rates above which noise in counts is amplified too much to correct
FLOOR_DRAWS = 1000  # simulated evaluations behind an expected figure
PRIOR = 0.5  # held-out images added to each cell when rates are drawn (Jeffreys), so that an empty cell is not certain


def correct_for_annotator(counts: ArrayLike, confusion: ArrayLike) -> FloatArray:
    """Counts, (prompts, J), corrected for the annotator's errors: fractional, with each prompt's sum, (prompts, K).

    By inverse rates, projected onto the simplex; the last of J = K + 1 columns is of images without a class.
    `confusion` are held-out counts, (true class, annotated class), (K, J).
    """
    table, held_out = _checked(counts, confusion)
    totals = table.sum(axis=1, keepdims=True)
    return totals * project_to_simplex(table / totals @ _inverse(shares_of(held_out)))


def corrected_interval(
    metric: str,
    counts: ArrayLike,
    confusion: ArrayLike,
    *,
    target: ArrayLike | None = None,
    num_resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Bias-aware 95% interval of a metric of corrected counts, as `intervals.interval` does of raw ones.

    Held-out images are sampled too: rates are drawn from Dirichlet distributions, the same for all prompts. Simulated
    coverage with annotators wrong in 10% is at least 93%.
    """
    table, held_out = _checked(counts, confusion)
    numbers = np.rint(table.sum(axis=1)).astype(np.int64)
    t = target_shares(target, len(held_out))
    resamples = resamples_for(num_resamples, len(table))
    generator = np.random.default_rng(seed)
    rates = shares_of(held_out + PRIOR)
    drawn = np.stack([generator.dirichlet(row + PRIOR, size=resamples) for row in held_out], axis=1)
    inverse, inverses = _inverse(rates), _inverse(drawn)

    def draw(p: FloatArray) -> FloatArray:
        annotated = generator.multinomial(numbers, shares_of(p @ rates), size=(resamples, len(p)))
        return project_to_simplex(annotated / numbers[:, None] @ inverses)

    def spread(distribution: FloatArray) -> FloatArray:
        """Trace of the covariance of x G for one draw x of a class from each row of `distribution`."""
        return np.asarray(distribution @ (inverse**2).sum(axis=1) - ((distribution @ inverse) ** 2).sum(axis=1))

    # The summed variance of corrected shares from the images and from the held-out images, at shares with one image
    # more of each class, so that none is zero.
    p = shares_of(correct_for_annotator(table, held_out))
    steady = (numbers[:, None] * p + 1) / (numbers[:, None] + p.shape[1])
    sampling = spread(steady @ rates) / numbers
    from_held_out = steady**2 @ (spread(rates) / held_out.sum(axis=1))
    plausible = plausible_shares(
        p,
        target=t,
        rates=rates,
        numbers=numbers * sampling / (sampling + from_held_out),
        worth=np.minimum((1 - (steady**2).sum(axis=1)) / (sampling + from_held_out), numbers),
    )
    degrees = int(min((numbers - 1).sum(), (held_out.sum(axis=1) - 1).sum()))
    low, high = bias_aware(METRICS[metric], p, plausible, draw, target=t, degrees=degrees)
    # Few held-out images make the correction skewed: what it makes of these images under any plausible rates counts.
    values = METRICS[metric].formula(project_to_simplex(shares_of(table) @ inverses), t).mean(axis=1)
    return min(low, float(np.quantile(values, 0.025))), max(high, float(np.quantile(values, 0.975)))


def corrected_floor(metric: str, counts: ArrayLike, confusion: ArrayLike, target: ArrayLike | None = None) -> float:
    """Expected value of a metric of corrected counts for a sampler on target that draws as many images.

    Above `metrics.metric_floor`, and the more so the worse the annotator: correcting spreads counts that are near the
    target. The mean of simulations; arguments as of `correct_for_annotator`.
    """
    table, held_out = _checked(counts, confusion)
    numbers, rates = np.rint(table.sum(axis=1)).astype(np.int64), shares_of(held_out)
    t, draws = target_shares(target, len(held_out)), (resamples_for(FLOOR_DRAWS, len(table)), len(table))
    annotated = np.random.default_rng(0).multinomial(numbers, t @ rates, size=draws)
    return float(METRICS[metric].formula(project_to_simplex(annotated / numbers[:, None] @ _inverse(rates)), t).mean())


def project_to_simplex(x: FloatArray) -> FloatArray:
    """Nearest shares to each vector, (..., groups): Duchi et al., "Efficient projections onto the l1-ball" (2008)."""
    falling = -np.sort(-x, axis=-1)
    excess = (falling.cumsum(axis=-1) - 1) / np.arange(1, x.shape[-1] + 1)
    last = (falling > excess).sum(axis=-1, keepdims=True) - 1
    return np.asarray(np.maximum(x - np.take_along_axis(excess, last, axis=-1), 0.0))


def _inverse(rates: FloatArray) -> FloatArray:
    """G (..., J, K) of rates M (..., K, J), such that q G is the p of least |p M - q| under sum(p) = 1."""
    *batch, num_classes, _ = rates.shape
    system = np.zeros((*batch, num_classes + 1, num_classes + 1))
    system[..., :-1, :-1] = rates @ np.swapaxes(rates, -1, -2)
    system[..., -1, :-1] = system[..., :-1, -1] = 1.0
    # The normal equations; q sums to 1, so the constraint's right-hand side is a row of ones.
    right = np.concatenate([rates, np.ones((*batch, 1, rates.shape[-1]))], axis=-2)
    return np.swapaxes(np.linalg.solve(system, right)[..., :-1, :], -1, -2)


def _checked(counts: ArrayLike, confusion: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Counts (prompts, J) and a usable confusion matrix (K, J)."""
    held_out = np.asarray(confusion, dtype=np.float64)
    table = checked_counts(counts)
    if held_out.ndim != 2 or len(held_out) < 2 or held_out.shape[1] - len(held_out) not in (0, 1):
        raise EvaluationError(f"Expected a confusion matrix of shape (K, K) or (K, K + 1), got {held_out.shape}.")
    if held_out.shape[1] != table.shape[1]:
        widths = f"{table.shape[1]} and {held_out.shape[1]}"
        raise EvaluationError(f"Expected counts and confusion matrix of as many annotated classes, got {widths}.")
    if not np.all(np.isfinite(held_out) & (held_out >= 0)):
        raise EvaluationError(f"Expected held-out counts of zero or more, got {held_out.tolist()}. Count them again.")
    sums = held_out.sum(axis=1)
    if not sums.all():
        raise EvaluationError(f"Expected held-out images of every class, got none of class {sums.argmin()}. Add some.")
    mixing, sizes, _ = np.linalg.svd(shares_of(held_out))
    if sizes[-1] * MAX_CONDITION < sizes[0]:
        # The mixture of true classes that hardly changes what is annotated.
        first, second = np.sort(np.argsort(-np.abs(mixing[:, -1]))[:2])
        found = f"one that hardly tells class {first} from class {second} (condition number above {MAX_CONDITION:.0f})"
        remedy = "Merge these classes or train a better annotator."
        raise EvaluationError(f"Expected an annotator that tells the classes apart, got {found}. {remedy}")
    return table, held_out
