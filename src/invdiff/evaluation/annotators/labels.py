"""Labels of images: to train and measure annotators with, or to evaluate by instead of an annotator."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...data.captioned import CAPTION_COLUMNS, CaptionedImages, Source, known_columns, load_captioned_images
from ...data.tables import labels_in
from ...errors import DataError, EvaluationError
from ...text import label_of
from .annotations import CANNOT_TELL, Annotations

MAX_CLASSES = 50
FOLDER_ATTRIBUTE = "label"  # the attribute that names of sub-folders are values of


def load_labelled_images(source: Source, *, caption_column: str | None = None, **options: Any) -> CaptionedImages:
    """Images with attributes, as from `load_captioned_images`; captions are not needed, and are no attribute.

    A folder without a metadata file but with one sub-folder per class (`photos/cat/1.png`) has one attribute, "label".
    """
    images = load_captioned_images(source, captions=False, **options)
    captions = CAPTION_COLUMNS if caption_column is None else (caption_column,)
    attributes = {name: values for name, values in images.attributes.items() if name not in captions}
    if not images.attributes:
        folders = [PurePosixPath(name).parent.name for name in images.names]
        attributes = {FOLDER_ATTRIBUTE: folders} if any(folders) else {}
    return dataclasses.replace(images, attributes=attributes)


def read_targets(
    data: CaptionedImages, attributes: Sequence[str] | None = None
) -> tuple[dict[str, tuple[str, ...]], NDArray[np.int64]]:
    """Class names by attribute (all by default), names sorted, and class indices, (N, attributes), in that order."""
    known = known_columns(data)
    names = sorted(set(data.attributes if attributes is None else attributes))
    if not names:
        raise DataError(f"Expected columns of classes, or one sub-folder of images per class, found {known}.")
    classes: dict[str, tuple[str, ...]] = {}
    columns = []
    for name in names:
        if name not in data.attributes:
            raise DataError(f"Expected attribute {name!r} in the data, found {known}. Choose one of these.")
        values = labels_in(name, zip(data.attributes[name], data.names, strict=True), DataError)
        if "" in values:
            absent = f"{values.count('')} of {len(values)}"
            raise DataError(f"Expected a value of {name!r} for every image, found none for {absent}. Add them.")
        found, column = np.unique(values, return_inverse=True)
        if not 2 <= len(found) <= MAX_CLASSES:
            raise DataError(f"Expected 2 to {MAX_CLASSES} classes of {name!r}, found {len(found)}. Bin numbers.")
        classes[name] = tuple(found.tolist())
        columns.append(column)
    return classes, np.stack(columns, axis=1).astype(np.int64)


class GivenLabels:
    """Classes of images from columns of their manifest, written by people or by another program, taken as true.

    A missing or empty value, or "cannot tell", is an image that nothing is known of. Classes are the distinct values,
    sorted, of all rows seen by `discover`.
    """

    name = "labels"
    feature_name = ""

    def __init__(self, names: Sequence[str]) -> None:
        self._places: dict[str, dict[str, str]] = {name: {} for name in names}

    def discover(self, rows: Sequence[Mapping[str, Any]], places: Sequence[str] = ()) -> GivenLabels:
        """Add the classes in `rows`, which stand at `places` for messages; the result is the same object."""
        columns = dict.fromkeys(name for row in rows for name in row)
        places = places or [f"row {number}" for number in range(len(rows))]
        for name, known in self._places.items():
            if columns and name not in columns:
                raise EvaluationError(f"Expected a column {name!r} of labels, found {', '.join(columns)}. Choose one.")
            cells = ((row.get(name), place) for row, place in zip(rows, places, strict=True))
            labels_in(name, cells, EvaluationError, known)
            if len(self._classes(name)) > MAX_CLASSES:
                expected = f"Expected at most {MAX_CLASSES} classes of {name!r}"
                raise EvaluationError(f"{expected}, found more. Choose a column of labels.")
        return self

    @property
    def attributes(self) -> Mapping[str, tuple[str, ...]]:
        """Attribute name to class names, sorted."""
        attributes = {name: self._classes(name) for name in self._places}
        for name, classes in attributes.items():
            if len(classes) < 2:
                found = ", ".join(classes) or "none"
                raise EvaluationError(f"Expected two classes or more in column {name!r}, found {found}. Label more.")
        return attributes

    def _classes(self, name: str) -> tuple[str, ...]:
        return tuple(sorted(self._places[name].keys() - {"", CANNOT_TELL}))

    def annotate(self, rows: Sequence[Mapping[str, Any]]) -> Annotations:
        """Labels of N rows as probabilities of 0 and 1; all 0 where nothing is known."""
        attributes, probabilities = self.attributes, {}
        for name, classes in attributes.items():
            labels = np.array([label_of(row.get(name)) for row in rows], dtype=object)
            probabilities[name] = (labels[:, None] == np.array(classes, dtype=object)).astype(np.float32)
        return Annotations(attributes, probabilities)

    def confusion(self, attribute: str, min_confidence: float = 0.0) -> None:
        """None: given labels are not measured against others."""
