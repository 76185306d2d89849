"""Decode an image file to upright RGB, or say in one line why it cannot be read."""

from __future__ import annotations

import io
import struct
import zlib
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
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UnreadableImage(str(path), reason_of(error)) from error
    return decode_image(data, str(path))


def decode_image(data: bytes, name: str) -> Image.Image:
    """Decode a file's bytes to upright RGB, transparency on white, 16 bits scaled to 8, or raise `UnreadableImage`."""
    if not data:
        raise UnreadableImage(name, "the file is empty")
    try:
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
        raise UnreadableImage(name, reason_of(error)) from error


def reason_of(error: Exception) -> str:
    """A short reason, for messages, why reading an image failed."""
    if isinstance(error, FileNotFoundError):
        return "the file does not exist"
    if isinstance(error, UnidentifiedImageError):
        return "not an image in a known format"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
