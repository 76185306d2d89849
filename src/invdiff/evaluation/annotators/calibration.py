"""Temperature scaling of class probabilities, and how far probabilities are from the truth.

Guo et al., "On calibration of modern neural networks" (ICML 2017).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

MAX_TEMPERATURE = 100.0


def fit_temperature(logits: ArrayLike, truth: NDArray[np.int64]) -> float:
    """The temperature that minimises the negative log-likelihood of held-out images.

    Without a mistake among them, any probability below 1 would seem too modest, and the temperature would go to 0.
    So targets are smoothed by 1 / (N + 2), Laplace's estimate of the share of mistakes where N images show none
    (Platt, 1999, does the same for two classes).

    Args:
        logits: (N, classes).
        truth: Class indices, (N,).
    """
    scores, smoothing = np.asarray(logits, dtype=np.float64), 1 / (len(truth) + 2)

    def loss(log_temperature: float) -> float:
        log_probabilities = log_softmax(scores / np.exp(log_temperature), axis=1)
        of_truth = log_probabilities[np.arange(len(truth)), truth]
        of_others = (log_probabilities.sum(axis=1) - of_truth) / (scores.shape[1] - 1)
        return float(-((1 - smoothing) * of_truth + smoothing * of_others).mean())

    # Convex in 1 / T, so there is one minimum for the bounded search to find.
    bound = np.log(MAX_TEMPERATURE)
    found = minimize_scalar(loss, bounds=(-bound, bound), method="bounded", options={"xatol": 1e-6})
    return float(np.exp(found.x)) if found.fun < loss(0.0) else 1.0


def expected_calibration_error(probabilities: NDArray[Any], truth: NDArray[np.int64], *, num_bins: int = 15) -> float:
    """Mean distance of confidence to accuracy over equal bins of confidence, weighted by images.

    Naeini et al., "Obtaining well calibrated probabilities using Bayesian binning" (AAAI 2015). With N images it is
    above zero even for a perfectly calibrated annotator, by about sqrt(bins in use / N).

    Args:
        probabilities: (N, classes).
        truth: Class indices, (N,).
        num_bins: Bins (0, 1/num_bins], (1/num_bins, 2/num_bins] and so on.
    """
    values = np.asarray(probabilities, dtype=np.float64)
    confidence, correct = values.max(axis=1), values.argmax(axis=1) == truth
    bins = np.searchsorted(np.arange(1, num_bins) / num_bins, confidence)
    gaps = np.bincount(bins, weights=correct - confidence, minlength=num_bins)
    return float(np.abs(gaps).sum() / len(values))
