"""What an annotator makes of held-out images whose classes are known: its accuracy, calibration and confusion."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

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
        sizes = {len(self.probabilities[name]) for name in self.attributes} | {
            len(self.truth[name]) for name in self.attributes
        }
        if len(sizes) != 1:
            raise EvaluationError(f"Expected as many held-out images for every attribute, got {sorted(sizes)}.")
        for name, classes in self.attributes.items():
            probabilities, truth = self.probabilities[name], self.truth[name]
            labelled = truth != UNLABELLED
            if (
                probabilities.shape[1:] != (len(classes),)
                or not np.isfinite(probabilities).all()
                or not labelled.any()
                or not np.isin(truth[labelled], range(len(classes))).all()
            ):
                raise EvaluationError(
                    f"Expected finite probabilities of {len(classes)} classes of {name!r} and labelled images of "
                    f"them, got shape {probabilities.shape} and {labelled.sum()} labelled. Measure again."
                )

    def confusion(self, attribute: str, min_confidence: float = 0.0) -> NDArray[np.int64]:
        """Return counts, (true class K, annotated class K + 1); the last column is "cannot tell".

        Args:
            attribute: One of `attributes`.
            min_confidence: Probability, from 0 to 1, below which the annotator "cannot tell".

        Raises:
            EvaluationError: The attribute is unknown, or `min_confidence` is outside [0, 1].
        """
        probabilities, truth = self._labelled(attribute)
        size = probabilities.shape[1]
        annotated = most_probable(probabilities, min_confidence)
        return np.bincount(truth * (size + 1) + annotated, minlength=size * (size + 1)).reshape(size, size + 1)

    def accuracy(self, attribute: str) -> float:
        """Return the share of labelled images whose most probable class is the true one."""
        counts = self.confusion(attribute)
        return float(np.trace(counts) / counts.sum())

    def worst_combination(self, attribute: str) -> float | None:
        """Return the lowest accuracy among the combinations of all attributes with ten images or more, if any.

        Far below `accuracy`, it means that the annotator reads one attribute off another.
        """
        _, truth = self._labelled(attribute)
        rows = self.truth[attribute] != UNLABELLED
        correct = most_probable(self.probabilities[attribute][rows]) == truth
        cells = combinations(np.stack([self.truth[name][rows] for name in self.attributes], axis=1))
        sizes = np.bincount(cells)
        shares = np.bincount(cells, weights=correct) / sizes
        return min((float(share) for share in shares[sizes >= MIN_CELL]), default=None)

    def calibration_error(self, attribute: str) -> float:
        """Return the expected calibration error over 15 bins; see `expected_calibration_error`."""
        return expected_calibration_error(*self._labelled(attribute))

    def summary(self) -> dict[str, dict[str, Any]]:
        """Return figures by attribute, as plain JSON types; the matrix is (true class, most probable class)."""
        return {
            name: {
                "classes": list(classes),
                "images": int(self.confusion(name).sum()),
                "matrix": self.confusion(name)[:, :-1].tolist(),
                "accuracy": self.accuracy(name),
                "worst_combination": self.worst_combination(name),
                "calibration_error": self.calibration_error(name),
            }
            for name, classes in self.attributes.items()
        }

    def updated(self, newer: HeldOut) -> HeldOut:
        """Return `newer` with those of these attributes that it lacks, each still measured on its own images.

        Images are not matched: `worst_combination` knows combinations of attributes that were measured together.
        """
        kept = {name: classes for name, classes in self.attributes.items() if name not in newer.attributes}
        if not kept:
            return newer
        rows = np.any([self.truth[name] != UNLABELLED for name in kept], axis=0)
        old, new = int(rows.sum()), len(next(iter(newer.truth.values())))
        probabilities, truth = {}, {}
        for name, classes in {**kept, **newer.attributes}.items():
            if name in kept:
                parts = [self.probabilities[name][rows], np.zeros((new, len(classes)), np.float32)]
                labels = [self.truth[name][rows], np.full(new, UNLABELLED)]
            else:
                parts = [np.zeros((old, len(classes)), np.float32), newer.probabilities[name]]
                labels = [np.full(old, UNLABELLED), newer.truth[name]]
            probabilities[name], truth[name] = np.concatenate(parts), np.concatenate(labels)
        return HeldOut({**kept, **newer.attributes}, probabilities, truth)

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
            attributes = {name: tuple(figures["classes"]) for name, figures in summary.items()}
            return cls(
                attributes,
                {name: tensors[f"probabilities.{name}"].numpy() for name in attributes},
                {name: tensors[f"truth.{name}"].numpy().astype(np.int64) for name in attributes},
            )
        except (AttributeError, KeyError, TypeError, EvaluationError) as error:
            raise DataError(
                f"Expected {TENSORS} and {SUMMARY} of one annotator in {folder}, found that they disagree "
                f"({error}). Measure the annotator again."
            ) from error

    def _labelled(self, attribute: str) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        if attribute not in self.attributes:
            raise EvaluationError(unknown_attribute(attribute, self.attributes))
        rows = self.truth[attribute] != UNLABELLED
        return self.probabilities[attribute][rows], self.truth[attribute][rows]


class Measurable:
    """Gives an annotator its `confusion`, from held-out images that it was measured on."""

    attributes: Mapping[str, tuple[str, ...]]
    held_out: HeldOut | None = None

    def weights_digest(self) -> str:
        """Return 16 hex digits that name its weights: what was measured with other ones is not true of it.

        This is of an annotator that is a network itself; one that holds a network names that network's.
        """
        return weights_digest(cast(torch.nn.Module, self))

    def confusion(self, attribute: str, min_confidence: float = 0.0) -> NDArray[np.int64] | None:
        """Return counts of held-out images, (true class K, annotated class K + 1), the last for "cannot tell".

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
    """Return what `annotator` makes of labelled images, one at a time; it must not have been trained on them.

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
    """Number the distinct rows of (N, attributes), sorted, and return each row's number, (N,)."""
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
