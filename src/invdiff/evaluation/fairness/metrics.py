"""Fairness from counts: how unevenly a prompt's images fall into the classes of a sensitive attribute.

Every metric takes counts, (prompts, groups), and averages over prompts. Counts are images by their most
probable class, or sums of the annotator's class probabilities (the softmax form, fractional). `METRICS` holds
the metrics by name, each as a function on shares.

Plug-in metrics of a fair sampler are not at their fair value with finitely many images: read them beside
`floors.metric_floor` and `intervals.interval`. Only polynomials in the shares of degree at most N have an unbiased
estimate from N images, such as the squared discrepancy (`squared_discrepancy_unbiased`). Mean |p_i - p_j|, the
parity gap, the discrepancy itself, entropies and ratios are not polynomials, so none exists for them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import entr, rel_entr

from ...errors import EvaluationError

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Metric:
    """A fairness metric of one prompt's shares."""

    name: str
    per_prompt: Callable[..., FloatArray]
    """From shares (..., groups) and a target (groups,), uniform when None, to values (...)."""
    fair_value: int
    """The value of shares that equal the target: 0 or 1."""
    takes_target: bool
    """Whether it can be measured against other shares than even ones."""
    label: str
    """Its name for people, and which value is fair."""

    def limits(self, target: FloatArray) -> tuple[float, float]:
        """Return the least and the greatest value; all metrics here are extreme at the target and the vertices."""
        vertices = np.eye(len(target))[supported(self, target)]
        ends = np.append(self.per_prompt(vertices, target), float(self.fair_value))
        return float(ends.min()), float(ends.max())


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
    it is above zero even for a fair sampler: read it beside `floors.bias_floor`.

    Args:
        counts: Images per prompt and group, (prompts, groups).

    Raises:
        EvaluationError: As for `shares`.
    """
    return float(bias_per_prompt(counts).mean())


def fairness_discrepancy(counts: ArrayLike, target: ArrayLike | None = None) -> float:
    """Return the mean over prompts of the Euclidean distance of the shares to a target; 0 is fair.

    The fairness discrepancy of Choi et al., "Fair generative modeling via weak supervision" (ICML 2020), and
    Teo et al., "On measuring fairness in generative models" (NeurIPS 2023). Label counts give its argmax form,
    sums of class probabilities its softmax form.

    Args:
        counts: Images, or sums of probabilities, per prompt and group, (prompts, groups).
        target: Shares to compare with, (groups,), summing to 1; even when None.

    Raises:
        EvaluationError: As for `shares`, or the target is not shares of these groups.
    """
    return float(per_prompt("fairness_discrepancy", counts, target=target).mean())


def parity_gap(counts: ArrayLike) -> float:
    """Return the mean over prompts of the largest share less the smallest; 0 is even.

    Fairlearn calls it the demographic parity difference.

    Args:
        counts: Images per prompt and group, (prompts, groups).

    Raises:
        EvaluationError: As for `shares`.
    """
    return float(per_prompt("parity_gap", counts).mean())


def kl_to_target(counts: ArrayLike, target: ArrayLike | None = None) -> float:
    """Return the mean over prompts of KL(shares || target) in nats; 0 is fair.

    Args:
        counts: Images per prompt and group, (prompts, groups).
        target: Shares to compare with, (groups,), summing to 1; even when None.

    Raises:
        EvaluationError: As for `fairness_discrepancy`, or a group has images where its target share is zero.
    """
    return float(per_prompt("kl_to_target", counts, target=target).mean())


def normalised_entropy(counts: ArrayLike) -> float:
    """Return the mean over prompts of H(shares) / log K; 1 is even, 0 is all of one group.

    Args:
        counts: Images per prompt and group, (prompts, groups).

    Raises:
        EvaluationError: As for `shares`.
    """
    return float(per_prompt("normalised_entropy", counts).mean())


def worst_group_ratio(counts: ArrayLike) -> float:
    """Return the mean over prompts of the smallest share over the largest; 1 is even.

    Fairlearn calls it the demographic parity ratio.

    Args:
        counts: Images per prompt and group, (prompts, groups).

    Raises:
        EvaluationError: As for `shares`.
    """
    return float(per_prompt("worst_group_ratio", counts).mean())


def per_prompt(metric: str, counts: ArrayLike, *, target: ArrayLike | None = None) -> FloatArray:
    """Return a metric's value for each prompt, (prompts,).

    Args:
        metric: A name in `METRICS`.
        counts: Images per prompt and group, (prompts, groups).
        target: Shares to compare with, (groups,), for a metric that takes them; even when None.

    Raises:
        EvaluationError: As for the metric, or it is unknown or takes no target.
    """
    p = shares(counts)
    chosen = find_metric(metric)
    checked_target = target_of(chosen, target, p.shape[1])
    forbidden = np.argwhere((p > 0) & ~supported(chosen, checked_target))
    if len(forbidden):
        prompt, group = forbidden[0]
        raise EvaluationError(
            f"Expected no image of group {group}, whose target share is zero, got a share of "
            f"{p[prompt, group]:.3g} for prompt {prompt}: KL is infinite. Give the group a target above zero."
        )
    return chosen.per_prompt(p, checked_target)


def squared_discrepancy_unbiased(counts: ArrayLike, target: ArrayLike | None = None) -> float:
    """Return the unbiased estimate of the mean over prompts of the squared distance of the shares to a target.

    The U-statistic sum_k n_k (n_k - 1) / (N (N - 1)) - 2 t_k n_k / N + t_k^2. Unlike the plug-in it averages to
    zero for a fair sampler, so a single value may well be negative.

    Args:
        counts: Images per prompt and group, whole numbers, at least two for each prompt, (prompts, groups).
        target: Shares to compare with, (groups,), summing to 1; even when None.

    Raises:
        EvaluationError: As for `fairness_discrepancy`, counts that are not whole, or a prompt with one image.
    """
    checked = _checked(counts)
    t = target_of(METRICS["fairness_discrepancy"], target, checked.shape[1])
    numbers = checked.sum(axis=1, keepdims=True)
    if np.any(checked != np.floor(checked)):
        raise EvaluationError("Expected whole numbers of images, got fractions. Pass counts, not shares.")
    if np.any(numbers < 2):
        raise EvaluationError(
            f"Expected at least two images for every prompt, got one for prompt {int(numbers.argmin())}: "
            "no unbiased estimate exists. Generate more."
        )
    squares = checked * (checked - 1) / (numbers * (numbers - 1))
    return float((squares - 2 * t * checked / numbers + t**2).sum(axis=1).mean())


def intersections(*labels: ArrayLike, num_classes: Sequence[int]) -> tuple[NDArray[np.int64], int]:
    """Return joint class indices of several attributes, (N,), and the number of joint classes.

    The last attribute varies fastest: with `num_classes=(2, 3)`, classes 1 and 2 are joint class 5.

    Args:
        *labels: Class indices of one attribute each, (N,).
        num_classes: Classes of each attribute.

    Raises:
        EvaluationError: No attribute, arrays of different lengths, or an index that is not one of the classes.
    """
    arrays = [np.asarray(values) for values in labels]
    if not arrays or len(arrays) != len(num_classes):
        raise EvaluationError(
            f"Expected a number of classes for each of one or more attributes, got {len(arrays)} attributes and "
            f"{len(num_classes)} numbers. Pass one of each."
        )
    for position, (values, classes) in enumerate(zip(arrays, num_classes, strict=True)):
        if values.ndim != 1 or values.shape != arrays[0].shape or not np.issubdtype(values.dtype, np.integer):
            raise EvaluationError(
                f"Expected whole-number labels of shape {arrays[0].shape[:1]} for every attribute, got {values.dtype} "
                f"of shape {values.shape} for attribute {position}. Label the same images for each."
            )
        if np.any((values < 0) | (values >= classes)):
            raise EvaluationError(
                f"Expected labels from 0 to {classes - 1} for attribute {position}, got {values.min()} to "
                f"{values.max()}. Leave out images without a class."
            )
    joint = np.ravel_multi_index(tuple(arrays), tuple(num_classes))
    return np.asarray(joint, dtype=np.int64), int(np.prod(num_classes))


def find_metric(name: str) -> Metric:
    """Return the metric called `name`.

    Raises:
        EvaluationError: There is none.
    """
    if name not in METRICS:
        raise EvaluationError(f"Expected a metric among {', '.join(METRICS)}, got {name!r}. Choose one of these.")
    return METRICS[name]


def target_of(metric: Metric, target: ArrayLike | None, num_groups: int) -> FloatArray:
    """Return the target shares (groups,), even when None.

    Raises:
        EvaluationError: The metric takes no target, or it is not `num_groups` shares that sum to 1.
    """
    if target is None:
        return np.full(num_groups, 1 / num_groups)
    if not metric.takes_target:
        raise EvaluationError(
            f"Expected no target for {metric.name}, which compares groups with each other, got one. "
            "Use fairness_discrepancy or kl_to_target."
        )
    array = np.asarray(target, dtype=np.float64)
    if array.shape != (num_groups,) or not np.all(array >= 0) or abs(array.sum() - 1) > 1e-6:
        raise EvaluationError(
            f"Expected {num_groups} target shares of zero or more that sum to 1, got {target!r}. "
            "Give one share for each group."
        )
    return array / array.sum()


def supported(metric: Metric, target: FloatArray) -> NDArray[np.bool_]:
    """Return the groups that may have images without making the metric infinite, (groups,)."""
    return target > 0 if metric.name == "kl_to_target" else np.ones(len(target), dtype=bool)


def _mean_pair_difference(p: FloatArray, target: FloatArray | None = None) -> FloatArray:
    """Mean over pairs of |p_i - p_j| along the last axis: the k-th smallest enters 2k - K - 1 times."""
    num_groups = p.shape[-1]
    signs = 2 * np.arange(1, num_groups + 1) - num_groups - 1
    return np.asarray(np.sort(p, axis=-1) @ signs / (num_groups * (num_groups - 1) / 2), dtype=np.float64)


def _discrepancy(p: FloatArray, target: FloatArray | None = None) -> FloatArray:
    even = 1 / p.shape[-1]
    return np.asarray(np.linalg.norm(p - (even if target is None else target), axis=-1))


def _gap(p: FloatArray, target: FloatArray | None = None) -> FloatArray:
    return np.asarray(p.max(axis=-1) - p.min(axis=-1))


def _kl(p: FloatArray, target: FloatArray | None = None) -> FloatArray:
    even = 1 / p.shape[-1]
    return np.asarray(rel_entr(p, even if target is None else target).sum(axis=-1))


def _entropy(p: FloatArray, target: FloatArray | None = None) -> FloatArray:
    return np.asarray(entr(p).sum(axis=-1) / np.log(p.shape[-1]))


def _ratio(p: FloatArray, target: FloatArray | None = None) -> FloatArray:
    return np.asarray(p.min(axis=-1) / p.max(axis=-1))


METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        metric.name: metric
        for metric in (
            Metric("bias", _mean_pair_difference, 0, False, "Bias: 0 is even, 1 is always one class"),
            Metric(
                "fairness_discrepancy", _discrepancy, 0, True, "distance of the shares to the target: 0 is on target"
            ),
            Metric("parity_gap", _gap, 0, False, "largest share less the smallest: 0 is even"),
            Metric("kl_to_target", _kl, 0, True, "divergence from the target, nats: 0 is on target"),
            Metric("normalised_entropy", _entropy, 1, False, "entropy over its maximum: 1 is even"),
            Metric("worst_group_ratio", _ratio, 1, False, "smallest share over the largest: 1 is even"),
        )
    }
)


def _checked(counts: ArrayLike) -> FloatArray:
    array = np.asarray(counts, dtype=np.float64)
    if array.ndim != 2 or array.shape[0] < 1:
        raise EvaluationError(
            f"Expected counts of shape (prompts, groups) with at least one prompt, got {array.shape}. "
            "Pass one row for each prompt."
        )
    if array.shape[1] < 2:
        raise EvaluationError(
            f"Expected counts for at least two groups, got {array.shape[1]}: fairness compares groups."
        )
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
