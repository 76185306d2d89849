"""The decision of the audit: whether a score of one dimension has two humps, and whether the cut between is worth it.

A mixture of Gaussians of one variance is log-concave exactly while its components lie less than two standard
deviations apart, so what a cut must refute is "one log-concave hump". It is refuted by a split likelihood ratio
(universal inference; Wasserman, Ramdas and Balakrishnan 2020): score and mixture are learned from one half of the
images, and on the other half E = exp(sum log mixture - max over log-concave f of sum log f), whose mean is at
most 1 where there is one hump, for any sample size. All candidates are controlled together (e-BH; Wang and Ramdas,
2022).

Labels are never read.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logit, softmax
from scipy.stats import false_discovery_control, norm

from ..config import AuditConfig
from .logconcave import fit_log_concave, max_log_likelihood

ROTATIONS = 10  # random partitions of the images into halves over which an e-value is averaged
RESAMPLES = 50  # bootstrap resamples of a mixture, for the bound of what the cut is worth
BINS = 250
REACH = 12.0  # interquartile ranges from the median at which scores are clipped when a mixture is fitted
MOST_JUDGED = 12_000  # images of a prompt that an e-value or free humps are made from, or shuffled, at most
CLEAR, LEAST_ROTATIONS = 30.0, 3
"""Log e-value that is beyond doubt: no more rotations are tried; nor after so many that all show nothing."""
STEPS = 6
LEAST_MASS = 4.0  # images that a component must hold
BEYOND = 0.02  # part of the large hump that is wide, so that images outside what was seen are possible
AWAY, SHARES = 4, (0.005, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2, 0.3, 0.5)
"""Standard deviations and shares of the minorities that the power to see them is computed of."""
_Array = NDArray[np.float64]
_Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Mixture:
    """Gaussians of one standard deviation: means (E,), rising, shares (E,). Batched fits have a leading axis."""

    means: _Array
    shares: _Array
    deviation: _Array

    def log_parts(self, scores: NDArray[np.floating]) -> _Array:
        """Log density of each component, times its share, (..., n, E)."""
        scale = self.deviation[..., None, None]
        z = (np.asarray(scores, dtype=float)[..., None] - self.means[..., None, :]) / scale
        return np.log(np.maximum(self.shares, 1e-300))[..., None, :] - 0.5 * z**2 - np.log(scale * np.sqrt(2 * np.pi))

    def log_density(self, scores: NDArray[np.floating]) -> _Array:
        """(..., n)."""
        return np.logaddexp.reduce(self.log_parts(scores), axis=-1)

    def posterior(self, scores: NDArray[np.floating]) -> _Array:
        """The probability of each component, (..., n, E)."""
        return softmax(self.log_parts(scores), axis=-1)

    @property
    def separation(self) -> _Array:
        """Distance of the nearest neighbours among the components, in their standard deviation."""
        return np.diff(self.means, axis=-1).min(axis=-1) / self.deviation

    def rand_index(self) -> _Array:
        """The adjusted Rand index with the components that their likeliest cut has among infinitely many scores."""
        width = self.deviation[..., None]
        low, high = self.means[..., :1] - 6 * width, self.means[..., -1:] + 6 * width
        edges = low + (high - low) * np.linspace(0, 1, 301)
        z = (edges[..., None] - self.means[..., None, :]) / width[..., None]
        mass = np.diff(norm.cdf(z), axis=-2) * self.shares[..., None, :]  # (..., bins, E)
        chosen = np.eye(self.means.shape[-1])[self.posterior((edges[..., :-1] + edges[..., 1:]) / 2).argmax(axis=-1)]
        table = np.einsum("...bj,...bk->...jk", mass, chosen)
        both, own, cut = (table**2).sum((-2, -1)), (table.sum(-1) ** 2).sum(-1), (table.sum(-2) ** 2).sum(-1)
        return (both - own * cut) / np.maximum((own + cut) / 2 - own * cut, 1e-12)


def fit_mixture(scores: NDArray[np.floating], num_groups: int, *, quick: bool = False) -> Mixture:
    """The maximum likelihood mixture of `num_groups` Gaussians of one variance, by EM from several starts."""
    centres, counts = _binned(scores)
    tails = np.array((0.05, 0.3) if quick else (0.03, 0.1, 0.25, 0.5))
    rare_last = np.insert(1 - np.outer(tails, np.linspace(1, 0, num_groups)), 0, 0.0, axis=1)
    edges = np.concatenate([rare_last, 1 - rare_last[:, ::-1]])  # of shares, the rare components at either end
    middles = (edges[:, :-1] + edges[:, 1:]) / 2
    means = np.sort(scores)[(middles * (len(scores) - 1)).astype(int)]
    mean = (counts @ centres) / counts.sum()
    spread = np.sqrt(counts @ (centres - mean) ** 2 / counts.sum())
    fitted = Mixture(np.sort(means, axis=-1), np.diff(edges), np.full(len(edges), 0.5 * max(spread, 1e-9)))
    for steps, kept in ((15, slice(2)), (25 if quick else 85, 0)):  # the likeliest two after a few steps go on
        fitted = _em(fitted, centres, np.broadcast_to(counts, (len(fitted.means), len(centres))), steps=steps)
        best = np.argsort(-(fitted.log_density(centres) @ counts), kind="stable")[kept]
        fitted = Mixture(fitted.means[best], fitted.shares[best], fitted.deviation[best])
    return fitted


def _binned(scores: NDArray[np.floating]) -> tuple[_Array, _Array]:
    """Centres and counts of a fine histogram of scores, those far from all others moved nearer."""
    low, middle, high = np.quantile(scores, [0.25, 0.5, 0.75])
    reach = REACH * max(high - low, 1e-9)
    counts, edges = np.histogram(np.clip(scores, middle - reach, middle + reach), bins=BINS)
    return (edges[:-1] + edges[1:]) / 2, counts.astype(float)


def _em(start: Mixture, centres: _Array, counts: _Array, *, steps: int) -> Mixture:
    """EM on histograms, counts (batch, bins), from a batch of mixtures."""
    total, square = counts.sum(axis=-1), counts @ centres**2
    means, shares, variance = start.means, start.shares, start.deviation**2
    least = ((centres[1] - centres[0]) / 2) ** 2
    for _ in range(steps):
        # Of one variance, the log odds of two components are linear in the score.
        slope = means / variance[:, None]
        logits = slope[..., None] * centres + (np.log(np.maximum(shares, 1e-300)) - slope * means / 2)[..., None]
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))  # (batch, E, bins)
        weights *= (counts / weights.sum(axis=1))[:, None]
        mass = np.maximum(weights.sum(axis=2), 1e-9)
        before, means = means, (weights @ centres) / mass
        shares = mass / total[:, None]
        variance = np.maximum((square - (mass * means**2).sum(axis=1)) / total, least)
        if np.abs(means - before).max() < 1e-3 * np.sqrt(variance.min()):
            break
    order = np.argsort(means, axis=-1)
    return Mixture(np.take_along_axis(means, order, -1), np.take_along_axis(shares, order, -1), np.sqrt(variance))


@dataclass(frozen=True)
class Humps:
    """A mixture whose largest component is any log-concave hump, and whose others are Gaussians, in rising order.

    Of real features the large hump is seldom Gaussian: a skewed one looks like two to a mixture of Gaussians.
    """

    gaussians: Mixture  # with the shares of all components; the largest one's Gaussian has its mean and deviation
    deviations: _Array  # of each component, (E,)
    largest: int
    knots: _Array  # between them the log density of the largest is linear, (k,); beyond it is wide and Gaussian
    heights: _Array  # its log density there, (k,)

    def log_parts(self, scores: _Array) -> _Array:
        """Log density of each component, times its share, (n, E)."""
        means, shares = self.gaussians.means, self.gaussians.shares
        parts = norm.logpdf(scores[:, None], means, self.deviations)
        inside = np.interp(scores, self.knots, self.heights, left=-np.inf, right=-np.inf)
        beyond = norm.logpdf(scores, means[self.largest], 1.5 * self.deviations[self.largest])
        parts[:, self.largest] = np.logaddexp(np.log1p(-BEYOND) + inside, np.log(BEYOND) + beyond)
        return parts + np.log(shares)

    def log_density(self, scores: _Array) -> _Array:
        """(n,)."""
        return np.logaddexp.reduce(self.log_parts(scores), axis=1)

    def posterior(self, scores: _Array) -> _Array:
        """The probability of each component, (n, E); of a higher one it never falls as the score rises."""
        order = np.argsort(scores, kind="stable")
        plain = softmax(self.log_parts(scores), axis=1)[order]
        above = np.cumsum(plain[:, ::-1], axis=1)[:, ::-1]  # of this component or a higher one
        start = int(np.searchsorted(scores[order], self.gaussians.means[self.largest]))
        above[start:] = np.maximum.accumulate(above[start:], axis=0)
        above[:start] = np.minimum.accumulate(above[:start][::-1], axis=0)[::-1]
        posterior = np.empty_like(plain)
        posterior[order] = np.clip(above - np.append(above[:, 1:], np.zeros((len(above), 1)), axis=1), 0.0, 1.0)
        return posterior / posterior.sum(axis=1, keepdims=True)


def fit_humps(scores: _Array, start: Mixture, *, steps: int = STEPS) -> Humps | None:
    """The humps of scores (n,), by EM from a mixture of Gaussians; None where a component vanishes.

    Of more than `MOST_JUDGED` scores those of evenly chosen ranks are fitted.
    """
    if len(scores) > MOST_JUDGED:
        scores = np.sort(scores)[np.linspace(0, len(scores) - 1, MOST_JUDGED).astype(int)]
    largest, weights = int(start.shares.argmax()), start.posterior(scores)
    humps, hull = None, None
    for _ in range(steps):
        mass = weights.sum(axis=0)
        if mass.min() < LEAST_MASS or mass[largest] < 10 * LEAST_MASS:
            return None
        means = weights.T @ scores / mass
        deviations = np.sqrt((weights * (scores[:, None] - means) ** 2).sum(axis=0) / mass)
        if not (np.diff(means) > 0).all() or deviations.min() <= 0:
            return None
        deviations = np.minimum(deviations, 1.5 * deviations[largest])
        hull = fit_log_concave(scores, weights[:, largest], hull)
        pooled = np.sqrt(mass @ deviations**2 / mass.sum())
        humps = Humps(Mixture(means, mass / mass.sum(), pooled), deviations, largest, *hull)
        weights = softmax(humps.log_parts(scores), axis=1)
    return humps


def rand_low(scores: NDArray[np.floating], mixture: Mixture, rng: np.random.Generator) -> float:
    """Lower 95% bound of the adjusted Rand index with the truth that separation and shares of a mixture predict.

    Over bootstrap resamples of the scores (n,) that it was fitted to.
    """
    centres, counts = _binned(scores)
    resampled = rng.multinomial(int(counts.sum()), counts / counts.sum(), size=RESAMPLES).astype(float)
    start = Mixture(*(np.repeat(np.asarray(part)[None], RESAMPLES, 0) for part in vars(mixture).values()))
    return round(float(np.quantile(_em(start, centres, resampled, steps=25).rand_index(), 0.05)), 4)


def share_intervals(posterior: _Array) -> list[tuple[float, float]]:
    """95% interval of each component's share, from posteriors (n, E): the less sure they are, the wider.

    It is normal on the scale of log odds, by the information about a share where the components are known; of a share
    of none or all it is Wilson's.
    """
    count, shares = len(posterior), posterior.mean(axis=0)
    odds, wilson = logit(shares.clip(1e-12, 1 - 1e-12)), np.stack([count * shares, count * shares + 1.96**2])
    half = 1.96 / np.maximum(posterior.std(axis=0) * np.sqrt(count), 1e-12)
    sure = count * np.minimum(shares, 1 - shares) < 0.5  # of an image
    ends = np.where(sure, wilson / (count + 1.96**2), expit([odds - half, odds + half]))
    return [(round(float(low), 4), round(float(high), 4)) for low, high in ends.T]


def num_modes(mixture: Mixture) -> int:
    """How many maxima the density of a mixture has."""
    grid = np.linspace(mixture.means[0] - mixture.deviation, mixture.means[-1] + mixture.deviation, 2000)
    rises = np.diff(mixture.log_density(grid)) > 0
    return int((rises[:-1] & ~rises[1:]).sum())


def halves(distinct: _Mask, rng: np.random.Generator) -> list[tuple[_Mask, _Mask]]:
    """For each rotation, which images, (n,), are learned from and which are the evidence.

    Of images that are nearly the same only one, those of `distinct` (n,), is in either; at most `MOST_JUDGED` are.
    """
    orders = [rng.permutation(np.flatnonzero(distinct))[:MOST_JUDGED] for _ in range(ROTATIONS)]
    every = np.arange(len(distinct))
    return [(np.isin(every, order[::2]), np.isin(every, order[1::2])) for order in orders]


def log_e_value(
    learn: Callable[[_Mask], Sequence[_Array]],
    scores: _Array,
    num_groups: int,
    rotations: Sequence[tuple[_Mask, _Mask]],
) -> float:
    """Natural log of an e-value against "one log-concave hump" of scores (n,).

    `learn` makes scores (n,) from those images alone for which its mask (n,) is true. Where it makes several, the one
    most like `scores` is taken and the e-value divided by their number, so that the choice costs no validity. Two
    mixtures are tried against the hump, of Gaussians and of a free large hump, and their e-values averaged. Where the
    first rotations show nothing, or two humps beyond doubt, the others are not tried and count as 0, which can only
    lower the e-value.
    """
    logs, log_e = list[float](), -np.inf
    for known, held_out in rotations if rotations[0][1].sum() > 1 else ():  # else all are nearly the same
        learned = [one for one in learn(known) if np.ptp(one[known]) > 0 and np.ptp(one[held_out]) > 0]
        if learned:
            chosen = max(learned, key=lambda one: abs(np.corrcoef(one, scores)[0, 1]))
            own, evidence = chosen[known], chosen[held_out]
            mixture = fit_mixture(own, num_groups, quick=True)
            likelihoods = [mixture.log_density(evidence).sum()]
            if (humps := fit_humps(own, mixture, steps=3)) is not None:
                likelihoods.append(humps.log_density(evidence).sum())
            gain = np.logaddexp.reduce(likelihoods) - np.log(2) - max_log_likelihood(evidence)
            logs.append(float(gain) - np.log(len(learned)))
        log_e = float(np.logaddexp.reduce(logs) - np.log(len(rotations))) if logs else -np.inf
        if log_e > CLEAR or (len(logs) >= LEAST_ROTATIONS and max(logs) < 0):
            break
    return log_e


def e_bh(log_e: Sequence[float], level: float) -> NDArray[np.bool_]:
    """Which hypotheses are rejected at a false discovery rate of `level`, whatever their dependence (e-BH)."""
    p_values = np.exp(-np.maximum(np.asarray(log_e, dtype=float), 0.0))  # 1 / E, by Benjamini and Hochberg's rule
    return false_discovery_control(p_values) <= level


def power(num_images: int, candidates: int, config: AuditConfig) -> str:
    """What size of minority could have been seen among a prompt's images, in words; see docs/auditing.md.

    The smallest with which the expected log e-value, of scores at the quantiles of the mixture, passes the first
    threshold of e-BH.
    """
    n, needed = num_images // 2, np.log(max(candidates, 1) / config.level)
    for share in (share for share in SHARES if n * share >= 3):
        mixture = Mixture(np.array([0.0, AWAY]), np.array([1 - share, share]), np.array(1.0))
        grid = np.linspace(-5, AWAY + 5, 4000)
        shared = norm.cdf(grid) * (1 - share) + norm.cdf(grid - AWAY) * share
        points = np.interp((np.arange(n) + 0.5) / n, shared, grid)
        fitted = mixture.log_density(points).sum() - 2  # what is lost by fitting it, half a parameter each
        if fitted - max_log_likelihood(points) >= needed and mixture.rand_index() >= config.min_rand:
            # A share just above the least that a group may have is found below it as often as not.
            least = f"a group of {max(share, 1.5 * config.min_share):.1%} or more, {AWAY} standard deviations away,"
            return f"{least} would probably have been seen in {num_images:,} images"
    return f"{num_images:,} images are too few to see a group of any size {AWAY} standard deviations away"
