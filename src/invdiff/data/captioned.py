"""Captioned images from a folder, parquet files, the hub or memory: one lazy view of them all."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import pyarrow.parquet
from datasets.data_files import DataFilesDict, get_data_patterns
from datasets.exceptions import DatasetsError
from PIL import Image

from ..errors import ConfigError, DataError, first_line
from ..files import held, is_inside, visible
from ..text import is_unicode, listed
from .images import UnreadableImage, about_unreadable, decode_image
from .tables import METADATA, caption_of, image_name, read_table

CAPTION_COLUMNS = ("text", "caption", "prompt")
IMAGE_COLUMNS = ("image", "img")
SPLITS = {"train", "test", "validation", "valid", "val", "dev", "eval"}
_LOADING_ERRORS = (OSError, ValueError, RuntimeError, DatasetsError)

Source: TypeAlias = str | Path | datasets.Dataset | datasets.DatasetDict


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
    _cell: Callable[[int], Any] = field(repr=False)
    """From a row to the bytes or the path of its image."""
    folder: Path | None = None
    """Where the images' files belong: the folder opened, or the cache of the hub; None where none is known."""
    homes: frozenset[Path] = frozenset()
    """The folders that its images' files lie in; with `takes_all`, the one that everything below is read of."""
    takes_all: bool = False
    """Whether any image, or parquet file, below its folder is data, by whatever it was written."""
    others: dict[str, str] = field(default_factory=dict)
    """Columns that hold several values a row, such as lists or embeddings, and their types: no attributes."""
    _rows: Sequence[int] | None = field(default=None, repr=False)
    """The row of each image; all of them, in order, where it is None."""

    def __len__(self) -> int:
        return len(self.captions)

    def __repr__(self) -> str:
        captions = len(set(self.captions))
        return f"CaptionedImages({len(self):,} images, {captions:,} captions; attributes: {known_columns(self)})"

    def image(self, index: int) -> Image.Image:
        """Decode an image as upright RGB, transparency on white; `UnreadableImage` where it cannot be."""
        return decode_image(lambda: self._bytes(index), self.names[index])

    def is_own(self, index: int) -> bool:
        """Whether an image is held by the data itself, or a file that truly lies in its folder.

        Files elsewhere, named by links or in parquet, may be trained on, but not be shown to others, as in a report.
        """
        stored = self._stored(index)
        return not isinstance(stored, Path) or (self.folder is not None and is_inside(stored, self.folder))

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that depend on the captions and the images' bytes, in order, and on nothing else."""
        digest = hashlib.sha256()
        for index, caption in enumerate(self.captions):
            digest.update(hashlib.sha256(caption.encode("utf-8", "surrogatepass")).digest())
            try:
                digest.update(hashlib.sha256(self._bytes(index)).digest())
            except OSError:
                digest.update(b"unreadable")
        return digest.hexdigest()[:16]

    def select(self, indices: Iterable[int]) -> CaptionedImages:
        """The images at `indices`, in that order; names stay as they were."""
        chosen = [int(index) for index in indices]
        return replace(
            self,
            captions=[self.captions[index] for index in chosen],
            names=[self.names[index] for index in chosen],
            attributes={name: [values[index] for index in chosen] for name, values in self.attributes.items()},
            _rows=chosen if self._rows is None else [self._rows[index] for index in chosen],
        )

    def _stored(self, index: int) -> Any:
        return self._cell(index if self._rows is None else self._rows[index])

    def _bytes(self, index: int) -> bytes:
        stored = self._stored(index)
        if isinstance(stored, Path):
            return stored.read_bytes()
        if not isinstance(stored, bytes):
            raise OSError("the row holds no image")
        return stored


def known_columns(data: CaptionedImages) -> str:
    """The attributes there are, and columns that are none with their types, for messages."""
    lists = [f"{name} (several values a row, {kind})" for name, kind in data.others.items()]
    return ", ".join([*data.attributes, *lists]) or "none"


