"""An annotator measured on labelled images that it was not trained on: accuracy, calibration and confusion."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.metrics import confusion_matrix

from ...data.captioned import CaptionedImages, readable_images
from ...errors import DataError, EvaluationError
from ...files import read_json, read_tensors, weights_digest, write_json, write_tensors
from .annotations import Annotator, label_of, most_probable, unknown_attribute
from .calibration import expected_calibration_error

TENSORS, SUMMARY = "heldout.safetensors", "confusion.json"
MEASURED = "annotator.json"
"""Beside these two: which annotator, in another place, they are of."""
UNLABELLED = -1
"""True class of an image whose label is missing."""
MIN_CELL = 10
"""Images below which the accuracy of one combination of attributes is chance."""


@dataclass(frozen=True)
class HeldOut:
    """Class probabilities of N held-out images beside their true classes."""

    attributes: Mapping[str, tuple[str, ...]]
    """Attribute name to class names."""
    probabilities: Mapping[str, NDArray[np.float32]]
    """Attribute name to probabilities, (N, classes)."""
    truth: Mapping[str, NDArray[np.int64]]
    """Attribute name to true class indices, (N,); `UNLABELLED` where it is unknown."""

    def __post_init__(self) -> None:
        sizes = {len(kind[name]) for kind in (self.probabilities, self.truth) for name in self.attributes}
        if len(sizes) != 1:
            raise EvaluationError(f"Expected as many held-out images for every attribute, got {sorted(sizes)}.")
        for name, classes in self.attributes.items():
            probabilities, truth = self.probabilities[name], self.truth[name]
            labelled = truth[truth != UNLABELLED]
            if (
                probabilities.shape[1:] != (len(classes),)
                or not np.isfinite(probabilities).all()
                or not len(labelled)
                or not np.isin(labelled, range(len(classes))).all()
            ):
                raise EvaluationError(
                    f"Expected finite probabilities of {len(classes)} classes of {name!r} and labelled images of "
                    f"them, got shape {probabilities.shape} and {len(labelled)} labelled. Measure again."
                )

    def confusion(self, attribute: str, min_confidence: float = 0.0) -> NDArray[np.int64]:
        """Counts, (true class K, annotated class K + 1); the last column is "cannot tell".

        Args:
            attribute: One of `attributes`.
            min_confidence: Probability, from 0 to 1, below which the annotator "cannot tell".

        Raises:
            EvaluationError: `min_confidence` is outside [0, 1].
        """
        size, labelled = len(self.attributes[attribute]), self.truth[attribute] != UNLABELLED
        annotated = most_probable(self.probabilities[attribute][labelled], min_confidence)
        return confusion_matrix(self.truth[attribute][labelled], annotated, labels=range(size + 1))[:size]

    def summary(self) -> dict[str, dict[str, Any]]:
        """Figures by attribute, as plain JSON types.

        "matrix" is (true class, most probable class); "worst_combination" is the lowest accuracy among the
        combinations of all attributes with ten images or more, None where there is none: far below "accuracy", it
        means that the annotator reads one attribute off another; "calibration_error" is over 15 bins.
        """
        return {name: self._figures(name) for name in self.attributes}

    def _figures(self, attribute: str) -> dict[str, Any]:
        rows = self.truth[attribute] != UNLABELLED
        truth, probabilities = self.truth[attribute][rows], self.probabilities[attribute][rows]
        correct = most_probable(probabilities) == truth
        cells = combinations(np.stack([self.truth[name][rows] for name in self.attributes], axis=1))
        sizes = np.bincount(cells)
        shares = np.bincount(cells, weights=correct) / sizes
        return {
            "classes": list(self.attributes[attribute]),
            "images": len(truth),
            "matrix": self.confusion(attribute)[:, :-1].tolist(),
            "accuracy": float(correct.mean()),
            "worst_combination": min(shares[sizes >= MIN_CELL].tolist(), default=None),
            "calibration_error": expected_calibration_error(probabilities, truth),
        }

    def updated(self, newer: HeldOut) -> HeldOut:
        """`newer` with those of these attributes that it lacks, each still measured on its own images.

        Images are not matched: `summary` knows combinations of attributes that were measured together.
        """
        kept = [name for name in self.attributes if name not in newer.attributes]
        if not kept:
            return newer
        rows = np.any([self.truth[name] != UNLABELLED for name in kept], axis=0)
        before, after = int(rows.sum()), len(next(iter(newer.truth.values())))
        probabilities = {name: np.pad(self.probabilities[name][rows], ((0, after), (0, 0))) for name in kept}
        truth = {name: np.pad(self.truth[name][rows], (0, after), constant_values=UNLABELLED) for name in kept}
        for name in newer.attributes:
            probabilities[name] = np.pad(newer.probabilities[name], ((before, 0), (0, 0)))
            truth[name] = np.pad(newer.truth[name], (before, 0), constant_values=UNLABELLED)
        return HeldOut({name: self.attributes[name] for name in kept} | dict(newer.attributes), probabilities, truth)

    def save(self, folder: Path) -> None:
        """Write `heldout.safetensors` and, for people, `confusion.json` into `folder`."""
        tensors = {}
        for name in self.attributes:
            tensors[f"probabilities.{name}"] = torch.from_numpy(self.probabilities[name])
            tensors[f"truth.{name}"] = torch.from_numpy(self.truth[name].astype(np.int16))
        write_tensors(folder / TENSORS, tensors)
        write_json(folder / SUMMARY, self.summary())

    @classmethod
    def load(cls, folder: Path) -> HeldOut:
        """Read what `save` wrote.

        Raises:
            DataError: A file is absent or damaged, or the two do not belong together.
        """
        summary, tensors = read_json(folder / SUMMARY), read_tensors(folder / TENSORS)
        try:
            return cls(
                {name: tuple(figures["classes"]) for name, figures in summary.items()},
                {name: tensors[f"probabilities.{name}"].numpy() for name in summary},
                {name: tensors[f"truth.{name}"].numpy().astype(np.int64) for name in summary},
            )
        except (AttributeError, KeyError, TypeError, EvaluationError) as error:
            raise DataError(
                f"Expected {TENSORS} and {SUMMARY} of one annotator in {folder}, found that they disagree "
                f"({error}). Measure the annotator again."
            ) from error


class Measurable:
    """An annotator of images, whose `confusion` comes from held-out images that it was measured on."""

    attributes: Mapping[str, tuple[str, ...]]
    held_out: HeldOut | None = None

    def weights_digest(self) -> str:
        """16 hex digits that name its weights: what was measured with other ones is not true of it.

        This is of an annotator that is a network itself; one that holds a network names that network's.
        """
        return weights_digest(cast(torch.nn.Module, self))

    def confusion(self, attribute: str, min_confidence: float = 0.0) -> NDArray[np.int64] | None:
        """Counts of held-out images, (true class K, annotated class K + 1), the last for "cannot tell".

        None where the annotator was not measured on labelled images of this attribute.

        Raises:
            EvaluationError: The annotator does not know the attribute, or `min_confidence` is outside [0, 1].
        """
        if attribute not in self.attributes:
            raise EvaluationError(unknown_attribute(attribute, self.attributes))
        if self.held_out is None or attribute not in self.held_out.attributes:
            return None
        return self.held_out.confusion(attribute, min_confidence)

    def use_held_out(self, held_out: HeldOut) -> None:
        """Take `confusion` of its attributes from `held_out`; that of others stays.

        Raises:
            DataError: It is of other attributes or classes than the annotator's.
        """
        for name, classes in held_out.attributes.items():
            if self.attributes.get(name) != classes:
                raise DataError(
                    f"Expected held-out images of the annotator's classes {dict(self.attributes)}, got {name!r} with "
                    f"{classes}. Measure this annotator again."
                )
        self.held_out = held_out if self.held_out is None else self.held_out.updated(held_out)


def measure_annotator(
    annotator: Annotator, data: CaptionedImages, attributes: Sequence[str] | None = None, *, progress: bool = True
) -> HeldOut:
    """Annotate labelled images, one at a time, that `annotator` was not trained on.

    Images without a label of an attribute are left out of its figures.

    Args:
        annotator: Any annotator.
        data: Images with attributes whose values are the annotator's class names.
        attributes: Which to measure; by default all that the annotator and the data have in common.
        progress: Show a progress bar.

    Raises:
        DataError: An attribute is not in both, has no label, or has one that is no class of the annotator's; or
            more images are unreadable than the data allows.
    """
    common = [name for name in annotator.attributes if name in data.attributes]
    chosen = common if attributes is None else list(dict.fromkeys(attributes))
    if not chosen or not set(chosen) <= set(common):
        raise DataError(
            f"Expected attributes that both have, got {', '.join(chosen) or 'none'}: the annotator knows "
            f"{', '.join(annotator.attributes)}, the data {', '.join(data.attributes) or 'none'}. "
            "Rename the column or choose others."
        )
    truth = {name: _true_classes(data.attributes[name], name, annotator.attributes[name]) for name in chosen}
    rows: list[int] = []

    def images() -> Iterable[Image.Image]:
        for row, image in readable_images(data, "measuring", progress=progress):
            rows.append(row)
            yield image

    seen = annotator.predict(images())
    return HeldOut(
        {name: annotator.attributes[name] for name in chosen},
        {name: seen.probabilities[name] for name in chosen},
        {name: truth[name][rows] for name in chosen},
    )


def combinations(classes: NDArray[np.int64]) -> NDArray[np.int64]:
    """The number of each row of (N, attributes) among the distinct rows, sorted, (N,)."""
    return np.unique(classes, axis=0, return_inverse=True)[1].reshape(-1)


def _true_classes(values: Sequence[Any], attribute: str, classes: Sequence[str]) -> NDArray[np.int64]:
    labels = [label_of(value) for value in values]
    unknown = sorted(set(labels) - {"", *classes})
    if unknown or not any(labels):
        raise DataError(
            f"Expected labels of {attribute!r} among the annotator's classes {', '.join(classes)}, found "
            f"{', '.join(unknown[:5]) or 'none at all'}. Rename them as the annotator does, or leave them empty."
        )
    return np.array([classes.index(label) if label else UNLABELLED for label in labels], dtype=np.int64)
