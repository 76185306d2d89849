"""Line charts in the house look: intervals, floors, gaps, and a name at the end of each line."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from ..errors import EvaluationError
from .style import PALETTE, RULE, SOFT, Sheet, number, shorten, text_width, ticks, wrap

BASE_COLOUR = "#6f7b8a"
"""Of the model that others are compared with."""
SERIES_COLOURS = tuple(PALETTE[place] for place in (1, 2, 3, 5, 0, 6, 7, 4))
"""All others', in order."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
"""One for each colour: series are told apart without colours too."""

MARGIN = 64
WIDTH = 1400
_LEFT = MARGIN + 56
_PLOT_HEIGHT = 496
_NAME_SIZE = 20
_NAME_WIDTH = 400
_NAME_GAP = 28
_TICK_SIZE = 20
_DOTTED: dict[str, Any] = {"color": SOFT, "linewidth": 2, "linestyle": (0, (1, 2))}


@dataclass(frozen=True)
class Point:
    """One figure of a series."""

    x: float
    y: float | None
    """None where it is missing: the line has a gap there."""
    low: float | None = None
    """Lower end of its bar; None for no bar."""
    high: float | None = None
    """Upper end."""


@dataclass(frozen=True)
class Series:
    """One line, or the dots of one colour."""

    name: str
    points: tuple[Point, ...]
    """From left to right."""
    colour: str
    marker: str = "o"
    level: bool = False
    """Whether x does not matter to it: a flat line to compare with, of one figure, its bar a band."""

    @property
    def drawn(self) -> list[tuple[float, float]]:
        """(x, y) of the points that are not missing."""
        return [(point.x, point.y) for point in self.points if point.y is not None]

    def runs(self) -> Iterator[list[tuple[float, float]]]:
        """Yield (x, y) of neighbours without a missing point between them."""
        run: list[tuple[float, float]] = []
        for point in self.points:
            if point.y is None:
                if run:
                    yield run
                run = []
            else:
                run.append((point.x, point.y))
        if run:
            yield run


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    y_name: str
    series: Sequence[Series]
    floors: Sequence[Sequence[tuple[float, float]]] = ()
    """Dotted lines as (x, y); see `distinct_floors`."""
    reach: Sequence[float] = (0.0,)
    """Values that the y axis takes in, whatever the figures are."""


@dataclass(frozen=True)
class Area:
    """Where figures are plotted, in pixels from the top left corner."""

    x: float
    y: float
    width: float
    height: float


def numbered_series(index: int, name: str, points: tuple[Point, ...]) -> Series:
    """Return a series in the look of its place: a colour and a marker, which repeat after eight."""
    return Series(name, points, SERIES_COLOURS[index % len(SERIES_COLOURS)], MARKERS[index % len(MARKERS)])


def save_line_charts(
    path: Path,
    panels: Sequence[Panel],
    *,
    title: str,
    subtitle: str,
    x_name: str,
    even: bool = False,
    notes: Sequence[str] = (),
) -> Path:
    """Draw panels below each other over one x axis.

    Args:
        path: The PNG to write, 1400 pixels wide.
        panels: One or more; a single one is drawn tall.
        title: The heading.
        subtitle: How to read it, on at most two lines.
        x_name: What the x axis shows.
        even: Space the values of x evenly instead of by size; said below the axis.
        notes: What else a reader should know, two lines each at most, below everything.

    Raises:
        EvaluationError: A panel has no figure, or one that is not finite.
    """
    series = [one for panel in panels for one in panel.series]
    x_values = sorted({point.x for one in series for point in one.points})
    plot_width = _plot_width(series)
    plot_height, gap = (_PLOT_HEIGHT, 0) if len(panels) == 1 else (230, 100)
    plots = len(panels) * (plot_height + gap) - gap
    floors = any(panel.floors for panel in panels)
    sheet, top, below = _page(title, subtitle, notes, plots=plots, key_lines=int(floors))
    for place, panel in enumerate(panels):
        area = Area(_LEFT, top + place * (plot_height + gap), plot_width, plot_height)
        line_chart(sheet, area, panel, x_values=x_values, even=even)
    x_name += ", evenly spaced" if even else ""
    sheet.text(_LEFT + plot_width / 2, top + plots + 66, x_name, colour=SOFT, align="center", width=plot_width)
    if floors:
        _floor_key(sheet, below)
    return sheet.save(path)


