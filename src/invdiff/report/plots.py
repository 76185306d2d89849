"""Pictures inside a report, as data URIs: plots on light and on dark paper, and small images."""

from __future__ import annotations

import base64
import io
from dataclasses import replace

from PIL import Image

from .audit_pictures import draw_histogram, is_rare
from .audit_reading import Page
from .charts import Area, Panel, line_chart, name_room
from .document import Plot, Thumb
from .style import SOFT, Sheet, number, shorten

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
