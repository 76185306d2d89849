"""Pretrained networks from `transformers`: features of images (CLIP, DINOv2, ...) and of texts (CLIP)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, CLIPModel

from ..errors import ConfigError, DataError, ModelError
from ..files import fingerprint, weights_digest
from .load import check_complete, check_tokenizer, default_device, loading, public_name

BATCH_SIZE = 32


@dataclass(frozen=True)
class VisionEncoder:
    """A frozen model that turns an image into one vector: the joint embedding of CLIP, the pooled output of others."""

    name: str  # the last part of its hub id or folder, such as "clip-vit-base-patch32"
    model: Any
    processor: Any

    @classmethod
    def load(cls, name_or_folder: str | Path) -> VisionEncoder:
        """Load what `AutoModel` and `AutoImageProcessor` find in a folder or under a hub id onto `default_device()`.

        `ModelError` where there is no vision encoder, or its files are damaged or lack some of its weights.
        """
        source = str(name_or_folder)
        model = load_pretrained(AutoModel, source, "a vision encoder")
        return cls(model_name(source), model, load_image_processor(source))

    @torch.no_grad()
    def extract(self, images: Iterable[Image.Image]) -> NDArray[np.float32]:
        """Features of images of any sizes, (N, D), not normalised; `DataError` where there is no image."""
        run = getattr(self.model, "get_image_features", self.model)
        batches = pixel_batches(images, self.processor, self.model.device)
        features = [_pooled(run(pixel_values=pixel_values)) for pixel_values in batches]
        if not features:
            raise DataError("Expected at least one image to encode, got none. Check what selects the images.")
        return np.concatenate(features)

    def features_digest(self) -> str:
        """16 hex digits that name all that features depend on: weights, and how images are made ready."""
        return fingerprint(weights_digest(self.model), self.processor.to_json_string())


@dataclass(frozen=True)
class ClipEncoder(VisionEncoder):
    """Both towers of a CLIP model: images and texts become vectors of one space."""

    tokenizer: Any

    @classmethod
    def load(cls, name_or_folder: str | Path) -> ClipEncoder:
        """Load a `CLIPModel` with its tokenizer and image processor, of a folder or a hub id; `ModelError` without."""
        source = str(name_or_folder)
        model = load_pretrained(AutoModel, source, "a CLIP model")
        if not isinstance(model, CLIPModel):
            raise ModelError(
                f"Expected a CLIP model with both towers at {source}, got a {type(model).__name__}. Give one."
            )
        with loading("a tokenizer", source, "Save the model's own beside it."):
            tokenizer = AutoTokenizer.from_pretrained(source)
        check_tokenizer(tokenizer, source)
        return cls(model_name(source), model, load_image_processor(source), tokenizer)

    @property
    def logit_scale(self) -> float:
        """The factor of cosines in CLIP's softmax over texts, an inverse temperature."""
        return float(self.model.logit_scale.detach().exp())

    @torch.no_grad()
    def text_features(self, texts: Sequence[str], *, truncate: bool = True) -> NDArray[np.float32]:
        """Projected features of at least one text, (N, D), not normalised; each distinct text is computed once.

        Texts of more tokens than the model reads (77 for most) are cut, or refused unless `truncate`.
        """
        if isinstance(texts, str) or not texts:
            raise DataError(f"Expected a list of at least one prompt, got {texts!r}.")
        longest = self.model.config.text_config.max_position_embeddings
        cut = {"truncation": True, "max_length": longest} if truncate else {}
        distinct = list(dict.fromkeys(texts))
        by_text: dict[str, NDArray[np.float32]] = {}
        for start in range(0, len(distinct), BATCH_SIZE):
            batch = distinct[start : start + BATCH_SIZE]
            tokens = self.tokenizer(batch, padding=True, return_tensors="pt", **cut).to(self.model.device)
            if (found := tokens.input_ids.shape[1]) > longest:
                raise ConfigError(f"Expected prompts of at most {longest} tokens, got {found} in {batch}. Shorten it.")
            output = self.model.get_text_features(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
            by_text.update(zip(batch, _pooled(output), strict=True))
        return np.stack([by_text[text] for text in texts])


def load_pretrained(model_class: Any, name_or_folder: str, kind: str) -> Any:
    """A `transformers` model, such as `AutoModel`, in float32 on `default_device()`; `kind` is its name in messages.

    `ModelError` where there is none, or weights are missing, which `transformers` would draw at random.
    """
    with loading(kind, name_or_folder, "Give a folder or a hub id of such a model."):
        model, report = model_class.from_pretrained(name_or_folder, output_loading_info=True)
    check_complete(report["missing_keys"], kind, name_or_folder)
    return model.float().to(default_device()).eval()


def load_image_processor(name_or_folder: str) -> Any:
    """Load what turns images into a model's pixels; `ModelError` where there is none."""
    with loading("an image processor", name_or_folder, "Save the model's own processor beside it."):
        return AutoImageProcessor.from_pretrained(name_or_folder)


def pixel_batches(images: Iterable[Image.Image], processor: Any, device: torch.device) -> Iterator[torch.Tensor]:
    """Yield pixels, (batch, 3, height, width), holding the images of one batch at a time."""
    stream = iter(images)
    while batch := list(islice(stream, BATCH_SIZE)):
        rgb = [image.convert("RGB") for image in batch]
        yield processor(images=rgb, return_tensors="pt")["pixel_values"].to(device)


def model_name(name_or_folder: str) -> str:
    """The last part of a hub id, or the name of a folder without where it lies."""
    return public_name(name_or_folder).rpartition("/")[2]


def _pooled(output: Any) -> NDArray[np.float32]:
    """One vector per row, (batch, D), of a model's output.

    Copied: torch's own small pieces, kept, break up the heap, and memory grew by 20 KB an image.
    """
    if not isinstance(output, torch.Tensor):  # transformers 5 returns an object where 4 returned a tensor
        pooled = getattr(output, "pooler_output", None)
        output = output.last_hidden_state[:, 0] if pooled is None else pooled.flatten(1)
    return output.float().cpu().numpy().copy()
