"""The log-concave maximum likelihood estimator in one dimension, with a certificate: the null model of one hump."""

from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg.lapack import dptsv
from scipy.special import gammainc

from ..errors import AuditError

MOST_ROUNDS, MOST_STEPS = 300, 100
SAME = 1e-12  # standard deviations. Nearer values are replaced by their mean, which can only raise the bound (Jensen).

_Array = NDArray[Any]


def max_log_likelihood(x: _Array, *, tol: float = 1e-3) -> float:
    """The largest sum over i of log f(x_i) over all log-concave densities f: an upper bound within `tol` of it.

    x (n,) in any order and unit, ties included; `tol` in nats, of the sum. Infinite where all values are equal.

    The log density phi of the maximum is linear between knots among the data (Duembgen and Rufibach, 2009). An active
    set finds it: Newton steps on phi at the knots, where a knot goes once phi would cease to be concave there, and one
    comes between each two where a bend helps most (as in Liu and Wang, Statistics and Computing 2018).

    The certificate is the dual: if P_n has a larger or equal mean of max(X - t, 0) and max(t - X, 0) than a density f
    at every t, it has a smaller mean of every concave function, and so for every log-concave g, E_n log g <= E_f log g
    <= E_f log f. The fit becomes such an f by a contraction by 1 - s towards the mean, which costs -log(1 - s):
    the mean of max(X - t, 0) on the far side of the mean then shrinks by at least that factor.

    `AuditError` where x is empty or not finite, or no bound within `tol` was found.
    """
    x = np.sort(np.asarray(x, dtype=np.float64))
    if x.ndim != 1 or not len(x) or not np.isfinite(x).all():
        raise AuditError(f"Expected finite scores (n,), got {x}. Leave out what was not measured.")
    count, extent = len(x), x[-1] - x[0]
    if extent == 0:
        return np.inf
    x = (x - x[0]) / extent
    spread = x.std()
    x = (x - x.mean()) / spread
    starts = np.flatnonzero(np.append(True, np.diff(x) > SAME))
    weights = np.diff(np.append(starts, count)) / count
    x = np.add.reduceat(x, starts) / (weights * count)
    bound, _, _ = _certified_maximum(x - weights @ x, weights, tol / count)
    if np.isnan(bound):
        wanted = f"the best log-concave density of {count} scores within {tol:g} nats"
        remedy = "Ask for a larger tol, or leave out extreme scores."
        raise AuditError(f"Expected {wanted}, got none in {MOST_ROUNDS} rounds. {remedy}")
    return float(count * (bound - np.log(extent) - np.log(spread)))


def fit_log_concave(x: _Array, weights: _Array, start: tuple[_Array, _Array] | None = None) -> tuple[_Array, _Array]:
    """The log-concave density of largest mean log density of x (n,) under weights (n,): knots and log density there.

    Between the knots (k,), which rise, the log density is linear; beyond them the density is zero. A fit that is near,
    such as under weights that are alike, may be given as the `start`.
    """
    used = weights > 1e-4 * weights.max()
    values, places = np.unique(x[used], return_inverse=True)
    mass = np.bincount(places, weights[used])
    mass = mass / mass.sum()
    mean = mass @ values
    spread = np.sqrt(mass @ (values - mean) ** 2)
    near = None
    if start is not None:
        knots = np.unique(np.searchsorted(values, np.append(values[[0, -1]], start[0])).clip(0, len(values) - 1))
        near = knots, np.interp(values[knots], *start) + np.log(spread)
    _, knots, phi = _certified_maximum((values - mean) / spread, mass, 1e-3, near)
    return knots * spread + mean, phi - np.log(spread)


def _certified_maximum(
    x: _Array, weights: _Array, tol: float, start: tuple[_Array, _Array] | None = None
) -> tuple[float, _Array, _Array]:
    """The bound of the mean log density of x (m,), rising and of mean 0 under `weights` (m,); NaN if none is found.

    With the knots (k,) of the fit, and its log density there. `start`: knots as indices, and the log density there.
    """
    below = int(np.searchsorted(x, 0.0))
    needed = np.concatenate([_data_excess(-x[::-1], weights[::-1])[::-1][:below], _data_excess(x, weights)[below:]])
    knots, phi = start or (np.array([0, len(x) - 1]), np.full(2, -np.log(x[-1] - x[0])))
    precision = max((0.1 * tol) ** 2 * weights.min(), 1e-28)
    for _ in range(MOST_ROUNDS):
        t, share = x[knots], _hat_means(x, weights, knots)
        phi, fitted, kept = _climb(t, share, phi, precision)
        if not kept.all():
            knots, phi = knots[kept], phi[kept]
            continue
        # E max(t - X, 0) below the mean and E max(X - t, 0) above: each sums from its own end, exact far out too.
        left = _fitted_excess(np.append(0.0, -x[:below][::-1]), -t[::-1], phi[::-1])
        right = _fitted_excess(np.append(0.0, x[below:]), t, phi)
        excess = np.concatenate([left[:0:-1], right[1:]])
        relative = np.divide(excess - needed, excess, out=np.zeros(len(x)), where=excess > needed)
        # The second term moves the fit's mean to that of the data: the contraction is towards a point beside both.
        shrink = relative.max() + 2 * abs(right[0] - left[0]) / min(right[0], left[0])
        bound = float(fitted @ phi - np.log1p(-shrink)) if shrink < 1 else np.inf
        if bound - share @ phi <= tol:
            return bound, t, phi
        worth = np.where(relative > tol / 2, excess - needed, 0.0)
        worth[knots] = 0.0
        best = [a + int(worth[a:b].argmax()) for a, b in pairwise(knots)]
        added = [point for point in best if worth[point] > 0]
        if not added:
            precision *= 1e-4
        knots = np.sort(np.append(knots, added).astype(np.int64))
        phi = np.interp(x[knots], t, phi)
    return np.nan, knots, phi


