"""The look of every picture: colours, and one matplotlib style for light and for dark paper."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from threading import RLock
from typing import Any

import matplotlib
from cycler import cycler
from matplotlib.figure import Figure

from ..files import atomic_path

INK = "#1b2430"
"""Titles and figures."""
SOFT = "#5b6675"
"""Everything that explains them: 5.9 to 1 on white."""
RULE = "#d9dee5"
"""Hairlines."""
PAPER = "#ffffff"
DARK = {INK: "#e7ecf3", SOFT: "#a7b2c1", RULE: "#2e3846", PAPER: "#10151c"}
"""What takes their place on dark paper."""
PALETTE = ("#e69a1f", "#1f6fb5", "#1f9b78", "#b8528c", "#5ab4e0", "#c8501e", "#8a8f3a", "#6a5aa8")
"""Groups and classes, in order: after Okabe and Ito, distinguishable with any colour vision."""
BASE_COLOUR = "#6f7b8a"
"""The model that others are compared with."""
SERIES_COLOURS = tuple(PALETTE[place] for place in (1, 2, 3, 5, 0, 6, 7, 4))
"""All other models, in order."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
"""One for each colour: series differ without colours too."""

_LOCK = RLock()  # matplotlib's settings are global


def colour_of(index: int) -> str:
    """The colour of a group or class; they repeat after eight."""
    return PALETTE[index % len(PALETTE)]


def style(*, dark: bool = False) -> Any:
    """Settings for `matplotlib.rc_context` or `pyplot.style.use`: `house.mplstyle` in our colours."""
    ink, soft, rule, paper = (DARK[colour] if dark else colour for colour in (INK, SOFT, RULE, PAPER))
    settings: Any = matplotlib.rc_params_from_file(
        Path(__file__).with_name("house.mplstyle"), use_default_template=False
    )
    softer = ("axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color")
    colours = {"text.color": ink, **dict.fromkeys(softer, soft), "grid.color": rule}
    colours |= {"figure.facecolor": paper, "lines.markeredgecolor": paper}
    return {**settings, **colours, "axes.prop_cycle": cycler(color=SERIES_COLOURS, marker=MARKERS)}


def render(
    draw: Callable[[Figure], object], width: float, height: float, *, dark: bool = False, density: float = 1
) -> bytes:
    """What `draw` puts on a figure of `width` x `height` units, with `density` pixels for each, as a PNG.

    The same figure gives the same bytes. One unit is 1/100 inch, and the layout is constrained.
    """
    stream = io.BytesIO()
    with _LOCK, matplotlib.rc_context(style(dark=dark)), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # a box is drawn in its place
        figure = Figure(figsize=(width / 100, height / 100), dpi=100, layout="constrained")
        draw(figure)
        figure.savefig(stream, format="png", dpi=100 * density, metadata={"Software": None})
    return stream.getvalue()


def save_picture(path: Path, draw: Callable[[Figure], object], width: float, height: float) -> None:
    """Write what `render` draws on light paper, atomically."""
    png = render(draw, width, height)
    with atomic_path(path) as temporary:
        temporary.write_bytes(png)
