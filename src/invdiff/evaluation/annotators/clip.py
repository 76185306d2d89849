"""An annotator without training: CLIP compares images with prompts that describe the classes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.special import softmax

from ...errors import ConfigError
from ...models.encoders import ClipEncoder
from ...options import read_yaml
from .annotations import Annotations, class_names
from .heldout import Measurable

EXAMPLE = '{gender: {man: ["a photo of a man"], woman: ["a photo of a woman"]}}'


class ClipAnnotator(Measurable):
    """Zero-shot classes and features of any CLIP model (Radford et al., ICML 2021, section 3.1.4).

    A class is the normalised mean of its prompts' embeddings; probabilities are a softmax of logit_scale times the
    cosine. Such classes are unchecked: measure the annotator on labelled images before its figures are trusted.
    """

    def __init__(self, name_or_folder: str | Path, attributes: Mapping[str, Any] | Path) -> None:
        prompts = class_prompts(attributes)
        self._encoder = ClipEncoder.load(name_or_folder)
        self.network, self.name = self._encoder.model, self._encoder.name
        self.feature_name = self.name
        self.attributes = {name: tuple(classes) for name, classes in prompts.items()}
        self._embeddings = {}
        for attribute, classes in prompts.items():
            texts = [_unit(self._encoder.text_features(of, truncate=False)) for of in classes.values()]
            self._embeddings[attribute] = np.stack([_unit(embedded.mean(axis=0)) for embedded in texts])

    def predict(self, images: Iterable[Image.Image]) -> Annotations:
        """Annotate `images`, a batch at a time; an iterator is never held in memory as a whole."""
        stream = iter(images)
        features = np.zeros((0, self.network.config.projection_dim), np.float32)
        if (first := next(stream, None)) is not None:
            features = _unit(self._encoder.extract(chain([first], stream)))
        probabilities = {
            name: softmax(self._encoder.logit_scale * features @ classes.T, axis=1).astype(np.float32)
            for name, classes in self._embeddings.items()
        }
        return Annotations(self.attributes, probabilities, features)


def class_prompts(source: Any) -> dict[str, dict[str, list[str]]]:
    """Prompts as lists, of attribute name to class name to a prompt or several, or of a YAML or JSON file of that."""
    if isinstance(source, Path):
        given = read_yaml(source)
        try:
            return class_prompts(given)
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from error
    if not isinstance(source, Mapping) or not source:
        raise ConfigError(f"Expected prompts by class by attribute, such as {EXAMPLE}, got {source!r}.")
    checked: dict[str, dict[str, list[str]]] = {}
    for attribute, classes in source.items():
        if not isinstance(classes, Mapping) or len(classes) < 2:
            raise ConfigError(
                f"Expected two classes or more of attribute {attribute!r} with their prompts, such as {EXAMPLE}, "
                f"got {classes!r}."
            )
        checked[attribute] = {}
        for name, given in classes.items():
            texts = [given] if isinstance(given, str) else given
            words = [attribute, name, *texts] if isinstance(texts, Sequence) and texts else [None]
            if not all(isinstance(word, str) and word.strip() for word in words):
                raise ConfigError(
                    f"Expected text for attribute, class and prompts, got {attribute!r}, {name!r} and {given!r}. "
                    "Put the words true and false, and numbers, in quotes: YAML does not read them as text."
                )
            checked[attribute][name] = list(texts)
    spelled = class_names(checked, ConfigError)
    return {name: dict(zip(spelled[name], of.values(), strict=True)) for name, of in checked.items()}


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
