"""An annotator without training: CLIP compares images with prompts that describe the classes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from PIL import Image
from torch.nn.functional import normalize
from transformers import CLIPModel

from ...errors import ConfigError
from ...files import weights_digest
from ...models.encoders import load_tokenizer, pooled
from .annotations import CANNOT_TELL, Annotations, reserved_class
from .heldout import Measurable
from .transformers_models import last_part, load_image_processor, load_model, pixel_batches

ClassPrompts = Mapping[str, Mapping[str, str | Sequence[str]]]
"""Attribute name to class name to one or several prompts that describe the class."""

EXAMPLE = '{gender: {man: ["a photo of a man"], woman: ["a photo of a woman"]}}'


class ClipAnnotator(Measurable):
    """Zero-shot classes and features of any CLIP model (Radford et al., ICML 2021, section 3.1.4).

    A class is the mean of its prompts' normalised embeddings, normalised again; its probability is a softmax over
    an attribute's classes of logit_scale times the cosine to the image. Features are normalised image embeddings.
    Nobody has checked such classes: `measure` it on labelled images before its figures are trusted.

    Args:
        name_or_folder: A folder or a hub id of a `CLIPModel` with its tokenizer and image processor.
        attributes: Attribute name to class name to prompts: `{"gender": {"man": ["a photo of a man"], ...}}`.

    Raises:
        ConfigError: An attribute has fewer than two classes or one called "cannot tell", or a class no prompt or
            one that is too long.
        ModelError: There is no CLIP model, or it lacks its tokenizer or image processor.
    """

    def __init__(self, name_or_folder: str | Path, attributes: ClassPrompts) -> None:
        source = str(name_or_folder)
        prompts = checked_prompts(attributes)
        self.name = self.feature_name = last_part(source)
        self.attributes = {name: tuple(classes) for name, classes in prompts.items()}
        self._model = load_model(CLIPModel, source, "a CLIP model")
        self._processor = load_image_processor(source)
        tokenizer = load_tokenizer(source)
        self._embeddings = {
            attribute: torch.stack([self._embed_class(tokenizer, texts) for texts in classes.values()])
            for attribute, classes in prompts.items()
        }

    def weights_digest(self) -> str:
        """Return 16 hex digits that name the weights of both towers."""
        return weights_digest(self._model)

    @torch.no_grad()
    def predict(self, images: Iterable[Image.Image]) -> Annotations:
        """Annotate `images`, a batch at a time; an iterator is never held in memory as a whole."""
        scale = self._model.logit_scale.exp()
        size = self._model.config.projection_dim
        features: list[NDArray[np.float32]] = [np.zeros((0, size), np.float32)]
        probabilities = {name: [np.zeros((0, len(classes)), np.float32)] for name, classes in self.attributes.items()}
        for pixels in pixel_batches(images, self._processor, self._model.device):
            embeddings = normalize(pooled(self._model.get_image_features(pixel_values=pixels)), dim=1)
            features.append(embeddings.cpu().numpy().copy())  # as in ConvAnnotator.predict
            for name, of_classes in self._embeddings.items():
                probabilities[name].append((scale * embeddings @ of_classes.T).softmax(dim=1).cpu().numpy().copy())
        return Annotations(
            self.attributes,
            {name: np.concatenate(parts) for name, parts in probabilities.items()},
            np.concatenate(features),
        )

    @torch.no_grad()
    def _embed_class(self, tokenizer: Any, prompts: Sequence[str]) -> torch.Tensor:
        """Return the unit mean of the prompts' unit embeddings, (D,)."""
        tokens = tokenizer(list(prompts), padding=True, return_tensors="pt").to(self._model.device)
        longest = self._model.config.text_config.max_position_embeddings
        if tokens["input_ids"].shape[1] > longest:
            raise ConfigError(
                f"Expected prompts of at most {longest} tokens, got {tokens['input_ids'].shape[1]} in one of "
                f"{list(prompts)}. Shorten it."
            )
        outputs = self._model.get_text_features(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        return normalize(normalize(pooled(outputs), dim=1).mean(dim=0), dim=0)


def read_class_prompts(path: Path) -> dict[str, dict[str, list[str]]]:
    """Read a YAML or JSON file of attribute name to class name to a prompt or several.

    Raises:
        ConfigError: The file is absent or holds something else.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8-sig"))  # JSON is a subset of YAML
    except OSError as error:
        raise ConfigError(f"Could not read the classes in {path}: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"Expected JSON or YAML in {path}, found something else: {error}") from error
    try:
        return checked_prompts(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def checked_prompts(attributes: Any) -> dict[str, dict[str, list[str]]]:
    """Return prompts as lists, by class and attribute.

    Raises:
        ConfigError: They are not two classes or more per attribute, with a prompt or several for each class, or a
            class is called "cannot tell".
    """
    if not isinstance(attributes, Mapping) or not attributes:
        raise ConfigError(f"Expected prompts by class by attribute, such as {EXAMPLE}, got {attributes!r}.")
    checked: dict[str, dict[str, list[str]]] = {}
    for attribute, classes in attributes.items():
        if not isinstance(classes, Mapping) or len(classes) < 2:
            raise ConfigError(
                f"Expected two classes or more of attribute {attribute!r} with their prompts, such as {EXAMPLE}, "
                f"got {classes!r}."
            )
        if CANNOT_TELL in classes:
            raise ConfigError(reserved_class(attribute))
        prompts = {name: [given] if isinstance(given, str) else given for name, given in classes.items()}
        for name, texts in prompts.items():
            words = [attribute, name, *texts] if isinstance(texts, Sequence) and texts else [None]
            if not all(isinstance(word, str) and word.strip() for word in words):
                raise ConfigError(
                    f"Expected text for attribute, class and prompts, got {attribute!r}, {name!r} and {texts!r}. "
                    "Put words such as yes and no in quotes: YAML reads them as true and false."
                )
        checked[attribute] = {name: list(texts) for name, texts in prompts.items()}
    return checked
