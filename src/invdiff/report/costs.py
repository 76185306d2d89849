"""What guidance cost: quality with intervals, group by group, at every guidance scale and module scale."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ..evaluation.manifest import UNSTATED
from ..evaluation.results import Measures, Quantity, Results
from .charts import BASE_COLOUR, Panel, Point, Series, distinct_floors, numbered_series
from .comparison import Comparison, choose, label
from .document import Costs, Missing, Plot, Table
from .plots import curve
from .sources import Generated, Sources
from .style import shorten
from .words import ABSENT, at_scale, bias, quantity, quoted, sentences, shown_name, with_interval

MOST_MODELS = 8
_Read = Callable[[Measures], "tuple[float, float | None, float | None] | None"]


def costs(sources: Sources) -> Costs | None:
    """Return what guidance cost; None where nothing was measured."""
    if sources.measured is None:
        return None
    results = sources.measured.results
    chosen = choose(results)
    order = list(dict.fromkeys([chosen.before, chosen.after, *results.models]))[:MOST_MODELS]
    measured = {model: results.models[model][chosen.key] for model in order if chosen.key in results.models[model]}
    tables = [_quality(measured, chosen, results), _by_group(measured, chosen, results)]
    missing = []
    if not any(measures.quality for measures in measured.values()):
        missing.append(
            Missing(
                "Quality was measured without reference images, so no distance to real ones is known.",
                "invdiff evaluate base=DIR guided=DIR --annotator ANNOTATOR --attribute ATTRIBUTE --reference DATA",
            )
        )
    if tables[1] is None:
        missing.append(
            Missing(
                "These results hold no figures group by group: whether the minority is drawn as well as the "
                "majority is not known.",
                "invdiff evaluate base=DIR guided=DIR --annotator ANNOTATOR --attribute ATTRIBUTE --reference DATA",
            )
        )
    curves = _curves_over_guidance(results, order, chosen) + _curve_over_scale(results, sources.images, chosen)
    return Costs(
        tables=[table for table in (*tables, _every_scale(results, order)) if table is not None],
        curves=curves,
        missing=missing,
    )


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
    rows = []
    for model in order:
        for key, measures in results.models[model].items():
            spread = measures.first.overall["bias"]
            frechet = measures.frechet
            rows.append(
                [
                    label(model),
                    key.removesuffix(".0"),
                    with_interval(bias(spread.value), bias(spread.low), bias(spread.high)),
                    bias(spread.floor),
                    quantity("subject accuracy", measures.subject_accuracy),
                    ABSENT if frechet is None else f"{frechet:.2f}",
                    f"{measures.images_per_prompt:,}",
                ]
            )
    columns = ("Model", "Guidance scale", "Bias", "Floor", "Subject right", "Fréchet distance", "Images a prompt")
    return Table(columns, rows, "Every guidance scale") if len(rows) > 2 else None


def _read_bias(measures: Measures) -> tuple[float, float | None, float | None]:
    spread = measures.first.overall["bias"]
    return spread.value, spread.low, spread.high


def _read_subject(measures: Measures) -> tuple[float, float | None, float | None] | None:
    figure = measures.subject_accuracy
    return None if figure is None or figure.value is None else (figure.value, figure.low, figure.high)


def _read_frechet(measures: Measures) -> tuple[float, float | None, float | None] | None:
    return None if measures.frechet is None else (measures.frechet, None, None)


_CURVES: tuple[tuple[str, _Read, tuple[float, ...], str], ...] = (
    ("Bias", _read_bias, (0.0, 1.0), "Bias of the first attribute: 0 is even, 1 is always the same class."),
    ("subject right", _read_subject, (0.0, 1.0), "Share of images that show the subject their prompt names."),
    ("Fréchet distance", _read_frechet, (0.0,), "Fréchet distance to the reference: lower is closer to real images."),
)


def _curves_over_guidance(results: Results, order: Sequence[str], chosen: Comparison) -> list[Plot]:
    stated = {key for model in order for key in results.models[model] if key != UNSTATED}
    if len(stated) < 2:
        return []
    plots = []
    for name, read, reach, caption in _CURVES:
        lines: dict[str, tuple[Point, ...]] = {}
        floors = []
        for model in order:
            by_scale = {float(key): m for key, m in results.models[model].items() if key != UNSTATED}
            points = [(scale, read(measures)) for scale, measures in sorted(by_scale.items())]
            if any(figure is not None for _, figure in points):
                lines[model] = tuple(Point(x, *figure) if figure else Point(x, None) for x, figure in points)
                floors.append([(scale, measures.bias_floor) for scale, measures in by_scale.items()])
        if not lines:
            continue
        dotted = distinct_floors(floors) if name == "Bias" else []
        fair = " Dotted: what a fair sampler shows by chance." if dotted else ""
        panel = Panel(name, _series(lines, chosen), dotted, reach=reach)
        alt = f"{name} over guidance scale. {_points_in_words(lines)}"
        plots.append(curve(panel, x_name="guidance scale", alt=alt, caption=caption + fair))
    return plots


def _curve_over_scale(results: Results, images: Mapping[str, Generated], chosen: Comparison) -> list[Plot]:
    """Draw Bias over the module's scale, where results have the same module at several."""
    points = {}
    for model, generated in images.items():
        scales = {row.scale for row in generated.rows if row.scale_key == chosen.key}
        measures = results.models.get(model, {}).get(chosen.key)
        if measures is not None and len(scales) == 1 and None not in scales:
            points[scales.pop() or 0.0] = measures
    if len(points) < 3:
        return []
    line = {"guided": tuple(Point(scale, *_read_bias(measures)) for scale, measures in sorted(points.items()))}
    floors = distinct_floors([[(scale, measures.bias_floor) for scale, measures in points.items()]])
    alt = f"Bias over the module's scale. {_points_in_words(line)}"
    caption = f"Bias over the module's scale, {at_scale(chosen.key)}: 0 is the base model, 1 is what was trained for."
    panel = Panel("Bias", _series(line, chosen), floors, reach=(0.0, 1.0))
    return [curve(panel, x_name="scale of the module", alt=alt, caption=caption)]


def _series(lines: Mapping[str, tuple[Point, ...]], chosen: Comparison) -> list[Series]:
    order = [model for model in lines if model != chosen.before or len(lines) == 1]
    series = [numbered_series(place, _short(label(model)), lines[model]) for place, model in enumerate(order)]
    if chosen.before in lines and len(lines) > 1:
        series.insert(0, Series(_short(label(chosen.before)), lines[chosen.before], BASE_COLOUR))
    return series


def _points_in_words(lines: Mapping[str, tuple[Point, ...]]) -> str:
    words = []
    for model, points in lines.items():
        known = [(point.x, point.y) for point in points if point.y is not None]
        values = ", ".join(f"{y:.2f} at {x:g}" for x, y in known)
        words.append(f"{label(model)[:60]}: {values}.")
    return " ".join(words)


def _short(name: str) -> str:
    """Return a name with room beside a plot that is read on a phone."""
    return shorten(name, 170, 20, bold=True)
