"""Turn the descriptions of one model's images into figures: how evenly classes are drawn, quality, preservation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import EvaluationError
from ..models.encoders import ClipEncoder
from ..seeds import derived_seed
from .annotate import Described, Question
from .fairness.estimate import estimate
from .fairness.floors import metric_floor
from .fairness.intervals import interval
from .fairness.metrics import METRICS, per_prompt
from .images import Row
from .quality.diversity import LPIPS, mean_cosine_distance, paired_cosines
from .quality.figures import group_figures, quality_figures, share
from .quality.intervals import mean_interval
from .results import CANNOT_TELL, AttributeMeasures, Estimate, Measures, Quantity

PROMPT_RESAMPLES = 200
"""Resamples of the intervals of single prompts, which are many."""


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
        seen: Their descriptions, in the same order.
        question: The measures asked for.
        reference: The reference images' descriptions.
        group_size: Images of each group that distances by group are of; see `quality.figures.common_group_size`.
        clip: The CLIP model whose text features CLIP-T is measured with; its image features are among those seen.
        lpips: The network to measure diversity by LPIPS with, on the first images of each prompt.

    Raises:
        EvaluationError: No image of a prompt has a class.
    """
    prompts = [row.prompt for row in rows]
    right = _subject_right(prompts, seen, question)
    attributes = {
        name: _spread(name, prompts, seen.classes[name], seen.probabilities[name], right, question)
        for name in question.attributes
    }
    if len(question.attributes) > 1:
        name, asked, joint = _intersection(seen, question)
        attributes[name] = _spread(name, prompts, joint, None, right, asked)
    known = right[right >= 0]
    return Measures(
        images_per_prompt=min(Counter(prompts).values()),
        attributes=attributes,
        subject_accuracy=share(known, question.confidence) if len(known) else None,
        quality=quality_figures(rows, seen, reference, clip, lpips, question),
        by_group=group_figures(seen, reference, right, question, group_size),
    )


def preserve(
    rows: Sequence[Row], seen: Described, base_rows: Sequence[Row], base: Described, question: Question
) -> dict[str, Quantity]:
    """How far images moved from those that the baseline draws from the same prompts and seeds.

    The distance of features is that of pairs of one seed; beside it stands that of unrelated images of the baseline.
    Attributes other than the sensitive ones should not change: the share of pairs that keep each class is given.
    """
    places = []
    for side in (rows, base_rows):
        keys = [(row.prompt, row.seed) for row in side]
        # A seed that repeats within a prompt is ambiguous.
        once = {key for key, count in Counter(keys).items() if count == 1 and key[1] is not None}
        places.append({key: place for place, key in enumerate(keys) if key in once})
    pairs = [(place, places[1][key]) for key, place in places[0].items() if key in places[1]]
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
            known = (mine < size) & (before < size)
            if known.any():
                kept = share((mine == before)[known], question.confidence)
                figures[f"{attribute} unchanged"] = replace(kept, note=f"{known.sum()} of {number}")
            else:
                figures[f"{attribute} unchanged"] = Quantity(
                    None, note="not defined: no pair has a class on both sides"
                )
    return figures


def _subject_right(prompts: Sequence[str], seen: Described, question: Question) -> NDArray[np.int64]:
    """1 where an image shows its prompt's subject, 0 where not, -1 where the prompt names none, (N,)."""
    if not question.subject_attribute:
        return np.full(len(prompts), -1)
    place = {name: index for index, name in enumerate(question.classes[question.subject_attribute])}
    named = np.array([place[question.subject_of[p]] if p in question.subject_of else -1 for p in prompts])
    return np.where(named < 0, -1, (seen.classes[question.subject_attribute] == named).astype(np.int64))


def _intersection(seen: Described, question: Question) -> tuple[str, Question, NDArray[np.int64]]:
    """The combinations of all attributes' classes as an attribute: its name, the question with it, and classes (N,).

    Its confusion matrix would need held-out images of every combination, so nothing is corrected.
    """
    name = " x ".join(question.attributes)
    sizes = [len(question.classes[attribute]) for attribute in question.attributes]
    columns = np.stack([seen.classes[attribute] for attribute in question.attributes])
    limits = np.array(sizes)[:, None]
    joint = np.ravel_multi_index(tuple(np.minimum(columns, limits - 1)), tuple(sizes))
    classes = np.where((columns < limits).all(axis=0), joint, np.prod(sizes))
    combinations = tuple(map(" x ".join, product(*(question.classes[attribute] for attribute in question.attributes))))
    return name, replace(question, classes={**question.classes, name: combinations}), classes


