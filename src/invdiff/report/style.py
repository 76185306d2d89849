"""One look for every picture: palette, type, and a sheet of paper that is laid out in pixels.

Nothing here touches matplotlib's global state, and nothing a user writes is ever taken for markup.
"""

from __future__ import annotations

import io
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.colors import to_rgb, to_rgba
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, get_font
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, FancyBboxPatch, Patch, Rectangle
from matplotlib.text import Text
from PIL import Image, ImageDraw, ImageOps

from ..files import save_image

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
"""Groups and classes, in order: after Okabe and Ito, told apart with any colour vision."""

DPI = 100
_POINTS_PER_PIXEL = 72 / DPI
_MOST_CHARACTERS = 600  # what no picture has room for is not measured
_REPLACEMENT = "\ufffd"


def colour_of(index: int) -> str:
    """Return the colour of a group or class; they repeat after eight."""
    return PALETTE[index % len(PALETTE)]


def percent(share: float) -> str:
    """Return a share in words that never round something to nothing: "5%", "<1%", ">99%"."""
    if 0 < share < 0.005:
        return "<1%"
    if 0.995 <= share < 1:
        return ">99%"
    return f"{share:.0%}"


def plain(text: str, *, bold: bool = False) -> str:
    """Return `text` as one line that the font can draw.

    White space becomes single spaces; control, formatting and stacked combining characters are dropped;
    what the font lacks becomes U+FFFD.
    """
    text = unicodedata.normalize("NFC", text[:_MOST_CHARACTERS])
    text = " ".join(text.split())
    font = get_font(_font_file(bold))
    drawn = []
    for character in text:
        category = unicodedata.category(character)
        if category in ("Cc", "Cf", "Mn", "Me"):
            continue
        # Each character outside the font would be a warning and an empty box.
        known = category != "Cs" and font.get_char_index(ord(character)) != 0
        drawn.append(character if known else _REPLACEMENT)
    return " ".join("".join(drawn).split())


def text_width(text: str, size: float, *, bold: bool = False) -> float:
    """Return the width of one line of `text`, in pixels, at `size` pixels."""
    return float(_renderer().get_text_width_height_descent(text, font(size, bold=bold), False)[0])


def shorten(text: str, width: float, size: float, *, bold: bool = False) -> str:
    """Return `plain(text)`, cut to `width` pixels with an ellipsis where it is longer."""
    line = plain(text, bold=bold)
    if len(text) <= _MOST_CHARACTERS and text_width(line, size, bold=bold) <= width:
        return line
    low, high = 0, len(line)
    while low < high:
        middle = (low + high + 1) // 2
        fits = text_width(line[:middle].rstrip() + "…", size, bold=bold) <= width
        low, high = (middle, high) if fits else (low, middle - 1)
    return line[:low].rstrip() + "…"


def wrap(text: str, width: float, size: float, *, max_lines: int = 2) -> list[str]:
    """Return `plain(text)` broken into at most `max_lines` lines of `width` pixels, the last one shortened."""
    words = plain(text).split(" ")
    lines: list[str] = []
    while words and len(lines) < max_lines - 1:
        count = 1
        while count < len(words) and text_width(" ".join(words[: count + 1]), size) <= width:
            count += 1
        lines.append(shorten(" ".join(words[:count]), width, size))
        words = words[count:]
    return [*lines, shorten(" ".join(words), width, size)] if words else lines


def font(size: float, *, bold: bool = False) -> FontProperties:
    """Return the DejaVu Sans that ships with matplotlib, so that every machine draws the same."""
    return FontProperties(fname=_font_file(bold), size=size * _POINTS_PER_PIXEL)


