"""The sections of a report about generated images: the glance, what changed prompt by prompt, and what it cost."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np

from ..data.images import read_image
from ..data.tables import labels_in
from ..errors import DataError
from ..evaluation.fairness.metrics import METRICS
from ..evaluation.images import Row
from ..evaluation.results import CANNOT_TELL, AttributeMeasures, Estimate, Measures, Quantity, Results
from .audit_view import summary
from .compare import BASE, GUIDED, Comparison, label, modules_by_scale, over_guidance, over_module
from .figures import (
    ABSENT,
    Share,
    Table,
    at_scale,
    bias,
    corrected,
    correction_matters,
    counted,
    estimate,
    floors,
    images_each,
    quantity,
    quoted,
    sentences,
    share_in_words,
    share_of,
    shown_name,
    with_direction,
)
from .plots import BASE_COLOUR, SERIES_COLOURS, Thumb, plot_chart, thumb
from .read import MOST_PROMPTS, Run

PAIRS = 8
MOST_FIGURES, MOST_NOTES = 40, 8
TRAINING_DATA = "Training data"
DATA_COLOUR = "#a9793f"  # of no group, class or model


def glance(run: Run, chosen: Comparison | None) -> dict[str, Any]:
    """The report in a few lines: a verdict, the figure of the two models that it is by, and pairs of images."""
    view: dict[str, Any] = {"sentences": [summary(run.audit)] if run.audit else [], "headlines": [], "pairs": []}
    if chosen is None:
        return view
    turns = [pair for turn in zip_longest(*chosen.pairs.values()) for pair in turn if pair]
    view["pairs"] = [pair_of(pair, chosen) for pair in turns[:PAIRS]]
    results, models = run.results, dict.fromkeys([chosen.before, chosen.after])
    if results is None:
        return view
    by, found = results.criterion, [(label(model), results.judged(chosen.measures[model])) for model in models]
    figures = [of for _, of in found]
    matters, shows = correction_matters(figures), f"A {by.sampler} shows"
    last = ["Corrected for the annotator", f"{shows}, corrected"] if matters else []
    columns = ("", f"{by.name} ({results.confidence:.0%} interval)", shows, *last)
    rows = [
        [name, estimate(of), floors([of]), corrected(of), floors([of], "corrected_floor")][: len(columns)]
        for name, of in found
    ]
    view["sentences"].append(_verdict(results, chosen))
    return view | {"headlines": found, "corrected": matters, "floors": floors(figures), "table": Table(columns, rows)}


def _verdict(results: Results, chosen: Comparison) -> str:
    """What the two figures say, and no more than their intervals allow."""
    before, after = (results.judged(chosen.measures[model]) for model in (chosen.before, chosen.after))
    matters = correction_matters([before, after])
    of, sampler = "the base model" if chosen.before == BASE else quoted(chosen.before), results.criterion.sampler
    words = f"{results.criterion.name} of {quoted(results.attribute)} in images of {of} is {_told(before, matters)}"
    by_chance = floors([after], "corrected_floor" if matters and after.corrected is not None else "floor")
    fair = f"about {by_chance} by chance alone"
    if chosen.before == chosen.after:
        words += f". A {sampler} would show {fair}. No other model was measured"
        return words + (f" {at_scale(chosen.key)}." if len(results.models) > 1 else " beside it.")
    whose = "with guidance" if chosen.after == GUIDED else f"of {quoted(chosen.after)}"
    words += f"; {whose} it is {_told(after, matters)}."
    (least_before, most_before), (least, most) = _ends(before, matters), _ends(after, matters)
    apart, fair_as_well = most < least_before, round(least, 2) <= 0
    if fair_as_well:
        words += f" Its interval reaches 0, the true figure of a {sampler}, whose images show {fair}; "
        words += f"as much as {bias(most)} is possible too."
        metric, of_prompts = results.criterion.metric, chosen.measures[chosen.after].first.by_prompt.values()
        if uneven := sum(round(_ends(each[metric], matters)[0], 2) > 0 for each in of_prompts if metric in each):
            words += f" That of {uneven} of {counted(len(of_prompts), 'prompt')} alone does not reach 0."
    elif apart:
        words += f" It is less, but its interval does not reach 0, the true figure of a {sampler}."
    if least > most_before:
        guided = chosen.after == GUIDED or results.module_scales.get(chosen.after)
        return f"{words} It is more{': on these images guidance did harm' if guided and not fair_as_well else ''}."
    told_before, told = (of.value if of.corrected is None or not matters else of.corrected for of in (before, after))
    doubt = "It is no less." if told >= told_before else "But the two intervals overlap: more images would tell."
    return words if apart else f"{words} {doubt}"


def _told(figure: Estimate, matters: bool) -> str:
    """A figure in a sentence, and what it is once the annotator's errors are counted, where that `matters`."""
    known = matters and figure.corrected is not None
    return bias(figure.value) + (f", or {corrected(figure)} corrected for the annotator's errors" if known else "")


