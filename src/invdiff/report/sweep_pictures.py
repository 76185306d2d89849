"""Pictures of a sweep: what Bias, quality, found groups and cost do as a setting changes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import EvaluationError
from .charts import (
    BASE_COLOUR,
    MARKERS,
    Panel,
    Point,
    Series,
    distinct_floors,
    numbered_series,
    save_line_charts,
    save_paths,
)
from .style import number

AXIS_NAMES = {
    "guidance_scale": "guidance scale",
    "scale": "scale Δ",
    "penalty": "penalty λ",
    "num_groups": "number of groups E",
    "omega": "ω",
    "num_images": "data set size",
}
GROUP_FIGURES = {
    "group_auroc": "AUROC",
    "group_adjusted_rand": "adjusted Rand",
    "group_homogeneity": "homogeneity",
}
COST_FIGURES = {"audit_seconds": "audit", "train_seconds": "training"}
AFTER_AUDIT = (
    *("guidance_scale", "scale", "num_inference_steps"),
    *("penalty", "steps", "learning_rate", "width", "rounds"),
)
"""Axes that the audit never sees: groups and their cost are not drawn over them."""
SEEDS = ("seed", "data_seed")
"""Axes that figures are averaged over."""
MOST_SERIES = 8
MOST_NOTES = 4

_TITLES = {
    "guidance_scale": "Does Bias stay low at every guidance scale?",
    "scale": "How far does scale Δ lower Bias?",
    "penalty": "Which penalty λ lowers Bias most?",
}
_BIAS = "Bias: 0 is balanced, 1 is always the same class."

Row = Mapping[str, Any]


@dataclass(frozen=True)
class _Sweep:
    axes: tuple[str, ...]
    rows: list[Row]


@dataclass(frozen=True)
class _Group:
    """The rows of one series."""

    model: str
    values: tuple[Any, ...]
    """Of the axes that tell series apart."""
    rows_at: dict[float | None, list[Row]]
    """By x; None where x does not concern the model."""
    name: str = ""


def save_sweep_pictures(folder: Path, document: Mapping[str, Any]) -> list[Path]:
    """Draw what the varied axes of a sweep call for, each PNG 1400 pixels wide.

    Each numeric axis but seeds has `bias_over_<axis>.png`; scale has `pareto.png` too, where a Fréchet distance
    was measured; those that may change the audit have `groups_over_<axis>.png` with Bias and cost below, where
    groups were compared with the truth. num_groups has that alone, and always. Where only names and seeds vary,
    nothing is drawn.

    Args:
        folder: Where the PNGs are written.
        document: {"axes": [...], "rows": [{...}, ...]}: every row holds its value of each axis, "model" ("base" or
            "guided"), "note", and figures such as "bias", "bias_low", "bias_high" and "bias_floor"; None where an
            axis does not concern the model or a figure is missing, and then the note says why.

    Returns:
        The pictures' paths.

    Raises:
        EvaluationError: The document is not such a sweep, two rows disagree, or there is no figure to draw.
    """
    sweep = _read(document)
    folder = Path(folder)
    numeric = [axis for axis in sweep.axes if axis not in SEEDS and _is_numeric(sweep, axis)]
    paths: list[Path | None] = []
    for axis in numeric:
        if axis != "num_groups":
            paths.append(_save_bias(folder / f"bias_over_{axis}.png", sweep, axis))
        if axis == "scale":
            paths.append(_save_pareto(folder / "pareto.png", sweep))
        if axis not in AFTER_AUDIT:
            paths.append(_save_groups(folder / f"groups_over_{axis}.png", sweep, axis))
    drawn = [path for path in paths if path is not None]
    if not drawn and (numeric or all(_figure(row, "bias") is None for row in sweep.rows)):
        notes = "; ".join(sorted({str(row.get("note")) for row in sweep.rows if row.get("note")})[:3])
        raise EvaluationError(
            f"Expected at least one measured figure in the sweep, got none{f' ({notes})' if notes else ''}. "
            "See why its runs were not measured."
        )
    return drawn


def sweep_series(document: Mapping[str, Any], *, over: str, figure: str = "bias") -> list[Series]:
    """Return what is drawn of `figure` against the axis `over`.

    There is one series for every combination of the other axes but seeds, in the order of the rows, and before
    it the base model that it is compared with. Each point is the mean over seeds; its bar runs from the lowest to the
    highest seed, or, of a single seed, over the figure's own interval. A base model that `over` does not concern is a
    level. It is scale 0: there the lines of guided models begin.

    Args:
        document: As for `save_sweep_pictures`.
        over: The axis whose values are x.
        figure: The figure whose values are y.

    Raises:
        EvaluationError: As for `save_sweep_pictures`, or `over` is no numeric axis of the sweep.
    """
    sweep = _read(document)
    if over not in sweep.axes or not _is_numeric(sweep, over):
        raise EvaluationError(f"Expected a numeric axis among {', '.join(sweep.axes)}, got {over!r}. Choose one.")
    return _series(sweep, over, figure)


def non_dominated(points: ArrayLike) -> NDArray[np.bool_]:
    """Return which points (N, 2) have no other that is as low on both coordinates and lower on one."""
    table = np.asarray(points, dtype=np.float64).reshape(-1, 2)
    no_worse = (table[:, None] <= table[None]).all(axis=2)
    better = (table[:, None] < table[None]).any(axis=2)
    return np.asarray(~(no_worse & better).any(axis=0))


def _save_bias(path: Path, sweep: _Sweep, over: str) -> Path | None:
    panel, notes = _bias_panel(sweep, over)
    if panel is None:
        return None
    return save_line_charts(
        path,
        [panel],
        title=_TITLES.get(over, f"How does Bias depend on {_axis_name(over)}?"),
        subtitle=" ".join([_BIAS, *_reading(sweep, over, panel.series)]),
        x_name=_axis_name(over),
        even=_evenly(sweep, over),
        notes=[*notes, *_gaps(sweep, over, ["bias"])],
    )


def _save_groups(path: Path, sweep: _Sweep, over: str) -> Path | None:
    """Draw how well groups were found, what Bias came of it, and what it cost."""
    found, notes = _figures(sweep, over, GROUP_FIGURES, "groups found")
    bias, more = _bias_panel(sweep, over)
    cost, most = _figures(sweep, over, COST_FIGURES, "cost")
    panels = [Panel("Groups found, against the truth: 1 is perfect", found, reach=(0, 1))] if found else []
    panels += [bias] if bias is not None else []
    panels += [Panel("Cost in seconds", cost)] if cost else []
    of_groups = over == "num_groups"
    if not found and not (of_groups and panels):
        return None
    series = [one for panel in panels for one in panel.series]
    return save_line_charts(
        path,
        panels,
        title="How many groups E does the audit need?" if of_groups else f"What changes with {_axis_name(over)}?",
        subtitle=" ".join([_BIAS, *_reading(sweep, over, series)]),
        x_name=_axis_name(over),
        even=_evenly(sweep, over),
        notes=[*notes, *more, *most, *_gaps(sweep, over, ["bias", *GROUP_FIGURES])],
    )


def _save_pareto(path: Path, sweep: _Sweep) -> Path | None:
    """Draw Bias against the Fréchet distance along scale."""
    distance = _frechet_name(sweep)
    if distance is None:
        return None
    paths, labels = [], []
    for x, y in zip(_series(sweep, "scale", distance), _series(sweep, "scale", "bias"), strict=True):
        both = [
            (Point(at_x.y, at_y.y), number(at_x.x))
            for at_x, at_y in zip(x.points, y.points, strict=True)
            if at_x.y is not None and at_y.y is not None
        ]
        both = both[:1] if x.level else both
        if both:
            points, scales = zip(*both, strict=True)
            paths.append(replace(y, points=points))
            labels.append(["base"] if x.level else scales)
    if not paths:
        return None
    paths, left_out = _at_most(paths, "scale Δ")
    flags = iter(non_dominated([point for one in paths for point in one.drawn]))
    return save_paths(
        path,
        paths,
        labels=labels[: len(paths)],
        filled=[[bool(next(flags)) for _ in one.points] for one in paths],
        title="What does lower Bias cost in quality?",
        subtitle=" ".join(["Each point is one scale Δ, which is written beside it.", *_means(sweep)]),
        x_name=f"← better: lower {distance}",
        y_name="↓ better: lower Bias",
        floors=sorted({round(y, 4) for one in _series(sweep, "scale", "bias_floor") for _, y in one.drawn}),
        notes=[*left_out, *_gaps(sweep, "scale", ["bias", distance])],
    )


def _read(document: Mapping[str, Any]) -> _Sweep:
    """Check the document; a plain model's row that is there once for each guided run is taken once."""
    axes = document.get("axes") if isinstance(document, Mapping) else None
    rows = document.get("rows") if isinstance(document, Mapping) else None
    # Axes name files.
    if not isinstance(axes, list) or not all(isinstance(a, str) and re.fullmatch(r"\w[\w.-]{0,63}", a) for a in axes):
        raise EvaluationError(f"Expected axes as a list of names, got {axes!r}. Give the JSON that a sweep wrote.")
    if not isinstance(rows, list) or not rows:
        raise EvaluationError(f"Expected rows of a sweep, got {rows!r}. Give the JSON that a sweep wrote.")
    kept: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        if not isinstance(row, Mapping) or row.get("model") not in ("base", "guided"):
            raise EvaluationError(f"Expected every row to be of the model 'base' or 'guided', got {row!r}.")
        for name, value in row.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise EvaluationError(f"Expected a finite number or null for {name!r}, got {value}. Measure it again.")
            if name in axes and not isinstance(value, (str, int, float, type(None))):
                raise EvaluationError(f"Expected a number, text or null for the axis {name!r}, got {value!r}.")
        key = row["model"], *(row.get(axis) for axis in axes)
        if kept.setdefault(key, row) != row:
            values = ", ".join(f"{axis} {row.get(axis)!r}" for axis in axes)
            raise EvaluationError(
                f"Expected one row of the {row['model']} model at {values}, got two that disagree. "
                "Add the axis that tells them apart."
            )
    return _Sweep(tuple(axes), list(kept.values()))


