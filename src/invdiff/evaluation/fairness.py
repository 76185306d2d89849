"""Fairness from counts, all in one place: metrics, the floors of a fair sampler, intervals, and corrections.

Metrics take counts of images, (prompts, groups), and average over prompts; see `metrics` for what they are, `floors`
for what a perfectly fair sampler would show, `intervals` for how sure a figure is, `annotator_error` for what an
annotator's mistakes hide, and `estimates` for all of these at once.
"""

from __future__ import annotations

from .annotator_error import correct_for_annotator, corrected_interval
from .estimates import Estimate, estimate
from .floors import bias_floor, metric_floor
from .intervals import bias_interval, interval
from .metrics import (
    METRICS,
    Metric,
    bias,
    bias_per_prompt,
    fairness_discrepancy,
    intersections,
    kl_to_target,
    normalised_entropy,
    parity_gap,
    per_prompt,
    shares,
    squared_discrepancy_unbiased,
    worst_group_ratio,
)

__all__ = [
    "METRICS",
    "Estimate",
    "Metric",
    "bias",
    "bias_floor",
    "bias_interval",
    "bias_per_prompt",
    "correct_for_annotator",
    "corrected_interval",
    "estimate",
    "fairness_discrepancy",
    "intersections",
    "interval",
    "kl_to_target",
    "metric_floor",
    "normalised_entropy",
    "parity_gap",
    "per_prompt",
    "shares",
    "squared_discrepancy_unbiased",
    "worst_group_ratio",
]
