"""What an annotator sees in images, and what `evaluate` asks of an annotator."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ...errors import EvaluationError, InvDiffError, ModelError
from ...text import label_of
from ..results import CANNOT_TELL as CANNOT_TELL


@dataclass(frozen=True)
class Annotations:
    """Classes and features that an annotator saw in N images."""

    attributes: Mapping[str, tuple[str, ...]]  # attribute name to class names
    probabilities: Mapping[str, NDArray[np.float32]]  # attribute to (N, classes); zeros: not known
    features: NDArray[np.float32] | None = None  # (N, D), for distances between sets of images

    def __post_init__(self) -> None:
        lengths = set() if self.features is None else {len(self.features)}
        class_names(self.attributes, EvaluationError)
        for name, classes in self.attributes.items():
            values = np.asarray(self.probabilities[name])
            lengths.add(len(values))
            if values.shape[1:] != (len(classes),) or not np.all((values >= 0) & (values <= 1 + 1e-4)):
                found = f"shape {values.shape}, values from {values.min(initial=1):g} to {values.max(initial=0):g}"
                expected = f"probabilities in [0, 1] of {len(classes)} classes of {name!r} from the annotator"
                raise EvaluationError(f"Expected {expected}, got {found}.")
        if len(lengths) > 1:
            raise EvaluationError(f"Expected as many rows of every attribute and of features, got {sorted(lengths)}.")

    def classes(self, attribute: str, min_confidence: float = 0.0) -> NDArray[np.int64]:
        """Most probable class of each image, (N,); K for "cannot tell", below `min_confidence` or if unknown."""
        values = np.asarray(self.probabilities[attribute])
        top = values.max(axis=1)
        # float(): beside a NumPy scalar, float32 probabilities of 0.9 would count as below 0.9
        unsure = (top < float(min_confidence)) | (top == 0)
        return np.where(unsure, values.shape[1], values.argmax(axis=1))

    def labels(self, attribute: str, min_confidence: float = 0.0) -> list[str]:
        """`classes` by name, `CANNOT_TELL` among them."""
        names = np.array([*self.attributes[attribute], CANNOT_TELL])
        return names[self.classes(attribute, min_confidence)].tolist()


@runtime_checkable
class Annotator(Protocol):
    """Anything that names the classes in images: `evaluate` needs no more than this."""

    @property
    def name(self) -> str:
        """Its name in figures and cards."""

    @property
    def feature_name(self) -> str:
        """The name of its features, "" where it gives none."""

    @property
    def attributes(self) -> Mapping[str, tuple[str, ...]]:
        """Attribute name to class names."""

    def predict(self, images: Iterable[Image.Image]) -> Annotations:
        """Annotate `images`."""

    def confusion(self, attribute: str, min_confidence: float = 0.0) -> NDArray[np.int64] | None:
        """Counts of held-out images, (true class K, annotated class K + 1), the last for "cannot tell", or None."""


def class_names(
    attributes: Mapping[str, Iterable[str]], error: type[InvDiffError] = ModelError
) -> dict[str, tuple[str, ...]]:
    """The classes of each attribute as `label_of` spells them; `error` where two are one, or one is "cannot tell"."""
    spelled = {name: tuple(map(label_of, classes)) for name, classes in attributes.items()}
    for name, classes in spelled.items():
        if CANNOT_TELL in classes:
            raise error(f"Expected classes of {name!r} other than {CANNOT_TELL!r}, which is no class. Rename it.")
        if len(set(classes)) < len(classes):
            raise error(f"Expected classes of {name!r} named apart, got {', '.join(classes)}. Rename or join them.")
    return spelled
