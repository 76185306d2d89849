"""Look at every image once: classes, probabilities and features are kept, pixels are not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..data.captioned import CaptionedImages, readable_images
from ..errors import EvaluationError
from ..progress import Bar
from .annotators.annotations import Annotations, Annotator
from .annotators.given_labels import GivenLabels
from .manifest import Row
from .quality.extractors import FeatureExtractor

Judge = Annotator | GivenLabels
"""What names the classes: from the images, or from the columns of the manifest."""


@dataclass(frozen=True, eq=False)
class Described:
    """What is known of N images."""

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

    def take(self, rows: Sequence[int] | NDArray[Any]) -> Described:
        """Return what is known of some of the images."""
        rows = np.asarray(rows, dtype=np.int64)
        classes, probabilities, features = (
            {name: values[rows] for name, values in kind.items()}
            for kind in (self.classes, self.probabilities, self.features)
        )
        return Described(classes, probabilities, features, self.min_confidence)


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
        EvaluationError: An image is damaged, its features are not finite, or two extractors have one name.
    """
    batches = (rows[start : start + batch_size] for start in range(0, len(rows), batch_size))
    # The images of a batch are not looked at where labels are given and no features are asked for.
    pixels = bool(extractors) or not isinstance(judge, GivenLabels)
    return _describe(
        (
            ([row.path for row in batch], [open_image(row.path) for row in batch] if pixels else [], batch)
            for batch in batches
        ),
        judge,
        extractors,
        min_confidence,
        bar,
    )


def describe_images(
    images: Iterable[Image.Image],
    judge: Judge,
    *,
    extractors: Sequence[FeatureExtractor] = (),
    min_confidence: float = 0.0,
    batch_size: int = 64,
) -> Described:
    """Describe images, such as real ones to compare with; of `GivenLabels`, features alone.

    Raises:
        EvaluationError: An image's features are not finite, or two extractors have one name.
    """
    stream = iter(images)
    batches: Iterator[list[Image.Image]] = iter(lambda: list(islice(stream, batch_size)), [])
    numbered = (
        ([f"image {number * batch_size + place}" for place in range(len(batch))], batch, None)
        for number, batch in enumerate(batches)
    )
    return _describe(numbered, judge, extractors, min_confidence, None)


def describe_reference(
    data: CaptionedImages,
    judge: Judge,
    *,
    extractors: Sequence[FeatureExtractor] = (),
    min_confidence: float = 0.0,
    progress: bool = True,
) -> Described:
    """Describe all readable images of a captioned set.

    Raises:
        DataError: More images are unreadable than `data` allows.
        EvaluationError: An image's features are not finite.
    """
    images = (image for _, image in readable_images(data, "reference", progress=progress))
    return describe_images(images, judge, extractors=extractors, min_confidence=min_confidence)


def open_image(path: Path) -> Image.Image:
    """Return an image as RGB.

    Raises:
        EvaluationError: It cannot be read.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise EvaluationError(
            f"Expected a readable image in {path}, found something else ({error}). Draw it again, or remove its row."
        ) from error


def _describe(
    batches: Iterable[tuple[Sequence[Any], Sequence[Image.Image], Sequence[Row] | None]],
    judge: Judge,
    extractors: Sequence[FeatureExtractor],
    min_confidence: float,
    bar: Bar | None,
) -> Described:
    names_of = [extractor.name for extractor in extractors]
    if len(set(names_of)) < len(names_of):
        raise EvaluationError(
            f"Expected extractors of different names, got {', '.join(names_of)}: their features could not be told "
            "apart. Name each model once, and models of one name by folders of different names."
        )
    classes: dict[str, list[NDArray[np.int64]]] = {}
    probabilities: dict[str, list[NDArray[np.float32]]] = {}
    features: dict[str, list[NDArray[np.float32]]] = {extractor.name: [] for extractor in extractors}
    for names, images, rows in batches:
        seen = _annotate(judge, images, rows)
        if seen is not None:
            for attribute, values in seen.probabilities.items():
                probabilities.setdefault(attribute, []).append(values)
                classes.setdefault(attribute, []).append(seen.classes(attribute, min_confidence))
            # Of one name, as of one CLIP model that annotates and scores, those of the extractor are kept.
            if seen.features is not None and judge.feature_name not in names_of:
                features.setdefault(judge.feature_name, []).append(_finite(seen.features, names, judge.feature_name))
        for extractor in extractors:
            features[extractor.name].append(_finite(extractor.extract(images), names, extractor.name))
        if bar is not None:
            bar.advance(len(names))
    return Described(
        classes={name: np.concatenate(parts) for name, parts in classes.items()},
        probabilities={name: np.concatenate(parts) for name, parts in probabilities.items()},
        features={name: np.concatenate(parts) for name, parts in features.items() if parts},
        min_confidence=min_confidence,
    )


def _annotate(judge: Judge, images: Sequence[Image.Image], rows: Sequence[Row] | None) -> Annotations | None:
    if isinstance(judge, GivenLabels):
        return None if rows is None else judge.annotate([row.values for row in rows])
    return judge.predict(images)


def _finite(features: Any, names: Sequence[Any], extractor: str) -> NDArray[np.float32]:
    array = np.asarray(features, dtype=np.float32)
    bad = np.flatnonzero(~np.isfinite(array).all(axis=1))
    if len(bad):
        raise EvaluationError(
            f"Expected finite features of every image from {extractor}, got NaN or infinity for {names[bad[0]]}. "
            "Look at that image, and at the extractor's weights."
        )
    return array
