"""The sections of a report about generated images: what changed, prompt by prompt, and what it cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..data.images import read_image
from ..evaluation.annotators.annotations import label_of
from ..evaluation.fairness.metrics import METRICS
from ..evaluation.images import Row
from ..evaluation.results import CANNOT_TELL, AttributeMeasures, Measures, Quantity, Results
from .compare import (
    Comparison,
    label,
    measured,
    modules_by_scale,
    over_guidance,
    over_module_scale,
    same_seeds,
)
from .figures import (
    ABSENT,
    Missing,
    Share,
    Table,
    at_scale,
    bias,
    corrected,
    counted,
    estimate,
    quantity,
    quoted,
    sentences,
    share_in_words,
    share_of,
    shown_name,
    with_direction,
)
from .groups import MOST_PROMPTS
from .plots import Chart, Plot, Thumb, plot_chart, thumb
from .read import Run
from .theme import BASE_COLOUR, SERIES_COLOURS, colour_of

PAIRS = 8
TRAINING_DATA = "Training data"
DATA_COLOUR = "#a9793f"
"""Of no group, class or model."""
EVALUATE = "invdiff evaluate base=DIR guided=DIR --annotator ANNOTATOR --attribute ATTRIBUTE"


@dataclass(frozen=True)
class Pair:
    """What two models drew from one prompt and seed."""

    before: Thumb
    after: Thumb


@dataclass(frozen=True)
class ClassShares:
    """One class under one prompt: its share of the training data, where that is known, and of each model's images."""

    name: str
    target: float
    bars: Sequence[Share]


@dataclass(frozen=True)
class ChangedPrompt:
    """One prompt before and after."""

    prompt: str
    groups: Sequence[Share]
    """The audit's groups of its training images; empty where the data's own labels say more."""
    note: str
    """What the shares of training data are of; "" where there are none."""
    classes: Sequence[ClassShares]
    pairs: Sequence[Pair]


@dataclass(frozen=True)
class Changes:
    """What guidance changed."""

    where: str
    attribute: str
    prompts: Sequence[ChangedPrompt]
    shares: Table | None
    """The shares of all these prompts, in words."""
    notes: Sequence[str]
    """Prompts left out; where the shares of training data come from."""
    fairness: Sequence[Table]
    missing: Sequence[Missing]


@dataclass(frozen=True)
class Costs:
    """What guidance cost."""

    over_guidance: Sequence[Plot]
    over_module_scale: Sequence[Plot]
    tables: Sequence[Table]
    missing: Sequence[Missing]


def changes(run: Run, chosen: Comparison) -> Changes:
    """The section on what changed."""
    results, pairs, models = run.results, same_seeds(run.images, chosen), measured(run.results, chosen)
    names = list(next(iter(models.values())).shares) if models else list(pairs)
    known = training_labels(run)
    prompts = [
        _prompt(name, run, chosen, models, known.get(name), pairs.get(name, ())) for name in names[:MOST_PROMPTS]
    ]
    labelled = any(prompt.note for prompt in prompts)
    notes = [f"{len(names) - MOST_PROMPTS} more prompts are in the results."] if len(names) > MOST_PROMPTS else []
    if labelled and results:
        notes.append(
            f"Shares of training data are counts of the data's own column {quoted(results.attribute)}, which was read "
            "for this report only, never by audit or training. Counted are the images whose captions mean the prompt "
            "to the model; captions that say more, such as the class itself, are prompts of their own."
        )
    attributes = dict.fromkeys(name for measures in models.values() for name in measures.attributes)
    return Changes(
        where=where(models, chosen),
        attribute=results.attribute if results else "",
        prompts=prompts,
        shares=_shares(prompts, [label(model) for model in models], labelled) if models else None,
        notes=notes,
        fairness=[
            _fairness(name, {label(model): m.attributes[name] for model, m in models.items() if name in m.attributes})
            for name in attributes
        ],
        missing=_missing(run, chosen, bool(pairs)),
    )


