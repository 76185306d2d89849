"""Which words tell groups apart: differences, and a permutation test corrected for all words. Plain numpy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_Array = NDArray[np.float64]

LEAST_IMAGES = 10
"""Smaller groups (Kish's effective size, where W is soft) are not judged."""
_AT_ONCE = 100


@dataclass(frozen=True)
class Part:
    """Images of one prompt, as the test sees them."""

    scores: _Array
    """(n, V) how near each image is to each word."""
    weights: _Array
    """(n, E) their rows of W."""
    usable: NDArray[np.bool_]
    """(V,) the words that are tried under this prompt."""

    @property
    def judged(self) -> NDArray[np.bool_]:
        """Which groups (E,) are large enough, and leave enough others, to be compared with them."""
        judged: NDArray[np.bool_] = np.minimum(_effective(self.weights), _effective(1 - self.weights)) >= LEAST_IMAGES
        return judged


@dataclass(frozen=True)
class Comparison:
    """Each group's images against the others, word by word, (E, V); 0 where nothing was compared."""

    difference: _Array
    """Of weighted mean scores, within each prompt, averaged over prompts."""
    effect: _Array
    """The same in standard deviations of a word's score under its prompt."""
    statistic: _Array
    """The effect over its standard error, in which each group has its own variance (Welch)."""


def compare(parts: Sequence[Part]) -> Comparison:
    """Compare each group with the other images of its prompt, over one prompt or several.

    A prompt counts by the precision that its group sizes give a difference, where it tries the word.

    Args:
        parts: One per prompt, with the same words and groups.
    """
    difference, effect, statistic = _compared(
        [_standardised(part) for part in parts], [p.weights[None] for p in parts]
    )
    return Comparison(difference[0], effect[0], statistic[0])


def chance_maxima(parts: Sequence[Part], rng: np.random.Generator, *, permutations: int = 999) -> _Array:
    """Return the largest absolute statistic of any group and word where groups mean nothing, (permutations,).

    Rows of W change places within each prompt. Held against these maxima (Westfall and Young's max-T), statistics
    have p-values that hold for all words and groups together, however words depend on each other: exactly where
    groups differ in nothing, and nearly where a group is only more varied than the others, since statistics with
    variances of their own are compared (Chung and Romano, Annals of Statistics 2013).

    Args:
        parts: As for `compare`.
        rng: Draws the permutations.
        permutations: How many; the smallest p-value is 1 / (permutations + 1).
    """
    standard = [_standardised(part) for part in parts]
    maxima = []
    for start in range(0, permutations, _AT_ONCE):
        count = min(_AT_ONCE, permutations - start)
        orders = [rng.permuted(np.tile(np.arange(len(p.weights)), (count, 1)), axis=1) for p in parts]
        drawn = [part.weights[order] for part, order in zip(parts, orders, strict=True)]
        maxima.append(np.abs(_compared(standard, drawn)[2]).max(axis=(1, 2)))
    return np.concatenate(maxima)


def p_values(statistics: _Array, maxima: _Array) -> _Array:
    """Return the p-value of each statistic against the largest ones by chance; the observed order counts as one."""
    beaten = len(maxima) - np.searchsorted(np.sort(maxima), np.abs(statistics) - 1e-9)
    return np.where(statistics == 0, 1.0, (1 + beaten) / (1 + len(maxima)))


@dataclass(frozen=True)
class _Standard:
    """A part with scores in standard deviations from their mean."""

    scores: _Array
    spread: _Array
    """(V,) standard deviations."""
    importance: _Array
    """(E, V) how much the part counts; 0 where it does not judge the group or not try the word."""
    size: _Array
    effective: _Array
    effective_others: _Array
    """(E,) of the group and of the others."""


def _standardised(part: Part) -> _Standard:
    centred = part.scores - part.scores.mean(axis=0)
    spread = centred.std(axis=0)
    varied = spread > 1e-9  # a word that varies not at all is not tried
    size = part.weights.sum(axis=0)
    share = np.where(part.judged, size * (len(part.scores) - size) / len(part.scores), 0.0)
    return _Standard(
        scores=np.where(varied, centred / np.where(varied, spread, 1.0), 0.0),
        spread=spread,
        importance=share[:, None] * (part.usable & varied),
        size=size,
        effective=_effective(part.weights),
        effective_others=_effective(1 - part.weights),
    )


def _compared(parts: Sequence[_Standard], drawn: Sequence[_Array]) -> tuple[_Array, _Array, _Array]:
    """Return differences, effects and statistics, each (P, E, V), of P orders of each part's W, given as (P, n, E)."""
    raw, standard, variance, total = np.zeros(1), np.zeros(1), np.zeros(1), np.zeros(1)
    for part, weights in zip(parts, drawn, strict=True):
        between, error = _between(part, weights)
        raw = raw + part.importance * part.spread * between
        standard = standard + part.importance * between
        variance = variance + part.importance**2 * error
        total = total + part.importance
    tried = total > 0
    total, variance = np.where(tried, total, 1.0), np.where(tried, variance, 1.0)
    return raw / total, standard / total, standard / np.sqrt(variance)


def _between(part: _Standard, weights: _Array) -> tuple[_Array, _Array]:
    """Return differences of means, the group's less the others', and their squared standard errors, (P, E, V)."""
    columns = weights.transpose(0, 2, 1)  # (P, E, n)
    flat = columns.reshape(-1, columns.shape[2])
    squared = part.scores**2
    sums, squares = ((flat @ values).reshape(*columns.shape[:2], -1) for values in (part.scores, squared))
    mean, error = _mean(sums, squares, part.size, part.effective)
    others = part.scores.sum(axis=0) - sums, squared.sum(axis=0) - squares
    rest, rest_error = _mean(*others, len(part.scores) - part.size, part.effective_others)
    return mean - rest, error + rest_error


def _mean(sums: _Array, squares: _Array, size: _Array, effective: _Array) -> tuple[_Array, _Array]:
    """Return weighted means and their squared standard errors, (P, E, V), of groups (E,) of such sizes."""
    size = np.maximum(size, 1e-9)[:, None]
    mean = sums / size
    spread = np.maximum(squares / size - mean**2, 1e-9)
    return mean, spread / np.maximum(effective - 1, 1.0)[:, None]


def _effective(weights: _Array) -> _Array:
    """Return Kish's effective size of each group, (E,): its images, where W says yes or no."""
    squares = (weights**2).sum(axis=0)
    return np.where(squares > 0, weights.sum(axis=0) ** 2 / np.maximum(squares, 1e-12), 0.0)