def _bias_panel(sweep: _Sweep, over: str) -> tuple[Panel | None, list[str]]:
    both = zip(_series(sweep, over, "bias"), _series(sweep, over, "bias_floor"), strict=True)
    drawn = [(one, floor.drawn) for one, floor in both if one.drawn]
    if not drawn:
        return None, []
    series, notes = _at_most([one for one, _ in drawn], "Bias")
    floors = distinct_floors([floor for _, floor in drawn[:MOST_SERIES]])
    return Panel("Bias", series, floors), notes


def _figures(sweep: _Sweep, over: str, names: Mapping[str, str], of: str) -> tuple[list[Series], list[str]]:
    """Return a series of each figure; the guided models that share its values, such as one audit, are one."""
    found: list[tuple[str, tuple[Point, ...]]] = []
    for figure, name in names.items():
        distinct: dict[tuple[Point, ...], str] = {}
        for group, one in zip(_groups(sweep, over), _series(sweep, over, figure), strict=True):
            if group.model == "guided" and one.drawn:
                distinct.setdefault(one.points, one.name)
        found += [(f"{name} · {of}" if len(distinct) > 1 else name, points) for points, of in distinct.items()]
    return _at_most([numbered_series(place, name, points) for place, (name, points) in enumerate(found)], of)


