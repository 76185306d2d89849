"""Classes read from columns of the manifest, written by people or by another program, instead of an annotator."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ...errors import EvaluationError
from .annotations import CANNOT_TELL, Annotations, label_of, unknown_attribute
from .labelled import MAX_CLASSES


class GivenLabels:
    """Reads the classes of images from columns of their manifest.

    A missing or empty value, or "cannot tell", is an image that nothing is known of. The labels are taken as true:
    there is no confusion. Classes are the distinct values, sorted, of all rows seen by `discover`.

    Args:
        names: The columns to read, each an attribute.
        rows: Rows to discover the classes in, as `discover` does.

    Raises:
        EvaluationError: No column is named, or as `discover` does.
    """

    name = "labels"
    feature_name = ""

    def __init__(self, names: Sequence[str], rows: Iterable[Mapping[str, Any]] = ()) -> None:
        if isinstance(names, str) or not names or not all(names):
            raise EvaluationError(f"Expected columns to read labels from, got {names!r}. Name the attributes.")
        self._values: dict[str, set[str]] = {name: set() for name in names}
        self.discover(rows)

    def discover(self, rows: Iterable[Mapping[str, Any]]) -> GivenLabels:
        """Add the classes in `rows` to those known; the result is the same object.

        Raises:
            EvaluationError: No row has one of the columns, or a column has more than 50 classes.
        """
        columns: dict[str, None] = {}
        for row in rows:
            columns.update(dict.fromkeys(row))
            for name, values in self._values.items():
                values.add(_label(row.get(name)))
                if len(values - {""}) > MAX_CLASSES:
                    raise EvaluationError(
                        f"Expected at most {MAX_CLASSES} classes of {name!r}, found more. Choose a column of labels."
                    )
        for name in self._values if columns else ():
            if name not in columns:
                raise EvaluationError(
                    f"Expected a column {name!r} of labels, found {', '.join(columns)}. "
                    "Write it into the manifest or choose one of these."
                )
        return self

    @property
    def attributes(self) -> Mapping[str, tuple[str, ...]]:
        """Attribute name to class names, sorted.

        Raises:
            EvaluationError: Fewer than two classes were found.
        """
        found = {name: tuple(sorted(values - {""})) for name, values in self._values.items()}
        for name, classes in found.items():
            if len(classes) < 2:
                raise EvaluationError(
                    f"Expected two classes or more in the column {name!r}, found {', '.join(classes) or 'none'}. "
                    "Label the images, or discover the classes in all rows first."
                )
        return found

    def annotate(self, rows: Sequence[Mapping[str, Any]]) -> Annotations:
        """Labels of N rows as probabilities of 0 and 1; all 0 where nothing is known.

        Raises:
            EvaluationError: A label is none of the classes.
        """
        attributes = self.attributes
        probabilities = {name: np.zeros((len(rows), len(classes)), np.float32) for name, classes in attributes.items()}
        for name, classes in attributes.items():
            for number, row in enumerate(rows):
                label = _label(row.get(name))
                if label and label not in classes:
                    raise EvaluationError(
                        f"Expected a label of {name!r} among {', '.join(classes)}, got {label!r}. "
                        "Discover the classes in all rows first."
                    )
                if label:
                    probabilities[name][number, classes.index(label)] = 1
        return Annotations(attributes, probabilities, None)

    def confusion(self, attribute: str, min_confidence: float = 0.0) -> None:
        """None: given labels are not measured against others.

        Raises:
            EvaluationError: The attribute is unknown.
        """
        if attribute not in self._values:
            raise EvaluationError(unknown_attribute(attribute, self._values))


def _label(value: Any) -> str:
    label = label_of(value)
    return "" if label == CANNOT_TELL else label
