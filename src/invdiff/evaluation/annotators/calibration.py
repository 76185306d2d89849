"""Temperature scaling of class probabilities, and how far probabilities are from the truth.

Guo et al., "On calibration of modern neural networks" (ICML 2017).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from ...errors import EvaluationError

MAX_TEMPERATURE = 100.0


def negative_log_likelihood(
    logits: ArrayLike, truth: ArrayLike, temperature: float = 1.0, *, smoothing: float = 0.0
) -> float:
    """Return the mean negative log-likelihood of `softmax(logits / temperature)`.

    Args:
        logits: (N, classes).
        truth: Class indices, (N,).
        temperature: Above 0; larger is less confident.
        smoothing: Probability mass of each target that is spread evenly over the other classes.
    """
    scores, classes = _checked(logits, truth)
    log_probabilities = log_softmax(scores / temperature, axis=1)
    of_truth = log_probabilities[np.arange(len(classes)), classes]
    of_others = (log_probabilities.sum(axis=1) - of_truth) / (scores.shape[1] - 1)
    return float(-((1 - smoothing) * of_truth + smoothing * of_others).mean())


def fit_temperature(logits: ArrayLike, truth: ArrayLike) -> float:
    """Return the temperature that minimises the negative log-likelihood of held-out images.

    Without a mistake among them, any probability below 1 would seem too modest, and the temperature would go to 0.
    So targets are smoothed by 1 / (N + 2), Laplace's estimate of the share of mistakes where N images show none
    (Platt, 1999, does the same for two classes).

    Args:
        logits: (N, classes).
        truth: Class indices, (N,).

    Raises:
        EvaluationError: There are no images or fewer than two classes, sizes disagree, logits are not finite, or
            an index is no class.
    """
    scores, classes = _checked(logits, truth)
    smoothing = 1 / (len(classes) + 2)

    def loss(log_temperature: float) -> float:
        return negative_log_likelihood(scores, classes, float(np.exp(log_temperature)), smoothing=smoothing)

    # Convex in 1 / T, so there is one minimum for the bounded search to find.
    bound = np.log(MAX_TEMPERATURE)
    found = minimize_scalar(loss, bounds=(-bound, bound), method="bounded", options={"xatol": 1e-6})
    return float(np.exp(found.x)) if found.fun < loss(0.0) else 1.0


def expected_calibration_error(probabilities: ArrayLike, truth: ArrayLike, *, num_bins: int = 15) -> float:
    """Return the mean distance of confidence to accuracy over equal bins of confidence, weighted by images.

    Naeini et al., "Obtaining well calibrated probabilities using Bayesian binning" (AAAI 2015). With N images it is
    above zero even for a perfectly calibrated annotator, by about sqrt(bins in use / N).

    Args:
        probabilities: (N, classes).
        truth: Class indices, (N,).
        num_bins: Bins (0, 1/num_bins], (1/num_bins, 2/num_bins] and so on.

    Raises:
        EvaluationError: As for `fit_temperature`, or `num_bins` is below 1.
    """
    values, classes = _checked(probabilities, truth)
    if num_bins < 1:
        raise EvaluationError(f"Expected at least 1 bin, got {num_bins}. The usual number is 15.")
    confidence = values.max(axis=1)
    correct = values.argmax(axis=1) == classes
    inner_edges = np.arange(1, num_bins) / num_bins
    bins = np.searchsorted(inner_edges, confidence)
    gaps = np.bincount(bins, weights=correct - confidence, minlength=num_bins)
    return float(np.abs(gaps).sum() / len(classes))


def _checked(scores: ArrayLike, truth: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    values, classes = np.asarray(scores, dtype=np.float64), np.asarray(truth)
    if values.ndim != 2 or len(values) == 0 or values.shape[1] < 2 or classes.shape != (len(values),):
        raise EvaluationError(
            f"Expected (images, classes) of at least 1 image and 2 classes and one true class each, got shapes "
            f"{values.shape} and {classes.shape}. Give one row per held-out image."
        )
    if not np.isfinite(values).all():
        raise EvaluationError("Expected finite values for every class, got NaN or infinity. Look at the images.")
    if not np.issubdtype(classes.dtype, np.integer) or classes.min() < 0 or classes.max() >= values.shape[1]:
        raise EvaluationError(
            f"Expected true classes as integers from 0 to {values.shape[1] - 1}, got {classes.dtype} from "
            f"{classes.min()} to {classes.max()}. Number the classes as the columns are."
        )
    return values, classes.astype(np.int64)