def _at_most(series: Sequence[Series], of: str) -> tuple[list[Series], list[str]]:
    rest = len(series) - MOST_SERIES
    notes = [f"{rest} more lines of {of} not drawn: see the sweep's table."]
    return list(series[:MOST_SERIES]), notes if rest > 0 else []


def _series(sweep: _Sweep, over: str, figure: str) -> list[Series]:
    """Return all series in the order of `_groups`, those without a single figure too."""
    groups = _groups(sweep, over)
    xs = sorted(
        {x for group in groups for x in group.rows_at if x is not None} | ({0.0} if over == "scale" else set())
    )
    points = [
        [_point(x, rows, figure) for x, rows in sorted(group.rows_at.items(), key=lambda entry: entry[0] or 0.0)]
        for group in groups
    ]
    counts = {"base": 0, "guided": 0}
    series: list[Series] = []
    for group, own in zip(groups, points, strict=True):
        place = counts[group.model]
        counts[group.model] += 1
        if group.model == "base":
            level = None in group.rows_at
            shown = [replace(own[0], x=x) for x in xs] if level else own
            series.append(Series(group.name, tuple(shown), BASE_COLOUR, MARKERS[place % len(MARKERS)], level))
            continue
        if over == "scale" and own[0].x > 0:
            base = next((points[i] for i, other in enumerate(groups) if _is_base_of(other, group)), [])
            own = [*(Point(0.0, point.y) for point in base[:1]), *own]
        series.append(numbered_series(place, group.name, tuple(own)))
    return series


