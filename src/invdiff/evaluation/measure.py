"""Turn the descriptions of one model's images into figures: how evenly classes are drawn, quality, preservation."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..config import EvaluateConfig
from ..seeds import derived_seed
from .annotate import Described, Question
from .fairness.correction import correct_for_annotator, corrected_floor, corrected_interval
from .fairness.intervals import interval, mean_interval
from .fairness.metrics import METRICS, metric_floor, per_prompt, shares_of, squared_discrepancy_unbiased
from .images import Row, pairs_of
from .quality.distances import mean_cosine_distance, paired_cosines
from .quality.figures import group_figures, quality_figures, share, where_defined
from .results import CANNOT_TELL, AttributeMeasures, Estimate, Measures, Quantity

PROMPT_RESAMPLES = 200  # resamples of the intervals of single prompts, which are many


def measure(rows: Sequence[Row], seen: Described, question: Question, group_size: int) -> Measures:
    """Measures of one model's images, and their descriptions in the same order, at one guidance scale.

    Distances by group are of `group_size` images each.
    """
    prompts = [row.prompt for row in rows]
    right = np.full(len(rows), -1)  # 1 where an image shows its prompt's subject, 0 where not, -1 where not known
    if subject := question.config.subject_attribute:
        named = np.array([question.subject_of.get(prompt, -1) for prompt in prompts])
        unclear = (named >= 0) & (seen.classes[subject] == len(question.classes[subject]))
        right = np.where(unclear | (named < 0), -1, seen.classes[subject] == named)
    attributes = {name: _spread(name, prompts, seen, right, question) for name in question.attributes}
    if len(attributes) > 1:
        # The confusion matrix of an intersection would need held-out images of every combination: none is corrected.
        kinds = [question.classes[name] for name in attributes]
        columns, sizes = [seen.classes[name] for name in attributes], tuple(map(len, kinds))
        certain = np.all([of < size for of, size in zip(columns, sizes, strict=True)], axis=0)
        joint = np.where(certain, np.ravel_multi_index(tuple(columns), sizes, mode="clip"), np.prod(sizes))
        name, names = " x ".join(attributes), tuple(map(" x ".join, product(*kinds)))
        told = {prompt for prompt, each in zip(prompts, certain, strict=True) if each}
        apart = set(prompts) - told.difference(*question.apart.values())
        if apart < set(prompts):
            of = replace(question, classes={**question.classes, name: names}, apart={**question.apart, name: apart})
            both = replace(seen, classes={**seen.classes, name: joint})
            attributes[name] = _spread(name, prompts, both, right, of)
    known, accuracy = right[right >= 0], None
    if len(known):
        untold = f"accuracy leaves out {unclear.sum()} of {len(rows)} images, whose {subject} is not told"
        accuracy = replace(share(known), note=untold if unclear.any() else "")
    return Measures(
        images_per_prompt=min(Counter(prompts).values()),
        attributes=attributes,
        subject_accuracy=accuracy,
        quality=quality_figures(rows, seen, question),
        by_group=group_figures(seen, right, question, group_size),
    )


def preserve(
    rows: Sequence[Row], seen: Described, base_rows: Sequence[Row], base: Described, question: Question
) -> dict[str, Quantity]:
    """How far images moved from those that the baseline draws from the same prompts and seeds.

    By features, beside unrelated images of the baseline, also prompt by prompt, since prompts that nobody audited are
    to stay; and by the share of pairs that keep their class.
    """

    def shift(before: NDArray[Any], after: NDArray[Any]) -> Quantity:
        moved, unrelated = 1 - paired_cosines(before, after), mean_cosine_distance(before)
        note = f"cosine distance, {len(moved)} pairs; the baseline's own images are {unrelated:.3g} apart"
        return Quantity(float(moved.mean()), *mean_interval(moved), note=note)

    pairs = pairs_of(rows, base_rows)
    if len(pairs) < 2:
        why = "not defined: the manifests share no two seeds of a prompt with the baseline, each given once"
        return {"feature shift": Quantity(None, note=why)}
    ours, theirs = (np.array(side) for side in zip(*pairs, strict=True))
    figures: dict[str, Quantity] = {}
    prompts = np.array([rows[place].prompt for place in ours])
    several = [prompt for prompt, count in Counter(prompts.tolist()).items() if 1 < count < len(prompts)]
    for name, prompt in product(seen.features, (None, *several)):
        own = np.ones(len(pairs), dtype=bool) if prompt is None else prompts == prompt
        figure = f"feature shift ({name})" + (f", {prompt!r}" if prompt is not None else "")
        before, after = base.features[name][theirs[own]], seen.features[name][ours[own]]
        figures[figure] = where_defined(shift, before, after)
    for attribute in [name for name in seen.classes if name not in question.attributes]:
        mine, before = seen.classes[attribute][ours], base.classes[attribute][theirs]
        known = np.maximum(mine, before) < len(question.classes[attribute])
        kept = Quantity(None, note="not defined: no pair has a class on both sides")
        if known.any():
            kept = replace(share((mine == before)[known]), note=f"{known.sum()} of {len(pairs)} pairs")
        figures[f"{attribute} unchanged"] = kept
    return figures


def estimate(
    metric: str,
    counts: NDArray[np.int64],
    unsure: NDArray[np.int64],
    *,
    target: ArrayLike | None = None,
    confusion: ArrayLike | None = None,
    num_resamples: int = 1000,
    seed: int = 0,
) -> Estimate:
    """A fairness metric's mean over prompts, of counts (prompts, groups), with interval, floor and correction.

    Images without a class, (prompts,), enter the corrected figures only.
    """
    values, notes = per_prompt(metric, counts, target=target), []
    settings: Any = {"target": target, "num_resamples": num_resamples, "seed": seed}
    low, high = interval(metric, counts, **settings)
    totals, square = counts.sum(axis=1), None
    if metric == "fairness_discrepancy" and totals.min() < 2:
        notes.append("unbiased_square: not defined with one image of a prompt")
    elif metric == "fairness_discrepancy":
        square = squared_discrepancy_unbiased(counts, target)
    if len(values) == 1:
        notes.append("sd_over_prompts: not defined for one prompt")
    found = Estimate(
        value=float(values.mean()),
        low=low,
        high=high,
        floor=metric_floor(metric, totals, counts.shape[1], target=target),
        sd_over_prompts=float(values.std(ddof=1)) if len(values) > 1 else None,
        unbiased_square=square,
        note="; ".join(notes),
    )
    if confusion is None:
        return found
    annotated = np.column_stack([counts, unsure])
    corrected = float(per_prompt(metric, correct_for_annotator(annotated, confusion), target=target).mean())
    low, high = corrected_interval(metric, annotated, confusion, **settings)
    floor = corrected_floor(metric, annotated, confusion, target)
    return replace(found, corrected=corrected, corrected_low=low, corrected_high=high, corrected_floor=floor)


def _spread(
    name: str, prompts: Sequence[str], seen: Described, right: NDArray[np.int64], question: Question
) -> AttributeMeasures:
    """How one attribute's classes are spread over the images, of prompts (N,), of those that do not lie apart."""
    names, told = question.classes[name], (p for p in dict.fromkeys(prompts) if p not in question.apart[name])
    place = {prompt: number for number, prompt in enumerate(told)}
    chosen = [k for k, prompt in enumerate(prompts) if prompt in place]
    index, classes, right = np.array([place[prompts[k]] for k in chosen]), seen.classes[name][chosen], right[chosen]
    probabilities = seen.probabilities[name][chosen] if name in seen.probabilities else None
    target, config = None, question.config
    if question.target and name not in question.attributes[1:]:  # of an intersection, beside even mixes of the others
        target = tuple(np.repeat(question.target, len(names) // len(question.target)))

    def count(chosen: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Images per prompt and class, the last class for "cannot tell", (prompts, K + 1)."""
        table = np.zeros((len(place), len(names) + 1), dtype=np.int64)
        np.add.at(table, (index[chosen], classes[chosen]), 1)
        return table

    def estimates(counts: NDArray[np.int64], num_resamples: int = config.num_resamples) -> dict[str, Estimate]:
        return {
            metric: estimate(
                metric,
                counts[:, :-1],
                counts[:, -1],
                target=target if METRICS[metric].takes_target else None,
                confusion=question.confusion.get(name),
                num_resamples=num_resamples,
                seed=derived_seed("interval", config.seed, name, metric) % 2**31,
            )
            for metric in METRICS
        }

    counts, shown, note = count(np.ones(len(index), dtype=bool)), {}, ""
    if (right >= 0).any():
        table = count(right == 1)
        kept = table[:, :-1].sum(axis=1) > 0
        shown = estimates(table[kept]) if kept.any() else {}
        if left_out := [prompt for prompt, number in place.items() if not kept[number]]:
            these = f"{len(left_out)} of {len(place)} prompts that have none, first {left_out[0]!r}"
            note = f"figures of images whose subject is right leave out {these}"
    few = min(config.num_resamples, PROMPT_RESAMPLES)
    labels = (*names, CANNOT_TELL) if counts[:, -1].any() or config.min_confidence else names
    return AttributeMeasures(
        counts={prompt: dict(zip(labels, counts[number].tolist(), strict=False)) for prompt, number in place.items()},
        overall=estimates(counts),
        subject_right=shown,
        by_prompt={prompt: estimates(counts[[number]], few) for prompt, number in place.items() if len(place) > 1},
        softmax_discrepancy=_softmax(index, probabilities, target, config),
        note=note,
    )


def _softmax(
    index: NDArray[Any], probabilities: NDArray[Any] | None, target: ArrayLike | None, config: EvaluateConfig
) -> Quantity:
    """Fairness discrepancy of mean probabilities (N, K), of the images that have any, by prompt index (N,)."""
    if probabilities is None:
        return Quantity(None, note="not defined for an intersection")
    known = probabilities.sum(axis=1) > 0
    sums = np.zeros((index.max() + 1, probabilities.shape[1]))
    np.add.at(sums, index[known], shares_of(probabilities[known].astype(np.float64)))
    metric, seed = "fairness_discrepancy", derived_seed("softmax", config.seed) % 2**31
    ends = interval(metric, sums, target=target, num_resamples=config.num_resamples, seed=seed)
    floor = metric_floor(metric, np.rint(sums.sum(axis=1)), sums.shape[1], target=target)
    labels = f"interval and floor ({floor:.3g}) are those of labels"
    note = f"of mean probabilities, which spread less than labels: {labels}"
    return Quantity(float(per_prompt(metric, sums, target=target).mean()), *ends, note=note)
