"""Find the images and the other columns of a folder, parquet files, a hub id or a dataset in memory."""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple, TypeAlias

import datasets
import pyarrow.parquet
from datasets.data_files import DataFilesDict, get_data_patterns
from datasets.exceptions import DatasetsError
from PIL import Image

from ..errors import DataError, first_line
from .tables import read_table

IMAGE_COLUMNS = ("image", "img")
METADATA_EXAMPLE = "file_name,text\n  0001.png,a photo of a waterbird"

_LOADING_ERRORS = (OSError, ValueError, RuntimeError, DatasetsError)

Source: TypeAlias = str | Path | datasets.Dataset | datasets.DatasetDict


class Columns(NamedTuple):
    """A source, opened; no image is read yet."""

    cells: Sequence[Any]
    """The bytes or the path of each image."""
    names: list[str]
    """File names, or "row 17" where there is none."""
    others: dict[str, list[Any]]
    """All other columns."""
    folder: Path
    """Where the images' files belong: the source's folder, else the hub's cache."""


def columns_of(
    source: Source, image_column: str | None, split: str, limit: int | None, *, metadata: bool = True
) -> Columns:
    """Open any source that `load_captioned_images` takes, reading no image.

    Without need of `metadata`, a folder of nothing but images will do.

    Raises:
        DataError: There is no such source, or it has no images where they were expected.
    """
    cache = Path(datasets.config.HF_CACHE_HOME)
    if isinstance(source, datasets.DatasetDict):
        if split not in source:
            raise DataError(f"Expected a split named {split!r}, found {listed(list(source))}. Pass split=... .")
        source = source[split]
    if isinstance(source, datasets.Dataset):
        return _dataset_columns(source, image_column, limit, Path(), cache)
    path, text = Path(source).expanduser(), str(source)
    if path.is_file():
        folder = path.parent
        return _dataset_columns(_load_parquet([path], path, "train"), image_column, limit, folder, folder)
    if path.is_dir():
        for folder in (path, path / split):
            found = [folder / name for name in ("metadata.csv", "metadata.jsonl") if (folder / name).is_file()]
            if len(found) == 2:
                raise DataError(f"Expected one metadata file in {folder}, found both .csv and .jsonl. Remove one.")
            if found:
                return _folder_columns(found[0], image_column or "file_name", limit)._replace(folder=path)
        files = sorted(path.rglob("*.parquet"))
        if files:
            return _dataset_columns(_load_parquet(files, path, split), image_column, limit, path, path)
        if not metadata:
            return _plain_columns(path, limit)
        raise DataError(
            f"Expected metadata.csv or metadata.jsonl (or parquet files) in {path}, found neither. "
            f"Write one there, for example a metadata.csv of\n  {METADATA_EXAMPLE}"
        )
    if path.is_absolute() or text.startswith((".", "~")) or text.count("/") > 1 or text.endswith(".parquet"):
        raise DataError(f"Expected a folder or a parquet file at {source}, found nothing there. Check the path.")
    try:
        dataset = datasets.load_dataset(text, split=split)
    except _LOADING_ERRORS as error:
        raise DataError(
            f"{source} is neither an existing local path nor a reachable hub dataset with a split {split!r}: "
            f"{first_line(error)} Check the spelling, the network and, for a private set, `hf auth login`."
        ) from error
    return _dataset_columns(dataset, image_column, limit, Path(), cache)


def _folder_columns(table_file: Path, name_column: str, limit: int | None) -> Columns:
    table = read_table(table_file, required=(name_column,), limit=limit)
    names = []
    for row, values in enumerate(table.rows):
        given = values[name_column]
        if not isinstance(given, str) or not given:
            raise DataError(f"Expected a file name in {table.place(row)}, found {given!r}.")
        name = posixpath.normpath(given.replace("\\", "/"))
        if name == ".." or name.startswith(("../", "/")) or PureWindowsPath(name).drive:
            raise DataError(
                f"Expected file names inside {table_file.parent}, found {given!r} in {table.place(row)}. "
                "Move the image into the folder and give its path relative to it."
            )
        names.append(name)
    _check_unique(names, str(table_file))
    others = {column: [row.get(column) for row in table.rows] for column in table.columns if column != name_column}
    return Columns([table_file.parent / name for name in names], names, others, table_file.parent)


