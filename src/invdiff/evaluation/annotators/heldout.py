"""An annotator measured on labelled images that it was not trained on: accuracy, calibration and confusion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from sklearn.metrics import confusion_matrix

from ...data.captioned import CaptionedImages, known_columns, readable_images
from ...data.tables import labels_in
from ...errors import DataError, EvaluationError, ModelError
from ...files import read_arrays, read_json, weights_digest, write_arrays, write_json
from .annotations import Annotations, Annotator, class_names

TENSORS, SUMMARY = "heldout.safetensors", "confusion.json"
MEASURED = "annotator.json"  # beside these two: which annotator, in another place, they are of
UNLABELLED = -1  # true class of an image whose label is missing
MIN_CELL = 10  # images below which the accuracy of one combination of attributes is chance
MAX_TEMPERATURE = 100.0


@dataclass(frozen=True)
class HeldOut(Annotations):
    """Annotations of N held-out images beside their true classes."""

    truth: Mapping[str, NDArray[np.int64]] = field(kw_only=True)
    """Attribute name to true class indices, (N,); `UNLABELLED` where it is unknown."""

    def confusion(self, attribute: str, min_confidence: float = 0.0) -> NDArray[np.int64]:
        """Counts, (true class K, annotated class K + 1); the last column is "cannot tell"."""
        annotated, truth = self.classes(attribute, min_confidence), self.truth[attribute]
        size, labelled = len(self.attributes[attribute]), truth != UNLABELLED
        return confusion_matrix(truth[labelled], annotated[labelled], labels=range(size + 1))[:size]

    def summary(self) -> dict[str, dict[str, Any]]:
        """Figures by attribute, as plain JSON types; "calibration_error" is over 15 bins.

        "worst_combination" is the lowest accuracy among the combinations of all attributes with ten images or more:
        far below "accuracy", it means that the annotator reads one attribute off another.
        """
        figures = {}
        for attribute, classes in self.attributes.items():
            rows = self.truth[attribute] != UNLABELLED
            truth = self.truth[attribute][rows]
            correct = self.classes(attribute)[rows] == truth
            cells = combinations(np.stack([self.truth[name][rows] for name in self.attributes], axis=1))
            sizes = np.bincount(cells)
            shares = np.bincount(cells, weights=correct) / sizes
            figures[attribute] = {
                "classes": list(classes),
                "images": len(truth),
                "matrix": self.confusion(attribute)[:, :-1].tolist(),
                "accuracy": float(correct.mean()),
                "worst_combination": min(shares[sizes >= MIN_CELL].tolist(), default=None),
                "calibration_error": expected_calibration_error(self.probabilities[attribute][rows], truth),
            }
        return figures

    def save(self, folder: Path) -> None:
        """Write `heldout.safetensors` and, for people, `confusion.json` into `folder`."""
        arrays = {f"probabilities.{name}": self.probabilities[name] for name in self.attributes}
        arrays |= {f"truth.{name}": self.truth[name].astype(np.int16) for name in self.attributes}
        write_arrays(folder / TENSORS, arrays)
        write_json(folder / SUMMARY, self.summary())

    @classmethod
    def load(cls, folder: Path) -> HeldOut:
        """Read what `save` wrote; a file that is absent, damaged or not of one annotator is a `ModelError`."""
        try:
            summary, arrays = read_json(folder / SUMMARY), read_arrays(folder / TENSORS)
            return cls(
                class_names({name: figures["classes"] for name, figures in summary.items()}),
                {name: arrays[f"probabilities.{name}"] for name in summary},
                truth={name: arrays[f"truth.{name}"].astype(np.int64) for name in summary},
            )
        except (AttributeError, KeyError, TypeError, DataError, EvaluationError) as error:
            expected = f"Expected {TENSORS} and {SUMMARY} of an annotator in {folder}"
            raise ModelError(f"{expected}, which disagree: {error}. Measure anew.") from error


class Measurable:
    """An annotator of images, whose `confusion` comes from held-out images that it was measured on."""

    attributes: Mapping[str, tuple[str, ...]]
    network: Any = None  # the network that annotates; None where the annotator is a network itself
    held_out: HeldOut | None = None  # the images of the latest measurement
    _measured: Mapping[str, HeldOut] = {}  # attribute to the held-out images that it was measured on last

    def weights_digest(self) -> str:
        """16 hex digits that name its weights: what was measured with other ones is not true of it."""
        network: Any = self.network or self
        return weights_digest(network)

    def confusion(self, attribute: str, min_confidence: float = 0.0) -> NDArray[np.int64] | None:
        """Counts, (true class K, annotated class K + 1), or None where it was not measured on this attribute."""
        held_out = self._measured.get(attribute)
        return None if held_out is None else held_out.confusion(attribute, min_confidence)

    def use_held_out(self, held_out: HeldOut) -> None:
        """Take `confusion` of its attributes from `held_out`, which must be of the same classes; others' stays."""
        if not held_out.attributes.items() <= self.attributes.items():
            ours, theirs = dict(self.attributes), dict(held_out.attributes)
            raise ModelError(f"Expected held-out images of the annotator's {ours}, got {theirs}. Measure it again.")
        self.held_out = held_out
        self._measured = {**self._measured, **dict.fromkeys(held_out.attributes, held_out)}