def costs(run: Run, chosen: Comparison, results: Results) -> Costs:
    """The section on quality with intervals, group by group, at every guidance scale and scale of the module."""
    models = measured(results, chosen)
    modules = modules_by_scale(run, chosen)
    by_group = _by_group(models, chosen, results)
    missing = []
    if not any(measures.quality for measures in models.values()):
        missing.append(
            Missing(
                "Quality was measured without reference images, so no distance to real ones is known. Run the "
                "evaluation below again with --reference."
            )
        )
    if by_group is None:
        missing.append(
            Missing(
                "These results hold no figures group by group: whether the minority is drawn as well as the "
                "majority is not known. Run the evaluation below again with --reference."
            )
        )
    tables = [
        _quality(models, chosen, results),
        by_group,
        None if modules and len(chosen.keys) == 1 else _every_scale(results, chosen),
        _every_module_scale(modules, chosen),
    ]
    about = f"{at_scale(chosen.key).capitalize()}; 0 is the base model, 1 is what the module was trained for."
    return Costs(
        over_guidance=[_plot(chart, "over guidance scale", "") for chart in over_guidance(results, chosen)],
        over_module_scale=[_plot(chart, "over the module's scale", about) for chart in over_module_scale(modules)],
        tables=[table for table in tables if table is not None],
        missing=missing,
    )


def where(models: Mapping[str, Measures], chosen: Comparison) -> str:
    """At which guidance scale, and on how many images, in words."""
    words = at_scale(chosen.key)
    if len(chosen.keys) > 1:
        words += f", the middle one of {len(chosen.keys)} measured" if models else f", one of {len(chosen.keys)}"
    fewest = min((measures.images_per_prompt for measures in models.values()), default=0)
    return words + (f"; {counted(fewest, 'image')} of each prompt and model" if fewest else "")


def pair_of(rows: tuple[Row, Row], chosen: Comparison) -> Pair:
    """Two images of one prompt and seed, small enough to embed.

    Raises:
        DataError: An image is absent or damaged.
    """
    before, after = (
        thumb(read_image(row.path), f"{label(model)}: {row.prompt[:200]}, seed {row.seed}")
        for row, model in zip(rows, (chosen.before, chosen.after), strict=True)
    )
    return Pair(before, after)


def training_labels(run: Run) -> dict[str, Counter[str]]:
    """Caption to how many training images of its prompt show each class, as the data's own column says.

    Images without a label are not counted, nor those that people left out. Empty where the data has no column of the
    attribute that was measured, or none of its classes: audit and training never read it.
    """
    results, audit = run.results, run.audit
    column = run.data.attributes.get(results.attribute) if run.data is not None and results else None
    if audit is None or results is None or column is None:
        return {}
    values = [label_of(column[row]) for row in run.rows]
    classes = {name for _, _, measures in results.each() for shares in measures.shares.values() for name in shares}
    if not classes & set(values):
        return {}
    counts: dict[str, Counter[str]] = {}
    for index, prompt in reversed(list(enumerate(audit.prompts))):
        own = np.flatnonzero(audit.kept & (audit.prompt_ids == index))
        labels = Counter(values[position] for position in own if values[position] not in ("", CANNOT_TELL))
        counts |= dict.fromkeys((*prompt.captions, prompt.prompt), labels)
    return counts