def _point(x: float | None, rows: Sequence[Row], figure: str) -> Point:
    measured = [(value, row) for row in rows if (value := _figure(row, figure)) is not None]
    x = 0.0 if x is None else x
    if not measured:
        return Point(x, None)
    values = [value for value, _ in measured]
    if len(values) > 1:
        return Point(x, fmean(values), min(values), max(values))
    low, high = (_figure(measured[0][1], f"{figure}_{end}") for end in ("low", "high"))
    return Point(x, values[0], low, high) if low is not None and high is not None else Point(x, values[0])


def _groups(sweep: _Sweep, over: str) -> list[_Group]:
    """Return guided series in the order of their rows, each after the base model that it is compared with."""
    others = [axis for axis in sweep.axes if axis not in (over, *SEEDS)]
    rows_at: dict[tuple[str, tuple[Any, ...]], dict[float | None, list[Row]]] = {}
    for row in sweep.rows:
        x = row.get(over)
        # The plain model is what guidance of scale 0 gives, whether or not its row says so.
        x = None if over == "scale" and row["model"] == "base" else x
        if x is None and row["model"] == "guided":
            values = ", ".join(f"{axis} {row.get(axis)!r}" for axis in sweep.axes)
            raise EvaluationError(f"Expected {over} in every row of a guided model, got a row with {values}.")
        key = row["model"], tuple(row.get(axis) for axis in others)
        rows_at.setdefault(key, {}).setdefault(x if x is None else float(x), []).append(row)
    groups = [_Group(model, values, at) for (model, values), at in rows_at.items()]
    named = [replace(group, name=_name(group, groups, others)) for group in groups]
    for group in named:
        if None in group.rows_at and len(group.rows_at) > 1:
            raise EvaluationError(f"Expected {over} in all rows or in none of {group.name!r}, got it in some.")
    ordered: list[_Group] = []
    for group in named:
        if group.model == "guided":
            bases = [other for other in named if _is_base_of(other, group) and other not in ordered]
            ordered += [*bases[:1], group]
    return ordered + [group for group in named if group not in ordered]


def _is_base_of(base: _Group, guided: _Group) -> bool:
    pairs = zip(base.values, guided.values, strict=True)
    return base.model == "base" and guided.model == "guided" and all(own in (None, of) for own, of in pairs)


def _name(group: _Group, groups: Sequence[_Group], others: Sequence[str]) -> str:
    """Return what tells the group from others of its model."""
    alike = [other.values for other in groups if other.model == group.model]
    parts = ["Base model"] if group.model == "base" else []
    for place, (axis, value) in enumerate(zip(others, group.values, strict=True)):
        if value is not None and len({values[place] for values in alike}) > 1:
            parts.append(value if isinstance(value, str) else f"{_axis_name(axis)} {_in_words(value)}")
    return " · ".join(parts) or "With guidance"


