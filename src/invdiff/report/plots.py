"""Pictures inside a report, as data URIs: plots on light and on dark paper, and small images."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from ..text import one_line
from .audit_pictures import draw_histogram, is_rare
from .audit_reading import Page
from .charts import Area, Panel, line_chart, name_room
from .document import Plot, Thumb
from .style import SOFT, Sheet, number, shorten
from .theme import BASE_COLOUR, MARKERS, SERIES_COLOURS, save_picture

THUMB_SIDE = 192
"""The most pixels of a small image."""
_CRISP_SIDE = 96
"""Images this small are kept exactly, as PNG."""
WIDTH = 640
"""Pixels: still to be read on a phone, at half its size."""


def thumb(image: Image.Image, alt: str) -> Thumb:
    """Return an image small enough to embed."""
    image = image.convert("RGB")
    stream = io.BytesIO()
    if max(image.size) <= _CRISP_SIDE:
        image.save(stream, "PNG", optimize=True)
        return Thumb(_uri("png", stream.getvalue()), alt)
    image.thumbnail((THUMB_SIDE, THUMB_SIDE), Image.Resampling.LANCZOS)
    image.save(stream, "JPEG", quality=86)
    return Thumb(_uri("jpeg", stream.getvalue()), alt)


def histogram(page: Page) -> Plot:
    """Draw the scores of one prompt's images, each group in its colour."""
    sheet = Sheet(WIDTH, 400)
    draw_histogram(sheet.axes(70, 34, WIDTH - 84, 308), page)
    reach = [
        f"{group.name} from {number(round(float(own.min()), 2))} to {number(round(float(own.max()), 2))}"
        for group in page.groups
        if len(own := page.scores[page.labels == group.index])
    ]
    parted = [number(round(cut, 2)) for cut in page.cuts]
    where = f", parted at {' and '.join(parted)}" if parted else ", overlapping"
    alt = f"Histogram of the scores of {len(page.scores):,} images: {'; '.join(reach)}{where}."
    counts = "Images, on a log scale," if is_rare(page) else "Images"
    meaning = "A score is high for the rarer group; 0 is the prompt's mean."
    if page.by_hand:
        meaning = "Scores are as they were inferred, before people's changes."
    return as_plot(sheet, alt, f"{counts} by score. {meaning}")


def curve(panel: Panel, *, x_name: str, alt: str, caption: str) -> Plot:
    """Draw one panel of lines over x, their names short enough for a phone."""
    series = [replace(one, name=shorten(one.name, 170, 20, bold=True)) for one in panel.series]
    panel = replace(panel, series=series)
    room = name_room([one.name for one in series])
    sheet = Sheet(WIDTH, 440)
    area = Area(70, 58, WIDTH - 70 - room - 10, 296)
    line_chart(sheet, area, panel, x_values=sorted({point.x for one in series for point in one.points}))
    sheet.text(area.x + area.width / 2, 422, x_name, size=20, colour=SOFT, align="center")
    return as_plot(sheet, alt, caption)


def as_plot(sheet: Sheet, alt: str, caption: str) -> Plot:
    """Return a sheet as it looks on light and on dark paper; the sheet is dark afterwards."""
    light = _uri("png", sheet.png())
    return Plot(light, _uri("png", sheet.png(dark=True)), alt, caption, sheet.width, sheet.height)


def _uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


@dataclass(frozen=True)
class Line:
    """One line of a chart."""

    name: str
    points: Sequence[tuple[float, float | None, float | None, float | None]]
    """x, y, and the ends of its interval, from left to right; None where there is none: the line has a gap there."""
    place: int | None = None
    """Decides colour and marker, which repeat after eight; None is the grey of the model that others are compared
    with."""

    @property
    def look(self) -> tuple[str, str]:
        """Colour and marker."""
        if self.place is None:
            return BASE_COLOUR, MARKERS[0]
        return SERIES_COLOURS[self.place % len(SERIES_COLOURS)], MARKERS[self.place % len(MARKERS)]


@dataclass(frozen=True)
class Chart:
    """Lines over one x axis."""

    title: str
    """What the y axis shows."""
    x_name: str
    lines: Sequence[Line]
    top: float | None = None
    """Where the y axis ends at least; it begins at 0 or below."""
    floors: Sequence[Sequence[tuple[float, float]]] = ()
    """Dotted lines as (x, y): what a fair sampler shows by chance."""


def draw_chart(axes: Axes, chart: Chart, *, gap: float = 0.09) -> None:
    """Draw a chart: lines stand side by side, so that no interval covers another, and are named at their ends."""
    xs = sorted({x for line in chart.lines for x, *_ in line.points})
    span = (xs[-1] - xs[0]) or 1.0
    if len(xs) < 10 and min((right - left for left, right in pairwise(xs)), default=span) > 0.05 * span:
        axes.set_xticks(xs, [f"{x:g}" for x in xs])
    ends = []
    for floor in sorted({tuple((x, round(y, 4)) for x, y in floor) for floor in chart.floors}):
        axes.plot(*zip(*floor, strict=True), ":", color="0.5", linewidth=2, marker="", zorder=1)
        ends = [(floor[-1][1], "fair sampler", "0.5", "", "normal")]
    for place, line in enumerate(chart.lines):
        colour, marker = line.look
        x, y, low, high = np.array([[math.nan if v is None else v for v in point] for point in line.points]).T
        x = x + 0.016 * span * (place - (len(chart.lines) - 1) / 2)
        axes.vlines(x, low, high, color=colour, alpha=0.35, linewidth=7)
        axes.plot(x, y, color=colour, marker=marker, clip_on=False)
        if np.isfinite(y).any():
            ends.append((float(y[np.isfinite(y)][-1]), one_line(line.name, 24), colour, marker, "bold"))
    known = [value for line in chart.lines for _, *figures in line.points for value in figures if value is not None]
    low, high = min(0.0, *known), max(chart.top or 0.0, *known) or 1.0
    margin = (0.05 + 0.012 * len(chart.lines)) * span
    axes.set_xlim(xs[0] - margin, xs[-1] + margin)
    axes.set_ylim(low, high + 0.03 * (high - low))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set(title=chart.title, xlabel=chart.x_name)
    above, beside = -math.inf, axes.get_yaxis_transform()
    for y, name, colour, marker, weight in sorted(ends):
        above = max(y, above + gap * (axes.get_ylim()[1] - low))
        axes.plot(1.03, above, color=colour, marker=marker, linestyle="", transform=beside, clip_on=False)
        shade = rcParams["text.color"] if marker else rcParams["axes.labelcolor"]
        axes.text(1.06, above, name, color=shade, weight=weight, va="center", transform=beside)


def save_charts(path: Path, charts: Sequence[Chart], *, title: str) -> Path:
    """Draw charts of the same lines below each other over one x axis, 1400 pixels wide."""
    height = 160 + (560 if len(charts) == 1 else 280 * len(charts))

    def draw(figure: Figure) -> None:
        figure.set_layout_engine("constrained", rect=(0.035, 40 / height, 0.93, 1 - 160 / height))
        figure.suptitle(one_line(title, 70), x=0.045, y=1 - 50 / height, ha="left", va="top")
        for axes, chart in zip(figure.subplots(len(charts), sharex=True, squeeze=False)[:, 0], charts, strict=True):
            draw_chart(axes, chart)
            axes.set_xlabel(chart.x_name if chart is charts[-1] else "")

    return save_picture(path, draw, 1400, height)
