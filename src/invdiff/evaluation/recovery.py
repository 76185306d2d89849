"""Agreement of an audit's groups with labels that the audit itself never sees."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from sklearn.metrics import adjusted_rand_score, homogeneity_score, precision_score, recall_score, roc_auc_score

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
    """Compare scores (N,) and the rare group (N,) bool with the true minority (N,) bool.

    Raises:
        EvaluationError: The truth has no minority, or nothing else.
    """
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


@dataclass(frozen=True)
class GroupQuality:
    """Agreement of any number of inferred groups per prompt with a hidden attribute."""

    auroc: float
    """Chance that an image of the prompt's rarest class scores above another image of the prompt."""
    adjusted_rand: float
    """Adjusted Rand index of groups and classes within a prompt: 1 when they are the same, 0 for chance."""
    homogeneity: float
    """1 when no group mixes classes, though several groups may share one; 0 when groups carry no information."""
    images: int
    """Images compared: those of prompts in which the attribute varies."""


def group_quality(prompt_ids: ArrayLike, scores: ArrayLike, groups: ArrayLike, classes: ArrayLike) -> GroupQuality:
    """Compare inferred groups with the classes of a hidden attribute, within prompts, averaged over images.

    Args:
        prompt_ids: The prompt of each image, (N,).
        scores: How rare the audit takes each image to be, (N,).
        groups: The group of each image within its prompt, (N,).
        classes: The class of each image, (N,).

    Raises:
        EvaluationError: The attribute varies within no prompt.
    """
    prompts, rarity, found, truth = (np.asarray(values) for values in (prompt_ids, scores, groups, classes))
    figures, sizes = [], []
    for prompt in np.unique(prompts):
        rows = prompts == prompt
        names, counts = np.unique(truth[rows], return_counts=True)
        if len(names) < 2:
            continue
        rarest = truth[rows] == names[counts.argmin()]
        agreement = (score(truth[rows], found[rows]) for score in (adjusted_rand_score, homogeneity_score))
        figures.append((roc_auc_score(rarest, rarity[rows]), *agreement))
        sizes.append(int(rows.sum()))
    if not figures:
        raise EvaluationError("Expected a hidden attribute that varies within a prompt, got one that does not.")
    auroc, rand, homogeneity = np.average(figures, axis=0, weights=sizes)
    return GroupQuality(float(auroc), float(rand), float(homogeneity), sum(sizes))
