"""Intervals of means and shares over independent images."""

from __future__ import annotations

from numbers import Integral

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import norm, t

from ...errors import EvaluationError
from .kernels import check_confidence


def mean_interval(values: ArrayLike, *, confidence: float = 0.95) -> tuple[float, float]:
    """Return a confidence interval of a mean over independent images, such as `clip_t`, by Student's t.

    Args:
        values: One for each image, (N,).
        confidence: Nominal coverage, above 0 and below 1.

    Returns:
        The lower and the upper end.

    Raises:
        EvaluationError: There are fewer than two values, or some are not finite, or the confidence is out of range.
    """
    check_confidence(confidence)
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) < 2 or not np.isfinite(array).all():
        raise EvaluationError(
            f"Expected at least two finite values in one dimension, got {int(np.isfinite(array).sum())} finite ones "
            f"of shape {array.shape}. An interval is not defined there: give one value per image."
        )
    half = float(t.ppf((1 + confidence) / 2, len(array) - 1) * array.std(ddof=1) / np.sqrt(len(array)))
    return float(array.mean()) - half, float(array.mean()) + half


def share_interval(successes: int, total: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Return Wilson's (1927) score interval of a share of independent images, such as accuracy.

    It stays within [0, 1] and has width even where all images agree. For precision, recall and coverage it holds the
    balls of the other set fixed, so it is too narrow where that set is small.

    Args:
        successes: How many images have the property.
        total: How many images there are.
        confidence: Nominal coverage, above 0 and below 1.

    Returns:
        The lower and the upper end.

    Raises:
        EvaluationError: There is no image, or the counts are not whole or disagree, or the confidence is out of
            range.
    """
    check_confidence(confidence)
    whole = isinstance(successes, Integral) and isinstance(total, Integral)
    if not whole or total < 1 or not 0 <= successes <= total:
        raise EvaluationError(
            f"Expected whole numbers of successes, from 0 to a total of at least 1, got {successes} of {total}. "
            "Count the images."
        )
    z_squared = float(norm.ppf((1 + confidence) / 2)) ** 2
    share = successes / total
    centre = (share + z_squared / (2 * total)) / (1 + z_squared / total)
    half = np.sqrt(z_squared * (share * (1 - share) / total + z_squared / (4 * total**2))) / (1 + z_squared / total)
    return max(float(centre - half), 0.0), min(float(centre + half), 1.0)