def save_paths(
    path: Path,
    paths: Sequence[Series],
    *,
    labels: Sequence[Sequence[str]],
    filled: Sequence[Sequence[bool]],
    title: str,
    subtitle: str,
    x_name: str,
    y_name: str,
    floors: Sequence[float] = (),
    notes: Sequence[str] = (),
) -> Path:
    """Draw paths through a plane of two figures, such as quality and Bias.

    Args:
        path: The PNG to write, 1400 pixels wide.
        paths: Each goes through its points in their order; of a level only its points are drawn, above all others.
        labels: A word for every point, beside it; points that stand on each other are labelled once.
        filled: Whether each point is filled, for no other point beats it, or hollow.
        title: The heading.
        subtitle: How to read it, on at most two lines.
        x_name: What the x axis shows.
        y_name: What the y axis shows, which begins at 0.
        floors: Values of y at which a dotted line is drawn.
        notes: What else a reader should know, two lines each at most, below everything.

    Raises:
        EvaluationError: There is no point, or one that is not finite.
    """
    _check(paths)
    sheet, top, below = _page(title, subtitle, notes, plots=_PLOT_HEIGHT, key_lines=2 if floors else 1)
    area = Area(_LEFT, top, _plot_width(paths), _PLOT_HEIGHT)
    plane_chart(sheet, area, paths, labels=labels, filled=filled, y_name=y_name, floors=floors)
    sheet.text(area.x + area.width / 2, top + _PLOT_HEIGHT + 66, x_name, colour=SOFT, align="center", width=area.width)
    key = "Filled: no other point beats it. Hollow: another is as good in both figures, and better in one."
    sheet.text(MARGIN, below - (28 if floors else 0), key, size=18, colour=SOFT)
    if floors:
        _floor_key(sheet, below)
    return sheet.save(path)


def plane_chart(
    sheet: Sheet,
    area: Area,
    paths: Sequence[Series],
    *,
    labels: Sequence[Sequence[str]],
    filled: Sequence[Sequence[bool]],
    y_name: str,
    floors: Sequence[float] = (),
) -> None:
    """Draw paths through a plane of two figures; see `save_paths`. The paths' names stand to the right of `area`.

    Raises:
        EvaluationError: There is no point, or one that is not finite.
    """
    _check(paths)
    axes = sheet.axes(area.x, area.y, area.width, area.height)
    axes.grid(axis="x", color=RULE, linewidth=1.0)
    levels = nice_ticks(*(limit([x for one in paths for x, _ in one.drawn]) for limit in (min, max)))
    axes.set_xlim(levels[0], levels[-1])
    ticks(axes, "x", levels, [number(level) for level in levels], size=_TICK_SIZE)
    _y_axis(sheet, area, axes, [*floors, *(y for one in paths for _, y in one.drawn)], Panel(y_name, paths))

    above_all = {point for one in paths if one.level for point in one.drawn}
    words: dict[tuple[float, float], str] = {}
    for one, own_labels, own_filled in zip(paths, labels, filled, strict=True):
        if not one.level:
            axes.plot(*zip(*one.drawn, strict=True), color=one.colour, linewidth=2, alpha=0.6, zorder=2)
        for point, label, fill in zip(one.drawn, own_labels, own_filled, strict=True):
            if one.level or point not in above_all:
                inside = one.colour if fill else "white"
                (mark,) = axes.plot(*point, one.marker, color=one.colour, markersize=10, mew=2.2, mfc=inside)
                mark.set(zorder=4, clip_on=False)
                words.setdefault(point, label)
    _write_beside(sheet, area, axes, words, [one.drawn for one in paths if not one.level])
    for place, one in enumerate(paths):
        _name(sheet, area, area.y + 14 + _NAME_GAP * place, replace(one, level=False))
    for floor in floors:
        axes.axhline(floor, zorder=1, **_DOTTED)