def readable_images(
    data: CaptionedImages, label: str, *, progress: bool, unreadable: dict[str, str] | None = None
) -> Iterator[tuple[int, Image.Image]]:
    """Yield row and image of each image that can be read, under a progress bar called `label`.

    The others are named on the terminal, and added to `unreadable`, name to reason; `check_readable` holds.
    """
    from ..progress import note, progress_bar  # imports torch, which opening data does without

    skipped = {} if unreadable is None else unreadable
    with progress_bar(label, len(data), enabled=progress) as bar:
        for row in range(len(data)):
            bar.advance()
            try:
                image = data.image(row)
            except UnreadableImage as error:
                skipped[error.name] = error.reason
                check_readable(data, skipped)
            else:
                yield row, image
    if skipped:
        note(about_unreadable(skipped, len(data)))


def check_readable(data: CaptionedImages, skipped: Mapping[str, str]) -> None:
    """Raise `DataError` where more images, given as name to reason, could not be read than `data` allows, or all."""
    if len(skipped) > data.max_unreadable * len(data) or len(skipped) == len(data):
        first = [f"{name} ({reason})" for name, reason in list(skipped.items())[:5]]
        raise DataError(
            f"Expected at most {data.max_unreadable:.1%} of {len(data)} images to be unreadable, found {len(skipped)} "
            f"({len(skipped) / len(data):.1%}): {', '.join(first)}. Repair them, or raise max_unreadable."
        )


def refuse_output(data: CaptionedImages, output: Path) -> None:
    """Raise `ConfigError` where files written to the folder `output` would be read as images, or lie among them."""
    place = Path(os.path.realpath(output))
    for home in map(os.path.realpath, data.homes):
        if place == Path(home) or (data.takes_all and place.is_relative_to(home)):
            raise ConfigError(
                f"Expected a folder to write to outside the data, got {output}: what is written there would be read "
                f"as data, or lie among the images in {home}. Choose another --output."
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
            relative to the folder), a parquet file or a folder of them, a folder that `save_to_disk` wrote, a hub
            dataset id, or a dataset in memory.
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
        raise DataError(f"Expected no caption_column with captions=False, got {caption_column!r}. Leave one out.")
    where = "the dataset" if isinstance(source, datasets.Dataset | datasets.DatasetDict) else str(source)
    opened = replace(_open(source, image_column, split, limit, captions), max_unreadable=max_unreadable)
    attributes, names = dict(opened.attributes), opened.names
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        found = f"{len(twice)} more than once: {listed(twice)}"
        raise DataError(f"Expected each image once in {where}, found {found}. Remove rows.")
    if not captions:
        return opened
    column = _column(caption_column, CAPTION_COLUMNS, [*attributes, *opened.others], "caption_column", where)
    if not names:
        raise DataError(f"Expected captioned images in {where}, found no rows.")
    texts: list[str] = []
    wrong = [f"{name} ({opened.others[column]})" for name in names] if column in opened.others else []
    for name, value in zip(names, attributes.pop(column, ()), strict=not wrong):
        try:
            texts.append("" if value is None or value != value else caption_of(value))
        except TypeError as error:
            wrong.append(f"{name} ({error})")
    if wrong:
        raise DataError(
            f"Expected text, or the number of a class, as the caption of every image in {where}, found another type "
            f"in column {column!r} for {len(wrong)} of {len(names)}: {listed(wrong)}. Write one caption for each."
        )
    # No file of UTF-8 and no tokenizer can hold half of a pair of surrogates.
    if wrong := [name for name, text in zip(names, texts, strict=True) if not (text.strip() and is_unicode(text))]:
        raise DataError(
            f"Expected a caption of whole characters for every image in {where}, found none, or half a character (a "
            f"lone surrogate), in column {column!r} for {len(wrong)} of {len(names)}: {listed(wrong)}. Write "
            "captions for them or remove their rows."
        )
    return replace(opened, captions=texts, attributes=attributes)


