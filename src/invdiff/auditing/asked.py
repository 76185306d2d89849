"""Attributes that a user asks for by name, from what is known of the images, and how an audit says so. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..data.tables import labels_in, read_table
from ..errors import DataError
from ..text import one_line

if TYPE_CHECKING:
    from ..data.captioned import CaptionedImages

LEAST_LABELS = 5  # of each value, where an attribute is learned from a few
Labels: TypeAlias = str | Path | Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, eq=False)
class Asked:
    """One attribute that is asked for, and what is known of it of N images."""

    name: str
    values: list[str]  # names of the groups, sorted
    weights: NDArray[Any]  # (N, E): the probability of each value, rows of zeros where nothing is known
    evidence: str  # where that comes from, for people
    record: dict[str, Any] = field(default_factory=dict)  # the same as `Audit.settings["asked"]` keeps it
    refusal: str = ""  # why no image can be grouped by it, in words; "" where they can
    agreement: float = 1.0  # adjusted Rand index of given values and those that were inferred without them
    intervals: Mapping[int, Sequence[tuple[float, float]]] = field(default_factory=dict)
    """Prompt to 95% intervals of the values' shares, where what is inferred errs."""


def columns_asked(data: CaptionedImages, rows: NDArray[Any], names: Sequence[str]) -> list[Asked]:
    """The attributes of columns of `data`, of its images `rows` (N,); `DataError` where there are no such classes."""
    from ..data.captioned import known_columns

    found = []
    for name in names:
        if name not in data.attributes:
            remedy = "Check the spelling, or add it."
            raise DataError(f"Expected a column {name!r} in the data, found {known_columns(data)}. {remedy}")
        every = labels_in(name, zip(data.attributes[name], data.names, strict=True), DataError)
        labels = np.array(every, dtype=object)[rows]
        values = sorted(set(labels) - {""})
        weights = labels[:, None] == np.array(values, dtype=object)
        record = {"attribute": {name: int(weights.sum())}}
        found.append(Asked(name, values, weights.astype(float), f"the column {name!r}", record))
    return found


def labels_asked(labels: Labels | None, names: Sequence[str], skipped: Iterable[str] = ()) -> dict[str, list[str]]:
    """The labels of each attribute for images of these names, "" where there is none.

    `labels` is a table with `file_name` and a column for each attribute, or the same as attribute to name to value: a
    `DataError` where it cannot be read, names other images, or has too few. Those of images `skipped` do not count.
    """
    if isinstance(labels, str | Path):
        table = read_table(Path(labels), required=("file_name",))
        of = [str(row.get("file_name")).replace("\\", "/") for row in table.rows]
        if twice := [name for name, count in Counter(of).items() if count > 1]:
            raise DataError(f"Expected each image once in {labels}, found {twice[0]!r} again. Remove a row.")
        attributes = [column for column in table.columns if column != "file_name"]
        if not attributes:
            raise DataError(f"Expected a column beside file_name in {labels}, named as the attribute, found none.")
        labels = {name: dict(zip(of, (row.get(name) for row in table.rows), strict=True)) for name in attributes}
    found = {}
    for attribute, given in (labels or {}).items():
        if not isinstance(given, Mapping):
            raise DataError(f"Expected labels as attribute to image to value, got {given!r} as {attribute!r}. Fix it.")
        spelled = labels_in(attribute, [(value, name) for name, value in given.items()], DataError)
        known = dict(zip(given, spelled, strict=True))
        if absent := sorted(known.keys() - {*names, *skipped}):
            raise DataError(
                f"Expected labels of images of the data, found {len(absent)} of {len(known)} names that it has not, "
                f"such as {', '.join(map(repr, absent[:3]))}. Write them as the data does, such as {names[0]!r}."
            )
        found[attribute] = [known.get(name, "") for name in names]
        counts = sorted(Counter(filter(None, found[attribute])).items())
        needed = [f"{LEAST_LABELS - count} more of {value}" for value, count in counts if count < LEAST_LABELS]
        needed += [f"{LEAST_LABELS} of another value"] * (2 - len(counts))
        if needed:
            said = ", ".join(f"{value} ({count})" for value, count in counts) or "none"
            wanted = f"labels of two values of {attribute!r} or more, of {LEAST_LABELS} images each or more"
            raise DataError(f"Expected {wanted}, found {said}: {', '.join(needed)} are needed.")
    return found


def known_rows(weights: NDArray[Any]) -> NDArray[np.bool_]:
    """Whether each row of W (n, E) says anything of its image, (n,).

    A row that is even over the groups that it allows is no measurement: nothing is known of the image, or its value is
    no group under its prompt. Nor is a row of zeros, of an image that people left out.
    """
    least = np.where(weights > 0, weights, np.inf).min(axis=1)
    return ((weights > 0).sum(axis=1) == 1) | (least < weights.max(axis=1))


def about_asked(asked: Mapping[str, Any]) -> str:
    """How what was asked for was read, in sentences, from `Audit.settings["asked"]`; "" where nothing was."""
    said = [f"they are the values of the column “{one_line(name, 60)}”" for name in asked.get("attribute", ())]
    for name, of in asked.get("labels", {}).items():
        counts, right = of.get("images", {}), of.get("right", {})
        shares = ", ".join(f"{one_line(key, 60)} {count} ({right.get(key, 0):.0%})" for key, count in counts.items())
        said.append(
            f"“{one_line(name, 60)}” was learned from labels of few images, and is inferred of the others; "
            f"labels of each value, and the share of them guessed right when left out: {shares}"
        )
    readers: dict[str, list[str]] = {}
    for name, entry in asked.get("ask", {}).items():
        words = f"{one_line(name, 60)} ({', '.join(one_line(value, 60) for value in entry['values'])})"
        readers.setdefault(one_line(entry["reader"], 80), []).append(words)
    said += [f"{reader} read the images for {', '.join(words)}" for reader, words in readers.items()]
    return f"Groups were asked for, not sought: {'; '.join(said)}." if said else ""
