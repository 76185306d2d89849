"""Distances between two sets of features: Fréchet (FID), kernel (KID, CMMD) and neighbourhoods."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import norm
from sklearn.metrics import pairwise_distances_chunked
from sklearn.metrics.pairwise import polynomial_kernel
from sklearn.utils import check_array, gen_batches

from ...errors import EvaluationError, first_line

FloatArray = NDArray[np.float64]

BLOCK_ENTRIES = 2**22
"""Pairs of images in memory at a time: 32 MiB for each array of them."""
ROUNDING = 1e-12
"""Of squared distances, relative to the largest squared length: what lies on the edge of a ball lies in it."""


def frechet_distance(features: ArrayLike, reference: ArrayLike) -> float:
    """Squared Fréchet distance between Gaussians fitted to two sets of features (FID's formula).

    |m1 - m2|^2 + Tr(S1 + S2 - 2 (S1 S2)^(1/2)), Dowson and Landau (1982), in float64 with unbiased covariances. With
    S = R^T R, Tr (S1 S2)^(1/2) is the sum of the singular values of R1 R2^T, which holds for singular covariances
    (N < D) too. The distance falls as N grows: compare only sets of equal size.

    Args:
        features: Features of the images in question, (N, D).
        reference: Features of the reference images, (M, D), from the same extractor.

    Raises:
        EvaluationError: A set has fewer than two rows or values that are not finite, or D differs.
    """
    sets = checked_pair(features, reference)
    shift = sets[0].mean(axis=0) - sets[1].mean(axis=0)
    first, second = (_covariance_root(array) for array in sets)
    traces = np.square(first).sum() + np.square(second).sum()
    return max(float(shift @ shift + traces - 2 * np.linalg.norm(first @ second.T, "nuc")), 0.0)


class KernelDistance(NamedTuple):
    """A squared MMD with its confidence interval, both of which may lie below 0."""

    value: float
    low: float
    high: float


def kernel_distance(
    features: ArrayLike, reference: ArrayLike, *, degree: int = 3, confidence: float = 0.95
) -> KernelDistance:
    """Squared MMD of two sets of features under the kernel (x.y / D + 1)^degree (KID's formula).

    Bińkowski et al., "Demystifying MMD GANs" (ICLR 2018): the unbiased estimate over all pairs of different images
    (Gretton et al., 2012, equation 3), whose expectation does not depend on N and M. Where both sets come from one
    distribution it is negative about half of the time. Papers often give a thousandfold of it.

    The interval is the jackknife's (Arvesen, "Jackknifing U-statistics", 1969). For two sets of one distribution it
    is too wide, so it misses zero less often than `confidence` allows.

    Args:
        features: Features of the images in question, (N, D).
        reference: Features of the reference images, (M, D), from the same extractor.
        degree: Degree of the polynomial; KID's is 3.
        confidence: Nominal coverage, above 0 and below 1.

    Raises:
        EvaluationError: A set has fewer than three rows or values that are not finite, or D differs.
    """
    first, second = checked_pair(features, reference, minimum=3)
    sums, itself = _kernel_sums(first, second, lambda x, y: polynomial_kernel(x, y, degree=degree))
    value, variance = 0.0, 0.0
    for side, others in ((0, 1), (1, 0)):
        size, size_of_others = len(sums[side]), len(sums[others])
        within, across = sums[side][:, side] - itself[side], sums[side][:, others]
        value += within.sum() / (size * (size - 1)) - across.sum() / (size * size_of_others)
        within_without = (within.sum() - 2 * within) / ((size - 1) * (size - 2))  # each image left out in turn
        across_without = (across.sum() - across) / ((size - 1) * size_of_others)
        variance += (size - 1) * np.var(within_without - 2 * across_without)
    half = norm.ppf((1 + confidence) / 2) * np.sqrt(variance)
    return KernelDistance(float(value), float(value - half), float(value + half))


def cmmd(features: ArrayLike, reference: ArrayLike, *, sigma: float = 10.0, scale: float = 1000.0) -> float:
    """Squared MMD of two sets of CLIP features under a Gaussian kernel, times `scale` (CMMD).

    Jayasumana et al., "Rethinking FID: towards a better evaluation metric for image generation" (CVPR 2024). With
    k(x, y) = exp(-|x - y|^2 / (2 sigma^2)), it is the biased estimate (Gretton et al., 2012, equation 5),
    mean k(x, x') + mean k(y, y') - 2 mean k(x, y) over all pairs, an image's pair with itself among them: never
    negative, above 0 by about 1 / N even for two sets of one distribution. Rows are scaled to unit length first, as
    in the authors' code, which embeds images with CLIP ViT-L/14 at 336 pixels.

    Args:
        features: Features of the images in question, (N, D).
        reference: Features of the reference images, (M, D), from the same extractor.
        sigma: Width of the kernel.
        scale: Factor that makes the figures readable.

    Raises:
        EvaluationError: A set has fewer than two rows, values that are not finite or a row of zeros, or D differs.
    """
    first, second = (unit_rows(array) for array in checked_pair(features, reference))
    # All kernel values are near 1, which cancels in the estimate: with 1 taken off, no digits are lost.
    sums, _ = _kernel_sums(first, second, lambda x, y: np.expm1((x @ y.T - 1) / sigma**2))
    n, m = len(first), len(second)
    estimate = sums[0][:, 0].sum() / n**2 + sums[1][:, 1].sum() / m**2 - 2 * sums[0][:, 1].sum() / (n * m)
    return scale * max(float(estimate), 0.0)


class Neighbourhoods(NamedTuple):
    """How much of one set of features lies near the other; all but `density` are shares of images."""

    precision: float
    """Images that lie in the ball of some reference image: fidelity."""
    recall: float
    """Reference images that lie in the ball of some image: variety."""
    density: float
    """Balls of reference images that an image lies in, as a mean, in units of k; above 1 where images crowd."""
    coverage: float
    """Reference images whose ball holds some image."""


def precision_recall_density_coverage(features: ArrayLike, reference: ArrayLike, *, k: int = 5) -> Neighbourhoods:
    """Fidelity and variety apart, each in two ways.

    Precision and recall: Kynkäänniemi et al., "Improved precision and recall metric for assessing generative models"
    (NeurIPS 2019). Density and coverage, which one outlier sways less: Naeem et al., "Reliable fidelity and diversity
    metrics for generative models" (ICML 2020). An image's ball reaches to the k-th nearest other image of its own set,
    its edge included; images that are equal are neighbours at distance 0.
    All four depend on N, M and k: compare only sets of equal size. For sets of one distribution, coverage is near
    1 - 2^-k where N = M, and density near 1.

    Args:
        features: Features of the images in question, (N, D).
        reference: Features of the reference images, (M, D), from the same extractor.
        k: Which neighbour a ball reaches to, at least 1; the papers take 3 and 5.

    Raises:
        EvaluationError: A set does not have more than k rows or has values that are not finite, or D differs.
    """
    images, references = checked_pair(features, reference, minimum=k + 1)
    centre = references.mean(axis=0)  # lengths far above distances would cost digits
    images, references = images - centre, references - centre
    slack = ROUNDING * max(np.square(array).sum(axis=1).max() for array in (images, references))

    def squared_radius(distances: FloatArray, start: int) -> FloatArray:
        return np.partition(distances, k, axis=1)[:, k].copy()  # the nearest, at 0, is the image itself

    def recalled_and_covered(distances: FloatArray, start: int) -> NDArray[np.bool_]:
        own = reference_reach[start : start + len(distances)]
        return np.stack([(distances <= reach).any(axis=1), distances.min(axis=1) <= own], axis=1)

    reach, reference_reach = (_by_row(squared_radius, array) + slack for array in (images, references))
    balls = _by_row(lambda distances, start: (distances <= reference_reach).sum(axis=1), images, references)
    recall, coverage = _by_row(recalled_and_covered, references, images).mean(axis=0)
    return Neighbourhoods(float(np.mean(balls > 0)), float(recall), float(np.mean(balls) / k), float(coverage))


def checked(features: ArrayLike, *, name: str = "features", minimum: int = 2) -> FloatArray:
    """Features as float64, (N, D).

    Raises:
        EvaluationError: They have another shape, fewer than `minimum` rows, or values that are not finite.
    """
    try:
        return check_array(features, dtype=np.float64, ensure_min_samples=minimum, input_name=name)
    except (TypeError, ValueError) as error:
        raise EvaluationError(
            f"Expected finite {name} of shape (N, D), N at least {minimum}, got something else: {first_line(error)} "
            "Pass one row per image, all of one extractor or annotator."
        ) from error


def checked_pair(features: ArrayLike, reference: ArrayLike, *, minimum: int = 2) -> tuple[FloatArray, FloatArray]:
    """Two sets of features as float64, (N, D) and (M, D).

    Raises:
        EvaluationError: As for `checked`, or D differs.
    """
    first = checked(features, minimum=minimum)
    second = checked(reference, name="reference features", minimum=minimum)
    if first.shape[1] != second.shape[1]:
        raise EvaluationError(
            f"Expected features of one width, got {first.shape[1]} and {second.shape[1]} (reference). "
            "Compute both with the same extractor or annotator."
        )
    return first, second


def unit_rows(array: FloatArray) -> FloatArray:
    """Rows scaled to unit length, (N, D).

    Raises:
        EvaluationError: A row is all zeros and has no direction.
    """
    lengths = np.linalg.norm(array, axis=1, keepdims=True)
    zero = np.flatnonzero(lengths == 0)
    if len(zero):
        raise EvaluationError(
            f"Expected features with a direction, got {len(zero)} of {len(array)} rows of zeros, first row {zero[0]}. "
            "Look at that image: its cosines are not defined."
        )
    return array / lengths


def _covariance_root(features: FloatArray) -> FloatArray:
    """R with R^T R the covariance, (min(N, D), D)."""
    centred = features - features.mean(axis=0)
    return np.asarray(np.linalg.qr(centred / np.sqrt(len(features) - 1), mode="r"), dtype=np.float64)


def _kernel_sums(
    first: FloatArray, second: FloatArray, kernel: Callable[[FloatArray, FloatArray], FloatArray]
) -> tuple[list[FloatArray], list[FloatArray]]:
    """Sums of kernel values by image: with the first and with the second set, (N, 2) and (M, 2), and with itself."""
    both, sums, itself = np.concatenate([first, second]), [], []
    for rows in gen_batches(len(both), max(BLOCK_ENTRIES // len(both), 1)):
        values = kernel(both[rows], both)
        sums.append(np.stack([part.sum(axis=1) for part in np.split(values, [len(first)], axis=1)], axis=1))
        itself.append(np.diagonal(values, offset=rows.start).copy())
    return np.split(np.concatenate(sums), [len(first)]), np.split(np.concatenate(itself), [len(first)])


def _by_row(
    reduce: Callable[[FloatArray, int], NDArray[Any]], first: FloatArray, second: FloatArray | None = None
) -> NDArray[Any]:
    """What `reduce` makes of squared distances, a few rows of (N, M) at a time; (N, N) without `second`."""
    chunks = pairwise_distances_chunked(
        first,
        second,
        reduce_func=reduce,
        metric="euclidean",
        squared=True,
        working_memory=BLOCK_ENTRIES * 8 / 2**20,
    )
    return np.concatenate(list(chunks))