def _open(source: Source, image_column: str | None, split: str, limit: int | None, captions: bool) -> CaptionedImages:
    """Any source, its captions still among the attributes; without `captions`, a folder of images will do."""
    if isinstance(source, datasets.DatasetDict):
        if split not in source:
            raise DataError(f"Expected a split named {split!r}, found {listed(list(source))}. Pass split=... .")
        return _open_dataset(source[split], image_column, limit)
    if isinstance(source, datasets.Dataset):
        if split != str(source.split):
            _refuse_split(split, "one dataset")
        return _open_dataset(source, image_column, limit)
    path, text = Path(source).expanduser(), str(source)
    if path.is_file():
        _refuse_split(split, f"one file, {source}")
        return _open_dataset(_load_parquet([path], path, split), image_column, limit, path.parent)
    if path.is_dir():
        for folder in (path, path / split) if split == "train" else (path / split, path):
            found = [folder / name for name in METADATA if (folder / name).is_file()]
            if len(found) == 2:
                raise DataError(f"Expected one metadata file in {folder}, found both .csv and .jsonl. Remove one.")
            if found:
                if folder == path:
                    _refuse_split(split, f"{source}, whose {found[0].name} is of all its images")
                column = image_column or "file_name"
                table = read_table(found[0], required=(column,), limit=limit)
                given = zip(table.rows, table.places, strict=True)
                names = [image_name(row[column], folder, place, DataError) for row, place in given]
                others = {each: [row.get(each) for row in table.rows] for each in table.columns if each != column}
                places = [folder / name for name in names]
                homes = frozenset(place.parent for place in places)
                return CaptionedImages([""] * len(names), names, others, 0.0, places.__getitem__, path, homes)
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():  # as `save_to_disk` leaves them
            try:
                saved = datasets.load_from_disk(str(path))
            except _LOADING_ERRORS as error:
                told = first_line(error)
                raise DataError(f"Expected a saved dataset in {path}: {told}. Write it again.") from error
            opened = _open(saved, image_column, split, limit, captions)
            return replace(opened, folder=path, homes=frozenset([path]), takes_all=True)
        if files := visible(path, "**/*.parquet"):
            opened = _open_dataset(_load_parquet(files, path, split), image_column, limit, path)
            return replace(opened, homes=frozenset([path]), takes_all=True)
        if captions:
            wanted = f"Expected metadata.csv or metadata.jsonl (or parquet files) in {path}"
            if kind := held(path):
                raise DataError(f"{wanted}, found {kind}. Check the order: a model comes before data, an audit after.")
            example = "a metadata.csv of\n  file_name,text\n  0001.png,a photo of a waterbird"
            raise DataError(f"{wanted}, found neither. Write one, for example {example}")
        known = set(Image.registered_extensions())
        files = [file for file in visible(path, "**/*") if file.suffix.lower() in known and file.is_file()]
        folders = {file.relative_to(path).parts[0] if file.parent != path else "" for file in files}
        if split in folders and (split != "train" or folders <= SPLITS):  # else it may be a class
            return _open(path / split, image_column, "train", limit, captions)
        _refuse_split(split, f"{source}, which has no folder of this name")
        files = files[:limit]
        if not files:
            raise DataError(f"Expected images in {path}, found none. Give a folder of image files, or parquet files.")
        names = [file.relative_to(path).as_posix() for file in files]
        empty = [""] * len(names)
        return CaptionedImages(empty, names, {}, 0.0, files.__getitem__, path, frozenset([path]), takes_all=True)
    if path.is_absolute() or text.startswith((".", "~")) or text.count("/") > 1 or text.endswith(".parquet"):
        raise DataError(f"Expected a folder or a parquet file at {source}, found nothing there. Check the path.")
    try:
        dataset = datasets.load_dataset(text, split=split)
    except _LOADING_ERRORS as error:
        raise DataError(
            f"{source} is neither an existing local path nor a reachable hub dataset with a split {split!r}: "
            f"{first_line(error).rstrip('.')}. Check the spelling, the network and, if private, `hf auth login`."
        ) from error
    return _open_dataset(dataset, image_column, limit)


