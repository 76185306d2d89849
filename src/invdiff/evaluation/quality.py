"""Image quality as the distance between two sets of features."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import EvaluationError


def frechet_distance(features: ArrayLike, reference: ArrayLike) -> float:
    """Return the squared Fréchet distance between Gaussians fitted to two sets of features (FID's formula).

    |m1 - m2|^2 + Tr(S1 + S2 - 2 (S1 S2)^(1/2)), Dowson and Landau (1982). With S = R^T R, from the QR
    decomposition of the centred features, Tr (S1 S2)^(1/2) is the sum of the singular values of R1 R2^T: no
    matrix square root, no complex numbers, and it holds for singular covariances (N < D) too. Computed in
    float64 with unbiased covariances. The distance falls as N grows: compare only sets of equal size.

    Args:
        features: Features of the images in question, (N, D).
        reference: Features of the reference images, (M, D), from the same extractor.

    Raises:
        EvaluationError: A set has fewer than two rows, holds values that are not finite, or D differs.
    """
    first, second = _checked(features, "features"), _checked(reference, "reference features")
    if first.shape[1] != second.shape[1]:
        raise EvaluationError(
            f"Expected features of one width, got {first.shape[1]} and {second.shape[1]} (reference). "
            "Compute both with the same annotator."
        )
    difference = first.mean(axis=0) - second.mean(axis=0)
    first_root, second_root = _covariance_root(first), _covariance_root(second)
    cross = np.linalg.svd(first_root @ second_root.T, compute_uv=False).sum()
    traces = np.square(first_root).sum() + np.square(second_root).sum()
    return max(float(difference @ difference + traces - 2 * cross), 0.0)


def _covariance_root(features: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return R with R^T R the covariance, (min(N, D), D)."""
    centred = features - features.mean(axis=0)
    return np.asarray(np.linalg.qr(centred / np.sqrt(len(features) - 1), mode="r"), dtype=np.float64)


def _checked(features: ArrayLike, name: str) -> NDArray[np.float64]:
    array = np.asarray(features, dtype=np.float64)
    if array.ndim != 2 or array.shape[0] < 2 or array.shape[1] < 1:
        raise EvaluationError(
            f"Expected {name} of shape (N, D) with N at least 2, got {array.shape}. Pass one row per image."
        )
    bad = np.flatnonzero(~np.isfinite(array).all(axis=1))
    if len(bad):
        raise EvaluationError(
            f"Expected finite {name}, got NaN or infinity in {len(bad)} of {len(array)} rows, first in row "
            f"{bad[0]}. Look at that image, or train the annotator again."
        )
    return array
