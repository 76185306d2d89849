"""Turn what is known of one model's images into figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import EvaluationError
from ..seeds import derived_seed
from . import quality
from .annotations import CANNOT_TELL
from .describe import Described, open_image
from .estimates import Estimate, estimate
from .extractors import CLIPScorer
from .fairness import METRICS, fairness_discrepancy, intersections
from .manifest import Row
from .results import AttributeMeasures, Measures, Quantity

if TYPE_CHECKING:
    import torch

TARGETED = ("fairness_discrepancy", "kl_to_target")
"""Metrics that measure the distance to a target mix; the others measure evenness."""
NEIGHBOURS = 5
"""k of precision, recall, density and coverage."""
MIN_KERNEL = 3
"""Images of each side that the kernel distance's interval needs."""
PROMPT_RESAMPLES = 200
"""Resamples of the intervals of single prompts, which are many."""
LPIPS = Callable[["torch.Tensor", "torch.Tensor"], "torch.Tensor"]
"""From two batches of images to the mean distance of their pairs."""
LPIPS_IMAGES = 20
"""Images of each prompt that LPIPS compares in pairs."""
MIN_GROUP = 50
"""Images of a group below which distances to a reference are mostly error."""


@dataclass(frozen=True)
class Question:
    """What is asked of every model's images."""

    attributes: tuple[str, ...]
    """Sensitive attributes; the first gives the headline figures."""
    classes: Mapping[str, tuple[str, ...]]
    """Attribute to class names."""
    confusion: Mapping[str, NDArray[Any] | None]
    """Attribute to held-out counts, (K, K + 1); None where there are none."""
    min_confidence: float
    subject_attribute: str | None
    subject_of: Mapping[str, str]
    """Prompt to its class of `subject_attribute`."""
    target: tuple[float, ...] | None
    """Shares of the first attribute's classes to measure against; None is uniform."""
    confidence: float
    num_resamples: int
    seed: int