def _ends(figure: Estimate, matters: bool) -> tuple[float, float]:
    """The interval of a figure, corrected for the annotator's errors where that `matters` and they are known."""
    low, high = figure.corrected_low, figure.corrected_high
    return (figure.low, figure.high) if not matters or low is None or high is None else (low, high)


def changes(run: Run, chosen: Comparison) -> dict[str, Any]:
    """What guidance changed, prompt by prompt."""
    results, models = run.results, chosen.measures
    names = list(dict.fromkeys(prompt for of in models.values() for prompt in of.shares)) or list(chosen.pairs)
    known = training_labels(run)
    prompts = [_prompt(name, run, chosen, known.get(name)) for name in names[:MOST_PROMPTS]]
    notes = [f"{len(names) - MOST_PROMPTS} more prompts are in the results."] if len(names) > MOST_PROMPTS else []
    lost = ", ".join(run.unmeasured)
    notes += [f"Images of {lost} are not shown: they are not those that were measured."] if lost else []
    return {
        "attribute": results.attribute if results else "",
        "prompts": prompts,
        "shares": _shares(prompts, list(map(label, models))),
        "notes": notes,
        "labels_read": results is not None and any(prompt["note"] for prompt in prompts),
        "fairness": [
            _fairness(name, {label(model): m.attributes[name] for model, m in models.items() if name in m.attributes})
            for name in dict.fromkeys(name for measures in models.values() for name in measures.attributes)
        ],
    }


def costs(chosen: Comparison, results: Results) -> dict[str, Any]:
    """Quality with intervals, group by group, at every guidance scale and scale of the module."""
    modules, by_group = modules_by_scale(results, chosen), _by_group(chosen, results)
    every = sorted(results.each(), key=lambda of: (of[0] != chosen.before, of[0] != chosen.after))
    scales_say_it = len(every) <= 2 or (modules and len(chosen.keys) == 1)
    over_scale = [(name, f"{scale:g}", measures) for name, line in modules.items() for scale, measures in line.items()]
    at, plain = at_scale(chosen.key), any(0 in line for line in modules.values())
    notes = ["Scale 0 is the base model: there the module does nothing."] if plain else []
    about = f"{at.capitalize()}; 0 is the base model, 1 is what the module was trained for."
    return {
        "over_guidance": [plot_chart(chart, "over guidance scale") for chart in over_guidance(results, chosen)],
        "over_module_scale": [plot_chart(c, "over the module's scale", about) for c in over_module(results, chosen)],
        "tables": [
            _quality(chosen, results),
            by_group,
            headlines(results, () if scales_say_it else every, "Every guidance scale"),
            headlines(results, over_scale, f"Every scale of the module, {at}", notes, of=("Module", "Scale")),
        ],
        "with_quality": any(measures.quality for measures in chosen.measures.values()),
        "by_group": bool(by_group.rows),
    }


def where(chosen: Comparison) -> str:
    """At which guidance scale, and on how many images, in words."""
    words = at_scale(chosen.key)
    counts = sorted({sum(n.values()) for of in chosen.measures.values() for n in of.first.counts.values()})
    if len(chosen.keys) > 1:
        words += f", the middle one of {len(chosen.keys)} measured" if counts else f", one of {len(chosen.keys)}"
    least = f"{counts[0]:,} to " if len(counts) > 1 else ""
    return words + (f"; {least}{counted(counts[-1], 'image')} of each prompt and model" if counts else "")


