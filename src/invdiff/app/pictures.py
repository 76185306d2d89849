"""Images as files that galleries show, each written once."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections import OrderedDict
from functools import partial
from pathlib import Path

from PIL import Image, ImageDraw

from ..files import save_image
from ..report.theme import INK, RULE

MOST_FILES = 4096
"""Older ones are written again when they are shown again."""
_FRAME = 12
"""Width of the frame of a marked image, in 256ths of its side."""


class Pictures:
    """Writes images as PNG into a folder that lives as long as the page, named after what they show."""

    def __init__(self, folder: Path | None = None, *, most: int = MOST_FILES) -> None:
        # Below gradio's own folder, which `own_files` removes at the end.
        self.folder = folder or Path(tempfile.mkdtemp(prefix="shown-", dir=os.environ.get("GRADIO_TEMP_DIR")))
        self._most = most
        self._known: OrderedDict[str, Path] = OrderedDict()

    def path(self, image: Image.Image) -> str:
        """Return the file of an image."""
        digest = hashlib.sha256(f"{image.mode} {image.size} ".encode() + image.tobytes()).hexdigest()[:32]
        path = self.folder / f"{digest}.png"
        if digest not in self._known or not path.is_file():
            save_image(path, partial(image.save, format="PNG"))
        self._known[digest] = path
        self._known.move_to_end(digest)
        while len(self._known) > self._most:
            self._known.popitem(last=False)[1].unlink(missing_ok=True)
        return str(path)


def framed(image: Image.Image, colour: str) -> Image.Image:
    """Return a copy with a frame, to mark it."""
    image = image.convert("RGB")
    width = max(2, _FRAME * min(image.size) // 256)
    ImageDraw.Draw(image).rectangle((0, 0, image.width - 1, image.height - 1), outline=colour, width=width)
    return image


def nothing_to_show(side: int) -> Image.Image:
    """Return a tile that stands for an image that cannot be shown: crossed out."""
    tile = Image.new("RGB", (side, side), RULE)
    draw = ImageDraw.Draw(tile)
    for start, end in (((0, 0), (side, side)), ((0, side), (side, 0))):
        draw.line((*start, *end), fill=INK, width=max(1, side // 64))
    return tile
