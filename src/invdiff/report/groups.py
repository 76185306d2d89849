"""The groups of each prompt of an audit, and their images from the most typical to the least certain."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..auditing.edits import ladder
from ..auditing.result import Audit, PromptAudit
from ..errors import AuditError
from .figures import Share, share_of
from .plots import colour_of

MOST_PROMPTS = 8
"""Prompts that pictures and reports show in detail."""
_Array = NDArray[Any]


@dataclass(frozen=True)
class Group:
    """One group of one prompt's images, as positions in the audit."""

    index: int
    """The column of W."""
    name: str
    """The name that people gave it, or its number in words."""
    share: float
    size: int
    typical: list[int]
    """Highest weight first, then the most extreme score on the group's side."""
    uncertain: list[int]
    """Lowest weight first, then closest to another group's scores."""


@dataclass(frozen=True)
class Split:
    """One prompt's images, split into groups by one hidden factor."""

    index: int
    """Of the prompt, in the audit."""
    prompt: PromptAudit
    factor: str
    """Empty where the audit has one factor only."""
    factor_index: int
    """Of the hidden factor, from 0."""
    rows: _Array
    """(n,) positions in the audit of the prompt's images, without those left out; scores and labels are theirs."""
    scores: _Array
    labels: _Array
    groups: list[Group]
    cuts: list[float]
    """Scores at which the groups part, rising: those that people set, or the midpoints of the gaps between groups."""
    by_hand: bool
    """Whether people moved the cuts or left out images of this prompt."""

    def shares(self, confidence: float) -> list[Share]:
        """The share of images in each group."""
        total = len(self.labels)
        return [share_of(g.name, g.size, total, confidence=confidence, colour=colour_of(g.index)) for g in self.groups]


def splits_of(audit: Audit) -> list[Split]:
    """The prompts that hide groups, the largest first, once for each factor that splits them; no image left out."""
    splits, several = [], len(audit.group_weights) > 1
    for index, prompt in sorted(enumerate(audit.prompts), key=lambda entry: -entry[1].num_images):
        own = audit.prompt_ids == index
        rows = np.flatnonzero(audit.kept & own)
        scores = audit.scores[rows]
        for factor, of_all in enumerate(audit.group_weights):
            weights = of_all[rows]
            if not prompt.found or len(rows) == 0 or np.ptp(weights) < 1e-6:  # uniform: it does not split the prompt
                continue
            labels, moved = weights.argmax(axis=1), audit.edits.cuts.get(index, ()) if factor == 0 else ()
            names = [audit.edits.group_name(group, factor) for group in range(weights.shape[1])]
            splits.append(
                Split(
                    index=index,
                    prompt=prompt,
                    factor=f"factor {factor} · " if several else "",
                    factor_index=factor,
                    rows=rows,
                    scores=scores,
                    labels=labels,
                    groups=rank_groups(weights, scores, rows, names),
                    cuts=list(moved) or gaps(scores, labels),
                    by_hand=bool(moved or len(rows) < own.sum()),
                )
            )
    return splits


def rank_groups(weights: _Array, scores: _Array, rows: _Array, names: Sequence[str]) -> list[Group]:
    """The images of each of a prompt's E groups by how typical they are, from weights (n, E), scores (n,), rows (n,).

    The most typical image of the group that scores highest has the highest score, of the lowest the lowest; of a
    group between others it is the middle one.
    """
    labels = weights.argmax(axis=1)
    rising = ladder(weights, scores)
    groups = []
    for index, name in enumerate(names):
        members = np.flatnonzero(labels == index)
        own, others = scores[members], np.sort(scores[labels != index])
        extreme = distance = -np.abs(own - np.median(own)) if len(own) else own
        if len(rising) > 1 and index in (rising[0], rising[-1]):
            extreme = own if index == rising[-1] else -own
        if len(others):
            above = np.searchsorted(others, own).clip(0, len(others) - 1)
            distance = np.minimum(np.abs(others[above] - own), np.abs(others[(above - 1).clip(0)] - own))
        weight = weights[members, index].round(2)  # finer differences of a soft W mean less than the score
        typical = rows[members[np.lexsort((-extreme, -weight))]].tolist()
        uncertain = rows[members[np.lexsort((distance, weight))]].tolist()
        groups.append(Group(index, name, float(weights[:, index].mean()), len(members), typical, uncertain))
    return groups


def gaps(scores: _Array, labels: _Array) -> list[float]:
    """The midpoints of the gaps between neighbouring groups that the scores separate."""
    parts = sorted((scores[labels == label] for label in np.unique(labels)), key=lambda part: float(part.mean()))
    return [float(lower.max() + upper.min()) / 2 for lower, upper in pairwise(parts) if lower.max() <= upper.min()]


def rows_by_name(names: Sequence[str], available: Sequence[str]) -> list[int]:
    """Where each audited image stands in the data; a name's second use is its second image."""
    places: dict[str, list[int]] = defaultdict(list)
    for row in reversed(range(len(available))):
        places[available[row]].append(row)
    absent = [name for name in names if name not in places]
    if absent:
        raise AuditError(
            f"Expected the images that were audited, got data without {len(absent)} of {len(names)}, first "
            f"{absent[0]}. Give the data that the audit was made on."
        )
    return [places[name].pop() if len(places[name]) > 1 else places[name][0] for name in names]
