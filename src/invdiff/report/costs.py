"""What guidance cost: quality with intervals, group by group, at every guidance scale and module scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..evaluation.results import Measures, Quantity, Results
from .comparison import Comparison, choose, in_order, label
from .curves import Curve, ModuleLine, module_lines, over_guidance, over_module_scale
from .document import Costs, Missing, Plot, Table
from .plots import curve
from .sources import Sources
from .words import ABSENT, at_scale, bias, quantity, quoted, sentences, shown_name, with_interval

HEADLINES = ("Bias", "Floor", "Subject right", "Fréchet distance", "Images a prompt")


def costs(sources: Sources) -> Costs | None:
    """Return what guidance cost; None where nothing was measured."""
    if sources.measured is None:
        return None
    results = sources.measured.results
    chosen = choose(results)
    order = in_order(results, chosen)
    measured = {model: results.models[model][chosen.key] for model in order if chosen.key in results.models[model]}
    tables = [_quality(measured, chosen, results), _by_group(measured, chosen, results)]
    missing = []
    if not any(measures.quality for measures in measured.values()):
        missing.append(
            Missing(
                "Quality was measured without reference images, so no distance to real ones is known. Run the "
                "evaluation below again with --reference."
            )
        )
    if tables[1] is None:
        missing.append(
            Missing(
                "These results hold no figures group by group: whether the minority is drawn as well as the "
                "majority is not known. Run the evaluation below again with --reference."
            )
        )
    lines = module_lines(results, sources.images, chosen)
    tables += [] if lines and len(chosen.keys) == 1 else [_every_scale(results, order)]
    tables += [_every_module_scale(lines, chosen)]
    return Costs(
        tables=[table for table in tables if table is not None],
        curves=[_plot(entry) for entry in over_guidance(results, order, chosen)],
        over_module_scale=[_plot(entry) for entry in over_module_scale(lines, chosen.key)],
        missing=missing,
    )


def _plot(entry: Curve) -> Plot:
    return curve(entry.panel, x_name=entry.x_name, alt=entry.alt, caption=entry.caption)


def _quality(measured: Mapping[str, Measures], chosen: Comparison, results: Results) -> Table | None:
    """Return the figures of quality, and how far images moved, one column for each model."""
    figures = {model: _figures(measures) for model, measures in measured.items()}
    names = dict.fromkeys(name for entry in figures.values() for name in entry)
    rows = [[shown_name(name), *(quantity(name, entry.get(name)) for entry in figures.values())] for name in names]
    if not rows:
        return None
    notes = dict.fromkeys(
        f"{name.replace('Frechet', 'Fréchet')}: {entry[name].note}."
        for entry in figures.values()
        for name in entry
        if entry[name].note
    )
    reference = f", against {results.reference_images:,} real images" if results.reference_images else ""
    caption = f"Quality {at_scale(chosen.key)}{reference}"
    return Table(("Figure", *map(label, figures)), rows, caption, sentences(notes)[:8])


def _figures(measures: Measures) -> dict[str, Quantity]:
    subject = {} if measures.subject_accuracy is None else {"subject accuracy": measures.subject_accuracy}
    moved = {f"moved: {name}" if "unchanged" not in name else name: q for name, q in measures.preservation.items()}
    return {**subject, **measures.quality, **moved}


def _by_group(measured: Mapping[str, Measures], chosen: Comparison, results: Results) -> Table | None:
    columns = [(model, group) for model, measures in measured.items() for group in measures.by_group]
    names = dict.fromkeys(name for model, group in columns for name in measured[model].by_group[group])
    if not names:
        return None
    rows = [
        [
            label(model),
            group,
            *(_group_figure(name, measured[model].by_group[group].get(name)) for name in names),
        ]
        for model, group in columns
    ]
    notes = dict.fromkeys(
        figure.note + "."
        for model, group in columns
        for figure in measured[model].by_group[group].values()
        if figure.note
    )
    heads = [name.replace("Frechet", "Fréchet") for name in names]
    caption = f"Is each class of {quoted(results.attribute)} drawn as well? {at_scale(chosen.key).capitalize()}"
    return Table(("Model", "Class", *heads), rows, caption, sentences(notes)[:4])


def _group_figure(name: str, figure: Quantity | None) -> str:
    if name == "images" and figure is not None and figure.value is not None:
        return f"{figure.value:,.0f}"
    return quantity(name, figure)


def _every_scale(results: Results, order: Sequence[str]) -> Table | None:
    rows = [
        [label(model), key.removesuffix(".0"), *_headlines(measures)]
        for model in order
        for key, measures in results.models[model].items()
    ]
    columns = ("Model", "Guidance scale", *HEADLINES)
    return Table(columns, rows, "Every guidance scale") if len(rows) > 2 else None


def _every_module_scale(lines: Sequence[ModuleLine], chosen: Comparison) -> Table | None:
    rows = [
        [line.name, f"{scale:g}", *_headlines(measures)] for line in lines for scale, measures in line.measures.items()
    ]
    has_base = any(0 in line.measures for line in lines)
    notes = ["Scale 0 is the base model: there the module does nothing."] if has_base else []
    caption = f"Every scale of the module, {at_scale(chosen.key)}"
    return Table(("Module", "Scale", *HEADLINES), rows, caption, notes) if rows else None


def _headlines(measures: Measures) -> list[str]:
    spread, frechet = measures.first.overall["bias"], measures.frechet
    return [
        with_interval(bias(spread.value), bias(spread.low), bias(spread.high)),
        bias(spread.floor),
        quantity("subject accuracy", measures.subject_accuracy),
        ABSENT if frechet is None else f"{frechet:.2f}",
        f"{measures.images_per_prompt:,}",
    ]