def pair_of(rows: tuple[Row, Row], chosen: Comparison) -> list[Thumb]:
    """Two images of one prompt and seed, small enough to embed."""
    return [
        thumb(read_image(row.path), f"{label(model)}: {row.prompt[:200]}, seed {row.seed}")
        for row, model in zip(rows, (chosen.before, chosen.after), strict=True)
    ]


def training_labels(run: Run) -> dict[str, Counter[str]]:
    """Caption to how many training images of its prompt show each class, as the data's own column says.

    Without images that have no label or were left out; empty where the data has no such column, or none of its
    classes.
    """
    results, audit = run.results, run.audit
    column = run.data.attributes.get(results.attribute) if run.data is not None and results else None
    if audit is None or results is None or column is None:
        return {}
    classes = {name for _, _, of in results.each() for shares in of.shares.values() for name in shares}
    cells = ((column[row], name) for row, name in zip(run.rows, audit.names, strict=True))
    values = labels_in(results.attribute, cells, DataError, dict.fromkeys(classes, "the results"))
    if not classes & set(values):
        return {}
    counts: dict[str, Counter[str]] = {}
    for index, prompt in reversed(list(enumerate(audit.prompts))):
        own = np.flatnonzero(audit.kept & (audit.prompt_ids == index))
        labels = Counter(values[position] for position in own if values[position] not in ("", CANNOT_TELL))
        counts |= dict.fromkeys((*prompt.captions, prompt.prompt), labels)
    return counts


def _prompt(prompt: str, run: Run, chosen: Comparison, labels: Counter[str] | None) -> dict[str, Any]:
    """One prompt before and after: shares of each class in training data, where known, and in each model's images."""
    results, models, classes, note = run.results, chosen.measures, [], ""
    groups: list[tuple[str, list[Share]]] = []  # of each hidden factor
    counted_by = {
        label(model): {of: n for of, n in measures.first.counts.get(prompt, {}).items() if of != CANNOT_TELL}
        for model, measures in models.items()
    }
    if labels and results:
        note = f"{TRAINING_DATA}: {counted(labels.total(), 'labelled image')} under this prompt"
        others = [name for name, _ in labels.most_common() if name not in results.classes.get(results.attribute, ())]
        if others:
            count = sum(labels[name] for name in others)
            note += f"; {count:,} of them show other classes, such as {quoted(others[0])}, and count in the total"
        note += "."
        counted_by = {TRAINING_DATA: labels, **counted_by}
    else:
        groups = [(of.factor, of.shares) for of in run.splits if prompt in (of.prompt.prompt, *of.prompt.captions)]
    guided = [label(model) for model in models if model != chosen.before]
    colours = {TRAINING_DATA: DATA_COLOUR, **dict(zip(guided, SERIES_COLOURS, strict=False))}
    first = next(iter(models.values())).shares.get(prompt, {}) if models else {}
    for name in first:
        bars = [
            share_of(of, n[name], sum(n.values()), colour=colours.get(of, BASE_COLOUR))
            for of, n in counted_by.items()
            if name in n or of == TRAINING_DATA
        ]
        target = results.target.get(name, 0.0) if results and results.target else 1 / len(first)
        classes.append({"name": name, "target": target, "bars": bars})
    pairs = [pair_of(pair, chosen) for pair in chosen.pairs.get(prompt, ())[:PAIRS]]
    return {"prompt": prompt, "groups": groups, "note": note, "classes": classes, "pairs": pairs}


def _shares(prompts: Sequence[Mapping[str, Any]], models: Sequence[str]) -> Table:
    """The shares of all these prompts, in words."""
    grouped = any(prompt["groups"] for prompt in prompts)
    bars = [*([TRAINING_DATA] if any(prompt["note"] for prompt in prompts) else []), *models]
    rows = []
    for prompt in prompts:
        named = [(factor, share) for factor, shares in prompt["groups"] for share in shares]
        groups = "; ".join(f"{factor}{share.name}: {share_in_words(share)}" for factor, share in named) or ABSENT
        for place, of_class in enumerate(prompt["classes"]):
            shares = {bar.name: share_in_words(bar) for bar in of_class["bars"]}
            data = [groups if place == 0 else ""] if grouped else []
            figures = [shares.get(name, ABSENT) for name in bars]
            rows.append([prompt["prompt"], *data, of_class["name"], *figures, f"{of_class['target']:.0%}"])
    columns = ["Prompt", *(["Data (the audit's groups)"] if grouped else []), "Class", *bars, "Target"]
    return Table(columns, rows, notes=[f"{quoted(p['prompt'])}, {p['note']}" for p in prompts if p["note"]])