def _reading(sweep: _Sweep, over: str, series: Sequence[Series]) -> list[str]:
    """Return sentences that say what points, bars and flat lines are."""
    sentences = _means(sweep)
    if any(point.low is not None for one in series for point in one.points):
        runs = {len(rows) for group in _groups(sweep, over) for rows in group.rows_at.values()}
        of_one = "the interval of a single run"
        sentences.append(
            f"Bars: {of_one if max(runs) == 1 else f'their range, or {of_one}' if 1 in runs else 'their range'}."
        )
    if any(one.level for one in series):
        sentences.append(f"Base model: {'scale 0, ' if over == 'scale' else ''}the flat line.")
    return sentences


def _means(sweep: _Sweep) -> list[str]:
    seeds = len({_seed(sweep, row) for row in sweep.rows if row["model"] == "guided"})
    return [f"Points: means of {seeds} seeds."] if seeds > 1 else []


def _seed(sweep: _Sweep, row: Row) -> str:
    return ", ".join(_in_words(row.get(axis)) for axis in SEEDS if axis in sweep.axes)


def _gaps(sweep: _Sweep, over: str, figures: Sequence[str]) -> list[str]:
    """Return where any of the figures is missing, and why."""
    places: dict[tuple[str, str], list[str]] = {}  # (series, reason) to where
    for group in _groups(sweep, over):
        everything = [row for rows in group.rows_at.values() for row in rows]
        # Groups are never compared with the truth for the base model, nor again where an audit is used again.
        wanted = [
            figure
            for figure in figures
            if figure not in GROUP_FIGURES or any(_figure(row, figure) is not None for row in everything)
        ]
        for x, rows in sorted(group.rows_at.items(), key=lambda entry: entry[0] or 0.0):
            seeds_of: dict[str, list[str]] = {}
            for row in rows:
                if any(_figure(row, figure) is None for figure in wanted):
                    reason = str(row.get("note") or "no reason was recorded")
                    seeds_of.setdefault(reason, []).append(_seed(sweep, row))
            for reason, seeds in seeds_of.items():
                seed = f" with seed {' and '.join(seeds)}" if len(seeds) < len(rows) else ""
                where = ("" if x is None else f" at {number(x)}") + seed
                places.setdefault((group.name, reason), []).append(where)
    names: dict[tuple[str, str], list[str]] = {}  # (where, reason) to series
    for (name, reason), wheres in places.items():
        names.setdefault((",".join(wheres), reason), []).append(name)
    notes = [f"Not measured{where} ({', '.join(of)}): {reason}" for (where, reason), of in names.items()]
    rest = len(notes) - MOST_NOTES
    return [*notes[:MOST_NOTES], f"{rest} more gaps: see the sweep's table."] if rest > 0 else notes


def _frechet_name(sweep: _Sweep) -> str | None:
    names = dict.fromkeys(name for row in sweep.rows for name in row)
    distances = [name for name in names if name.startswith(("Frechet", "Fréchet", "FID"))]
    return next((name for name in distances if any(_figure(row, name) is not None for row in sweep.rows)), None)


def _axis_name(axis: str) -> str:
    return AXIS_NAMES.get(axis, axis.replace("_", " "))


def _in_words(value: Any) -> str:
    return number(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)


def _is_numeric(sweep: _Sweep, axis: str) -> bool:
    values = [row.get(axis) for row in sweep.rows if row.get(axis) is not None]
    return bool(values) and all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)


def _evenly(sweep: _Sweep, axis: str) -> bool:
    """Return whether the axis' values span so much that by size some would stand on each other."""
    gaps = np.diff(np.unique([float(row[axis]) for row in sweep.rows if row.get(axis) is not None]))
    return len(gaps) > 1 and bool(gaps.min() < 0.04 * gaps.sum()) and not np.allclose(gaps, gaps[0])


def _figure(row: Row, name: str) -> float | None:
    value = row.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise EvaluationError(f"Expected a finite number or null for {name!r}, got {value!r}. Measure it again.")
    return float(value)