def line_chart(sheet: Sheet, area: Area, panel: Panel, *, x_values: Sequence[float], even: bool = False) -> None:
    """Draw one panel; the names of its lines stand to the right of `area`, on `name_room` pixels.

    Args:
        sheet: The sheet to draw on.
        area: Where figures are plotted; the numbers of the axes stand outside.
        panel: What is drawn.
        x_values: Where the x axis has ticks, rising; every point stands at one of them.
        even: Space them evenly instead of by size.

    Raises:
        EvaluationError: The panel has no figure, or one that is not finite.
    """
    series = [one for one in panel.series if one.drawn]
    _check(series)
    place_of = {x: float(place) if even else x for place, x in enumerate(x_values)}
    places = list(place_of.values())
    spread = (places[-1] - places[0]) or 1.0
    marked = sum(not one.level for one in series)
    room = max(0.04 * area.width, 5 * marked + 6)  # pixels for half the bars of one place
    margin = spread * room / (area.width - 2 * room)
    limits = (places[0] - margin, places[-1] + margin)
    axes = sheet.axes(area.x, area.y, area.width, area.height)
    axes.set_xlim(*limits)
    _x_ticks(axes, area, places, [number(x) for x in x_values])
    points = [point for one in series for point in one.points]
    _y_axis(sheet, area, axes, [value for point in points for value in (point.y, point.low, point.high)], panel)

    for floor in panel.floors:
        line = [(place_of[x], y) for x, y in floor]
        line = [(limits[0], line[0][1]), *line, (limits[1], line[-1][1])]
        axes.plot(*zip(*line, strict=True), zorder=1, **_DOTTED)
    nearest = min((right - left for left, right in pairwise(places)), default=spread)
    pixel = (limits[1] - limits[0]) / area.width
    # Side by side, so that bars do not cover each other.
    step = min(10 * pixel, 0.6 * nearest / max(marked, 1))
    shifts = iter([step * (place - (marked - 1) / 2) for place in range(marked)])
    ends = []
    for one in series:
        x, y = one.drawn[-1]
        if one.level:
            _draw_level(axes, one)
            ends.append((limits[1], y))
            continue
        shift = next(shifts)
        _draw_line(axes, one, {x: place + shift for x, place in place_of.items()}, min(step / pixel, 9) * 0.72)
        ends.append((place_of[x] + shift, y))
    _name_ends(sheet, area, axes, series, ends)


def name_room(names: Sequence[str]) -> float:
    """Return the pixels that the names of lines take to the right of the plot."""
    return 46 + max((text_width(_shown(name), _NAME_SIZE, bold=True) for name in names), default=0.0)


def nice_ticks(low: float, high: float) -> list[float]:
    """Return about five round numbers; the first is at most `low`, the last at least `high`."""
    if high <= low:
        low, high = (0.0, 1.0) if low == 0 else (low - abs(low) / 2, low + abs(low) / 2)
    found = MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    return [float(f"{level:.12g}") for level in found]  # 0.30000000000000004


def apart(
    values: Sequence[float], gap: float, *, low: float = float("-inf"), high: float = float("inf")
) -> list[float]:
    """Return `values` moved as little as it takes for no two to be closer than `gap`, in the same order.

    Args:
        values: Where things would stand.
        gap: The least distance.
        low: None stands below it.
        high: None stands above it; where both cannot be, this one holds.
    """
    order = sorted(range(len(values)), key=lambda index: values[index])
    clusters: list[list[int]] = []
    centres: list[float] = []
    for index in order:
        clusters.append([index])
        centres.append(values[index])
        while len(clusters) > 1:
            reach = gap * (len(clusters[-1]) + len(clusters[-2])) / 2
            if centres[-1] - centres[-2] >= reach:
                break
            merged = clusters[-2] + clusters[-1]
            clusters[-2:], centres[-2:] = [merged], [sum(values[i] for i in merged) / len(merged)]
    moved = [0.0] * len(values)
    for cluster, centre in zip(clusters, centres, strict=True):
        for place, index in enumerate(cluster):
            moved[index] = centre + gap * (place - (len(cluster) - 1) / 2)
    for rank, index in enumerate(order):
        moved[index] = min(max(moved[index], low + gap * rank), high - gap * (len(order) - 1 - rank))
    return moved