def _fairness(attribute: str, models: Mapping[str, AttributeMeasures]) -> Table:
    """One attribute's metrics, mean over prompts."""
    rows = []
    for metric in dict.fromkeys(name for measures in models.values() for name in measures.overall):
        entries = [measures.overall.get(metric) for measures in models.values()]
        name = METRICS[metric].label if metric in METRICS else metric
        rows.append([name, *map(estimate, entries), floors(entries)])
        right = [measures.subject_right.get(metric) for measures in models.values()]
        if metric == "bias" and any(right):
            rows.append(["… among images whose subject is right", *map(estimate, right), ABSENT])
        if correction_matters(entries):
            shown = map(corrected, entries)
            rows.append(["… corrected for the annotator's errors", *shown, floors(entries, "corrected_floor")])
    notes = [measures.note for measures in models.values() if measures.note]
    columns = ("Mean over prompts", *models, "A fair sampler shows")
    return Table(columns, rows, f"How evenly the classes of {quoted(attribute)} are drawn", sentences(notes))


def _quality(chosen: Comparison, results: Results) -> Table:
    """Figures of quality, and how far images moved, one column for each model."""
    figures: dict[str, dict[str, Quantity]] = {}
    for model, measures in chosen.measures.items():
        subject = {"subject accuracy": measures.subject_accuracy} if measures.subject_accuracy else {}
        moved = {n if "unchanged" in n else f"moved: {n}": q for n, q in measures.preservation.items()}
        figures[label(model)] = {**subject, **measures.quality, **moved}
    names = dict.fromkeys(name for entry in figures.values() for name in entry)
    rows = [[with_direction(name), *(quantity(name, entry.get(name)) for entry in figures.values())] for name in names]
    notes = [f"{shown_name(name)}: {q.note}" for entry in figures.values() for name, q in entry.items() if q.note]
    reference = f", against {results.reference_images:,} real images" if results.reference_images else ""
    more = [f"{len(rows) - MOST_FIGURES} more figures are in the results"] if len(rows) > MOST_FIGURES else []
    told = sentences([*more, *notes])
    told = told if len(told) <= MOST_NOTES else [*told[:MOST_NOTES], "More notes are in the results."]
    return Table(("Figure", *figures), rows[:MOST_FIGURES], f"Quality {at_scale(chosen.key)}{reference}", told)


def _by_group(chosen: Comparison, results: Results) -> Table:
    """Figures of the images of each class; one that is defined of none has no column, but a note."""
    groups = [(label(m), group, of) for m, each in chosen.measures.items() for group, of in each.by_group.items()]
    every = [(name, figure) for _, _, figures in groups for name, figure in figures.items()]
    names = list(dict.fromkeys(name for name, figure in every if figure.value is not None))
    rows = [[model, group, *(quantity(name, figures.get(name)) for name in names)] for model, group, figures in groups]
    first: dict[tuple[str, bool], str] = {}
    for name, of in every:
        first.setdefault((name, of.value is None), f"{shown_name(name)}: {of.note}" if of.note else "")
    caption = f"Is each class of {quoted(results.attribute)} drawn as well? {at_scale(chosen.key).capitalize()}"
    columns = ("Model", "Class", *map(shown_name, names))
    return Table(columns, rows if names else [], caption, sentences(first.values())[:4])


def headlines(
    results: Results,
    measured: Iterable[tuple[str, str, Measures]],
    caption: str,
    notes: Sequence[str] = (),
    *,
    of: tuple[str, str] = ("Model", "Guidance scale"),
) -> Table:
    """The main figures of models at scales."""
    rows = []
    for name, scale, measures in measured:
        judged = results.judged(measures)
        quality = [quantity("subject accuracy", measures.subject_accuracy), quantity("", Quantity(measures.frechet))]
        figures = [estimate(judged), bias(judged.floor), *quality, images_each(measures)]
        rows.append([label(name), scale.removesuffix(".0"), *figures])
    main = (results.criterion.name, "Floor", "Subject right", "Fréchet distance", "Images a prompt")
    return Table((*of, *main), rows, caption, notes)