def _climb(t: _Array, share: _Array, phi: _Array, precision: float) -> tuple[_Array, _Array, _Array]:
    """Newton's method for share @ phi - integral of exp(phi), in phi (k,) at the knots t (k,).

    It ends where the next step would gain less than `precision`, or at the first knot that ceases to bend downwards.
    Returns normalised phi, the means (k,) of the knots' hat functions under exp(phi), and which knots to keep (k,).
    """
    gaps, kept = np.diff(t), np.full(len(t), True)
    phi, moments = _normalised(gaps, phi)
    for _ in range(MOST_STEPS):
        mass, first, second = moments
        fitted, diagonal = np.zeros(len(t)), np.zeros(len(t))
        fitted[:-1] += mass - first
        fitted[1:] += first
        diagonal[:-1] += mass - 2 * first + second
        diagonal[1:] += second
        _, _, step, failed = dptsv(diagonal, first - second, share - fitted)
        rise = float((share - fitted) @ step)
        if failed or not precision < rise < np.inf:
            break
        # How far the slope falls at the inner knots, and how much of that a whole step takes away.
        bends, loss = np.maximum(-np.diff(np.diff(phi) / gaps), 0.0), np.diff(np.diff(step) / gaps)
        reach = np.divide(bends, loss, out=np.full(len(loss), np.inf), where=bends < loss)
        length = longest = reach.min(initial=1.0)
        while True:
            trial = phi + length * step
            if trial.max() < phi.max() + 50:  # no overflow
                trial, moments = _normalised(gaps, trial)
                if share @ (trial - phi) >= 1e-4 * length * rise - 1e-13:
                    break
            length /= 2
        phi = trial
        if length == longest < 1:
            kept[1:-1] = reach > longest + 1e-9
            break
    return phi, fitted, kept


def _normalised(gaps: _Array, phi: _Array) -> tuple[_Array, tuple[_Array, ...]]:
    """Phi (k,) less a constant, such that exp(phi) is a density, and its moments between knots."""
    moments = _moments(gaps, phi[:-1], phi[1:])
    total = moments[0].sum()
    return phi - np.log(total), tuple(moment / total for moment in moments)


def _moments(width: _Array, start: _Array, end: _Array) -> tuple[_Array, ...]:
    """Integrals of u^k exp((1 - u) start + u end) over u in [0, 1], times the width, for k = 0, 1, 2."""
    drop = np.maximum(np.abs(start - end), 1e-30)
    low = np.exp(-drop)
    second = 2 * gammainc(3, drop) / drop**3
    first = (drop * second + low) / 2
    mass = drop * first + low
    # So far u was measured from the higher end.
    rises, scale = start < end, width * np.exp(np.maximum(start, end))
    second = np.where(rises, mass - 2 * first + second, second)
    return scale * mass, scale * np.where(rises, mass - first, first), scale * second


def _hat_means(x: _Array, weights: _Array, knots: _Array) -> _Array:
    """Means (k,) over the data x (m,) of the piecewise linear functions that are 1 at one knot and 0 at the others."""
    piece = np.minimum(np.searchsorted(knots, np.arange(len(x)), "right"), len(knots) - 1) - 1
    u = (x - x[knots][piece]) / np.diff(x[knots])[piece]
    sizes = len(knots)
    return np.bincount(piece, weights * (1 - u), sizes) + np.bincount(piece + 1, weights * u, sizes)


def _data_excess(x: _Array, weights: _Array) -> _Array:
    """Mean of max(X - t, 0) over the data x (m,), at each t of x: a sum of positive terms from the far end."""
    beyond = np.cumsum(weights[::-1])[::-1]
    return np.append(np.cumsum((np.diff(x) * beyond[1:])[::-1])[::-1], 0.0)


def _fitted_excess(points: _Array, t: _Array, phi: _Array) -> _Array:
    """Mean of max(X - point, 0) under exp(phi), at each of the points (m,) between the first and last knot of t."""
    width = np.diff(t)
    mass, first, _ = _moments(width, phi[:-1], phi[1:])
    beyond = np.append(np.cumsum(mass[::-1])[::-1], 0.0)
    above = np.append(np.cumsum((width * (first + beyond[1:]))[::-1])[::-1], 0.0)
    end = np.minimum(np.searchsorted(t, points, "right"), len(t) - 1)
    rest = t[end] - points
    return above[end] + rest * (beyond[end] + _moments(rest, np.interp(points, t, phi), phi[end])[1])
