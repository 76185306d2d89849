"""Prompts of an audit, and the images of each group ordered from the most typical."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..auditing.edits import Edits, ladder
from ..auditing.result import Audit, PromptAudit
from ..errors import AuditError

_Array = NDArray[Any]


@dataclass(frozen=True)
class Group:
    """One group of one prompt's images: positions in the audit, the telling ones first."""

    index: int
    name: str
    """What people called it, or its number in words."""
    share: float
    size: int
    typical: list[int]
    """Highest weight first, then the most extreme score on the group's side."""
    uncertain: list[int]
    """Lowest weight first, then closest to another group's scores."""


@dataclass(frozen=True)
class Page:
    """One prompt under one hidden factor."""

    index: int
    """Of the prompt, in the audit."""
    prompt: PromptAudit
    factor: str
    """Empty where the audit has one factor only."""
    factor_index: int
    """Of the hidden factor, from 0."""
    rows: _Array
    """Positions in the audit of the prompt's images, without those left out; scores and labels are theirs."""
    scores: _Array
    labels: _Array
    groups: list[Group]
    cuts: list[float]
    """Scores at which the groups part, rising: those that people set, or the midpoints of the gaps between groups."""
    by_hand: bool
    """Whether people moved the cuts or left out images of this prompt."""


def rank_groups(
    weights: _Array, scores: _Array, rows: _Array, *, edits: Edits | None = None, factor: int = 0
) -> list[Group]:
    """Order the images of each of a prompt's groups by how telling they are.

    Args:
        weights: (n, E) the prompt's rows of W.
        scores: (n,) their scores.
        rows: (n,) their positions in the audit.
        edits: Names of groups.
        factor: The hidden factor that W is of.

    Returns:
        E groups. The side of the group that scores highest is up, of the lowest down; between them the middle
        of a group is the most typical.
    """
    labels = weights.argmax(axis=1)
    rising = ladder(weights, scores)
    groups = []
    for index in range(weights.shape[1]):
        members = np.flatnonzero(labels == index)
        own, others = scores[members], np.sort(scores[labels != index])
        extreme = distance = -np.abs(own - np.median(own)) if len(own) else own
        if len(rising) > 1 and index in (rising[0], rising[-1]):
            extreme = own if index == rising[-1] else -own
        if len(others):
            above = np.searchsorted(others, own).clip(0, len(others) - 1)
            distance = np.minimum(np.abs(others[above] - own), np.abs(others[(above - 1).clip(0)] - own))
        weight = weights[members, index].round(2)  # finer differences of a soft W say less than the score
        groups.append(
            Group(
                index=index,
                name=(edits or Edits()).group_name(index, factor),
                share=float(weights[:, index].mean()),
                size=len(members),
                typical=rows[members[np.lexsort((-extreme, -weight))]].tolist(),
                uncertain=rows[members[np.lexsort((distance, weight))]].tolist(),
            )
        )
    return groups


def rows_by_name(names: list[str], available: list[str]) -> list[int]:
    """Return where each audited image stands in the data; a name's second use is its second image."""
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


def pages_of(audit: Audit) -> list[Page]:
    """The largest prompts that hide a group, once for each factor that splits them; without images left out."""
    kept, factors = audit.kept, len(audit.group_weights)
    found = [index for index, prompt in enumerate(audit.prompts) if prompt.found]
    found.sort(key=lambda index: -audit.prompts[index].num_images)
    pages = []
    for index in found:
        rows = np.flatnonzero(kept & (audit.prompt_ids == index))
        fewer = len(rows) < np.count_nonzero(audit.prompt_ids == index)
        scores = audit.scores[rows]
        for factor in range(factors):
            weights = audit.group_weights[factor][rows]
            if len(rows) == 0 or np.ptp(weights) < 1e-6:  # uniform: this factor does not split this prompt
                continue
            labels, moved = weights.argmax(axis=1), audit.edits.cuts.get(index, ()) if factor == 0 else ()
            pages.append(
                Page(
                    index=index,
                    prompt=audit.prompts[index],
                    factor=f"factor {factor} · " if factors > 1 else "",
                    factor_index=factor,
                    rows=rows,
                    scores=scores,
                    labels=labels,
                    groups=rank_groups(weights, scores, rows, edits=audit.edits, factor=factor),
                    cuts=list(moved) or cuts(scores, labels),
                    by_hand=bool(moved or fewer),
                )
            )
    return pages


def cuts(scores: _Array, labels: _Array) -> list[float]:
    """Return the midpoints of the gaps between neighbouring groups that the scores separate."""
    parts = sorted((scores[labels == label] for label in np.unique(labels)), key=lambda part: float(part.mean()))
    return [float(lower.max() + upper.min()) / 2 for lower, upper in pairwise(parts) if lower.max() <= upper.min()]
