"""Annotators made of networks from `transformers`: CLIP with prompts that name the classes, and image classifiers."""

from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.special import softmax
from sklearn.preprocessing import normalize
from transformers import AutoModelForImageClassification

from ...errors import ConfigError, ModelError
from ...models.encoders import ClipEncoder, load_image_processor, load_pretrained, model_name, pixel_batches
from ...options import read_yaml, typed
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
            texts = [normalize(self._encoder.text_features(of, truncate=False)) for of in classes.values()]
            self._embeddings[attribute] = normalize([embedded.mean(axis=0) for embedded in texts])

    def predict(self, images: Iterable[Image.Image]) -> Annotations:
        """Annotate `images`, a batch at a time; an iterator is never held in memory as a whole."""
        stream = iter(images)
        features = np.zeros((0, self.network.config.projection_dim), np.float32)
        if (first := next(stream, None)) is not None:
            features = normalize(self._encoder.extract(chain([first], stream)))
        probabilities = {
            name: softmax(self._encoder.logit_scale * features @ classes.T, axis=1).astype(np.float32)
            for name, classes in self._embeddings.items()
        }
        return Annotations(self.attributes, probabilities, features)


class ClassifierAnnotator(Measurable):
    """The classes of `attribute` by one classifier, a folder or hub id, named by its `id2label`; without features."""

    feature_name = ""

    def __init__(self, name_or_folder: str | Path, *, attribute: str = "label") -> None:
        source = str(name_or_folder)
        self.network = load_pretrained(AutoModelForImageClassification, source, "an image classifier")
        self._processor = load_image_processor(source)
        config = self.network.config
        classes = tuple(str(config.id2label[index]) for index in range(config.num_labels))
        if len(classes) < 2 or len(set(classes)) < len(classes):
            raise ModelError(f"Expected a classifier of two classes or more, each named apart, found {classes[:5]}.")
        if config.problem_type not in (None, "single_label_classification"):
            expected = "Expected a classifier of one class for an image"
            raise ModelError(f"{expected}, found {config.problem_type} at {source}. Choose another model.")
        self.name = model_name(source)
        self.attributes = class_names({attribute: classes})

    @torch.no_grad()
    def predict(self, images: Iterable[Image.Image]) -> Annotations:
        """Annotate `images`, a batch at a time; an iterator is never held in memory as a whole."""
        ((attribute, classes),) = self.attributes.items()
        probabilities = [np.zeros((0, len(classes)), np.float32)]
        for pixels in pixel_batches(images, self._processor, self.network.device):
            logits = self.network(pixel_values=pixels).logits
            probabilities.append(logits.float().softmax(dim=1).cpu().numpy().copy())  # as in ConvAnnotator.predict
        return Annotations(self.attributes, {attribute: np.concatenate(probabilities)})


def class_prompts(source: Any) -> dict[str, dict[str, tuple[str, ...]]]:
    """Prompts of attribute name to class name to a prompt or several, or of a YAML or JSON file of that."""
    where, given = (f"{source}: ", read_yaml(source)) if isinstance(source, Path) else ("", source)
    try:
        if not isinstance(given, Mapping) or not all(isinstance(of, Mapping) and len(of) > 1 for of in given.values()):
            raise TypeError(f"expected two classes or more of each attribute, got {given!r}")
        several = {
            attribute: {name: [texts] if isinstance(texts, str) else texts for name, texts in classes.items()}
            for attribute, classes in given.items()
        }
        prompts: dict[str, dict[str, tuple[str, ...]]] = typed(dict[str, dict[str, tuple[str, ...]]], several)
        names = [*prompts, *(name for of in prompts.values() for name in of)]
        if not prompts or not all(isinstance(name, str) for name in names):
            raise TypeError("expected text for attributes and classes; put true, false and numbers in quotes")
        if not all(texts and all(map(str.strip, texts)) for of in prompts.values() for texts in of.values()):
            raise TypeError("expected a prompt of each class, got none")
    except TypeError as error:
        raise ConfigError(f"{where}Expected prompts by class by attribute, such as {EXAMPLE}: {error}.") from None
    spelled = class_names(prompts, ConfigError)
    return {name: dict(zip(spelled[name], of.values(), strict=True)) for name, of in prompts.items()}
