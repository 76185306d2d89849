"""Captioned images from a folder, parquet files, the hub or memory: one lazy view of them all."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

from ..errors import DataError
from ..files import is_inside
from .images import UnreadableImage, decode_image, reason_of
from .sources import Source, columns_of, find_column, listed

CAPTION_COLUMNS = ("text", "caption", "prompt")

_CHUNK = 1 << 20


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
        """Decode an image as upright RGB, transparency on white.

        Raises:
            UnreadableImage: The image is missing, empty, cut short or in no known format.
        """
        name = self.names[index]
        try:
            data = b"".join(_chunks(self._cells[index]))
        except OSError as error:
            raise UnreadableImage(name, reason_of(error)) from error
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
        """The images at `indices`, in that order; names stay as they were."""
        rows = [int(index) for index in indices]
        return CaptionedImages(
            captions=[self.captions[row] for row in rows],
            names=[self.names[row] for row in rows],
            attributes={name: [values[row] for row in rows] for name, values in self.attributes.items()},
            max_unreadable=self.max_unreadable,
            _cells=_Selection(self._cells, rows),
            folder=self.folder,
        )


def readable_images(data: CaptionedImages, label: str, *, progress: bool) -> Iterator[tuple[int, Image.Image]]:
    """Yield row and image of each image that can be read, under a progress bar called `label`.

    Raises:
        DataError: More images are unreadable than `data.max_unreadable` allows, or all are.
    """
    from ..progress import progress_bar  # imports torch, which opening data does without

    skipped: list[tuple[str, str]] = []
    with progress_bar(label, len(data), enabled=progress) as bar:
        for row in range(len(data)):
            bar.advance()
            try:
                image = data.image(row)
            except UnreadableImage as error:
                skipped.append((error.name, error.reason))
                check_readable(data, skipped)
            else:
                yield row, image


def check_readable(data: CaptionedImages, skipped: Sequence[tuple[str, str]]) -> None:
    """Raise `DataError` where more images, given by name and reason, could not be read than `data` allows, or all."""
    if len(skipped) > data.max_unreadable * len(data) or len(skipped) == len(data):
        first = [f"{name} ({reason})" for name, reason in skipped[:5]]
        raise DataError(
            f"Expected at most {data.max_unreadable:.1%} of {len(data)} images to be unreadable, found "
            f"{len(skipped)} ({len(skipped) / len(data):.1%}) so far: {', '.join(first)}. "
            "Repair them, remove their rows, or raise max_unreadable."
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
    cells, names, others, folder = columns_of(source, image_column, split, limit, metadata=captions)
    if not captions:
        return CaptionedImages([""] * len(names), names, others, max_unreadable, cells, folder)
    column = find_column(caption_column, CAPTION_COLUMNS, list(others), "caption_column", where)
    texts = others.pop(column)
    if not texts:
        raise DataError(f"Expected captioned images in {where}, found no rows.")
    empty = [name for name, text in zip(names, texts, strict=True) if not (isinstance(text, str) and text.strip())]
    if empty:
        raise DataError(
            f"Expected a caption for every image in {where}, found none in column {column!r} for "
            f"{len(empty)} of {len(names)}: {listed(empty)}. Write captions for them or remove their rows."
        )
    # Half of a pair of surrogates: no file of UTF-8 and no tokenizer can hold it.
    halves = [
        name
        for name, text in zip(names, texts, strict=True)
        if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text)
    ]
    if halves:
        raise DataError(
            f"Expected captions of whole characters in {where}, found half of one (a lone surrogate) in those of "
            f"{len(halves)} of {len(names)}: {listed(halves)}. Write these captions again."
        )
    return CaptionedImages(texts, names, others, max_unreadable, cells, folder)


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
