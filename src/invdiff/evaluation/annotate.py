"""Look at every image once: classes, probabilities and features are kept, pixels are not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..config import EvaluateConfig
from ..data.captioned import CaptionedImages, readable_images
from ..data.images import read_image
from ..errors import EvaluationError
from ..models.encoders import ClipEncoder
from ..progress import Bar
from .annotators.annotations import Annotations, Annotator
from .annotators.labels import GivenLabels
from .images import Row
from .quality.extractors import LPIPS, FeatureExtractor

Judge = GivenLabels | Annotator  # the source of classes: columns of the manifest, or an annotator of images


@dataclass(frozen=True)
class Question:
    """The measures asked for of every model's images."""

    attributes: tuple[str, ...]  # sensitive attributes; the first gives the headline figures
    classes: Mapping[str, tuple[str, ...]]  # attribute to class names
    confusion: Mapping[str, NDArray[Any] | None]  # attribute to held-out counts, (K, K + 1); None where there are none
    subject_of: Mapping[str, int]  # prompt to the index of its class of the subject attribute
    target: tuple[float, ...] | None  # shares of the first attribute's classes to measure against; None is uniform
    reference: Described | None  # of real images, for distances
    clip: ClipEncoder | None  # for CLIP-T; its features of images are among those described
    lpips: LPIPS | None  # for diversity
    apart: Mapping[str, set[str]]  # attribute to prompts without figures: of some model's images nothing is told
    config: EvaluateConfig


@dataclass(frozen=True, eq=False)
class Described:
    """Classes, probabilities and features of N images."""

    classes: Mapping[str, NDArray[np.int64]]  # attribute to class index (N,); the number of classes for "cannot tell"
    probabilities: Mapping[str, NDArray[np.float32]]  # attribute to class probabilities, (N, classes)
    features: Mapping[str, NDArray[np.float32]]  # name of the features to features, (N, D)
    unreadable: Mapping[str, str] = field(default_factory=dict)  # name to reason of images left out of the N

    def __len__(self) -> int:
        described: list[Any] = [*self.classes.values(), *self.features.values()]
        return len(described[0]) if described else 0

    def take(self, rows: Sequence[int]) -> Described:
        """The description of some of the images."""
        kinds: Any = (self.classes, self.probabilities, self.features)
        return Described(*({name: values[rows] for name, values in kind.items()} for kind in kinds))


def describe_images(
    images: Sequence[Row] | CaptionedImages | Iterable[Image.Image],
    judge: Judge,
    *,
    extractors: Sequence[FeatureExtractor] = (),
    min_confidence: float = 0.0,
    batch_size: int = 64,
    progress: bool = True,
    bar: Bar | None = None,
) -> Described:
    """Describe images, holding the pixels of one batch at a time; under `GivenLabels`, pictures by features alone.

    They are rows of generated images, pictures, or a captioned set, of which all readable ones are described under a
    progress bar of its own. Images less certain than `min_confidence` are "cannot tell". Advances a running `bar`.
    """
    given = [extractor.name for extractor in extractors]
    if len(set(given)) < len(given):
        raise EvaluationError(f"Expected extractors of different names, got {', '.join(given)}. Name each once.")
    unreadable: dict[str, str] = {}
    if isinstance(images, CaptionedImages):
        images = (image for _, image in readable_images(images, "reference", progress=progress, unreadable=unreadable))
    stream, start = iter(images), 0
    classes, probabilities, features = kinds = [defaultdict[str, list[NDArray[Any]]](list) for _ in range(3)]
    while batch := list(islice(stream, batch_size)):
        rows = [item for item in batch if isinstance(item, Row)]
        pixels: list[Any] = [] if rows else batch
        if rows and (extractors or not isinstance(judge, GivenLabels)):  # else no image is opened
            pixels = [read_image(row.path) for row in rows]
        found: dict[str, Any] = {extractor.name: extractor.extract(pixels) for extractor in extractors}
        if isinstance(judge, GivenLabels):
            seen = judge.annotate([row.values for row in rows]) if rows else Annotations({}, {})
        else:
            seen = judge.predict(pixels)
        for attribute, values in seen.probabilities.items():
            probabilities[attribute].append(values)
            classes[attribute].append(seen.classes(attribute, min_confidence))
        if seen.features is not None:  # of one CLIP model that annotates and scores, the extractor's are kept
            found.setdefault(judge.feature_name, seen.features)
        for name, values in found.items():
            array = np.asarray(values, dtype=np.float32)
            bad = np.flatnonzero(~np.isfinite(array).all(axis=1))
            if len(bad):
                image = rows[bad[0]].path if rows else f"image {start + bad[0]}"
                raise EvaluationError(f"Expected finite features from {name}, got NaN or infinity for {image}.")
            features[name].append(array)
        start += len(batch)
        if bar is not None:
            bar.advance(len(batch))
    joined: Any = [{name: np.concatenate(parts) for name, parts in kind.items()} for kind in kinds]
    return Described(joined[0], joined[1], joined[2], unreadable)
