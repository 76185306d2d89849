"""Captioned images from a folder, parquet files, the hub or memory: one lazy view of them all."""

from __future__ import annotations

import hashlib
import io
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import DataError
from ..files import is_inside
from .sources import Source, columns_of, find_column, folder_of, listed

CAPTION_COLUMNS = ("text", "caption", "prompt")

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
_CHUNK = 1 << 20


class UnreadableImage(DataError):  # noqa: N818
    """One image is missing, empty, cut short or in no known format."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"Could not read the image {name}: {reason}. Replace the file or remove its row.")
        self.name = name
        self.reason = reason


@dataclass(frozen=True, eq=False)
class CaptionedImages:
    """Images with captions, decoded on demand; a set of any size fits in memory.

    Made by `load_captioned_images`.
    """

    captions: list[str]
    """One caption per image."""
    names: list[str]
    """The file name of each image, or "row 17" where it has none."""
    attributes: dict[str, list[Any]]
    """All further columns, one value per image. For evaluation only: audit and training never read them."""
    max_unreadable: float
    """The share of images, from 0 to 1, that may turn out to be unreadable before work stops."""
    _cells: Sequence[Any] = field(repr=False)
    folder: Path | None = None
    """Where the images' files belong: the folder opened, or the cache of the hub; None where none is known."""

    def __len__(self) -> int:
        return len(self.captions)

    def image(self, index: int) -> Image.Image:
        """Return an image as upright RGB; what is transparent becomes white.

        Raises:
            UnreadableImage: The image is missing, empty, cut short or in no known format.
        """
        name = self.names[index]
        try:
            data = b"".join(_chunks(self._cells[index]))
        except OSError as error:
            raise UnreadableImage(name, _reason(error)) from error
        return decode_image(data, name)

    def is_own(self, index: int) -> bool:
        """Whether an image is part of the data itself: held by it, or a file that truly lies in its folder.

        Data may name files elsewhere, by links or by the paths in parquet files. They are good to train on; but what
        is passed on to others, such as a report, should not show a file that only a name brought in.
        """
        cell = self._cells[index]
        return not isinstance(cell, Path) or (self.folder is not None and is_inside(cell, self.folder))

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that depend on the captions and the images' bytes, in order, and on nothing else."""
        digest = hashlib.sha256()
        for caption, cell in zip(self.captions, self._cells, strict=True):
            digest.update(hashlib.sha256(caption.encode("utf-8", "surrogatepass")).digest())
            try:
                content = hashlib.sha256()
                for chunk in _chunks(cell):
                    content.update(chunk)
                digest.update(content.digest())
            except OSError:
                digest.update(b"unreadable")
        return digest.hexdigest()[:16]

    def select(self, indices: Iterable[int]) -> CaptionedImages:
        """Return the images at `indices`, in that order; names stay as they were."""
        rows = [int(index) for index in indices]
        return CaptionedImages(
            captions=[self.captions[row] for row in rows],
            names=[self.names[row] for row in rows],
            attributes={name: [values[row] for row in rows] for name, values in self.attributes.items()},
            max_unreadable=self.max_unreadable,
            _cells=_Selection(self._cells, rows),
            folder=self.folder,
        )


