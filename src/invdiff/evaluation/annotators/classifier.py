"""Any image classifier from `transformers` as an annotator of one attribute."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageClassification

from ...errors import ModelError
from ...models.encoders import load_image_processor, load_pretrained, model_name, pixel_batches
from .annotations import Annotations, class_names
from .heldout import Measurable


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
            raise ModelError(
                f"Expected a classifier of one class for an image, found {config.problem_type} at {source}. "
                "Choose another model."
            )
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
