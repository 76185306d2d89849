"""Read tables of images, `metadata.csv`, `metadata.jsonl` or a manifest, so strictly that no row is lost unseen.

Every fault is an error that names the file and the line. `csv.reader` would take a quote that is never closed for the
start of one long cell and swallow the rows after it, and it refuses cells of more than 128 KB.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

from ..errors import DataError, InvDiffError

_CSV_CELL = re.compile(r'(?:"([^"]*(?:""[^"]*)*)"|([^",\r\n][^,\r\n]*)?)(,|\r\n?|\n|\Z)')
"""A quoted or a plain cell, then what ends it. Nothing of the kind starts where a quote is not closed."""
_LINE_END = re.compile(r"\r\n?|\n")

Required: TypeAlias = "Sequence[str | tuple[str, ...]]"
NumberedRows: TypeAlias = "Iterator[tuple[int, dict[str, Any]]]"


@dataclass(frozen=True)
class Table:
    """The rows of a file, each with the line it begins at."""

    path: Path
    columns: list[str]
    """All columns, in order of first appearance."""
    rows: list[dict[str, Any]]
    """Column to value: text in CSV, "" where a cell is empty; any JSON value in JSONL, where rows may lack columns."""
    lines: list[int]
    """The line of each row, from 1."""

    def place(self, row: int) -> str:
        """The place of a row for messages, such as "line 3 of metadata.csv"."""
        return f"line {self.lines[row]} of {self.path}"


def read_table(
    path: Path, *, required: Required = (), limit: int | None = None, error: type[InvDiffError] = DataError
) -> Table:
    """Read a CSV file (its name ends in .csv, the first line names the columns) or a file of one JSON object a line.

    Both are UTF-8, with or without a byte order mark; empty lines are skipped.

    Args:
        path: The file.
        required: What each row must have: the name of a column, or several names of which it must have one.
        limit: Read the first `limit` rows only.
        error: The class of the errors that are raised.

    Raises:
        InvDiffError: As the class `error`, always with file and line: the file cannot be read, is not UTF-8, has no
            row or a column twice; a quote is not closed; a row has more or fewer cells than there are columns, is no
            JSON object, or lacks a required column.
    """
    try:
        data = path.read_bytes()
        text = data.decode("utf-8-sig")
    except OSError as fault:
        raise error(f"Could not read {path}: {fault.strerror}.") from fault
    except UnicodeDecodeError as fault:
        line = fault.object.count(b"\n", 0, fault.start) + 1
        raise error(f"Expected UTF-8 in line {line} of {path}, found other bytes. Save the file as UTF-8.") from fault
    read = _csv_rows if path.suffix == ".csv" else _jsonl_rows
    numbered = list(islice(read(text, path, required, error), limit))
    if not numbered:
        raise error(f"Expected at least one image in {path}, found no rows.")
    columns = list(dict.fromkeys(name for _, row in numbered for name in row))
    return Table(path, columns, [row for _, row in numbered], [line for line, _ in numbered])


def _csv_rows(text: str, path: Path, required: Required, error: type[InvDiffError]) -> NumberedRows:
    records = _csv_records(text, path, error)
    header, columns = next(records, (1, []))
    _check_names(columns, f"line {header} of {path}", error)
    if columns:
        _check_present(columns, required, f"line {header} of {path}", error)
    for line, cells in records:
        if len(cells) != len(columns):
            raise error(
                f"Expected {len(columns)} cells in line {line} of {path}, found {len(cells)}. "
                'Put text that holds a comma in double quotes: "a dog, sitting".'
            )
        yield line, dict(zip(columns, cells, strict=True))


def _csv_records(text: str, path: Path, error: type[InvDiffError]) -> Iterator[tuple[int, list[str]]]:
    """Yield the cells of each record with the line it begins at (RFC 4180)."""
    cells: list[str] = []
    at, line, first = 0, 1, 1
    while at < len(text):
        cell = _CSV_CELL.match(text, at)
        if cell is None:
            raise error(
                f"Expected a closing double quote, then a comma or the end of the line, after the quote that opens in "
                f'line {line} of {path}, found none. Close it, and write a quote inside the text twice: "a 5"" pipe".'
            )
        quoted, plain, end = cell.groups()
        at = cell.end()
        if quoted is None:
            cells.append(plain or "")
        else:
            cells.append(quoted.replace('""', '"'))
            line += len(_LINE_END.findall(quoted))
        if end != ",":
            line += 1
            if cells != [""] or quoted is not None:
                yield first, cells
            cells, first = [], line
    if cells:  # the file ends with a comma
        yield first, [*cells, ""]


def _jsonl_rows(text: str, path: Path, required: Required, error: type[InvDiffError]) -> NumberedRows:
    for line, written in enumerate(text.split("\n"), 1):  # text in JSON may hold other line breaks
        if not written.strip():
            continue
        where = f"line {line} of {path}"

        def as_row(pairs: list[tuple[str, Any]], where: str = where) -> dict[str, Any]:
            _check_names([name for name, _ in pairs], where, error)
            return dict(pairs)

        try:
            row = json.loads(written, object_pairs_hook=as_row)
        except (ValueError, RecursionError) as fault:
            raise error(f"Expected JSON in {where}, found {written[:60]!r} ({fault}).") from fault
        if not isinstance(row, dict):
            raise error(f"Expected a JSON object in {where}, found {written[:60]!r}.")
        _check_present(row, required, where, error)
        yield line, row


def _check_names(columns: Sequence[str], where: str, error: type[InvDiffError]) -> None:
    twice = [name for name, count in Counter(columns).items() if count > 1]
    if twice:
        raise error(f"Expected each column once in {where}, found {', '.join(twice)} more than once. Rename one.")


def _check_present(columns: Iterable[str], required: Required, where: str, error: type[InvDiffError]) -> None:
    found = list(columns)
    for names in ((entry,) if isinstance(entry, str) else entry for entry in required):
        if not set(names) & set(found):
            raise error(
                f"Expected a column {' or '.join(names)} in {where}, found {', '.join(found) or 'nothing'}. "
                "Rename a column, or write what is missing."
            )