def measure_annotator(
    annotator: Annotator, data: CaptionedImages, attributes: Sequence[str] | None = None, *, progress: bool = True
) -> HeldOut:
    """Annotate labelled images that `annotator` was not trained on: of the attributes named, or all that both have.

    Labels are class names of the annotator; images without one are left out of the attribute's figures.
    """
    common = [name for name in annotator.attributes if name in data.attributes]
    chosen = common if attributes is None else list(dict.fromkeys(attributes))
    if not chosen or not set(chosen) <= set(common):
        told = f"the annotator knows {', '.join(annotator.attributes)}, the data {known_columns(data)}"
        raise DataError(f"Expected attributes that both have, got {', '.join(chosen) or 'none'}: {told}.")
    classes = {name: annotator.attributes[name] for name in chosen}
    truth = {}
    for name in chosen:
        known = dict.fromkeys(classes[name], "the annotator's classes")
        values = labels_in(name, zip(data.attributes[name], data.names, strict=True), DataError, known)
        unknown = sorted(set(values) - {"", *classes[name]})
        if unknown or not any(values):
            found = ", ".join(unknown[:5]) or "none at all"
            raise DataError(f"Expected labels of {name!r} among {', '.join(classes[name])}, found {found}. Rename.")
        truth[name] = np.array([classes[name].index(value) if value else UNLABELLED for value in values])
    unreadable: dict[str, str] = {}
    images = readable_images(data, "measuring", progress=progress, unreadable=unreadable)
    seen = annotator.predict(image for _, image in images)
    rows = [row for row, name in enumerate(data.names) if name not in unreadable]
    probabilities = {name: seen.probabilities[name] for name in chosen}
    return HeldOut(classes, probabilities, truth={name: indices[rows] for name, indices in truth.items()})


def combinations(classes: NDArray[np.int64]) -> NDArray[np.int64]:
    """The number of each row of (N, attributes) among the distinct rows, sorted, (N,)."""
    return np.unique(classes, axis=0, return_inverse=True)[1].reshape(-1)


def fit_temperature(logits: ArrayLike, truth: NDArray[np.int64]) -> float:
    """The temperature of logits, (N, classes), that minimises the negative log-likelihood of the true classes, (N,).

    Guo et al., "On calibration of modern neural networks" (ICML 2017). So that it does not go to 0 where no image is
    mistaken, targets are smoothed by 1 / (N + 2), Laplace's estimate of the share of mistakes (as Platt, 1999).
    """
    scores, smoothing = np.asarray(logits, dtype=np.float64), 1 / (len(truth) + 2)

    def loss(log_temperature: float) -> float:
        log_probabilities = log_softmax(scores / np.exp(log_temperature), axis=1)
        of_truth = log_probabilities[np.arange(len(truth)), truth]
        of_others = (log_probabilities.sum(axis=1) - of_truth) / (scores.shape[1] - 1)
        return float(-((1 - smoothing) * of_truth + smoothing * of_others).mean())

    # Convex in 1 / T, so there is one minimum for the bounded search to find.
    bound = np.log(MAX_TEMPERATURE)
    found = minimize_scalar(loss, bounds=(-bound, bound), method="bounded", options={"xatol": 1e-6})
    return float(np.exp(found.x)) if found.fun < loss(0.0) else 1.0


def expected_calibration_error(probabilities: NDArray[Any], truth: NDArray[np.int64], *, num_bins: int = 15) -> float:
    """Mean distance of confidence to accuracy over equal bins of confidence, weighted by images.

    Naeini et al., "Obtaining well calibrated probabilities using Bayesian binning" (AAAI 2015).
    """
    values = np.asarray(probabilities, dtype=np.float64)
    confidence, correct = values.max(axis=1), values.argmax(axis=1) == truth
    bins = np.searchsorted(np.arange(1, num_bins) / num_bins, confidence)
    gaps = np.bincount(bins, weights=correct - confidence, minlength=num_bins)
    return float(np.abs(gaps).sum() / len(values))
