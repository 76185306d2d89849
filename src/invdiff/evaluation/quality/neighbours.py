"""How two sets of features cover each other, by balls that reach to the k-th nearest neighbour."""

from __future__ import annotations

from numbers import Integral
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ...errors import EvaluationError
from .kernels import FloatArray, blocks_of_products, checked_pair

ROUNDING = 1e-12
"""Of squared distances, relative to the largest squared length: what lies on the edge of a ball lies in it."""


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
    """Return fidelity and variety apart, each in two ways.

    Precision and recall: Kynkäänniemi et al., "Improved precision and recall metric for assessing generative models"
    (NeurIPS 2019). Density and coverage, which one outlier sways less: Naeem et al., "Reliable fidelity and diversity
    metrics for generative models" (ICML 2020). An image's ball reaches to the k-th nearest other image of its own set,
    its edge included; images that are equal are neighbours at distance 0.
    All four depend on N, M and k: compare only sets of equal size. For sets of one distribution, coverage is near
    1 - 2^-k where N = M, and density near 1.

    Args:
        features: Features of the images in question, (N, D).
        reference: Features of the reference images, (M, D), from the same extractor.
        k: Which neighbour a ball reaches to; the papers take 3 and 5.

    Raises:
        EvaluationError: A set does not have more than k rows, or holds values that are not finite, or D differs; or
            k is not a whole number of at least 1.
    """
    if not isinstance(k, Integral) or k < 1:
        raise EvaluationError(f"Expected k to be a whole number of at least 1, got {k}. 5 is usual.")
    images, references = checked_pair(features, reference, minimum=k + 1)
    centre = references.mean(axis=0)  # lengths far above distances would cost digits
    images, references = images - centre, references - centre
    slack = ROUNDING * max(_squared_lengths(images).max(), _squared_lengths(references).max())
    reach = _squared_radii(images, k) + slack
    reference_reach = _squared_radii(references, k) + slack

    balls_around, recalled, nearest = [], np.zeros(len(references), bool), np.full(len(references), np.inf)
    for rows, products in blocks_of_products(images, references):
        distances = _squared_distances(products, images[rows], references)
        balls_around.append(np.count_nonzero(distances <= reference_reach, axis=1))
        recalled |= (distances <= reach[rows, None]).any(axis=0)
        np.minimum(nearest, distances.min(axis=0), out=nearest)
    counts = np.concatenate(balls_around)
    return Neighbourhoods(
        precision=float(np.mean(counts > 0)),
        recall=float(recalled.mean()),
        density=float(counts.mean() / k),
        coverage=float(np.mean(nearest <= reference_reach)),
    )


def _squared_radii(array: FloatArray, k: int) -> FloatArray:
    """Return each row's squared distance to its k-th nearest other row, (N,)."""
    radii = []
    for rows, products in blocks_of_products(array, array):
        distances = _squared_distances(products, array[rows], array)
        distances[np.arange(len(distances)), np.arange(rows.start, rows.stop)] = np.inf
        distances.partition(k - 1, axis=1)
        radii.append(distances[:, k - 1].copy())
    return np.concatenate(radii)


def _squared_distances(products: FloatArray, first: FloatArray, second: FloatArray) -> FloatArray:
    """Turn inner products (rows, M) into squared distances, in place."""
    products *= -2
    products += _squared_lengths(first)[:, None]
    products += _squared_lengths(second)
    return np.maximum(products, 0, out=products)


def _squared_lengths(array: FloatArray) -> FloatArray:
    return np.asarray(np.einsum("nd,nd->n", array, array))
