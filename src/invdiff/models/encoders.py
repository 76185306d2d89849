"""Features of images from any pretrained `transformers` vision model (CLIP, DINOv2, ...), and of texts from CLIP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, CLIPModel

from ..errors import DataError, ModelError
from ..files import weights_digest
from .load import default_device, public_name

BATCH_SIZE = 32


@dataclass(frozen=True)
class VisionEncoder:
    """A frozen model that turns an image into one vector: the joint embedding of CLIP, the pooled output of others."""

    name: str
    """The last part of its hub id or folder, such as "clip-vit-base-patch32"."""
    model: Any
    processor: Any

    @classmethod
    def load(cls, name_or_folder: str | Path) -> VisionEncoder:
        """Load onto `default_device()`.

        Args:
            name_or_folder: A folder or a hub id that `AutoModel` and `AutoImageProcessor` can load.

        Raises:
            ModelError: There is no vision encoder there, or its files are damaged or lack some of its weights.
        """
        source = str(name_or_folder)
        try:
            processor = AutoImageProcessor.from_pretrained(source)
            model, found = AutoModel.from_pretrained(source, output_loading_info=True)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ModelError(
                f"Expected a vision encoder at {source}, could not load it: {first_line(error)}"
            ) from error
        if found["missing_keys"]:  # they would be random, and other ones in the next run
            raise ModelError(
                f"Expected all weights of the vision encoder at {source}, found none of "
                f"{', '.join(sorted(found['missing_keys']))}. Choose another: classifiers often lack their pooler's."
            )
        return cls(public_name(source).rpartition("/")[2], model.to(default_device()).eval(), processor)

    @torch.no_grad()
    def encode(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        """Return the features of images of any sizes, (N, D), not normalised.

        Raises:
            DataError: There is no image.
        """
        if not images:
            raise DataError("Expected at least one image to encode, got none. Check what selects the images.")
        return np.concatenate(
            [self._encode_batch(images[start : start + BATCH_SIZE]) for start in range(0, len(images), BATCH_SIZE)]
        )

    def _encode_batch(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        inputs = self.processor([image.convert("RGB") for image in images], return_tensors="pt")
        pixel_values = inputs["pixel_values"].to(self.model.device)
        if hasattr(self.model, "get_image_features"):
            output = self.model.get_image_features(pixel_values=pixel_values)
        else:
            output = self.model(pixel_values=pixel_values)
        return np.asarray(pooled(output).float().cpu().numpy(), dtype=np.float32)


@dataclass(frozen=True)
class ClipEncoder(VisionEncoder):
    """Both towers of a CLIP model: images and texts become vectors of one space."""

    tokenizer: Any

    @classmethod
    def load(cls, name_or_folder: str | Path) -> ClipEncoder:
        """Load a whole CLIP model onto `default_device()`.

        Args:
            name_or_folder: A folder or a hub id of a `CLIPModel` with its tokenizer and image processor.

        Raises:
            ModelError: There is no CLIP model with both towers, or it lacks weights or its tokenizer.
        """
        vision = VisionEncoder.load(name_or_folder)
        if not isinstance(vision.model, CLIPModel):
            raise ModelError(
                f"Expected a CLIP model with both towers at {name_or_folder}, got a {type(vision.model).__name__}. "
                "Give a folder or hub id such as openai/clip-vit-base-patch32."
            )
        return cls(vision.name, vision.model, vision.processor, load_tokenizer(str(name_or_folder)))

    def weights_digest(self) -> str:
        """Return 16 hex digits that name the weights of both towers."""
        return weights_digest(self.model)

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return the projected features of texts, (N, D), not normalised; each distinct text is computed once.

        CLIP reads 77 tokens: what goes beyond is not seen.

        Raises:
            DataError: There is no text.
        """
        if isinstance(texts, str) or not texts:
            raise DataError(f"Expected a list of at least one prompt, got {texts!r}.")
        distinct = list(dict.fromkeys(texts))
        features = []
        for start in range(0, len(distinct), BATCH_SIZE):
            tokens = self.tokenizer(
                distinct[start : start + BATCH_SIZE],
                padding=True,
                truncation=True,
                max_length=self.model.config.text_config.max_position_embeddings,
                return_tensors="pt",
            ).to(self.model.device)
            output = self.model.get_text_features(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
            features.append(pooled(output).float().cpu().numpy())
        position = {text: index for index, text in enumerate(distinct)}
        return np.asarray(np.concatenate(features)[[position[text] for text in texts]], dtype=np.float32)


def load_tokenizer(name_or_folder: str) -> Any:
    """Return what turns a model's prompts into tokens.

    Raises:
        ModelError: There is none, or one that knows no word: every prompt would be the same to the model.
    """
    expected, remedy = f"Expected a tokenizer at {name_or_folder}", "Save the model's own beside it."
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_folder)
    except (OSError, ValueError) as error:
        raise ModelError(f"{expected}, could not load it: {first_line(error)} {remedy}") from error
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):  # transformers 5 makes up for absent files with this
        raise ModelError(f"{expected}, found one that knows no word: its files are absent or empty. {remedy}")
    return tokenizer


def first_line(error: Exception) -> str:
    """Return what a library's error says first; the rest is advice on its own use."""
    return str(error).strip().split("\n")[0]


def pooled(output: Any) -> torch.Tensor:
    """Return one vector per row, (batch, D), of what a transformers model put out."""
    if isinstance(output, torch.Tensor):  # get_image_features before transformers 5
        return output
    if getattr(output, "pooler_output", None) is not None:
        return output.pooler_output.flatten(1)
    return output.last_hidden_state[:, 0]
