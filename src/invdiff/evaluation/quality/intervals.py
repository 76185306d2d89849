"""Intervals of means and shares over independent images, as their lower and upper end."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import binomtest, t

from ...errors import EvaluationError


def mean_interval(values: ArrayLike, *, confidence: float = 0.95) -> tuple[float, float]:
    """Student's t interval of the mean of (N,) values, such as CLIP-T."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) < 2:
        raise EvaluationError(f"Expected at least two values, one for each image, got shape {array.shape}.")
    half = float(t.ppf((1 + confidence) / 2, len(array) - 1) * array.std(ddof=1) / np.sqrt(len(array)))
    return float(array.mean()) - half, float(array.mean()) + half


def share_interval(successes: int, total: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's (1927) score interval of a share, `successes` of `total` images, such as accuracy.

    It stays within [0, 1] and has width even where all images agree. For precision, recall and coverage it holds the
    balls of the other set fixed, so it is too narrow where that set is small.
    """
    low, high = binomtest(successes, total).proportion_ci(confidence, method="wilson")
    return float(low), float(high)
