"""Fairness metrics: how unevenly a prompt's images fall into the classes of a sensitive attribute.

`METRICS` is the table of metrics. Every one takes the shares of one prompt's groups; `per_prompt` takes counts of
images, (prompts, groups), and figures are means over prompts. Counts are images by their most probable class, or sums
of the annotator's class probabilities (the softmax form, fractional).

With finitely many images a metric of a fair sampler is not at its fair value: read it beside `floors.metric_floor` and
`intervals.interval`. Only polynomials in the shares of degree at most N have an unbiased estimate from N images, such
as the squared discrepancy (`squared_discrepancy_unbiased`); none of the metrics here is one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import entr, rel_entr

from ...errors import EvaluationError

FloatArray = NDArray[np.float64]


def bias(p: FloatArray, target: FloatArray) -> FloatArray:
    """Mean over pairs of groups of |p_i - p_j|.

    The Bias of Shen et al., "Finetuning text-to-image diffusion models for fairness" (ICLR 2024). Of sorted shares,
    the k-th smallest enters 2k - K - 1 times.
    """
    num_groups = p.shape[-1]
    signs = 2 * np.arange(1, num_groups + 1) - num_groups - 1
    return np.asarray(np.sort(p, axis=-1) @ signs / (num_groups * (num_groups - 1) / 2), dtype=np.float64)


def fairness_discrepancy(p: FloatArray, target: FloatArray) -> FloatArray:
    """Euclidean distance of the shares to the target, |p - t|.

    Choi et al., "Fair generative modeling via weak supervision" (ICML 2020), and Teo et al., "On measuring fairness
    in generative models" (NeurIPS 2023).
    """
    return np.asarray(np.linalg.norm(p - target, axis=-1))


def parity_gap(p: FloatArray, target: FloatArray) -> FloatArray:
    """Largest share less the smallest, max p - min p: Fairlearn's demographic parity difference."""
    return np.asarray(p.max(axis=-1) - p.min(axis=-1))


def kl_to_target(p: FloatArray, target: FloatArray) -> FloatArray:
    """Kullback-Leibler divergence of the shares from the target in nats, sum p log(p / t)."""
    return np.asarray(rel_entr(p, target).sum(axis=-1))


def normalised_entropy(p: FloatArray, target: FloatArray) -> FloatArray:
    """Entropy of the shares over its maximum, H(p) / log K."""
    return np.asarray(entr(p).sum(axis=-1) / np.log(p.shape[-1]))


def worst_group_ratio(p: FloatArray, target: FloatArray) -> FloatArray:
    """Smallest share over the largest, min p / max p: Fairlearn's demographic parity ratio."""
    return np.asarray(p.min(axis=-1) / p.max(axis=-1))


@dataclass(frozen=True)
class Metric:
    """A fairness metric of one prompt's shares."""

    formula: Callable[[FloatArray, FloatArray], FloatArray]
    """From shares (..., groups) and a target (groups,) to values (...)."""
    fair_value: int
    """The value of shares that equal the target: 0 or 1."""
    takes_target: bool
    """Whether it measures against any target; the others measure evenness."""
    label: str
    """Its name for people, and which value is fair."""

    @property
    def name(self) -> str:
        """The name in `METRICS` and in results."""
        return self.formula.__name__

    def supported(self, target: FloatArray) -> NDArray[np.bool_]:
        """Groups that may have images without making the metric infinite, (groups,)."""
        return target > 0 if self.formula is kl_to_target else np.ones(len(target), dtype=bool)

    def limits(self, target: FloatArray) -> tuple[float, float]:
        """Least and greatest value: all metrics here are extreme at the target and the vertices."""
        vertices = np.eye(len(target))[self.supported(target)]
        ends = np.append(self.formula(vertices, target), float(self.fair_value))
        return float(ends.min()), float(ends.max())

    def target(self, target: ArrayLike | None, num_groups: int) -> FloatArray:
        """Target shares, (groups,), even when None.

        Raises:
            EvaluationError: The metric takes no target, or it is not `num_groups` shares that sum to 1.
        """
        if target is None:
            return np.full(num_groups, 1 / num_groups)
        if not self.takes_target:
            raise EvaluationError(
                f"Expected no target for {self.name}, which compares groups with each other, got one. "
                f"Use {' or '.join(name for name, metric in METRICS.items() if metric.takes_target)}."
            )
        array = np.asarray(target, dtype=np.float64)
        if array.shape != (num_groups,) or not np.all(array >= 0) or abs(array.sum() - 1) > 1e-6:
            raise EvaluationError(
                f"Expected {num_groups} target shares of zero or more that sum to 1, got {target!r}. "
                "Give one share for each group."
            )
        return array / array.sum()


METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        metric.name: metric
        for metric in (
            Metric(bias, 0, False, "Bias: 0 is even, 1 is always one class"),
            Metric(fairness_discrepancy, 0, True, "distance of the shares to the target: 0 is on target"),
            Metric(parity_gap, 0, False, "largest share less the smallest: 0 is even"),
            Metric(kl_to_target, 0, True, "divergence from the target, nats: 0 is on target"),
            Metric(normalised_entropy, 1, False, "entropy over its maximum: 1 is even"),
            Metric(worst_group_ratio, 1, False, "smallest share over the largest: 1 is even"),
        )
    }
)


def find_metric(name: str) -> Metric:
    """The metric called `name`.

    Raises:
        EvaluationError: There is none.
    """
    if name not in METRICS:
        raise EvaluationError(f"Expected a metric among {', '.join(METRICS)}, got {name!r}. Choose one of these.")
    return METRICS[name]


def per_prompt(metric: str, counts: ArrayLike, *, target: ArrayLike | None = None) -> FloatArray:
    """A metric's value for each prompt, (prompts,).

    Args:
        metric: A name in `METRICS`.
        counts: Images, or sums of probabilities, per prompt and group, (prompts, groups).
        target: Shares to compare with, (groups,), for a metric that takes them; even when None.

    Raises:
        EvaluationError: The counts are no table of at least one prompt and two groups, are negative or not finite, or
            a prompt has no image; the metric is unknown or takes no target; the target is not shares of these groups;
            or, for KL, a group has images where its target share is zero.
    """
    table, chosen = checked_counts(counts), find_metric(metric)
    p = table / table.sum(axis=1, keepdims=True)
    t = chosen.target(target, p.shape[1])
    forbidden = np.argwhere((p > 0) & ~chosen.supported(t))
    if len(forbidden):
        prompt, group = forbidden[0]
        raise EvaluationError(
            f"Expected no image of group {group}, whose target share is zero, got a share of "
            f"{p[prompt, group]:.3g} for prompt {prompt}: KL is infinite. Give the group a target above zero."
        )
    return chosen.formula(p, t)


def squared_discrepancy_unbiased(counts: ArrayLike, target: ArrayLike | None = None) -> float:
    """Unbiased estimate of the mean over prompts of the squared distance of the shares to a target.

    The U-statistic sum_k n_k (n_k - 1) / (N (N - 1)) - 2 t_k n_k / N + t_k^2. Unlike the plug-in it averages to
    zero for a fair sampler, so a single value may well be negative.

    Args:
        counts: Images per prompt and group, whole numbers, at least two for each prompt, (prompts, groups).
        target: Shares to compare with, (groups,), summing to 1; even when None.

    Raises:
        EvaluationError: As for `per_prompt`, counts that are not whole, or a prompt with one image.
    """
    table = checked_counts(counts)
    t = METRICS["fairness_discrepancy"].target(target, table.shape[1])
    numbers = table.sum(axis=1, keepdims=True)
    if np.any(table != np.floor(table)):
        raise EvaluationError("Expected whole numbers of images, got fractions. Pass counts, not shares.")
    if np.any(numbers < 2):
        raise EvaluationError(
            f"Expected at least two images for every prompt, got one for prompt {int(numbers.argmin())}: "
            "no unbiased estimate exists. Generate more."
        )
    squares = table * (table - 1) / (numbers * (numbers - 1))
    return float((squares - 2 * t * table / numbers + t**2).sum(axis=1).mean())


def checked_counts(counts: ArrayLike) -> FloatArray:
    """Counts as float64, (prompts, groups).

    Raises:
        EvaluationError: They are no table of at least one prompt and two groups, are negative or not finite, or a
            prompt has no image.
    """
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
