"""Bias from counts: how unevenly a prompt's images fall into the classes of a sensitive attribute."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import gammaln
from scipy.stats import binom

from ..errors import EvaluationError

FloatArray = NDArray[np.float64]


def shares(counts: ArrayLike) -> FloatArray:
    """Return the share of each group among a prompt's images.

    Args:
        counts: Images per prompt and group, (prompts, groups).

    Returns:
        Shares that sum to 1 over the groups, (prompts, groups).

    Raises:
        EvaluationError: The counts are negative or not finite, a prompt has no image, or there are fewer than
            two groups.
    """
    checked = _checked(counts)
    return checked / checked.sum(axis=1, keepdims=True)


def bias_per_prompt(counts: ArrayLike) -> FloatArray:
    """Return each prompt's mean over pairs of groups of |p_i - p_j|, (prompts,); 0 is perfectly even.

    Args:
        counts: Images per prompt and group, (prompts, groups).

    Raises:
        EvaluationError: As for `shares`.
    """
    return _mean_pair_difference(shares(counts))


def bias(counts: ArrayLike) -> float:
    """Return the Bias of Shen et al., "Finetuning text-to-image diffusion models for fairness" (ICLR 2024).

    Bias is the mean over prompts of the mean over pairs of groups of |p_i - p_j|. With finitely many images
    it is above zero even for a fair sampler: read it beside `bias_floor`.

    Args:
        counts: Images per prompt and group, (prompts, groups).

    Raises:
        EvaluationError: As for `shares`.
    """
    return float(bias_per_prompt(counts).mean())


def bias_floor(num_images: ArrayLike, num_groups: int) -> float:
    """Return the exact expected Bias of a sampler that draws the groups uniformly and independently.

    For one pair of groups, n_i + n_j = T is Binomial(N, 2 / K), and given T the difference n_i - n_j is where
    a simple random walk stands after T steps, whose mean distance from zero has a closed form.

    Args:
        num_images: Images per prompt, N: one number for all prompts, or (prompts,).
        num_groups: Groups K.

    Raises:
        EvaluationError: Fewer than two groups, or a number of images that is not a whole number above zero.
    """
    if num_groups < 2:
        raise EvaluationError(f"Expected at least two groups, got {num_groups}: Bias compares groups in pairs.")
    numbers = np.atleast_1d(np.asarray(num_images, dtype=np.float64))
    if numbers.size == 0 or not np.all(np.isfinite(numbers) & (numbers >= 1) & (numbers == np.floor(numbers))):
        raise EvaluationError(
            f"Expected a whole number of images above zero for every prompt, got {num_images!r}. "
            "Leave out prompts without images."
        )
    distinct, prompts = np.unique(numbers.astype(np.int64), return_counts=True)
    floors = [_expected_pair_difference(int(number), num_groups) for number in distinct]
    return float(np.average(floors, weights=prompts))


def bias_interval(
    counts: ArrayLike, *, confidence: float = 0.95, num_resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Return a percentile bootstrap interval for Bias, resampling images within each prompt.

    Trust it far from the fair point only. Bias is a mean of absolute differences and cannot fall below zero,
    so near the fair point its resamples lie above the truth: the interval of a fair sampler usually misses 0
    and covers less often than `confidence` says. Compare with `bias_floor` there. Prompts are taken as given;
    the interval says nothing about other prompts.

    Args:
        counts: Images per prompt and group, whole numbers, (prompts, groups).
        confidence: Nominal coverage, above 0 and below 1.
        num_resamples: Bootstrap resamples.
        seed: Seed of the resampling.

    Returns:
        The lower and the upper end.

    Raises:
        EvaluationError: As for `shares`, or counts that are not whole numbers, or a setting out of range.
    """
    if not 0 < confidence < 1:
        raise EvaluationError(f"Expected a confidence above 0 and below 1, got {confidence}. 0.95 is usual.")
    if num_resamples < 1:
        raise EvaluationError(f"Expected at least one resample, got {num_resamples}. 2000 is usual.")
    checked = _checked(counts)
    if np.any(checked != np.floor(checked)):
        raise EvaluationError("Expected whole numbers of images, got fractions. Pass counts, not shares.")
    generator = np.random.default_rng(seed)
    total = np.zeros(num_resamples)
    for row in checked:
        resampled = generator.multinomial(int(row.sum()), row / row.sum(), size=num_resamples)
        total += _mean_pair_difference(resampled / row.sum())
    low, high = np.quantile(total / len(checked), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _mean_pair_difference(p: FloatArray) -> FloatArray:
    """Mean over pairs of |p_i - p_j| along the last axis: the k-th smallest enters 2k - K - 1 times."""
    num_groups = p.shape[-1]
    signs = 2 * np.arange(1, num_groups + 1) - num_groups - 1
    return np.asarray(np.sort(p, axis=-1) @ signs / (num_groups * (num_groups - 1) / 2), dtype=np.float64)


def _expected_pair_difference(num_images: int, num_groups: int) -> float:
    totals = np.arange(num_images + 1)
    # E|S_T| of the simple random walk: with m = ceil(T / 2), it is 2 m C(2m, m) / 4^m.
    half = (totals + 1) // 2
    log_choose = gammaln(2 * half + 1) - 2 * gammaln(half + 1)
    distance = 2 * half * np.exp(log_choose - half * np.log(4.0))
    return float(binom.pmf(totals, num_images, 2 / num_groups) @ distance) / num_images


def _checked(counts: ArrayLike) -> FloatArray:
    array = np.asarray(counts, dtype=np.float64)
    if array.ndim != 2 or array.shape[0] < 1:
        raise EvaluationError(
            f"Expected counts of shape (prompts, groups) with at least one prompt, got {array.shape}. "
            "Pass one row for each prompt."
        )
    if array.shape[1] < 2:
        raise EvaluationError(f"Expected counts for at least two groups, got {array.shape[1]}. Bias compares pairs.")
    bad = np.argwhere(~np.isfinite(array) | (array < 0))
    if len(bad):
        prompt, group = bad[0]
        raise EvaluationError(
            f"Expected counts of zero or more, got {array[prompt, group]} for prompt {prompt}, "
            f"group {group}. Count the images again."
        )
    empty = np.flatnonzero(array.sum(axis=1) == 0)
    if len(empty):
        raise EvaluationError(
            f"Expected at least one image for every prompt, got none for prompt {empty[0]}. "
            "Generate its images or leave the prompt out."
        )
    return array
