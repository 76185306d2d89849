"""Figures of features: distances between two sets (FID, KID, CMMD, neighbourhoods), cosines of pairs, diversity."""

from collections.abc import Callable, Iterator
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import entr
from scipy.stats import norm
from sklearn.metrics import pairwise_distances_chunked
from sklearn.metrics.pairwise import polynomial_kernel
from sklearn.utils import check_array, gen_batches

from ...errors import EvaluationError, first_line
from ..results import Quantity

FloatArray = NDArray[np.float64]

BLOCK_ENTRIES = 2**22  # pairs of images in memory at a time: 32 MiB for each array of them
ROUNDING = 1e-12  # of squared distances, relative to the largest squared length: an edge of a ball lies in it


def frechet_distance(features: ArrayLike, reference: ArrayLike) -> float:
    """Squared Fréchet distance between Gaussians fitted to features, (N, D), and a reference's, (M, D): FID's formula.

    |m1 - m2|^2 + Tr(S1 + S2 - 2 (S1 S2)^(1/2)), Dowson and Landau (1982), in float64 with unbiased covariances. With
    S = R^T R, Tr (S1 S2)^(1/2) is the sum of the singular values of R1 R2^T, which holds for singular covariances
    (N < D) too. The distance falls as N grows: compare only sets of equal size.
    """
    sets = checked_pair(features, reference)
    shift = sets[0].mean(axis=0) - sets[1].mean(axis=0)
    roots = [np.asarray(np.linalg.qr((rows - rows.mean(axis=0)) / np.sqrt(len(rows) - 1), mode="r")) for rows in sets]
    traces = sum(np.square(root).sum() for root in roots)
    return max(float(shift @ shift + traces - 2 * np.linalg.norm(roots[0] @ roots[1].T, "nuc")), 0.0)


def kernel_distance(features: ArrayLike, reference: ArrayLike, *, confidence: float = 0.95) -> Quantity:
    """Squared MMD of features, (N, D), and a reference's, (M, D), under the kernel (x.y / D + 1)^3 (KID).

    Bińkowski et al., "Demystifying MMD GANs" (ICLR 2018): the unbiased estimate, whose expectation does not depend on
    N and M, so that it may lie below 0; papers often give a thousandfold. The interval is the jackknife's (Arvesen,
    "Jackknifing U-statistics", 1969).
    """
    first, second = checked_pair(features, reference, minimum=3)
    # A product is several times faster than a power.
    sums, itself = _kernel_sums(
        first, second, lambda x, y: reduce(np.multiply, [polynomial_kernel(x, y, degree=1)] * 3)
    )
    value, variance = 0.0, 0.0
    for side, others in ((0, 1), (1, 0)):
        size, size_of_others = len(sums[side]), len(sums[others])
        within, across = sums[side][:, side] - itself[side], sums[side][:, others]
        value += within.sum() / (size * (size - 1)) - across.sum() / (size * size_of_others)
        within_without = (within.sum() - 2 * within) / ((size - 1) * (size - 2))  # each image left out in turn
        across_without = (across.sum() - across) / ((size - 1) * size_of_others)
        variance += (size - 1) * np.var(within_without - 2 * across_without)
    half = norm.ppf((1 + confidence) / 2) * np.sqrt(variance)
    return Quantity(float(value), float(value - half), float(value + half))


def cmmd(features: ArrayLike, reference: ArrayLike, *, sigma: float = 10.0, scale: float = 1000.0) -> float:
    """Squared MMD of CLIP features, (N, D) and (M, D), under a Gaussian kernel of width `sigma`, times `scale` (CMMD).

    Jayasumana et al., "Rethinking FID" (CVPR 2024): the biased estimate over all pairs with k(x, y) = exp(-|x - y|^2 /
    (2 sigma^2)), of rows scaled to unit length, above 0 by about 1 / N even for two sets of one distribution.
    """
    first, second = (unit_rows(array) for array in checked_pair(features, reference))
    # All kernel values are near 1, which cancels in the estimate: with 1 taken off, no digits are lost.
    sums, _ = _kernel_sums(first, second, lambda x, y: np.expm1((x @ y.T - 1) / sigma**2))
    n, m = len(first), len(second)
    estimate = sums[0][:, 0].sum() / n**2 + sums[1][:, 1].sum() / m**2 - 2 * sums[0][:, 1].sum() / (n * m)
    return scale * max(float(estimate), 0.0)