class Sheet:
    """A white sheet, laid out in pixels from the top left corner.

    Args:
        width: Pixels.
        height: Pixels.
    """

    def __init__(self, width: int, height: int) -> None:
        self.width = width
        self.height = height
        self.figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor=PAPER)

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: float = 20,
        colour: str = INK,
        bold: bool = False,
        align: str = "left",
        width: float | None = None,
    ) -> None:
        """Write one line with its baseline at `y`, shortened to `width` where it is given."""
        line = plain(text, bold=bold) if width is None else shorten(text, width, size, bold=bold)
        self.figure.text(
            x / self.width,
            1 - y / self.height,
            line,
            color=colour,
            fontproperties=font(size, bold=bold),
            ha=align,
            va="baseline",
            parse_math=False,
            usetex=False,
        )

    def image(self, image: Image.Image, x: int, y: int, side: int) -> None:
        """Place the middle square of an image, `side` pixels wide, its corners rounded."""
        square = ImageOps.fit(image.convert("RGB"), (side, side), Image.Resampling.BICUBIC)
        square.putalpha(_rounded(side, max(side // 16, 3)))
        self.figure.figimage(np.asarray(square), x, self.height - y - side, origin="upper")

    def images(self, images: Sequence[Image.Image], x: int, y: int, side: int, *, columns: int, gap: int) -> None:
        """Place images in rows of `columns`."""
        for index, image in enumerate(images):
            row, column = divmod(index, columns)
            self.image(image, x + column * (side + gap), y + row * (side + gap), side)

    def dot(self, x: float, y: float, colour: str, *, radius: float = 8) -> None:
        """Draw a disc around (x, y)."""
        self._add(Circle((x, self.height - y), radius, color=colour, lw=0))

    def rule(self, x: float, y: float, width: float) -> None:
        """Draw a hairline."""
        self._add(Rectangle((x, self.height - y), width, 1.5, color=RULE, lw=0))

    def dotted(self, x: float, y: float, width: float) -> None:
        """Draw a dotted line, as in the key of a plot."""
        line = Line2D((x, x + width), (self.height - y,) * 2, color=SOFT, linewidth=2, linestyle=(0, (1, 2)))
        line.set_transform(None)
        self.figure.add_artist(line)

    def share_bar(self, x: float, y: float, width: float, shares: Sequence[float], *, height: float = 14) -> None:
        """Draw shares as one bar of coloured parts; what is above zero never vanishes."""
        self._box(x, y, width, height, RULE, height / 2)
        lengths = {index: max(width * share, 4.0) for index, share in enumerate(shares) if share > 0}
        scale = min(width / max(sum(lengths.values()), 1.0), 1.0)
        edges = [x]
        for length in lengths.values():
            edges.append(edges[-1] + length * scale)
        clip = self._box(x, y, width, height, "none", height / 2)
        for index, left, right in zip(lengths, edges[:-1], edges[1:], strict=True):
            part = Rectangle((left, self.height - y - height), right - left, height, color=colour_of(index), lw=0)
            self._add(part)
            part.set_clip_path(clip)
        for edge in edges[1:-1]:
            self._add(Rectangle((edge - 1, self.height - y - height), 2, height, color=PAPER, lw=0))

    def axes(self, x: float, y: float, width: float, height: float) -> Axes:
        """Return axes whose plotting area has its top left corner at (x, y): two quiet spines, a light grid."""
        bounds = (x / self.width, 1 - (y + height) / self.height, width / self.width, height / self.height)
        axes = self.figure.add_axes(bounds, facecolor="none")
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.spines["bottom"].set(color=SOFT, linewidth=1.2)
        axes.tick_params(which="both", length=0, pad=8, labelcolor=SOFT)
        axes.grid(axis="y", color=RULE, linewidth=1.0)
        axes.set_axisbelow(True)
        return axes

    def save(self, path: Path) -> Path:
        """Write a PNG, atomically, and return its path; the same sheet gives the same bytes."""
        save_image(path, self._draw)
        return path

    def png(self, *, dark: bool = False) -> bytes:
        """Return it as a PNG; on dark paper from then on if asked for."""
        if dark:
            self._darken()
        stream = io.BytesIO()
        self._draw(stream)
        return stream.getvalue()

    def _draw(self, target: Path | io.BytesIO) -> None:
        paper = self.figure.get_facecolor()
        self.figure.savefig(
            target, format="png", dpi=DPI, facecolor=paper, bbox_inches=None, metadata={"Software": None}
        )

    def _darken(self) -> None:
        """Replace ink, rules and paper by those of `DARK`; colours that stand for something stay."""
        dark = {to_rgb(light): colour for light, colour in DARK.items()}
        for artist in self.figure.findobj(lambda artist: isinstance(artist, Text | Line2D | Patch)):
            for name in ("color", "markeredgecolor", "markerfacecolor", "facecolor", "edgecolor"):
                if isinstance(artist, Patch) and name == "color":
                    continue
                colour = getattr(artist, f"get_{name}", lambda: "none")()
                if not (isinstance(colour, str) and colour in ("none", "auto")) and to_rgba(colour)[3] > 0:
                    replaced = dark.get(to_rgb(colour))
                    if replaced:
                        getattr(artist, f"set_{name}")(replaced)

    def _box(self, x: float, y: float, width: float, height: float, colour: str, radius: float) -> FancyBboxPatch:
        style = f"round,pad=0,rounding_size={radius}"
        box = FancyBboxPatch((x, self.height - y - height), width, height, boxstyle=style, color=colour, lw=0)
        self._add(box)
        return box

    def _add(self, patch: Patch) -> None:
        patch.set_transform(None)  # pixels, whose origin is the bottom left corner
        self.figure.add_artist(patch)


def ticks(axes: Axes, axis: str, positions: Sequence[float], labels: Sequence[str], *, size: float = 18) -> None:
    """Set the ticks of one axis ("x" or "y") in this style."""
    chosen = axes.xaxis if axis == "x" else axes.yaxis
    chosen.set_ticks(positions, labels, fontproperties=font(size), parse_math=False, usetex=False)
    chosen.set_ticks([], minor=True)


def number(value: float) -> str:
    """Return a tick label with a true minus sign."""
    return f"{value:g}".replace("-", "−")


def _font_file(bold: bool) -> str:
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return str(Path(matplotlib.get_data_path(), "fonts", "ttf", name))


@lru_cache(maxsize=1)
def _renderer() -> RendererAgg:
    return RendererAgg(16, 16, DPI)


@lru_cache(maxsize=16)
def _rounded(side: int, radius: int) -> Image.Image:
    """Return a mask of a square with rounded corners, drawn large for a smooth edge."""
    mask = Image.new("L", (4 * side, 4 * side), 0)
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, 4 * side - 1, 4 * side - 1), 4 * radius, fill=255)
    return mask.resize((side, side), Image.Resampling.LANCZOS)
