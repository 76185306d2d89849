"""Decode an image file to upright RGB, or say in one line why it cannot be read."""

import io
import struct
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from ..errors import DataError
from ..text import listed, one_line

# No pixel depends on a PNG's texts and colour profile, such as workflows and edits, which Pillow refuses beyond 1 MB.
PngImagePlugin.MAX_TEXT_CHUNK = max(PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY)  # 64 MB

_DECODING_ERRORS = (
    *(OSError, ValueError, TypeError, IndexError, EOFError, struct.error, zlib.error, Image.DecompressionBombError),
    SyntaxError,  # Pillow's word for a broken PNG
)


class UnreadableImage(DataError):  # noqa: N818
    """One image is missing, empty, cut short or in no known format."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"Could not read the image {name}: {reason}. Replace the file or remove its row.")
        self.name, self.reason = name, reason


def about_unreadable(skipped: Mapping[str, str], total: int) -> str:
    """How many of `total` images were left out, given as name to reason, and the first of them, in a sentence."""
    shown = listed([f"{one_line(name, 80)} ({one_line(reason, 80)})" for name, reason in skipped.items()])
    verb = "is" if len(skipped) == 1 else "are"
    return f"{len(skipped):,} of {total:,} images could not be read and {verb} left out: {shown}."


def read_image(path: Path) -> Image.Image:
    """Decode a file as `decode_image` does, or raise `UnreadableImage`."""
    return decode_image(path.read_bytes, str(path))


def decode_image(read: Callable[[], bytes], name: str) -> Image.Image:
    """Decode the bytes that `read` gives to upright RGB, transparency on white, 16 bits scaled to 8.

    `UnreadableImage` with `name` where `read` raises an `OSError`, or the bytes are no whole image.
    """
    try:
        data = read()
        if not data:
            raise ValueError("the file is empty")
        with Image.open(io.BytesIO(data)) as file:
            file.load()
            Image.open(io.BytesIO(data)).verify()  # checksums of a PNG, which Pillow skips where it reads pixels
            try:
                image = ImageOps.exif_transpose(file)
            except _DECODING_ERRORS:  # only what is said about the pixels is damaged
                image = file
            if image.mode == "F" or (image.mode == "I" and file.format == "TIFF"):
                raise ValueError("pixels that are floating point or have a sign have no known range")
            if image.mode.startswith("I"):  # Pillow's convert("RGB") would clip 16 bits to white
                scaled = np.asarray(image).clip(0, 65535).astype(np.float64) / 257
                return Image.fromarray(scaled.round().astype(np.uint8)).convert("RGB")
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except _DECODING_ERRORS as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if isinstance(error, FileNotFoundError):
            reason = "the file does not exist"
        elif isinstance(error, UnidentifiedImageError):
            reason = "not an image in a known format"
        raise UnreadableImage(name, reason) from error