def distinct_floors(floors: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[tuple[float, float], ...]]:
    """Return the (x, floor) lines that differ in four digits; a part of another line is left out."""
    kept: list[tuple[tuple[float, float], ...]] = []
    for floor in sorted(floors, key=len, reverse=True):
        line = tuple(sorted((x, round(y, 4)) for x, y in floor))
        if line and not any(set(line) <= set(other) for other in kept):
            kept.append(line)
    return sorted(kept)


def without_collisions(centres: Sequence[float], widths: Sequence[float], gap: float) -> list[int]:
    """Return which labels fit beside each other: the last, and from the left each that meets none before it."""
    last = len(centres) - 1
    kept: list[int] = []
    for index in range(last + 1):
        neighbours = ([kept[-1]] if kept else []) + ([last] if index < last else [])
        if index == last or all(
            abs(centres[index] - centres[other]) >= (widths[index] + widths[other]) / 2 + gap for other in neighbours
        ):
            kept.append(index)
    return kept


def _page(title: str, subtitle: str, notes: Sequence[str], *, plots: float, key_lines: int) -> tuple[Sheet, int, int]:
    """Return a sheet with its words, where its plots begin, and the last line of the key below them."""
    width = WIDTH - 2 * MARGIN
    above, below = wrap(subtitle, width, 23), [line for note in notes for line in wrap(note, width, 18)]
    top = 174 + 30 * len(above)
    last = int(top + plots + 66 + (18 + 28 * key_lines if key_lines else 0))
    sheet = Sheet(WIDTH, last + 28 * len(below) + 48)
    sheet.text(MARGIN, 92, title, size=40, bold=True, width=width)
    for place, line in enumerate(above):
        sheet.text(MARGIN, 136 + 30 * place, line, size=23, colour=SOFT)
    for place, line in enumerate(below):
        sheet.text(MARGIN, last + 36 + 28 * place, line, size=18, colour=SOFT)
    return sheet, top, last


def _floor_key(sheet: Sheet, y: float) -> None:
    sheet.dotted(MARGIN, y - 6, 44)
    sheet.text(_LEFT, y, "what a perfectly fair sampler would show on as many images", size=18, colour=SOFT)


def _plot_width(series: Sequence[Series]) -> float:
    return WIDTH - _LEFT - MARGIN - name_room([one.name for one in series])


def _check(series: Sequence[Series]) -> None:
    if not series:
        raise EvaluationError("Expected at least one figure to draw, got none. Measure something first.")
    for one in series:
        for point in one.points:
            for value in (point.x, point.y, point.low, point.high):
                if value is not None and not math.isfinite(value):
                    raise EvaluationError(
                        f"Expected finite figures of {one.name!r}, got {value} at {point.x:g}. "
                        "Give None where a figure is missing."
                    )


def _y_axis(sheet: Sheet, area: Area, axes: Axes, values: Sequence[float | None], panel: Panel) -> None:
    """Fit the y axis around `values` and what else the panel takes in, and name it."""
    floors = [y for floor in panel.floors for _, y in floor]
    known = [value for value in (*values, *floors, *panel.reach) if value is not None]
    levels = nice_ticks(min(known), max(known))
    axes.set_ylim(levels[0], levels[-1] + 0.04 * (levels[-1] - levels[0]))
    ticks(axes, "y", levels, [number(level) for level in levels], size=_TICK_SIZE)
    sheet.text(MARGIN, area.y - 22, panel.y_name, size=18, colour=SOFT, width=area.x + area.width - MARGIN)


def _x_ticks(axes: Axes, area: Area, places: Sequence[float], labels: Sequence[str]) -> None:
    left, right = axes.get_xlim()
    centres = [(place - left) / (right - left) * area.width for place in places]
    kept = set(without_collisions(centres, [text_width(label, _TICK_SIZE) for label in labels], 12))
    ticks(axes, "x", places, [label if place in kept else "" for place, label in enumerate(labels)], size=_TICK_SIZE)