def load_captioned_images(
    source: Source,
    *,
    image_column: str | None = None,
    caption_column: str | None = None,
    captions: bool = True,
    split: str = "train",
    max_unreadable: float = 0.01,
    limit: int | None = None,
) -> CaptionedImages:
    """Open captioned images without decoding them.

    Args:
        source: A folder with metadata.csv or metadata.jsonl (columns `file_name` and `text`; paths are
            relative to the folder), a parquet file or a folder of them, a hub dataset id, or a dataset in
            memory.
        image_column: The column of images, or of file names for a folder with metadata. Unless given:
            `file_name` for such a folder, else `image`, `img` or the only column of images.
        caption_column: The column of captions; `text`, `caption` or `prompt` unless given. For a class-conditional
            model, the column of class names or numbers.
        captions: False, for an unconditional model, reads none: every caption is empty, and a folder needs no
            metadata file.
        split: The split of a hub dataset or of parquet files; for a folder without metadata of its own, the
            sub-folder that has it.
        max_unreadable: The share of images, from 0 to 1, that may be unreadable before encoding stops.
        limit: Take the first `limit` rows only.

    Raises:
        DataError: The source is absent or has no rows, images or captions where they were expected.
    """
    if not 0 <= max_unreadable <= 1:
        raise DataError(f"Expected max_unreadable between 0 and 1, got {max_unreadable!r}.")
    if limit is not None and limit < 1:
        raise DataError(f"Expected a limit of at least 1, got {limit!r}.")

    if not captions and caption_column is not None:
        raise DataError(
            f"Expected no caption_column with captions=False, got {caption_column!r}. Leave one of them out."
        )
    where = "the dataset" if isinstance(source, datasets.Dataset | datasets.DatasetDict) else str(source)
    cells, names, others = columns_of(source, image_column, split, limit, metadata=captions)
    folder = folder_of(source)
    if not captions:
        return CaptionedImages([""] * len(names), names, others, max_unreadable, cells, folder)
    caption_name = find_column(caption_column, CAPTION_COLUMNS, list(others), "caption_column", where)
    texts = others.pop(caption_name)
    if not texts:
        raise DataError(f"Expected captioned images in {where}, found no rows.")
    empty = [name for name, text in zip(names, texts, strict=True) if not (isinstance(text, str) and text.strip())]
    if empty:
        raise DataError(
            f"Expected a caption for every image in {where}, found none in column {caption_name!r} for "
            f"{len(empty)} of {len(names)}: {listed(empty)}. Write captions for them or remove their rows."
        )
    halves = [name for name, text in zip(names, texts, strict=True) if _has_half_a_character(text)]
    if halves:
        raise DataError(
            f"Expected captions of whole characters in {where}, found half of one (a lone surrogate) in those of "
            f"{len(halves)} of {len(names)}: {listed(halves)}. Write these captions again."
        )
    return CaptionedImages(texts, names, others, max_unreadable, cells, folder)


def _has_half_a_character(text: str) -> bool:
    """Whether text holds what no file of UTF-8 and no tokenizer can: half of a pair of surrogates."""
    return not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text)


def decode_image(data: bytes, name: str) -> Image.Image:
    """Decode a file's bytes to upright RGB, transparency on white, 16 bits scaled to 8.

    Raises:
        UnreadableImage: The bytes are empty, cut short or in no known format.
    """
    if not data:
        raise UnreadableImage(name, "the file is empty")
    try:
        with Image.open(io.BytesIO(data)) as file:
            return _to_rgb(ImageOps.exif_transpose(file))
    except _DECODING_ERRORS as error:
        raise UnreadableImage(name, _reason(error)) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating point pixels have no known range")
    if image.mode.startswith("I"):  # Pillow's convert("RGB") would clip 16 bits to white
        scaled = np.asarray(image).clip(0, 65535).astype(np.float64) / 257
        return Image.fromarray(scaled.round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "the file does not exist"
    if isinstance(error, UnidentifiedImageError):
        return "not an image in a known format"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def _chunks(cell: Any) -> Iterator[bytes]:
    """Yield the bytes of one image, whichever way a data set stores it."""
    if isinstance(cell, bytes):
        yield cell
    elif isinstance(cell, Path):
        with cell.open("rb") as file:
            while chunk := file.read(_CHUNK):
                yield chunk
    else:
        raise OSError("the row holds no image")


class _Selection(Sequence[Any]):
    def __init__(self, cells: Sequence[Any], rows: list[int]) -> None:
        self.cells, self.rows = cells, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.cells[self.rows[index]]
