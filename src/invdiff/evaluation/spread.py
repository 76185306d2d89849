"""How the classes of an attribute are spread over a model's images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import EvaluationError
from ..seeds import derived_seed
from .annotators.annotations import CANNOT_TELL
from .describe import Described
from .fairness.estimate import estimate
from .fairness.floors import metric_floor
from .fairness.intervals import interval
from .fairness.metrics import METRICS, fairness_discrepancy, intersections
from .question import Question
from .results import AttributeMeasures, Estimate, Quantity

TARGETED = ("fairness_discrepancy", "kl_to_target")
"""Metrics that measure the distance to a target mix; the others measure evenness."""
PROMPT_RESAMPLES = 200
"""Resamples of the intervals of single prompts, which are many."""


def spread_of(
    name: str, prompts: Sequence[str], seen: Described, right: NDArray[np.int64], question: Question
) -> AttributeMeasures:
    """Measure how one attribute's classes are spread.

    Args:
        name: The attribute.
        prompts: The prompt of each image, (N,).
        seen: What is known of the images.
        right: 1 where an image shows its prompt's subject, 0 where not, -1 where the prompt names none, (N,).
        question: What is asked.

    Raises:
        EvaluationError: No image of a prompt can be told.
    """
    return _spread(name, prompts, seen.classes[name], seen.probabilities[name], right, question)


def spread_of_intersection(
    prompts: Sequence[str], seen: Described, right: NDArray[np.int64], question: Question
) -> AttributeMeasures:
    """Measure how the combinations of all attributes' classes are spread; arguments as for `spread_of`.

    Its confusion matrix would need held-out images of every combination, so nothing is corrected.
    """
    name = " x ".join(question.attributes)
    sizes = [len(question.classes[attribute]) for attribute in question.attributes]
    columns = [seen.classes[attribute] for attribute in question.attributes]
    told = np.logical_and.reduce([column < size for column, size in zip(columns, sizes, strict=True)])
    known = [np.minimum(column, size - 1) for column, size in zip(columns, sizes, strict=True)]
    joint, total = intersections(*known, num_classes=sizes)
    combinations = tuple(map(" x ".join, product(*(question.classes[attribute] for attribute in question.attributes))))
    asked = replace(question, classes={**question.classes, name: combinations})
    return _spread(name, prompts, np.where(told, joint, total), None, right, asked)


def _spread(
    name: str,
    prompts: Sequence[str],
    classes: NDArray[np.int64],
    probabilities: NDArray[np.float32] | None,
    right: NDArray[np.int64],
    question: Question,
) -> AttributeMeasures:
    names = question.classes[name]
    place_of = {prompt: place for place, prompt in enumerate(dict.fromkeys(prompts))}
    order = list(place_of)
    index = np.array([place_of[prompt] for prompt in prompts])
    counts = _counts(index, classes, len(order), len(names) + 1)
    _check_told(name, order, counts, question.min_confidence)
    first = name == question.attributes[0]
    ask = partial(
        _estimates,
        name=name,
        question=question,
        target=question.target if first else None,
        confusion=question.confusion.get(name),
    )
    subject_right: dict[str, Estimate] = {}
    note = ""
    if (right >= 0).any():
        chosen = right == 1
        table = _counts(index[chosen], classes[chosen], len(order), len(names) + 1)
        kept = table[:, :-1].sum(axis=1) > 0
        if kept.any():
            subject_right = ask(table[kept])
        left_out = [prompt for prompt, keep in zip(order, kept, strict=True) if not keep]
        if left_out:
            note = (
                f"figures of images whose subject is right leave out {len(left_out)} of {len(order)} prompts that "
                f"have none, first {left_out[0]!r}"
            )
    few = min(question.num_resamples, PROMPT_RESAMPLES)
    labels = (*names, CANNOT_TELL) if counts[:, -1].any() or question.min_confidence else names
    return AttributeMeasures(
        counts={
            prompt: dict(zip(labels, row.tolist(), strict=False)) for prompt, row in zip(order, counts, strict=True)
        },
        overall=ask(counts),
        subject_right=subject_right,
        by_prompt=_by_prompt(order, counts, partial(ask, question=replace(question, num_resamples=few))),
        softmax_discrepancy=_softmax(index, probabilities, len(order), question.target if first else None, question),
        note=note,
    )


def _by_prompt(
    prompts: Sequence[str], counts: NDArray[np.int64], ask: Callable[[NDArray[np.int64]], dict[str, Estimate]]
) -> dict[str, dict[str, Estimate]]:
    """Return each prompt's estimates; of a single prompt they are the overall ones."""
    if len(prompts) == 1:
        return {}
    return {prompt: ask(row[None]) for prompt, row in zip(prompts, counts, strict=True)}


def _estimates(
    counts: NDArray[np.int64],
    *,
    name: str,
    question: Question,
    target: tuple[float, ...] | None,
    confusion: NDArray[Any] | None,
) -> dict[str, Estimate]:
    """Return every metric's estimate of counts (prompts, K + 1) whose last column is "cannot tell"."""
    return {
        metric: estimate(
            metric,
            counts[:, :-1],
            target=target if metric in TARGETED else None,
            confusion=confusion,
            unsure=counts[:, -1],
            confidence=question.confidence,
            num_resamples=question.num_resamples,
            seed=derived_seed("interval", question.seed, name, metric) % 2**31,
        )
        for metric in METRICS
    }


def _softmax(
    index: NDArray[np.int64],
    probabilities: NDArray[np.float32] | None,
    num_prompts: int,
    target: tuple[float, ...] | None,
    question: Question,
) -> Quantity:
    """Return the discrepancy of mean probabilities, of the images that have any."""
    if probabilities is None:
        return Quantity(None, note="not defined for an intersection")
    known = probabilities.sum(axis=1) > 0
    shares = probabilities[known].astype(np.float64)
    shares /= shares.sum(axis=1, keepdims=True)
    sums = np.zeros((num_prompts, shares.shape[1]))
    np.add.at(sums, index[known], shares)
    totals = sums.sum(axis=1)
    if not totals.all():
        return Quantity(None, note="not defined: a prompt has no image with a probability")
    low, high = interval(
        "fairness_discrepancy",
        sums,
        target=target,
        confidence=question.confidence,
        num_resamples=question.num_resamples,
        seed=derived_seed("softmax", question.seed) % 2**31,
    )
    floor = metric_floor("fairness_discrepancy", np.rint(totals), sums.shape[1], target=target)
    note = (
        f"of mean probabilities, which spread less than labels: interval and floor ({floor:.3g}) are those of labels"
    )
    return Quantity(fairness_discrepancy(sums, target), low, high, note=note)


def _counts(
    index: NDArray[np.int64], classes: NDArray[np.int64], num_prompts: int, num_classes: int
) -> NDArray[np.int64]:
    table = np.zeros((num_prompts, num_classes), dtype=np.int64)
    np.add.at(table, (index, classes), 1)
    return table


def _check_told(name: str, prompts: Sequence[str], counts: NDArray[np.int64], min_confidence: float) -> None:
    untold = np.flatnonzero(counts[:, :-1].sum(axis=1) == 0)
    if len(untold):
        raise EvaluationError(
            f"Expected an image of {prompts[untold[0]]!r} whose {name} can be told, found none at a confidence of "
            f"{min_confidence:g} or more. Ask for less confidence, use a better annotator, or leave the prompt out."
        )
