"""The look of every picture, on light and on dark paper; charts of figures, histograms of scores, small images."""

from __future__ import annotations

import base64
import io
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator
from PIL import Image

from ..text import one_line

if TYPE_CHECKING:
    from .read import Split

INK = "#1b2430"  # titles and figures
SOFT = "#5b6675"  # what explains them: 5.9 to 1 on white
RULE = "#d9dee5"  # hairlines
PAPER = "#ffffff"
DARK = {INK: "#e7ecf3", SOFT: "#a7b2c1", RULE: "#2e3846", PAPER: "#10151c"}  # in their place on dark paper
PALETTE = ("#e69a1f", "#1f9b78", "#b8528c", "#5ab4e0", "#c8501e", "#8a8f3a", "#6a5aa8", "#1f6fb5")
"""Groups and classes, in order: after Okabe and Ito, told apart by any colour vision. The last is guidance's."""
BASE_COLOUR = "#6f7b8a"  # the model that others are compared with
SERIES_COLOURS = tuple(PALETTE[place] for place in (7, 1, 2, 4, 0, 5, 6, 3))  # all other models, in order
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")  # one for each colour: series differ without colours too

THUMB_SIDE = 192  # the most pixels of a small image
CRISP_SIDE = 96  # images this small are kept exactly, as PNG
RARE = 0.15  # below this share a group is hard to see unless counts are on a log scale
_LOCK = RLock()  # matplotlib's settings are global


class Thumb(NamedTuple):
    """A small image as a data URI, and its content in words."""

    uri: str
    alt: str


class Plot(NamedTuple):
    """A picture of figures as data URIs on light and on dark paper, and its content in words."""

    light: str
    dark: str
    alt: str
    caption: str


@dataclass(frozen=True)
class Line:
    """One line of a chart, of one figure or more."""

    name: str
    points: Sequence[tuple[float, float | None, float | None, float | None]]
    """x, y, and the ends of its interval, from left to right; None where there is none: the line has a gap there."""
    place: int | None = None  # of its colour and marker, which repeat after eight; None is the grey of `BASE_COLOUR`


@dataclass(frozen=True)
class Chart:
    """Lines over one x axis."""

    title: str  # what the y axis shows
    x_name: str
    lines: Sequence[Line]
    top: float | None = None  # where the y axis ends at least; it begins at 0 or below
    floors: Sequence[Sequence[tuple[float, float]]] = ()  # dotted lines as (x, y): what a fair sampler shows by chance


def colour_of(index: int) -> str:
    """The colour of a group or class; they repeat after eight."""
    return PALETTE[index % len(PALETTE)]


def style(*, dark: bool = False) -> Any:
    """Settings for `matplotlib.rc_context` or `pyplot.style.use`: `house.mplstyle` in our colours."""
    ink, soft, rule, paper = (DARK[colour] if dark else colour for colour in (INK, SOFT, RULE, PAPER))
    house: Any = matplotlib.rc_params_from_file(Path(__file__).with_name("house.mplstyle"), use_default_template=False)
    softer = ("axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color")
    colours = {"text.color": ink, **dict.fromkeys(softer, soft), "grid.color": rule}
    colours |= {"figure.facecolor": paper, "lines.markeredgecolor": paper}
    return {**house, **colours, "axes.prop_cycle": cycler(color=SERIES_COLOURS, marker=MARKERS)}


def render(
    draw: Callable[[Axes], object], width: float, height: float, *, dark: bool = False, density: float = 1
) -> bytes:
    """What `draw` puts on axes of a figure of `width` x `height` units, with `density` pixels for each, as a PNG.

    The same figure gives the same bytes. One unit is 1/100 inch, and the layout is constrained.
    """
    stream = io.BytesIO()
    with _LOCK, matplotlib.rc_context(style(dark=dark)), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # a box is drawn in its place
        figure = Figure(figsize=(width / 100, height / 100), dpi=100, layout="constrained")
        draw(figure.add_subplot())
        figure.savefig(stream, format="png", dpi=100 * density, metadata={"Software": None})
    return stream.getvalue()


