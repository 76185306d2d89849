"""Read an audit folder without torch: its prompts, and the images of each group ordered by how telling they are."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from ..errors import AuditError
from ..files import read_json

_Array = NDArray[Any]


@dataclass(frozen=True)
class Group:
    """One group of one prompt's images: positions in the audit, the telling ones first."""

    index: int
    share: float
    size: int
    typical: list[int]
    """Highest weight first, then the most extreme score on the group's side."""
    uncertain: list[int]
    """Lowest weight first, then closest to another group's scores."""


@dataclass(frozen=True)
class Page:
    """One prompt under one hidden factor."""

    prompt: dict[str, Any]
    factor: str
    """Empty where the audit has one factor only."""
    scores: _Array
    labels: _Array
    groups: list[Group]


def rank_groups(weights: _Array, scores: _Array, rows: _Array) -> list[Group]:
    """Order the images of each of a prompt's groups by how telling they are.

    Args:
        weights: (n, E) the prompt's rows of W.
        scores: (n,) their scores.
        rows: (n,) their positions in the audit.

    Returns:
        E groups. The side of the group that scores highest is up, of the lowest down; between them the middle
        of a group is the most typical.
    """
    labels = weights.argmax(axis=1)
    filled = [index for index in range(weights.shape[1]) if (labels == index).any()]
    ladder = sorted(filled, key=lambda index: scores[labels == index].mean())
    groups = []
    for index in range(weights.shape[1]):
        members = np.flatnonzero(labels == index)
        own, others = scores[members], np.sort(scores[labels != index])
        extreme = distance = -np.abs(own - np.median(own)) if len(own) else own
        if len(ladder) > 1 and index in (ladder[0], ladder[-1]):
            extreme = own if index == ladder[-1] else -own
        if len(others):
            above = np.searchsorted(others, own).clip(0, len(others) - 1)
            distance = np.minimum(np.abs(others[above] - own), np.abs(others[(above - 1).clip(0)] - own))
        weight = weights[members, index].round(2)  # finer differences of a soft W say less than the score
        groups.append(
            Group(
                index=index,
                share=float(weights[:, index].mean()),
                size=len(members),
                typical=rows[members[np.lexsort((-extreme, -weight))]].tolist(),
                uncertain=rows[members[np.lexsort((distance, weight))]].tolist(),
            )
        )
    return groups


def read_audit(folder: Path) -> tuple[dict[str, Any], dict[str, _Array]]:
    """Return what an audit folder states, and its tensors as arrays.

    Raises:
        AuditError: The folder holds no audit, or its tensors are damaged or of other images.
    """
    if not (folder / "audit.json").is_file():
        raise AuditError(f"Expected an audit folder at {folder}, found no audit.json. Run `invdiff audit`.")
    document = read_json(folder / "audit.json")
    try:
        tensors = load_file(folder / "audit.safetensors")
    except (OSError, SafetensorError) as error:
        raise AuditError(
            f"Expected the audit's tensors in {folder / 'audit.safetensors'}, found something else ({error}). "
            "Run `invdiff audit` again."
        ) from error
    count = len(document["names"])
    short = [name for name, tensor in tensors.items() if len(tensor) != count]
    if short:
        raise AuditError(
            f"Expected one row for each of the {count} images in {folder / 'audit.safetensors'}, found "
            f"{len(tensors[short[0]])} of {short[0]}. Run `invdiff audit` again."
        )
    return document, tensors


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


def pages_of(document: dict[str, Any], tensors: dict[str, _Array]) -> list[Page]:
    """Return the largest prompts that hide a group, once for each factor that splits them."""
    factors = len(document["num_groups"])
    found = [index for index, prompt in enumerate(document["prompts"]) if prompt["found"]]
    found.sort(key=lambda index: -document["prompts"][index]["num_images"])
    pages = []
    for index in found:
        rows = np.flatnonzero(tensors["prompt_ids"] == index)
        scores = tensors["scores"][rows]
        for factor in range(factors):
            weights = tensors[f"group_weights.{factor}"][rows]
            if len(rows) == 0 or np.ptp(weights) < 1e-6:  # uniform: this factor does not split this prompt
                continue
            pages.append(
                Page(
                    prompt=document["prompts"][index],
                    factor=f"factor {factor} · " if factors > 1 else "",
                    scores=scores,
                    labels=weights.argmax(axis=1),
                    groups=rank_groups(weights, scores, rows),
                )
            )
    return pages


def cuts(scores: _Array, labels: _Array) -> list[float]:
    """Return the midpoints of the gaps between neighbouring groups that the scores separate."""
    parts = sorted((scores[labels == label] for label in np.unique(labels)), key=lambda part: float(part.mean()))
    return [float(lower.max() + upper.min()) / 2 for lower, upper in pairwise(parts) if lower.max() <= upper.min()]