def _prompt(
    prompt: str,
    run: Run,
    chosen: Comparison,
    models: Mapping[str, Measures],
    labels: Counter[str] | None,
    pairs: Sequence[tuple[Row, Row]],
) -> ChangedPrompt:
    results, classes, note = run.results, [], ""
    confidence = results.confidence if results else 0.95
    groups: list[Share] = []
    if labels and results:
        note = f"{TRAINING_DATA}: {counted(labels.total(), 'labelled image')} under this prompt"
        others = [name for name, _ in labels.most_common() if name not in results.classes.get(results.attribute, ())]
        if others:
            count = sum(labels[name] for name in others)
            note += f"; {count:,} of them show other classes, such as {quoted(others[0])}, and count in the total"
        note += "."
    else:
        split = next((p for p in run.splits if prompt in (p.prompt.prompt, *p.prompt.captions)), None)
        if split is not None:
            groups = [
                share_of(g.name, g.size, len(split.labels), confidence=confidence, colour=colour_of(g.index))
                for g in split.groups
            ]
    colours = dict(zip([m for m in models if m != chosen.before], SERIES_COLOURS, strict=False))
    first = next(iter(models.values())).shares.get(prompt, {}) if models else {}
    for name in first:
        bars = []
        if labels:
            count, total = labels[name], labels.total()
            bars.append(share_of(TRAINING_DATA, count, total, confidence=confidence, colour=DATA_COLOUR))
        for model, measures in models.items():
            counts = {of: n for of, n in measures.first.counts.get(prompt, {}).items() if of != CANNOT_TELL}
            if name in counts:
                count, total, colour = counts[name], sum(counts.values()), colours.get(model, BASE_COLOUR)
                bars.append(share_of(label(model), count, total, confidence=confidence, colour=colour))
        target = results.target.get(name, 0.0) if results and results.target else 1 / len(first)
        classes.append(ClassShares(name, target, bars))
    return ChangedPrompt(prompt, groups, note, classes, [pair_of(pair, chosen) for pair in pairs[:PAIRS]])


def _shares(prompts: Sequence[ChangedPrompt], models: Sequence[str], labelled: bool) -> Table:
    grouped = any(prompt.groups for prompt in prompts)
    bars = [*([TRAINING_DATA] if labelled else []), *models]
    rows = []
    for prompt in prompts:
        groups = "; ".join(f"{share.name}: {share_in_words(share)}" for share in prompt.groups) or ABSENT
        for place, of_class in enumerate(prompt.classes):
            shares = {bar.name: share_in_words(bar) for bar in of_class.bars}
            data = [groups if place == 0 else ""] if grouped else []
            figures = [shares.get(name, ABSENT) for name in bars]
            rows.append([prompt.prompt, *data, of_class.name, *figures, f"{of_class.target:.0%}"])
    columns = ["Prompt", *(["Data (the audit's groups)"] if grouped else []), "Class", *bars, "Target"]
    return Table(columns, rows, notes=[f"{quoted(p.prompt)}, {p.note}" for p in prompts if p.note])


def _fairness(attribute: str, models: Mapping[str, AttributeMeasures]) -> Table:
    """One attribute's metrics, mean over prompts."""
    rows = []
    for metric in dict.fromkeys(name for measures in models.values() for name in measures.overall):
        entries = [measures.overall.get(metric) for measures in models.values()]
        floors = sorted({f"{entry.floor:.3f}" for entry in entries if entry is not None})
        rows.append(
            [METRICS[metric].label if metric in METRICS else metric, *map(estimate, entries), " / ".join(floors)]
        )
        right = [measures.subject_right.get(metric) for measures in models.values()]
        if metric == "bias" and any(right):
            rows.append(["… among images whose subject is right", *map(estimate, right), ABSENT])
        if any(map(corrected, entries)):
            shown = [
                corrected(entry) or (estimate(entry) if entry and entry.corrected is not None else ABSENT)
                for entry in entries
            ]
            rows.append(["… corrected for the annotator's errors", *shown, ABSENT])
    notes = [measures.note for measures in models.values() if measures.note]
    columns = ("Mean over prompts", *models, "A fair sampler shows")
    return Table(columns, rows, f"How evenly the classes of {quoted(attribute)} are drawn", sentences(notes))


def _missing(run: Run, chosen: Comparison, paired: bool) -> list[Missing]:
    missing = []
    if run.results is None:
        missing.append(Missing("These images were not measured, so no share is known.", EVALUATE))
    elif chosen.before == chosen.after:
        only = f"Only {quoted(label(chosen.before))} was measured here: nothing is compared."
        missing.append(Missing(only, EVALUATE))
    if not paired and chosen.before != chosen.after:
        if {chosen.before, chosen.after} <= run.images.keys():
            words = f"The images given share no seed of a prompt {at_scale(chosen.key)}, so no pair is shown."
            missing.append(Missing(words, "invdiff generate MODEL PROMPT --module module --output guided"))
        else:
            command = "invdiff report RUN --images base=DIR --images guided=DIR"
            missing.append(Missing("No generated images were given, so none is shown.", command))
    return missing