def draw_chart(axes: Axes, chart: Chart) -> None:
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
        look = line.place or 0
        colour = BASE_COLOUR if line.place is None else SERIES_COLOURS[look % len(SERIES_COLOURS)]
        marker = MARKERS[look % len(MARKERS)]
        x, y, low, high = np.array(line.points, dtype=float).T  # None is no number
        x = x + 0.016 * span * (place - (len(chart.lines) - 1) / 2)
        axes.vlines(x, low, high, color=colour, alpha=0.35, linewidth=7)
        axes.plot(x, y, color=colour, marker=marker, clip_on=False)
        ends.append((float(y[np.isfinite(y)][-1]), one_line(line.name, 24), colour, marker, "bold"))
    known = [value for line in chart.lines for _, *figures in line.points for value in figures if value is not None]
    known += [y for floor in chart.floors for _, y in floor]
    bottom, top = min(0.0, *known), max(chart.top or 0.0, *known) or 1.0
    margin = (0.05 + 0.012 * len(chart.lines)) * span
    axes.set_xlim(xs[0] - margin, xs[-1] + margin)
    axes.set_ylim(bottom, top + 0.03 * (top - bottom))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set(title=chart.title, xlabel=chart.x_name)
    beside, gap = axes.get_yaxis_transform(), 0.09 * (top - bottom)
    height = -math.inf
    for rank, (y, name, colour, marker, weight) in enumerate(sorted(ends), start=1):  # as far apart as lines of text
        height = min(max(y, height + gap), top - gap * (len(ends) - rank))
        axes.plot(1.03, height, color=colour, marker=marker, linestyle="", transform=beside, clip_on=False)
        shade = rcParams["text.color"] if marker else rcParams["axes.labelcolor"]
        axes.text(1.06, height, name, color=shade, weight=weight, va="center", transform=beside)


def plot_chart(chart: Chart, over: str, about: str = "") -> Plot:
    """A chart for a page; `over` names its x axis in words, and `about` says what the chart itself does not."""
    lines = [
        f"{line.name[:60]}: {', '.join(f'{y:.2f} at {x:g}' for x, y, _, _ in line.points if y is not None)}."
        for line in chart.lines
    ]
    alt = f"{chart.title.partition(':')[0]} {over}. {' '.join(lines)}"
    fair = "Dotted: what a fair sampler shows by chance." if chart.floors else ""
    return _plot(lambda axes: draw_chart(axes, chart), alt, f"{fair} {about}".strip())


def _plot(draw: Callable[[Axes], object], alt: str, caption: str) -> Plot:
    """What `draw` puts on axes of 640 x 400 CSS pixels, twice as sharp."""
    light, dark = (_uri("png", render(draw, 640, 400, dark=dark, density=2)) for dark in (False, True))
    return Plot(light, dark, alt, caption)


def histogram(split: Split, *, log_scale: bool | None = None) -> Plot:
    """The scores of one prompt's images, each group in its colour; counts on a log scale where one `is_rare`."""
    log_scale = is_rare(split) if log_scale is None else log_scale
    own = [(group.name, split.scores[split.labels == group.index]) for group in split.groups if group.size]
    reach = "; ".join(f"{name} from {scores.min():.2f} to {scores.max():.2f}" for name, scores in own)
    parted = f", parted at {' and '.join(f'{cut:.2f}' for cut in split.cuts)}" if split.cuts else ", overlapping"
    meaning = "A score is high for the rarer group; 0 is the prompt's median."
    if split.by_hand:
        meaning = "Scores are as they were inferred, before people's changes."
    alt = f"Histogram of the scores of {len(split.scores):,} images: {reach}{parted}."
    caption = f"{'Images, on a log scale,' if log_scale else 'Images'} by score. {meaning}"
    return _plot(lambda axes: draw_histogram(axes, split, log_scale=log_scale), alt, caption)


def draw_histogram(axes: Axes, split: Split, *, log_scale: bool) -> None:
    """Draw each group's scores in its colour, and where they part."""
    low, high = float(split.scores.min()), float(split.scores.max())
    high = high if high > low else low + 1.0
    tallest = 1.0
    for group in split.groups:
        weights, colour = split.weights[:, group.index], colour_of(group.index)  # the humps of a soft W overlap
        drawn = axes.hist(split.scores, 48, range=(low, high), weights=weights, rwidth=0.9, color=colour, alpha=0.8)
        tallest = max(tallest, float(np.max(drawn[0])))
    if log_scale:
        axes.set_yscale("log")
        axes.set_ylim(0.7, 1.4 * tallest)
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    for cut in (cut for cut in split.cuts if low <= cut <= high):
        line = axes.axvline(cut, color=rcParams["text.color"], linewidth=1.6, linestyle=(0, (4, 3)), marker="")
        axes.text(cut, 1.02, "cut", ha="center", transform=line.get_transform())


def is_rare(split: Split) -> bool:
    """Whether the counts of a group would vanish beside the others'."""
    return min((group.share for group in split.groups if group.size), default=1.0) < RARE


def thumb(image: Image.Image, alt: str) -> Thumb:
    """An image small enough to embed."""
    image, stream = image.convert("RGB"), io.BytesIO()
    kind = "png" if max(image.size) <= CRISP_SIDE else "jpeg"
    image.thumbnail((THUMB_SIDE, THUMB_SIDE), Image.Resampling.LANCZOS)
    image.save(stream, kind, optimize=kind == "png", quality=86)
    return Thumb(_uri(kind, stream.getvalue()), alt)


def _uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