def _draw_level(axes: Axes, series: Series) -> None:
    point = series.points[0]
    axes.axhline(series.drawn[0][1], color=series.colour, linewidth=2, zorder=1.5)
    if point.low is not None and point.high is not None:
        axes.axhspan(point.low, point.high, color=series.colour, alpha=0.15, linewidth=0)


def _draw_line(axes: Axes, series: Series, place_of: dict[float, float], bar_width: float) -> None:
    for point in series.points:
        if point.y is not None and point.low is not None and point.high is not None:
            place = place_of[point.x]
            axes.vlines(place, point.low, point.high, color=series.colour, alpha=0.35, linewidth=bar_width)
    for run in series.runs():
        x, y = [place_of[x] for x, _ in run], [y for _, y in run]
        axes.plot(x, y, color=series.colour, linewidth=3)
        axes.plot(x, y, series.marker, color=series.colour, markersize=9, mec="white", mew=1.2, clip_on=False)


def _name_ends(
    sheet: Sheet, area: Area, axes: Axes, series: Sequence[Series], ends: Sequence[tuple[float, float]]
) -> None:
    """Write each name beside the end of its line, joined by a hairline."""
    pixels = _pixels(sheet, axes, ends)
    heights = apart(pixels[:, 1].tolist(), _NAME_GAP, low=area.y, high=area.y + area.height)
    for one, end, y in zip(series, pixels, heights, strict=True):
        _name(sheet, area, y, one)
        leader = (end[0], area.x + area.width + 14), (sheet.height - end[1], sheet.height - y)
        _add_line(sheet, Line2D(*leader, color=one.colour, linewidth=1, alpha=0.6))


def _name(sheet: Sheet, area: Area, y: float, series: Series) -> None:
    """Write a series' name to the right of the plot, after a piece of its line or its marker."""
    x = area.x + area.width + 26
    piece = {"xdata": (x - 8, x + 8), "linewidth": 3} if series.level else {"xdata": (x, x), "marker": series.marker}
    line = Line2D(ydata=(sheet.height - y,) * 2, color=series.colour, markersize=9, mec="white", mew=0.8, **piece)
    _add_line(sheet, line)
    sheet.text(x + 16, y + 7, _shown(series.name), size=_NAME_SIZE, bold=True)


def _shown(name: str) -> str:
    return shorten(name, _NAME_WIDTH, _NAME_SIZE, bold=True)


def _add_line(sheet: Sheet, line: Line2D) -> None:
    line.set_transform(None)  # pixels, whose origin is the bottom left corner
    sheet.figure.add_artist(line)


def _pixels(sheet: Sheet, axes: Axes, points: Sequence[tuple[float, float]]) -> NDArray[np.float64]:
    """Return where points (N, 2) stand, in pixels from the top left corner."""
    return np.asarray(axes.transData.transform(points)) * (1, -1) + (0, sheet.height)


def _write_beside(
    sheet: Sheet,
    area: Area,
    axes: Axes,
    words: dict[tuple[float, float], str],
    lines: Sequence[Sequence[tuple[float, float]]],
) -> None:
    """Write a word beside each point, where it covers the fewest markers, lines and other words."""
    size = 17
    centres = _pixels(sheet, axes, list(words))
    taken = [centres]
    for line in lines:
        corners = _pixels(sheet, axes, line)
        taken += [np.linspace(start, end, 24) for start, end in pairwise(corners)]
    for centre, word in zip(centres, words.values(), strict=True):
        half = np.array([text_width(word, size) / 2 + 3, size / 2 + 1])
        best, least = centre, math.inf
        for side in ((1, 0), (0, -1), (-1, 0), (0, 1), (1, -1), (1, 1), (-1, -1), (-1, 1)):
            middle = centre + side * (half + 8)
            covered = sum(int((np.abs(points - middle) < half).all(axis=1).sum()) for points in taken)
            outside = not (area.x < middle[0] < area.x + area.width and area.y < middle[1] < area.y + area.height)
            if covered + 100 * outside < least:
                best, least = middle, covered + 100 * outside
        corners = np.array([(x, y) for x in (-1, 0, 1) for y in (-1, 0, 1)]) * half * 0.9
        taken.append(np.repeat(best + corners, 4, axis=0))
        sheet.text(best[0], best[1] + 6, word, size=size, align="center")