def _refuse_split(split: str, what: str) -> None:
    """Raise `DataError` where a split is asked for of what has none."""
    if split != "train":
        raise DataError(f"Expected no split of {what}, got {split!r}. Leave it out, or give the folder of that split.")


def _load_parquet(files: list[Path], source: Path, split: str) -> datasets.Dataset:
    for file in files:
        try:
            pyarrow.parquet.read_metadata(file)
        except (OSError, ValueError) as error:
            told = first_line(error)
            raise DataError(f"Expected a parquet file at {file}, found another ({told}). Write it again.") from error
    by_split: dict[str, list[str]] = {}
    if source.is_dir():  # splits by the names of files, as datasets reads them
        known = DataFilesDict.from_patterns(get_data_patterns(str(source)), base_path=str(source))
        by_split = {str(name): list(paths) for name, paths in known.filter(extensions=[".parquet"]).items() if paths}
        used = {Path(path).resolve() for paths in by_split.values() for path in paths}
        if by_split and (left := [file.name for file in files if file.resolve() not in used]):
            raise DataError(
                f"Expected a split in the names of all parquet files of {source}, or of none, found some "
                f"({', '.join(by_split)}), and none in {listed(left)}. Rename these, or move them away."
            )
    try:
        return datasets.load_dataset("parquet", split=split, data_files=by_split or {"train": list(map(str, files))})
    except _LOADING_ERRORS as error:
        told = first_line(error)
        raise DataError(f"Expected parquet files of one kind with a split {split!r} in {source}: {told}") from error


def _open_dataset(
    dataset: datasets.Dataset, image_column: str | None, limit: int | None, folder: Path | None = None
) -> CaptionedImages:
    """The rows of a dataset whose files lie in `folder`, or else in the cache of the hub or wherever they say."""
    dataset = dataset.with_format(None)
    if limit is not None:
        dataset = dataset.select(range(min(limit, len(dataset))))
    features = dataset.features
    of_images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    candidates = (*IMAGE_COLUMNS, *(of_images if len(of_images) == 1 else ()))
    column = _column(image_column, candidates, list(features), "image_column", "the dataset")
    if column in of_images:
        dataset = dataset.cast_column(column, datasets.Image(decode=False))
    attributes: dict[str, list[Any]] = {}
    others = {name: str(feature) for name, feature in features.items() if name != column}
    for name, feature in features.items():
        if name in others and isinstance(feature, datasets.Value | datasets.ClassLabel):
            del others[name]
            values = list(dataset[name])
            if isinstance(feature, datasets.ClassLabel):
                values = [None if value is None or value < 0 else feature.int2str(value) for value in values]
            attributes[name] = values
    names = [f"row {row}" for row in range(len(dataset))]
    if getattr(features[column], "dtype", None) in ("string", "large_string"):
        paths = (path and path.replace("\\", "/") for path in dataset[column])
        names = [path or name for name, path in zip(names, paths, strict=True)]
    cell = partial(_dataset_cell, dataset.select_columns([column]), folder or Path())  # pickled, as a closure is not
    home = folder or Path(datasets.config.HF_CACHE_HOME)
    return CaptionedImages([""] * len(names), names, attributes, 0.0, cell, home, others=others)


def _dataset_cell(dataset: datasets.Dataset, root: Path, row: int) -> Any:
    (cell,) = dataset[int(row)].values()
    if isinstance(cell, dict):
        cell = cell.get("path") if cell.get("bytes") is None else cell["bytes"]
    return root / cell.replace("\\", "/") if isinstance(cell, str) else cell


def _column(wanted: str | None, candidates: Sequence[str], found: list[str], argument: str, where: str) -> str:
    """The wanted column, or the first candidate there is."""
    names = candidates if wanted is None else (wanted,)
    if column := next((name for name in names if name in found), ""):
        return column
    expected = f"a column of {argument.removesuffix('_column')}s named {' or '.join(names)}"
    raise DataError(f"Expected {expected} in {where}, found {listed(found)}. Rename it or pass {argument}=... .")
