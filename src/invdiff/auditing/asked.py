"""Attributes that a user asks for by name, from what is known of the images, and how an audit says so. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..data.tables import labels_in
from ..errors import DataError
from ..text import one_line

if TYPE_CHECKING:
    from ..data.captioned import CaptionedImages


@dataclass(frozen=True, eq=False)
class Asked:
    """One attribute that is asked for, and what is known of it of N images."""

    name: str
    values: list[str]
    """Names of the groups, sorted."""
    weights: NDArray[Any]
    """(N, E): the probability of each value, rows of zeros where nothing is known."""
    evidence: str
    """Where that comes from, for people."""
    record: dict[str, Any] = field(default_factory=dict)
    """The same as `Audit.settings["asked"]` keeps it."""
    refusal: str = ""
    """Why no image can be grouped by it, in words; "" where they can."""
    agreement: float = 1.0
    """Adjusted Rand index of given values and those that were inferred without them."""


def columns_asked(data: CaptionedImages, rows: NDArray[Any], names: Sequence[str]) -> list[Asked]:
    """The attributes of columns of `data`, of its images `rows` (N,).

    Raises:
        DataError: There is no such column, or it holds other things than classes.
    """
    return [_of_values(name, _column(data, rows, name), f"the column {name!r}") for name in names]


def _column(data: CaptionedImages, rows: NDArray[Any], name: str) -> list[str]:
    """The class of each image, "" where there is none."""
    from ..data.captioned import known_columns

    if name not in data.attributes:
        raise DataError(
            f"Expected a column {name!r} in the data, found {known_columns(data)}. Choose one of these, or add it."
        )
    labels = labels_in(name, zip(data.attributes[name], data.names, strict=True), DataError)
    return [labels[row] for row in rows]


def _of_values(name: str, labels: Sequence[str], evidence: str) -> Asked:
    values = sorted(set(labels) - {""})
    weights = np.array(labels, dtype=object)[:, None] == np.array(values, dtype=object)
    known = int(weights.sum())
    return Asked(name, values, weights.astype(float), evidence, {"attribute": {name: known}})


def about_asked(asked: Mapping[str, Any]) -> str:
    """How what was asked for was read, in sentences, from `Audit.settings["asked"]`; "" where nothing was."""
    columns = " and ".join(f"“{one_line(name, 60)}”" for name in asked.get("attribute", ()))
    return f"Groups were asked for, not sought: they are the values of the column {columns}." if columns else ""
