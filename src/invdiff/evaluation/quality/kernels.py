"""Kernel distances between two sets of features, summed in blocks: memory does not grow with the number of pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from numbers import Integral

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import norm

from ...errors import EvaluationError

FloatArray = NDArray[np.float64]
Kernel = Callable[[FloatArray], FloatArray]
"""From inner products to kernel values, entry by entry."""

BLOCK_ENTRIES = 2**22
"""Pairs in memory at a time: 32 MiB for each array of them."""


def kernel_distance(
    features: ArrayLike,
    reference: ArrayLike,
    *,
    degree: int = 3,
    gamma: float | None = None,
    coef0: float = 1.0,
    num_subsets: int = 0,
    subset_size: int = 1000,
    seed: int = 0,
) -> float:
    """Return the squared MMD of two sets of features under (gamma x.y + coef0)^degree (KID's formula).

    Bińkowski et al., "Demystifying MMD GANs" (ICLR 2018): the unbiased estimate, which leaves out each image's pair
    with itself. Its expectation does not depend on the numbers of images, and is 0 where both sets come
    from one distribution: it is negative about half of the time there, and is given as it is. Papers often give a
    thousandfold of it. See `kernel_distance_interval` for how far to trust it.

    Args:
        features: Features of the images in question, (N, D).
        reference: Features of the reference images, (M, D), from the same extractor.
        degree: Of the polynomial, a whole number.
        gamma: Factor of the inner product; 1 / D unless given.
        coef0: Added to it.
        num_subsets: 0 takes all pairs, once. Otherwise the mean over so many random subsets, as the paper does; its
            expectation is the same, its scatter larger.
        subset_size: Images of each set in a subset.
        seed: Of the subsets.

    Raises:
        EvaluationError: A set has fewer than two rows, or fewer than a subset, or holds values that are not finite;
            or D differs; or a setting is out of range.
    """
    first, second = checked_pair(features, reference)
    kernel = _polynomial(first.shape[1], degree, gamma, coef0)
    _check_whole(num_subsets, "num_subsets", 0)
    if not num_subsets:
        return _PairSums.of(first, second, kernel).squared_mmd()
    _check_whole(subset_size, "subset_size", 2)
    smaller = min(len(first), len(second))
    if subset_size > smaller:
        raise EvaluationError(
            f"Expected a subset_size of at most {smaller}, the images of the smaller set, got {subset_size}. "
            "Choose fewer, or take all pairs with num_subsets=0."
        )
    numbers = np.random.default_rng(seed)
    values = []
    for _ in range(num_subsets):
        some, others = (array[numbers.choice(len(array), subset_size, replace=False)] for array in (first, second))
        values.append(_PairSums.of(some, others, kernel).squared_mmd())
    return float(np.mean(values))


def kernel_distance_interval(
    features: ArrayLike,
    reference: ArrayLike,
    *,
    degree: int = 3,
    gamma: float | None = None,
    coef0: float = 1.0,
    confidence: float = 0.95,
) -> tuple[float, float]:
    """Return a confidence interval of `kernel_distance` over all pairs: its value and the jackknife's error.

    Each image is left out in turn, which costs nothing beyond the sums over all pairs (Arvesen, "Jackknifing
    U-statistics", 1969). Where both sets come from one distribution the interval is too wide, so it misses zero less
    often than `confidence` allows.

    Args:
        features: Features of the images in question, (N, D).
        reference: Features of the reference images, (M, D), from the same extractor.
        degree: As for `kernel_distance`.
        gamma: As for `kernel_distance`.
        coef0: As for `kernel_distance`.
        confidence: Nominal coverage, above 0 and below 1.

    Returns:
        The lower and the upper end; the lower may be negative.

    Raises:
        EvaluationError: As for `kernel_distance`, or a set has fewer than three rows.
    """
    check_confidence(confidence)
    first, second = checked_pair(features, reference, minimum=3)
    sums = _PairSums.of(first, second, _polynomial(first.shape[1], degree, gamma, coef0))
    half = float(norm.ppf((1 + confidence) / 2)) * sums.standard_error()
    return sums.squared_mmd() - half, sums.squared_mmd() + half


def cmmd(features: ArrayLike, reference: ArrayLike, *, sigma: float = 10.0, scale: float = 1000.0) -> float:
    """Return the squared MMD of two sets of CLIP features under a Gaussian kernel, times `scale` (CMMD).

    Jayasumana et al., "Rethinking FID: towards a better evaluation metric for image generation" (CVPR 2024). With
    k(x, y) = exp(-|x - y|^2 / (2 sigma^2)), it is the biased estimate, mean k(x, x') + mean k(y, y') - 2 mean k(x, y)
    over all pairs, an image's pair with itself among them: never negative, above 0 by about 1 / N even for two sets of
    one distribution. Rows are scaled to unit length first, as the authors' code does where it embeds the images (with
    CLIP ViT-L/14 at 336 pixels): features that have it already are left as they are.

    Args:
        features: Features of the images in question, (N, D).
        reference: Features of the reference images, (M, D), from the same extractor.
        sigma: Width of the kernel.
        scale: Factor that makes the figures readable.

    Raises:
        EvaluationError: A set has fewer than two rows, holds values that are not finite or a row of zeros; or D
            differs; or a setting is not above 0.
    """
    for name, value in {"sigma": sigma, "scale": scale}.items():
        if not 0 < value < np.inf:
            raise EvaluationError(f"Expected a finite {name} above 0, got {value}. The paper's is the default.")
    first, second = (unit_rows(array, "features") for array in checked_pair(features, reference))
    gamma = 1 / (2 * sigma**2)

    def kernel_less_one(products: FloatArray) -> FloatArray:
        # All kernel values are near 1, which cancels in the estimate: left out, no digits are lost to it.
        return np.expm1((2 * gamma) * (products - 1))

    sums = _PairSums.of(first, second, kernel_less_one)
    return scale * max(sums.biased_squared_mmd(), 0.0)


@dataclass(frozen=True)
class _PairSums:
    """Sums of kernel values over the pairs of two sets, by image; each a pair of (N,) and (M,)."""

    within: tuple[FloatArray, FloatArray]
    """With all images of the same set, itself among them."""
    diagonal: tuple[FloatArray, FloatArray]
    """With itself."""
    across: tuple[FloatArray, FloatArray]
    """With all images of the other set."""

    @classmethod
    def of(cls, first: FloatArray, second: FloatArray, kernel: Kernel) -> _PairSums:
        within = tuple(
            np.concatenate([kernel(products).sum(axis=1) for _, products in blocks_of_products(array, array)])
            for array in (first, second)
        )
        diagonal = tuple(kernel(np.einsum("nd,nd->n", array, array)) for array in (first, second))
        by_row, by_column = [], np.zeros(len(second))
        for _, products in blocks_of_products(first, second):
            values = kernel(products)
            by_row.append(values.sum(axis=1))
            by_column += values.sum(axis=0)
        return cls((within[0], within[1]), (diagonal[0], diagonal[1]), (np.concatenate(by_row), by_column))

    def squared_mmd(self) -> float:
        """The unbiased estimate: Gretton et al. (2012), equation 3."""
        sizes = len(self.within[0]), len(self.within[1])
        means = [self._others(side).sum() / (size * (size - 1)) for side, size in enumerate(sizes)]
        return float(sum(means) - 2 * self.across[0].sum() / (sizes[0] * sizes[1]))

    def biased_squared_mmd(self) -> float:
        """The biased estimate: Gretton et al. (2012), equation 5."""
        sizes = len(self.within[0]), len(self.within[1])
        means = [self.within[side].sum() / size**2 for side, size in enumerate(sizes)]
        return float(sum(means) - 2 * self.across[0].sum() / (sizes[0] * sizes[1]))

    def standard_error(self) -> float:
        """The jackknife's, for the unbiased estimate: the two sets are independent, so their variances add up."""
        variance = 0.0
        for side, other in ((0, 1), (1, 0)):
            size, size_of_other = len(self.within[side]), len(self.within[other])
            others = self._others(side)
            within = (others.sum() - 2 * others) / ((size - 1) * (size - 2))
            across = (self.across[side].sum() - self.across[side]) / ((size - 1) * size_of_other)
            variance += (size - 1) * float(np.var(within - 2 * across))
        return float(np.sqrt(variance))

    def _others(self, side: int) -> FloatArray:
        return self.within[side] - self.diagonal[side]


def _polynomial(width: int, degree: int, gamma: float | None, coef0: float) -> Kernel:
    _check_whole(degree, "degree", 1)
    factor = 1 / width if gamma is None else gamma
    if not 0 < factor < np.inf or not 0 <= coef0 < np.inf:
        raise EvaluationError(
            f"Expected a finite gamma above 0 and a finite coef0 of at least 0, got {factor} and {coef0}. "
            "KID's are 1 / D (None) and 1."
        )

    def kernel(products: FloatArray) -> FloatArray:
        base = factor * products + coef0
        value = base.copy()
        for _ in range(degree - 1):  # several times as fast as a power of arrays
            value *= base
        return value

    return kernel


def blocks_of_products(first: FloatArray, second: FloatArray) -> Iterator[tuple[slice, FloatArray]]:
    """Yield rows of `first`, a few at a time, with their inner products with all of `second`, (rows, M)."""
    step = max(BLOCK_ENTRIES // len(second), 1)
    for start in range(0, len(first), step):
        rows = slice(start, min(start + step, len(first)))
        yield rows, first[rows] @ second.T


def checked(features: ArrayLike, name: str, *, minimum: int = 2) -> FloatArray:
    """Return features as float64, (N, D).

    Raises:
        EvaluationError: They have another shape, fewer than `minimum` rows, or values that are not finite.
    """
    try:
        array = np.asarray(features, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise EvaluationError(f"Expected {name} as an array of numbers, got something else ({error}).") from error
    if array.ndim != 2 or array.shape[0] < minimum or array.shape[1] < 1:
        raise EvaluationError(
            f"Expected {name} of shape (N, D) with N at least {minimum}, got {array.shape}. Pass one row per image."
        )
    bad = np.flatnonzero(~np.isfinite(array).all(axis=1))
    if len(bad):
        raise EvaluationError(
            f"Expected finite {name}, got NaN or infinity in {len(bad)} of {len(array)} rows, first in row "
            f"{bad[0]}. Look at that image, or use another extractor or annotator."
        )
    return array


def checked_pair(features: ArrayLike, reference: ArrayLike, *, minimum: int = 2) -> tuple[FloatArray, FloatArray]:
    """Return two sets of features as float64, (N, D) and (M, D).

    Raises:
        EvaluationError: As for `checked`, or D differs.
    """
    first = checked(features, "features", minimum=minimum)
    second = checked(reference, "reference features", minimum=minimum)
    if first.shape[1] != second.shape[1]:
        raise EvaluationError(
            f"Expected features of one width, got {first.shape[1]} and {second.shape[1]} (reference). "
            "Compute both with the same extractor or annotator."
        )
    return first, second


def unit_rows(array: FloatArray, name: str) -> FloatArray:
    """Return rows scaled to unit length, (N, D).

    Raises:
        EvaluationError: A row is all zeros and has no direction.
    """
    lengths = np.linalg.norm(array, axis=1, keepdims=True)
    zero = np.flatnonzero(lengths == 0)
    if len(zero):
        raise EvaluationError(
            f"Expected {name} with a direction, got {len(zero)} of {len(array)} rows of zeros, first row {zero[0]}. "
            "Look at that image: its cosines are not defined."
        )
    return array / lengths


def check_confidence(confidence: float) -> None:
    """Raise `EvaluationError` unless a confidence lies between 0 and 1."""
    if not 0 < confidence < 1:
        raise EvaluationError(f"Expected a confidence above 0 and below 1, got {confidence}. 0.95 is usual.")


def _check_whole(value: int, name: str, minimum: int) -> None:
    if not isinstance(value, Integral) or value < minimum:
        raise EvaluationError(f"Expected {name} to be a whole number of at least {minimum}, got {value}.")
