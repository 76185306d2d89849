"""Agreement of an audit's groups with labels that the audit itself never sees."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from sklearn.metrics import adjusted_rand_score, precision_score, recall_score, roc_auc_score

from ..errors import EvaluationError


@dataclass(frozen=True)
class Recovery:
    """Agreement of inferred groups with the hidden truth."""

    auroc: float
    """Chance that a minority image scores above a majority image."""
    precision: float
    """Share of the images put in the rare group that are of the minority; 0 where there are none."""
    recall: float
    """Share of the minority's images that were put in the rare group."""
    adjusted_rand: float
    """Adjusted Rand index between rare group and minority."""


def recovery(scores: ArrayLike, in_rare_group: ArrayLike, in_minority: ArrayLike) -> Recovery:
    """Compare scores (N,) and the rare group (N,) bool with the true minority (N,) bool, else an `EvaluationError`."""
    truth = np.asarray(in_minority, dtype=bool)
    found = np.asarray(in_rare_group, dtype=bool)
    if truth.all() or not truth.any():
        raise EvaluationError(
            f"Expected images of a minority and of a majority, got {int(truth.sum())} of {len(truth)}."
        )
    return Recovery(
        auroc=float(roc_auc_score(truth, np.asarray(scores))),
        precision=float(precision_score(truth, found, zero_division=0)),
        recall=float(recall_score(truth, found)),
        adjusted_rand=float(adjusted_rand_score(truth, found)),
    )