def measure(
    rows: Sequence[Row],
    seen: Described,
    question: Question,
    *,
    reference: Described | None,
    group_size: int = 0,
    clip: CLIPScorer | None = None,
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
    attributes = {
        name: _attribute(name, prompts, seen.classes[name], seen.probabilities[name], right, question)
        for name in question.attributes
    }
    if len(question.attributes) > 1:
        name, joint = _joint(seen, question)
        attributes[name] = joint_measures(name, joint, prompts, seen, right, question)
    known = right[right >= 0]
    return Measures(
        images_per_prompt=min(Counter(prompts).values()),
        attributes=attributes,
        subject_accuracy=_share(known, question.confidence) if len(known) else None,
        quality=_quality(rows, seen, reference, clip, question) | (_lpips(rows, lpips) if lpips else {}),
        by_group=_by_group(seen, reference, right, question, group_size),
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
            moved = 1 - quality.paired_cosines(before, after)
            unrelated = quality.feature_shift(before, before).unrelated
        except EvaluationError as error:
            figures[f"feature shift ({name})"] = Quantity(None, note=f"not defined: {error}")
            continue
        ends = quality.mean_interval(moved, confidence=question.confidence)
        note = f"cosine distance, {number}; the baseline's own images are {unrelated:.3g} apart"
        figures[f"feature shift ({name})"] = Quantity(float(moved.mean()), *ends, note=note)
    for attribute in seen.classes:
        if attribute not in question.attributes:
            mine, before = seen.classes[attribute][ours], base.classes[attribute][theirs]
            size = len(question.classes[attribute])
            told = (mine < size) & (before < size)
            if told.any():
                kept = _share((mine == before)[told], question.confidence)
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


def common_group_size(seen: Sequence[Described], reference: Described | None, question: Question) -> int:
    """Return how many images of each group distances are of, for all models and scales alike: they depend on it.

    It is the fewest that any group has, of those with enough, in any model's images at any scale and the reference's.
    """
    if reference is None or question.attributes[0] not in reference.classes:
        return 0
    attribute = question.attributes[0]
    sizes = [
        int((known.classes[attribute] == index).sum())
        for known in (*seen, reference)
        for index in range(len(question.classes[attribute]))
    ]
    return min((size for size in sizes if size >= MIN_GROUP), default=0)


def _attribute(
    name: str,
    prompts: Sequence[str],
    classes: NDArray[np.int64],
    probabilities: NDArray[np.float32] | None,
    right: NDArray[np.int64],
    question: Question,
    confusion: NDArray[Any] | None = None,
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
    shares = counts[:, :-1] / counts[:, :-1].sum(axis=1, keepdims=True)
    return AttributeMeasures(
        counts={
            prompt: dict(zip(labels, row.tolist(), strict=False)) for prompt, row in zip(order, counts, strict=True)
        },
        shares={
            prompt: dict(zip(names, row.tolist(), strict=True)) for prompt, row in zip(order, shares, strict=True)
        },
        overall=ask(counts),
        subject_right=subject_right,
        by_prompt=_by_prompt(order, counts, partial(ask, question=replace(question, num_resamples=few))),
        softmax_discrepancy=_softmax(index, probabilities, len(order), question.target if first else None),
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
) -> Quantity:
    if probabilities is None:
        return Quantity(None, note="not defined for an intersection")
    sums = np.zeros((num_prompts, probabilities.shape[1]))
    np.add.at(sums, index, probabilities)
    if not sums.sum(axis=1).all():
        return Quantity(None, note="not defined: a prompt has no image with a probability")
    return Quantity(
        fairness_discrepancy(sums, target), note="of mean probabilities; its interval is that of the labels"
    )


def _joint(seen: Described, question: Question) -> tuple[str, NDArray[np.int64]]:
    """Return the name and the joint classes of all attributes, the number of classes where one cannot be told."""
    sizes = [len(question.classes[name]) for name in question.attributes]
    columns = [seen.classes[name] for name in question.attributes]
    told = np.logical_and.reduce([column < size for column, size in zip(columns, sizes, strict=True)])
    joint, total = intersections(
        *(np.minimum(c, s - 1) for c, s in zip(columns, sizes, strict=True)), num_classes=sizes
    )
    return " x ".join(question.attributes), np.where(told, joint, total)


def joint_classes(question: Question) -> tuple[str, ...]:
    """Return the names of the intersections' classes, the last attribute varying fastest."""
    names = [""]
    for attribute in question.attributes:
        names = [f"{before} x {name}" if before else name for before in names for name in question.classes[attribute]]
    return tuple(names)


def joint_measures(
    name: str,
    joint: NDArray[np.int64],
    prompts: Sequence[str],
    seen: Described,
    right: NDArray[np.int64],
    question: Question,
) -> AttributeMeasures:
    """Measure the intersection of all attributes.

    Its confusion matrix would need held-out images of every combination, so nothing is corrected.
    """
    asked = replace(question, classes={**question.classes, name: joint_classes(question)})
    return _attribute(name, prompts, joint, None, right, asked)


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


def _quality(
    rows: Sequence[Row], seen: Described, reference: Described | None, clip: CLIPScorer | None, question: Question
) -> dict[str, Quantity]:
    figures: dict[str, Quantity] = {}
    of_prompt: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        of_prompt.setdefault(row.prompt, []).append(place)
    for name, features in seen.features.items():
        if reference is not None and name in reference.features:
            figures |= _against(features, reference.features[name], name, question)
        try:
            diversity = [quality.vendi_score(features[members]) for members in of_prompt.values()]
            figures[f"Vendi score ({name})"] = Quantity(float(np.mean(diversity)), note="mean over prompts")
        except EvaluationError as error:
            figures[f"Vendi score ({name})"] = Quantity(None, note=f"not defined: {error}")
    if clip is not None:
        cosines = quality.paired_cosines(seen.features[clip.name], clip.text_features([row.prompt for row in rows]))
        ends = quality.mean_interval(cosines, confidence=question.confidence)
        figures[f"CLIP-T ({clip.name})"] = Quantity(float(cosines.mean()), *ends)
    return figures


def _lpips(rows: Sequence[Row], network: LPIPS) -> dict[str, Quantity]:
    paths: dict[str, list[Path]] = {}
    for row in rows:
        paths.setdefault(row.prompt, []).append(row.path)
    diversity = [
        quality.lpips_diversity([open_image(path) for path in of_prompt[:LPIPS_IMAGES]], distance=network)
        for of_prompt in paths.values()
    ]
    note = f"mean over prompts, of all pairs of the first {LPIPS_IMAGES} images at most"
    return {"LPIPS diversity (alexnet)": Quantity(float(np.mean(diversity)), note=note)}


def _against(features: NDArray[Any], reference: NDArray[Any], name: str, question: Question) -> dict[str, Quantity]:
    """Return the distances and neighbourhood figures of features against a reference's."""
    sizes = f"{len(features)} against {len(reference)} images"
    frechet = quality.frechet_distance(features, reference)
    figures = {frechet_name(name): Quantity(frechet, note=f"{sizes}; falls as their number grows")}
    if min(len(features), len(reference)) < MIN_KERNEL:
        figures[f"KID ({name})"] = Quantity(None, note=f"not defined at {sizes}: needs {MIN_KERNEL} of each")
    else:
        low, high = quality.kernel_distance_interval(features, reference, confidence=question.confidence)
        figures[f"KID ({name})"] = Quantity((low + high) / 2, low, high, note=sizes)  # symmetric about its value
    figures[f"CMMD ({name})"] = Quantity(
        quality.cmmd(features, reference), note=f"{sizes}; falls as their number grows"
    )
    return figures | _neighbourhood(features, reference, name, question)


def frechet_name(features: str) -> str:
    """Return what the Fréchet distance on these features is called: FID on Inception's alone."""
    return f"FID ({features})" if features == "inception" else f"Frechet distance ({features})"


def _neighbourhood(
    features: NDArray[Any], reference: NDArray[Any], name: str, question: Question
) -> dict[str, Quantity]:
    needed = NEIGHBOURS + 1
    labels = [f"{figure} ({name})" for figure in ("precision", "recall", "density", "coverage")]
    if min(len(features), len(reference)) < needed:
        why = f"not defined at {len(features)} against {len(reference)} images: needs {needed} of each"
        return {label: Quantity(None, note=why) for label in labels}
    found = quality.precision_recall_density_coverage(features, reference, k=NEIGHBOURS)
    totals = {0: len(features), 1: len(reference), 3: len(reference)}
    figures = {}
    for place, (label, value) in enumerate(zip(labels, found, strict=True)):
        if place in totals:
            total = totals[place]
            ends = quality.share_interval(round(value * total), total, confidence=question.confidence)
            figures[label] = Quantity(float(value), *ends)
        else:
            figures[label] = Quantity(float(value))
    return figures


def _by_group(
    seen: Described, reference: Described | None, right: NDArray[np.int64], question: Question, even: int
) -> dict[str, dict[str, Quantity]]:
    """Return figures of `even` images of each class of the first attribute, against as many of the reference's."""
    attribute = question.attributes[0]
    names = question.classes[attribute]
    rng = np.random.default_rng(derived_seed("groups", question.seed))
    members = [rng.permutation(np.flatnonzero(seen.classes[attribute] == index)) for index in range(len(names))]
    real: list[NDArray[np.int64]] = []
    if reference is not None and attribute in reference.classes:
        real = [rng.permutation(np.flatnonzero(reference.classes[attribute] == index)) for index in range(len(names))]
    sizes = [min(len(mine), len(theirs)) for mine, theirs in zip(members, real, strict=False)]
    groups: dict[str, dict[str, Quantity]] = {}
    for index, (group, mine) in enumerate(zip(names, members, strict=True)):
        figures = {"images": Quantity(float(len(mine)))}
        known = right[mine][right[mine] >= 0]
        if len(known):
            figures["subject accuracy"] = _share(known, question.confidence)
        elif (right >= 0).any():
            figures["subject accuracy"] = Quantity(None, note="not defined: no image of this class")
        for name in reference.features if reference is not None and real else ():
            if name not in seen.features:
                continue
            if sizes[index] < MIN_GROUP:
                why = f"not defined at {len(mine)} against {len(real[index])} images: needs {MIN_GROUP} of each"
                figures[frechet_name(name)] = Quantity(None, note=why)
                continue
            assert reference is not None
            ours, theirs = seen.features[name][mine[:even]], reference.features[name][real[index][:even]]
            note = f"{even} images of each group against as many"
            distances = {frechet_name(name): Quantity(quality.frechet_distance(ours, theirs))}
            distances |= _neighbourhood(ours, theirs, name, question)
            figures |= {label: replace(figure, note=note) for label, figure in distances.items()}
        groups[group] = figures
    return groups


def _share(successes: NDArray[Any], confidence: float) -> Quantity:
    total, count = len(successes), int(np.sum(successes))
    return Quantity(count / total, *quality.share_interval(count, total, confidence=confidence))