def _spread(
    name: str,
    prompts: Sequence[str],
    classes: NDArray[np.int64],
    probabilities: NDArray[np.float32] | None,
    right: NDArray[np.int64],
    question: Question,
) -> AttributeMeasures:
    """How one attribute's classes (N,) are spread over the images of each prompt."""
    names = question.classes[name]
    place = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    order, index = list(place), np.array([place[prompt] for prompt in prompts])
    target = question.target if name == question.attributes[0] else None

    def count(chosen: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Images per prompt and class, the last class for "cannot tell", (prompts, K + 1)."""
        table = np.zeros((len(order), len(names) + 1), dtype=np.int64)
        np.add.at(table, (index[chosen], classes[chosen]), 1)
        return table

    def estimates(counts: NDArray[np.int64], num_resamples: int = question.num_resamples) -> dict[str, Estimate]:
        return {
            metric: estimate(
                metric,
                counts[:, :-1],
                target=target if METRICS[metric].takes_target else None,
                confusion=question.confusion.get(name),
                unsure=counts[:, -1],
                confidence=question.confidence,
                num_resamples=num_resamples,
                seed=derived_seed("interval", question.seed, name, metric) % 2**31,
            )
            for metric in METRICS
        }

    counts = count(np.ones(len(prompts), dtype=bool))
    unknown = np.flatnonzero(counts[:, :-1].sum(axis=1) == 0)
    if len(unknown):
        raise EvaluationError(
            f"Expected an image of {order[unknown[0]]!r} with a class of {name}, found none at a confidence of "
            f"{question.min_confidence:g} or more. Ask for less confidence, use a better annotator, or leave the "
            "prompt out."
        )
    shown, note = {}, ""
    if (right >= 0).any():
        table = count(right == 1)
        kept = table[:, :-1].sum(axis=1) > 0
        shown = estimates(table[kept]) if kept.any() else {}
        left_out = [prompt for prompt, keep in zip(order, kept, strict=True) if not keep]
        if left_out:
            note = (
                f"figures of images whose subject is right leave out {len(left_out)} of {len(order)} prompts that "
                f"have none, first {left_out[0]!r}"
            )
    few = min(question.num_resamples, PROMPT_RESAMPLES)
    labels = (*names, CANNOT_TELL) if counts[:, -1].any() or question.min_confidence else names
    return AttributeMeasures(
        counts={prompt: dict(zip(labels, counts[number].tolist(), strict=False)) for prompt, number in place.items()},
        overall=estimates(counts),
        subject_right=shown,
        by_prompt={prompt: estimates(counts[[number]], few) for prompt, number in place.items() if len(place) > 1},
        softmax_discrepancy=_softmax(index, probabilities, len(order), target, question),
        note=note,
    )


def _softmax(
    index: NDArray[np.int64],
    probabilities: NDArray[np.float32] | None,
    num_prompts: int,
    target: tuple[float, ...] | None,
    question: Question,
) -> Quantity:
    """Fairness discrepancy of mean probabilities, of the images that have any."""
    if probabilities is None:
        return Quantity(None, note="not defined for an intersection")
    known = probabilities.sum(axis=1) > 0
    shares: NDArray[Any] = probabilities[known].astype(np.float64)
    shares /= shares.sum(axis=1, keepdims=True)
    sums = np.zeros((num_prompts, shares.shape[1]))
    np.add.at(sums, index[known], shares)
    totals = sums.sum(axis=1)
    if not totals.all():
        return Quantity(None, note="not defined: a prompt has no image with a probability")
    metric = "fairness_discrepancy"
    low, high = interval(
        metric,
        sums,
        target=target,
        confidence=question.confidence,
        num_resamples=question.num_resamples,
        seed=derived_seed("softmax", question.seed) % 2**31,
    )
    floor = metric_floor(metric, np.rint(totals), sums.shape[1], target=target)
    note = (
        f"of mean probabilities, which spread less than labels: interval and floor ({floor:.3g}) are those of labels"
    )
    return Quantity(float(per_prompt(metric, sums, target=target).mean()), low, high, note=note)
