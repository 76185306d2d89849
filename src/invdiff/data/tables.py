"""Read tables of images, `metadata.csv`, `metadata.jsonl` or a manifest, so strictly that no row is lost unseen.

Every fault is an error that names the file and the line. Cells have one spelling, whatever tool wrote them.
"""

import csv
import io
import json
import os
import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple, TypeAlias

from ..errors import DataError, InvDiffError
from ..files import is_inside
from ..text import label_of

METADATA = ("metadata.csv", "metadata.jsonl")  # names of the table that stands beside the images of a data set
MANIFESTS = ("manifest.jsonl", *METADATA[::-1])  # names of the table beside generated images, in order of preference

Required: TypeAlias = Sequence[str | tuple[str, ...]]
PlacedRows: TypeAlias = Iterator[tuple[str, dict[str, Any]]]


class Table(NamedTuple):
    """What a file holds, row by row."""

    columns: list[str]  # all columns, in order of first appearance
    rows: list[dict[str, Any]]  # column to value: text in CSV, any JSON value in JSONL, where rows may lack columns
    places: list[str]  # where each row begins, for messages, such as "line 3 of metadata.csv"


def read_table(
    path: Path,
    *,
    required: Required = (),
    limit: int | None = None,
    error: type[InvDiffError] = DataError,
) -> Table:
    """Rows of a CSV file (its name ends in .csv, the first line names the columns) or of a file of JSON lines.

    Each row must have the columns `required`, one of them where an entry has several names. What cannot be read is an
    `error` that names file and line.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
        if "\0" in text:
            line = text[: text.index("\0")].count("\n") + 1
            raise DataError(f"Expected text in line {line} of {path}, found a NUL byte. Save the file as UTF-8.")
        rows = (_csv_rows if path.suffix.lower() == ".csv" else _jsonl_rows)(text, path, required)
        placed = list(islice(rows, limit))
    except OSError as fault:
        raise error(f"Could not read {path}: {fault.strerror}.") from fault
    except UnicodeDecodeError as fault:
        line = fault.object.count(b"\n", 0, fault.start) + 1
        raise error(f"Expected UTF-8 in line {line} of {path}, found other bytes. Save the file as UTF-8.") from fault
    except DataError as fault:
        raise error(str(fault)) from fault
    if not placed:
        raise error(f"Expected at least one image in {path}, found no rows.")
    columns = list(dict.fromkeys(name for _, row in placed for name in row))
    return Table(columns, [row for _, row in placed], [place for place, _ in placed])


def image_name(given: Any, folder: Path, place: str, error: type[InvDiffError], *, links: bool = True) -> str:
    """The path of an image below its table's `folder`, with slashes, whatever system wrote the table.

    An `error` with `place` where it is no file name, or leads out of the folder, by a link too unless `links`.
    """
    if not isinstance(given, str) or not given or "\0" in given:
        raise error(f"Expected a file name in {place}, found {given!r}.")
    name = posixpath.normpath(given.replace("\\", "/"))
    for home in (os.path.abspath(folder), os.path.realpath(folder)):
        if Path(name).is_relative_to(home):
            name = Path(name).relative_to(home).as_posix()
    outside = name == ".." or name.startswith(("../", "/")) or PureWindowsPath(name).drive
    if outside or not (links or is_inside(folder / name, folder)):
        raise error(
            f"Expected file names inside {folder}, found {given!r} in {place}, which lies outside it. "
            "Copy the image into the folder (no link) and give its path relative to it."
        )
    return name


def caption_of(value: Any) -> str:
    """A caption or prompt: text as it is, a whole number (of a class) as text; `TypeError` for all else."""
    if isinstance(value, str):
        return value
    text = label_of(value)
    if isinstance(value, bool) or not re.fullmatch(r"-?\d+", text):
        raise TypeError(f"{type(value).__name__}: {str(value)[:60]}")
    return text


def labels_in(
    attribute: str, cells: Iterable[tuple[Any, str]], error: type[InvDiffError], known: dict[str, str] | None = None
) -> list[str]:
    """Class names of an attribute's cells, each given with its place; `known`, class to a place, grows by them.

    An `error` with places where a cell holds several values, such as a list, or true and false stand beside 0 and 1,
    and it is unknown whether they mean the same.
    """
    known, labels = {} if known is None else known, []
    for value, place in cells:
        try:
            labels.append(label_of(value))
        except TypeError as fault:
            raise error(f"Expected one class of {attribute!r} in {place}, found a {fault}. Write one name.") from fault
        known.setdefault(labels[-1], place)
    truths, digits = ([name for name in names if name in known] for names in (("True", "False"), ("0", "1")))
    if truths and digits:
        found = " and ".join(f"{name} in {known[name]}" for name in (truths[0], digits[0]))
        remedy = "Write all as 0 and 1, or all as True and False."
        raise error(f"Expected the classes of {attribute!r} in one spelling, found {found}. {remedy}")
    return labels


def _csv_rows(text: str, path: Path, required: Required) -> PlacedRows:
    csv.field_size_limit(max(csv.field_size_limit(), len(text) + 1))  # else cells of more than 128 KB are refused
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    columns, where = list[str](), f"line 1 of {path}"
    try:
        for cells in reader:
            if columns and cells:
                if len(cells) != len(columns):
                    remedy = 'Put text that holds a comma in double quotes: "a dog, sitting".'
                    raise DataError(f"Expected {len(columns)} cells in {where}, found {len(cells)}. {remedy}")
                yield where, dict(zip(columns, cells, strict=True))
            elif cells:
                columns = cells
                _check_columns(columns, where, required)
            where = f"line {reader.line_num + 1} of {path}"
    except csv.Error as fault:
        raise DataError(
            f"Expected a closing double quote for each quote that opens in the row of {where}, found none ({fault}). "
            'Close it, and write a quote inside the text twice: "a 5"" pipe".'
        ) from fault


def _jsonl_rows(text: str, path: Path, required: Required) -> PlacedRows:
    for line, written in enumerate(text.split("\n"), 1):  # text in JSON may hold other line breaks
        where = f"line {line} of {path}"

        def unique(pairs: list[tuple[str, Any]], where: str = where) -> dict[str, Any]:
            _check_columns([name for name, _ in pairs], where)
            return dict(pairs)

        if written.strip():
            try:
                row = json.loads(written, object_pairs_hook=unique)
            except (ValueError, RecursionError) as fault:
                raise DataError(f"Expected JSON in {where}, found {written[:60]!r} ({fault}).") from fault
            if not isinstance(row, dict):
                raise DataError(f"Expected a JSON object in {where}, found {written[:60]!r}.")
            _check_columns(row, where, required)
            yield where, row


def _check_columns(columns: Iterable[str], where: str, required: Required = ()) -> None:
    found = list(columns)
    if twice := [name for name, count in Counter(found).items() if count > 1]:
        raise DataError(f"Expected each column once in {where}, found {', '.join(twice)} more than once. Rename one.")
    for names in ((entry,) if isinstance(entry, str) else entry for entry in required):
        if not set(names) & set(found):
            told = f"found {', '.join(found) or 'nothing'}. Rename a column, or write what is missing."
            raise DataError(f"Expected a column {' or '.join(names)} in {where}, {told}")