def precision_recall_density_coverage(
    features: ArrayLike, reference: ArrayLike, *, k: int = 5
) -> tuple[float, float, float, float]:
    """Fidelity and variety of features, (N, D), beside a reference's, (M, D), each in two ways.

    Precision is the share of images that lie in the ball of some reference image, recall that of reference images in
    the ball of some image. Density is how many balls of reference images an image lies in, as a mean, in units of k
    (above 1 in crowds); coverage is the share of reference images whose ball holds some image.
    Kynkäänniemi et al., "Improved precision and recall metric for assessing generative models" (NeurIPS 2019), and
    Naeem et al., "Reliable fidelity and diversity metrics for generative models" (ICML 2020). An image's ball reaches
    to the k-th nearest other image of its own set, its edge included. All depend on N, M and k: compare only sets of
    equal size.
    """
    images, references = checked_pair(features, reference, minimum=k + 1)
    centre = references.mean(axis=0)  # lengths far above distances would cost digits
    images, references = images - centre, references - centre
    slack = ROUNDING * max(np.square(array).sum(axis=1).max() for array in (images, references))
    reach, reference_reach = (  # the nearest of each row, at 0, is the image itself
        np.concatenate([np.partition(block, k, axis=1)[:, k] for block in _squared_distances(rows, rows)]) + slack
        for rows in (images, references)
    )
    balls, recalled, nearest, start = [], np.zeros(len(references), bool), np.full(len(references), np.inf), 0
    for block in _squared_distances(images, references):
        balls.append((block <= reference_reach).sum(axis=1))
        recalled |= (block <= reach[start : start + len(block), None]).any(axis=0)
        nearest = np.minimum(nearest, block.min(axis=0))
        start += len(block)
    held = np.concatenate(balls)
    shares = [float(np.mean(values)) for values in (held > 0, recalled, held, nearest <= reference_reach)]
    return shares[0], shares[1], shares[2] / k, shares[3]


def paired_cosines(features: ArrayLike, others: ArrayLike) -> FloatArray:
    """Cosine of each row of (N, D) with the row beside it, of the image's prompt or the image of the same seed, (N,).

    The mean of those of images with their prompts is CLIP-T (Ruiz et al., "DreamBooth", CVPR 2023); CLIPScore (Hessel
    et al., 2021) is 2.5 times the same, without what is below 0.
    """
    first, second = checked(features, minimum=1), checked(others, name="paired features", minimum=1)
    if first.shape != second.shape:
        raise EvaluationError(f"Expected paired features of one shape, got {first.shape} and {second.shape}.")
    return np.asarray(np.einsum("nd,nd->n", unit_rows(first), unit_rows(second)))


def mean_cosine_distance(features: ArrayLike) -> float:
    """Mean cosine distance over all pairs of different rows of (N, D), in [0, 2]."""
    rows = unit_rows(checked(features))
    total = rows.sum(axis=0)  # its square is the sum of all N^2 cosines
    return float(1 - (total @ total - len(rows)) / (len(rows) * (len(rows) - 1)))


def vendi_score(features: ArrayLike) -> float:
    """How many different images a set of features, (N, D), amounts to, from 1 (all alike) to N (no two alike).

    Friedman and Dieng, "The Vendi score" (TMLR 2023): exp of the entropy of the eigenvalues of K / N, where K holds
    the cosines of all pairs, (N, N). The inner products of the columns, (D, D), have the same eigenvalues other than
    0 and are used where they are fewer. The score grows with N: compare only sets of equal size.
    """
    rows = unit_rows(checked(features))
    similarities = rows.T @ rows if len(rows) > rows.shape[1] else rows @ rows.T
    eigenvalues = np.linalg.eigvalsh(similarities / len(rows))
    return float(np.exp(entr(np.maximum(eigenvalues, 0)).sum()))


def checked(features: ArrayLike, *, name: str = "features", minimum: int = 2) -> FloatArray:
    """Features as float64, (N, D); another shape, fewer rows or values not finite are an `EvaluationError`."""
    try:
        return check_array(features, dtype=np.float64, ensure_min_samples=minimum, input_name=name)
    except (TypeError, ValueError) as error:
        expected = f"Expected finite {name} of shape (N, D), N at least {minimum}"
        raise EvaluationError(f"{expected}, got something else: {first_line(error)}") from error


def checked_pair(features: ArrayLike, reference: ArrayLike, *, minimum: int = 2) -> tuple[FloatArray, FloatArray]:
    """Two sets of features, each `checked`, (N, D) and (M, D)."""
    first = checked(features, minimum=minimum)
    second = checked(reference, name="reference features", minimum=minimum)
    if first.shape[1] != second.shape[1]:
        widths = f"{first.shape[1]} and {second.shape[1]} (reference)"
        raise EvaluationError(f"Expected features of one width, got {widths}. Use one extractor for both.")
    return first, second


def unit_rows(array: FloatArray) -> FloatArray:
    """Rows scaled to unit length, (N, D); a row of zeros, which has no direction, is an `EvaluationError`."""
    lengths = np.linalg.norm(array, axis=1, keepdims=True)
    zero = np.flatnonzero(lengths == 0)
    if len(zero):
        raise EvaluationError(f"Expected features with a direction, got zeros in row {zero[0]}. Look at that image.")
    return array / lengths


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


def _squared_distances(first: FloatArray, second: FloatArray) -> Iterator[Any]:
    """Squared distances of (N, D) to (M, D), a few rows of (N, M) at a time."""
    return pairwise_distances_chunked(first, second, squared=True, working_memory=BLOCK_ENTRIES * 8 / 2**20)
