"""A fairness metric with all that is known about its error: interval, floor and correction."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...errors import EvaluationError
from ..results import Estimate
from .correction import correct_for_annotator, corrected_interval
from .floors import metric_floor
from .intervals import interval, whole_totals
from .metrics import FloatArray, per_prompt, squared_discrepancy_unbiased


def estimate(
    metric: str,
    counts: ArrayLike,
    *,
    target: ArrayLike | None = None,
    confusion: ArrayLike | None = None,
    unsure: ArrayLike | None = None,
    confidence: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
) -> Estimate:
    """A metric's mean over prompts with its interval, floor and correction for the annotator.

    Args:
        metric: A name in `metrics.METRICS`.
        counts: Images with a class, per prompt and group, (prompts, groups).
        target: Shares to compare with, (groups,), for a metric that takes them; even when None.
        confusion: Held-out counts of the annotator, (true class, annotated class), or rates; with one more column
            where it cannot tell. See `correction.correct_for_annotator`.
        unsure: Images of each prompt whose class the annotator could not tell, (prompts,). They are outside the
            raw figures; the corrected ones need them where `confusion` has a column for them.
        confidence: Coverage of the intervals, above 0 and below 1.
        num_resamples: Monte Carlo draws for each prompt, at least 20.
        seed: Seed of the draws.

    Raises:
        EvaluationError: As for `interval` and `correction.corrected_interval`, or `unsure` is not a number of
            images for each prompt, or is absent where `confusion` has a column for it.
    """
    values = per_prompt(metric, counts, target=target)
    table = np.asarray(counts, dtype=np.float64)
    settings = {"target": target, "confidence": confidence, "num_resamples": num_resamples, "seed": seed}
    low, high = interval(metric, table, **settings)  # type: ignore[arg-type]
    notes = []
    square = None
    if metric == "fairness_discrepancy":
        if np.any(table != np.floor(table)):
            notes.append("unbiased_square: not defined for fractional counts")
        elif np.any(table.sum(axis=1) < 2):
            notes.append("unbiased_square: not defined with one image of a prompt")
        else:
            square = squared_discrepancy_unbiased(table, target)
    if len(values) == 1:
        notes.append("sd_over_prompts: not defined for one prompt")
    corrected = corrected_low = corrected_high = None
    if confusion is not None:
        seen = _with_unsure(table, np.asarray(confusion), unsure)
        if seen is None:
            notes.append("corrected: not defined, as the confusion matrix has no column for images without a class")
        else:
            corrected = float(per_prompt(metric, correct_for_annotator(seen, confusion), target=target).mean())
            corrected_low, corrected_high = corrected_interval(metric, seen, confusion, **settings)  # type: ignore[arg-type]
    return Estimate(
        value=float(values.mean()),
        low=low,
        high=high,
        floor=metric_floor(metric, whole_totals(table), table.shape[1], target=target),
        sd_over_prompts=float(values.std(ddof=1)) if len(values) > 1 else None,
        unbiased_square=square,
        corrected=corrected,
        corrected_low=corrected_low,
        corrected_high=corrected_high,
        note="; ".join(notes),
    )


def _with_unsure(table: FloatArray, confusion: NDArray[np.generic], unsure: ArrayLike | None) -> FloatArray | None:
    """Counts with as many columns as the confusion matrix, None where it has none for the unsure images."""
    left_out = np.zeros(len(table)) if unsure is None else np.asarray(unsure, dtype=np.float64)
    if left_out.shape != (len(table),) or not np.all((left_out >= 0) & np.isfinite(left_out)):
        raise EvaluationError(
            f"Expected a number of unsure images for each of the {len(table)} prompts, got {unsure!r}. "
            "Count the images without a class."
        )
    if confusion.ndim != 2 or confusion.shape[1] != table.shape[1] + 1:
        return None if left_out.any() else table
    if unsure is None:
        raise EvaluationError(
            f"Expected the number of unsure images beside a confusion matrix of shape {confusion.shape}, got None. "
            "Pass `unsure`, zeros if the annotator told every class."
        )
    return np.column_stack([table, left_out])
