"""Decode an image file to upright RGB, or say in one line why it cannot be read."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import DataError

_DECODING_ERRORS = (
    OSError,
    SyntaxError,  # Pillow's word for a broken PNG
    ValueError,
    TypeError,
    IndexError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class UnreadableImage(DataError):  # noqa: N818
    """One image is missing, empty, cut short or in no known format."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"Could not read the image {name}: {reason}. Replace the file or remove its row.")
        self.name, self.reason = name, reason


def read_image(path: Path) -> Image.Image:
    """Decode a file as `decode_image` does, or raise `UnreadableImage`."""
    return decode_image(path.read_bytes, str(path))


def decode_image(read: Callable[[], bytes], name: str) -> Image.Image:
    """Decode the bytes that `read` gives to upright RGB, transparency on white, 16 bits scaled to 8.

    Raises:
        UnreadableImage: `read` raises an `OSError`, or the bytes are no whole image; `name` is that of the image.
    """
    try:
        data = read()
        if not data:
            raise ValueError("the file is empty")
        with Image.open(io.BytesIO(data)) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode == "F":
                raise ValueError("floating point pixels have no known range")
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
