"""Look at every image once: classes, probabilities and features are kept, pixels are not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..data.captioned import CaptionedImages, readable_images
from ..data.images import read_image
from ..errors import EvaluationError
from ..progress import Bar
from .annotators.annotations import Annotator
from .annotators.labels import GivenLabels
from .images import Row
from .quality.extractors import FeatureExtractor

Judge = Annotator | GivenLabels
"""The source of classes: an annotator of images, or columns of the manifest."""
Batch = tuple[Sequence[Any], Sequence[Image.Image], Sequence[Row]]
"""Names of images for messages, the images, and their rows where they have any."""


@dataclass(frozen=True)
class Question:
    """The measures asked for of every model's images."""

    attributes: tuple[str, ...]
    """Sensitive attributes; the first gives the headline figures."""
    classes: Mapping[str, tuple[str, ...]]
    """Attribute to class names."""
    confusion: Mapping[str, NDArray[Any] | None]
    """Attribute to held-out counts, (K, K + 1); None where there are none."""
    min_confidence: float
    subject_attribute: str
    """The attribute that prompts name; "" for none."""
    subject_of: Mapping[str, str]
    """Prompt to its class of `subject_attribute`."""
    target: tuple[float, ...] | None
    """Shares of the first attribute's classes to measure against; None is uniform."""
    confidence: float
    num_resamples: int
    seed: int


@dataclass(frozen=True, eq=False)
class Described:
    """Classes, probabilities and features of N images."""

    classes: Mapping[str, NDArray[np.int64]]
    """Attribute to class index (N,); the number of classes where the annotator cannot tell."""
    probabilities: Mapping[str, NDArray[np.float32]]
    """Attribute to class probabilities, (N, classes)."""
    features: Mapping[str, NDArray[np.float32]]
    """Name of the features to features, (N, D)."""
    min_confidence: float = 0.0
    """Below it, an image's class was taken for unknown."""

    def __len__(self) -> int:
        return max((len(rows) for kind in (self.classes, self.features) for rows in kind.values()), default=0)

    def take(self, rows: Sequence[int]) -> Described:
        """The description of some of the images."""
        kinds: Any = {
            kind: {name: values[np.asarray(rows, dtype=np.int64)] for name, values in getattr(self, kind).items()}
            for kind in ("classes", "probabilities", "features")
        }
        return Described(**kinds, min_confidence=self.min_confidence)


def describe_rows(
    rows: Sequence[Row],
    judge: Judge,
    *,
    extractors: Sequence[FeatureExtractor] = (),
    min_confidence: float = 0.0,
    batch_size: int = 64,
    bar: Bar | None = None,
) -> Described:
    """Describe generated images, holding the pixels of one batch at a time.

    Raises:
        DataError: An image is damaged.
        EvaluationError: An image's features are not finite, or two extractors have one name.
    """
    # Where labels are given and no features are asked for, no image is opened.
    pixels = bool(extractors) or not isinstance(judge, GivenLabels)

    def batches() -> Iterator[Batch]:
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            yield [row.path for row in batch], [read_image(row.path) for row in batch] if pixels else [], batch
            if bar is not None:
                bar.advance(len(batch))

    return _describe(batches(), judge, extractors, min_confidence)


def describe_images(
    images: CaptionedImages | Iterable[Image.Image],
    judge: Judge,
    *,
    extractors: Sequence[FeatureExtractor] = (),
    min_confidence: float = 0.0,
    batch_size: int = 64,
    progress: bool = True,
) -> Described:
    """Describe images, such as real ones to compare with; of `GivenLabels`, features alone.

    Args:
        images: Images, or a captioned set, of which all readable ones are described under a progress bar.
        judge: The source of classes.
        extractors: Further features.
        min_confidence: Images whose most probable class is less probable are "cannot tell".
        batch_size: Images in memory at a time.
        progress: Show a progress bar, of a captioned set.

    Raises:
        DataError: More images are unreadable than the captioned set allows.
        EvaluationError: An image's features are not finite, or two extractors have one name.
    """
    if isinstance(images, CaptionedImages):
        images = (image for _, image in readable_images(images, "reference", progress=progress))
    stream = iter(images)

    def batches() -> Iterator[Batch]:
        start = 0
        while batch := list(islice(stream, batch_size)):
            yield [f"image {start + place}" for place in range(len(batch))], batch, ()
            start += len(batch)

    return _describe(batches(), judge, extractors, min_confidence)


def _describe(
    batches: Iterator[Batch], judge: Judge, extractors: Sequence[FeatureExtractor], min_confidence: float
) -> Described:
    given = [extractor.name for extractor in extractors]
    if len(set(given)) < len(given):
        raise EvaluationError(
            f"Expected extractors of different names, got {', '.join(given)}: their features could not be told "
            "apart. Name each model once, and models of one name by folders of different names."
        )
    classes: dict[str, list[NDArray[np.int64]]] = {}
    probabilities: dict[str, list[NDArray[np.float32]]] = {}
    features: dict[str, list[NDArray[np.float32]]] = {name: [] for name in given}
    for names, images, rows in batches:
        found = [(extractor.name, extractor.extract(images)) for extractor in extractors]
        if isinstance(judge, GivenLabels):
            seen = judge.annotate([row.values for row in rows]) if rows else None
        else:
            seen = judge.predict(images)
        if seen is not None:
            for attribute, values in seen.probabilities.items():
                probabilities.setdefault(attribute, []).append(values)
                classes.setdefault(attribute, []).append(seen.classes(attribute, min_confidence))
            # Of one name, as of one CLIP model that annotates and scores, those of the extractor are kept.
            if seen.features is not None and judge.feature_name not in given:
                found.append((judge.feature_name, seen.features))
        for name, rows_of_features in found:
            features.setdefault(name, []).append(_finite(rows_of_features, names, name))
    return Described(
        classes={name: np.concatenate(parts) for name, parts in classes.items()},
        probabilities={name: np.concatenate(parts) for name, parts in probabilities.items()},
        features={name: np.concatenate(parts) for name, parts in features.items() if parts},
        min_confidence=min_confidence,
    )


def _finite(features: Any, names: Sequence[Any], extractor: str) -> NDArray[np.float32]:
    array = np.asarray(features, dtype=np.float32)
    bad = np.flatnonzero(~np.isfinite(array).all(axis=1))
    if len(bad):
        raise EvaluationError(
            f"Expected finite features of every image from {extractor}, got NaN or infinity for {names[bad[0]]}. "
            "Look at that image, and at the extractor's weights."
        )
    return array
