"""Turn what is known of one model's images into figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ..errors import EvaluationError
from ..models.encoders import ClipEncoder
from .describe import Described
from .manifest import Row
from .quality.diversity import mean_cosine_distance, paired_cosines
from .quality.figures import LPIPS, group_figures, lpips_figures, quality_figures, share
from .quality.intervals import mean_interval
from .question import Question
from .results import Measures, Quantity
from .spread import spread_of, spread_of_intersection


def measure(
    rows: Sequence[Row],
    seen: Described,
    question: Question,
    *,
    reference: Described | None,
    group_size: int = 0,
    clip: ClipEncoder | None = None,
    lpips: LPIPS | None = None,
) -> Measures:
    """Measure one model's images at one guidance scale.

    Args:
        rows: The images.
        seen: What is known of them, in the same order.
        question: What is asked.
        reference: What is known of the reference images.
        group_size: Images of each group that distances by group are of; see `common_group_size`.
        clip: Whose text features CLIP-T is measured with; its image features are among those seen.
        lpips: The network to measure diversity by LPIPS with, on the first images of each prompt.
    """
    prompts = [row.prompt for row in rows]
    right = _subject_right(prompts, seen, question)
    attributes = {name: spread_of(name, prompts, seen, right, question) for name in question.attributes}
    if len(question.attributes) > 1:
        attributes[" x ".join(question.attributes)] = spread_of_intersection(prompts, seen, right, question)
    known = right[right >= 0]
    return Measures(
        images_per_prompt=min(Counter(prompts).values()),
        attributes=attributes,
        subject_accuracy=share(known, question.confidence) if len(known) else None,
        quality=quality_figures(rows, seen, reference, clip, question) | (lpips_figures(rows, lpips) if lpips else {}),
        by_group=group_figures(seen, reference, right, question, group_size),
    )


def preserve(
    rows: Sequence[Row], seen: Described, base_rows: Sequence[Row], base: Described, question: Question
) -> dict[str, Quantity]:
    """Return how far images moved from those that the baseline draws from the same prompts and seeds.

    The distance of features is that of pairs of one seed; beside it stands that of unrelated images of the baseline.
    Attributes other than the sensitive ones should not change: the share of pairs that keep each class is given.
    """
    pairs = _pairs(rows, base_rows)
    if len(pairs) < 2:
        why = "not defined: the manifests share no two seeds of a prompt with the baseline, each given once"
        return {"feature shift": Quantity(None, note=why)}
    ours, theirs = (np.array(side) for side in zip(*pairs, strict=True))
    number = f"{len(pairs)} pairs"
    figures: dict[str, Quantity] = {}
    for name, features in seen.features.items():
        before, after = base.features[name][theirs], features[ours]
        try:
            moved = 1 - paired_cosines(before, after)
            unrelated = mean_cosine_distance(before)
        except EvaluationError as error:
            figures[f"feature shift ({name})"] = Quantity(None, note=f"not defined: {error}")
            continue
        ends = mean_interval(moved, confidence=question.confidence)
        note = f"cosine distance, {number}; the baseline's own images are {unrelated:.3g} apart"
        figures[f"feature shift ({name})"] = Quantity(float(moved.mean()), *ends, note=note)
    for attribute in seen.classes:
        if attribute not in question.attributes:
            mine, before = seen.classes[attribute][ours], base.classes[attribute][theirs]
            size = len(question.classes[attribute])
            told = (mine < size) & (before < size)
            if told.any():
                kept = share((mine == before)[told], question.confidence)
                figures[f"{attribute} unchanged"] = replace(kept, note=f"{told.sum()} of {number}")
            else:
                figures[f"{attribute} unchanged"] = Quantity(None, note="not defined: told in no pair")
    return figures


def _pairs(rows: Sequence[Row], base_rows: Sequence[Row]) -> list[tuple[int, int]]:
    """Return the places of images of one prompt and seed; a seed that repeats within a prompt tells nothing."""
    places = []
    for side in (rows, base_rows):
        keys = [(row.prompt, row.seed) for row in side]
        once = {key for key, count in Counter(keys).items() if count == 1 and key[1] is not None}
        places.append({key: place for place, key in enumerate(keys) if key in once})
    ours, theirs = places
    return [(place, theirs[key]) for key, place in ours.items() if key in theirs]


def _subject_right(prompts: Sequence[str], seen: Described, question: Question) -> NDArray[np.int64]:
    """Return 1 where an image shows its prompt's subject, 0 where not, -1 where the prompt names none."""
    right = np.full(len(prompts), -1)
    if question.subject_attribute is None:
        return right
    names = question.classes[question.subject_attribute]
    for row, (prompt, shown) in enumerate(zip(prompts, seen.classes[question.subject_attribute], strict=True)):
        if prompt in question.subject_of:
            right[row] = int(shown == names.index(question.subject_of[prompt]))
    return right
