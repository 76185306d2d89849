"""Bias against quality: which models and guidance scales no other beats in both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..evaluation.results import UNSTATED, Measures, Results
from .charts import BASE_COLOUR, Area, Point, Series, name_room, numbered_series, plane_chart
from .comparison import Comparison, in_order, label
from .document import Plot
from .plots import WIDTH, as_plot
from .style import SOFT, Sheet, shorten
from .words import at_scale

FRECHET, WRONG = "Fréchet distance", "share of images whose subject is wrong"


def front(results: Results, chosen: Comparison) -> Plot | None:
    """Draw Bias against quality, one path a model through its guidance scales; None for fewer than two points.

    Quality is the Fréchet distance where it was measured for every model, else the share of images that show another
    subject than their prompt names.
    """
    order = in_order(results, chosen)
    for name in (FRECHET, WRONG):
        points = {model: _points(results.models[model], name) for model in order}
        if sum(map(len, points.values())) >= 2 and all(points.values()):
            return _draw(points, chosen, name)
    return None


def _points(by_scale: Mapping[str, Measures], name: str) -> list[tuple[str, float, float]]:
    """Return guidance scale, quality and Bias, rising by guidance scale."""
    found = []
    for key in sorted(by_scale, key=lambda key: float("inf") if key == UNSTATED else float(key)):
        measures = by_scale[key]
        quality = measures.frechet
        if name == WRONG:
            quality = None if measures.accuracy is None else 1 - measures.accuracy
        if quality is not None:
            found.append((key, quality, measures.first.overall["bias"].value))
    return found


def _draw(points: Mapping[str, Sequence[tuple[str, float, float]]], chosen: Comparison, name: str) -> Plot:
    others = [model for model in points if model != chosen.before or len(points) == 1]
    paths, labels = [], []
    for model, found in points.items():
        along = tuple(Point(x, y) for _, x, y in found)
        shown = shorten(label(model), 170, 20, bold=True)
        one = Series(shown, along, BASE_COLOUR)
        if model in others:
            one = numbered_series(others.index(model), shown, along)
        paths.append(one)
        labels.append(["" if key == UNSTATED else f"{float(key):g}" for key, _, _ in found])
    flags = non_dominated([point for one in paths for point in one.drawn]).tolist()
    best = iter(flags)
    filled = [[bool(next(best)) for _ in one.drawn] for one in paths]

    sheet = Sheet(WIDTH, 440)
    area = Area(70, 58, WIDTH - 80 - name_room([one.name for one in paths]), 296)
    plane_chart(sheet, area, paths, labels=labels, filled=filled, y_name="Bias")
    sheet.text(area.x + area.width / 2, 422, f"← better: {name}", size=20, colour=SOFT, align="center", width=WIDTH)
    winners = [
        f"{label(model)[:60]} {at_scale(key)} (Bias {y:.2f}, {x:.3g})"
        for (model, found), fills in zip(points.items(), filled, strict=True)
        for (key, x, y), fill in zip(found, fills, strict=True)
        if fill
    ]
    caption = (
        f"Bias against {name}: lower is better in both. The number beside a point is its guidance scale. Filled: no "
        "other point beats it in both (the Pareto front). Differences may be within the intervals of the tables."
    )
    return as_plot(sheet, f"Bias against {name}. Not beaten in both: {'; '.join(winners)}.", caption)


def non_dominated(points: ArrayLike) -> NDArray[np.bool_]:
    """Return which points (N, 2) have no other that is as low on both coordinates and lower on one."""
    table = np.asarray(points, dtype=np.float64).reshape(-1, 2)
    no_worse = (table[:, None] <= table[None]).all(axis=2)
    better = (table[:, None] < table[None]).any(axis=2)
    return np.asarray(~(no_worse & better).any(axis=0))