def _plot(chart: Chart, over: str, about: str) -> Plot:
    name = chart.title.partition(":")[0]
    lines = [
        f"{line.name[:60]}: {', '.join(f'{y:.2f} at {x:g}' for x, y, _, _ in line.points if y is not None)}."
        for line in chart.lines
    ]
    fair = "Dotted: what a fair sampler shows by chance." if chart.floors else ""
    caption = " ".join(filter(None, (fair, about)))
    return plot_chart(chart, alt=f"{name} {over}. {' '.join(lines)}", caption=caption)


def _quality(models: Mapping[str, Measures], chosen: Comparison, results: Results) -> Table | None:
    """Figures of quality, and how far images moved, one column for each model."""
    figures: dict[str, dict[str, Quantity]] = {}
    for model, measures in models.items():
        subject = {"subject accuracy": measures.subject_accuracy} if measures.subject_accuracy else {}
        moved = {n if "unchanged" in n else f"moved: {n}": q for n, q in measures.preservation.items()}
        figures[model] = {**subject, **measures.quality, **moved}
    names = dict.fromkeys(name for entry in figures.values() for name in entry)
    rows = [[with_direction(name), *(quantity(name, entry.get(name)) for entry in figures.values())] for name in names]
    notes = [f"{shown_name(name)}: {q.note}" for entry in figures.values() for name, q in entry.items() if q.note]
    reference = f", against {results.reference_images:,} real images" if results.reference_images else ""
    caption = f"Quality {at_scale(chosen.key)}{reference}"
    return Table(("Figure", *map(label, figures)), rows, caption, sentences(notes)[:8]) if rows else None


def _by_group(models: Mapping[str, Measures], chosen: Comparison, results: Results) -> Table | None:
    groups = [(label(model), group, figures) for model, m in models.items() for group, figures in m.by_group.items()]
    names = list(dict.fromkeys(name for _, _, figures in groups for name in figures))
    rows = [[model, group, *(quantity(name, figures.get(name)) for name in names)] for model, group, figures in groups]
    notes = [figure.note for _, _, figures in groups for figure in figures.values() if figure.note]
    caption = f"Is each class of {quoted(results.attribute)} drawn as well? {at_scale(chosen.key).capitalize()}"
    return Table(("Model", "Class", *map(shown_name, names)), rows, caption, sentences(notes)[:4]) if names else None


HEADLINES = ("Bias", "Floor", "Subject right", "Fréchet distance", "Images a prompt")


def _headlines(measures: Measures) -> list[str]:
    return [
        estimate(measures.bias_estimate),
        bias(measures.bias_floor),
        quantity("subject accuracy", measures.subject_accuracy),
        ABSENT if measures.frechet is None else f"{measures.frechet:.2f}",
        f"{measures.images_per_prompt:,}",
    ]


def _every_scale(results: Results, chosen: Comparison) -> Table | None:
    order = dict.fromkeys([chosen.before, chosen.after, *results.models])
    rows = [
        [label(model), key.removesuffix(".0"), *_headlines(measures)]
        for model in order
        for key, measures in results.models[model].items()
    ]
    return Table(("Model", "Guidance scale", *HEADLINES), rows, "Every guidance scale") if len(rows) > 2 else None


def _every_module_scale(modules: Mapping[str, Mapping[float, Measures]], chosen: Comparison) -> Table | None:
    rows = [[name, f"{scale:g}", *_headlines(m)] for name, line in modules.items() for scale, m in line.items()]
    notes = (
        ["Scale 0 is the base model: there the module does nothing."] if any(0 in m for m in modules.values()) else []
    )
    caption = f"Every scale of the module, {at_scale(chosen.key)}"
    return Table(("Module", "Scale", *HEADLINES), rows, caption, notes) if rows else None