def _plain_columns(folder: Path, limit: int | None) -> Columns:
    suffixes = set(Image.registered_extensions())
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes and path.is_file())[:limit]
    if not files:
        raise DataError(f"Expected images in {folder}, found none. Give a folder of image files, or parquet files.")
    return Columns(files, [path.relative_to(folder).as_posix() for path in files], {}, folder)


def _load_parquet(files: list[Path], source: Path, split: str) -> datasets.Dataset:
    for file in files:
        try:
            pyarrow.parquet.read_metadata(file)
        except (OSError, ValueError) as error:
            raise DataError(
                f"Expected a parquet file at {file}, found something else ({first_line(error)}). "
                "Give a folder with metadata.csv, parquet files or a hub dataset id."
            ) from error
    by_split: dict[str, list[str]] = {}
    if source.is_dir():  # splits by the names of files, as datasets reads them; other files do not count
        known = DataFilesDict.from_patterns(get_data_patterns(str(source)), base_path=str(source))
        by_split = {str(name): list(paths) for name, paths in known.filter(extensions=[".parquet"]).items() if paths}
    try:
        return datasets.load_dataset("parquet", split=split, data_files=by_split or {"train": list(map(str, files))})
    except _LOADING_ERRORS as error:
        raise DataError(
            f"Expected parquet files of one kind with a split {split!r} in {source}: {first_line(error)}"
        ) from error


def _dataset_columns(
    dataset: datasets.Dataset, image_column: str | None, limit: int | None, root: Path, folder: Path
) -> Columns:
    """The columns of a dataset; paths in its image column are resolved against `root`."""
    dataset = dataset.with_format(None)
    if limit is not None:
        dataset = dataset.select(range(min(limit, len(dataset))))
    features = dataset.features
    of_images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    candidates = (*IMAGE_COLUMNS, *(of_images if len(of_images) == 1 else ()))
    column = find_column(image_column, candidates, list(features), "image_column", "the dataset")
    if column in of_images:
        dataset = dataset.cast_column(column, datasets.Image(decode=False))

    others: dict[str, list[Any]] = {}
    for name, feature in features.items():
        if name == column or not isinstance(feature, datasets.Value | datasets.ClassLabel):
            continue  # lists, embeddings and further images are not attributes
        values = list(dataset[name])
        if isinstance(feature, datasets.ClassLabel):
            values = [None if value is None or value < 0 else feature.int2str(value) for value in values]
        others[name] = values
    names = [f"row {row}" for row in range(len(dataset))]
    if getattr(features[column], "dtype", None) in ("string", "large_string"):
        names = [name if path is None else path for name, path in zip(names, dataset[column], strict=True)]
        _check_unique(names, "the dataset")
    return Columns(_DatasetCells(dataset.select_columns([column]), column, root), names, others, folder)


class _DatasetCells(Sequence[Any]):
    """The image column of a dataset, one cell at a time."""

    def __init__(self, dataset: datasets.Dataset, column: str, root: Path) -> None:
        self.dataset, self.column, self.root = dataset, column, root

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        cell = self.dataset[int(index)][self.column]
        if isinstance(cell, dict):
            cell = cell.get("path") if cell.get("bytes") is None else cell["bytes"]
        return self.root / cell if isinstance(cell, str) else cell


def _check_unique(names: list[str], where: str) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DataError(
            f"Expected each image once in {where}, found {len(twice)} named more than once: {listed(twice)}. "
            "Remove the extra rows."
        )


def find_column(wanted: str | None, candidates: Sequence[str], found: list[str], argument: str, where: str) -> str:
    """The wanted column, or the first candidate there is.

    Raises:
        DataError: There is none.
    """
    names = candidates if wanted is None else (wanted,)
    for name in names:
        if name in found:
            return name
    kind = argument.removesuffix("_column")
    raise DataError(
        f"Expected a column of {kind}s named {' or '.join(names)} in {where}, found {listed(found)}. "
        f"Rename it or pass {argument}=... ."
    )


def listed(values: Sequence[str], most: int = 5) -> str:
    """The first few values, joined for a message."""
    shown = ", ".join(map(str, values[:most])) or "nothing"
    return f"{shown} and {len(values) - most} more" if len(values) > most else shown
