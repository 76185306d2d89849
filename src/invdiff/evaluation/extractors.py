"""Networks, named and pretrained, whose features images are compared by: Inception-v3 or any vision model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import CLIPModel

from ..errors import EvaluationError, ModelError
from ..pipelines import default_device
from ..vision import BATCH_SIZE, VisionEncoder, pooled
from .transformers_models import load_tokenizer

FloatArray = NDArray[np.float32]


@runtime_checkable
class FeatureExtractor(Protocol):
    """What turns images into the features that a metric compares."""

    @property
    def name(self) -> str:
        """What figures measured with it are labelled with: they compare with those of the same name only."""

    def extract(self, images: Sequence[Image.Image]) -> FloatArray:
        """Return one row of features per image, (N, D), float32."""


@dataclass(frozen=True)
class VisionFeatures:
    """Features of any vision model that `transformers` knows, such as CLIP or DINOv2."""

    encoder: VisionEncoder

    @classmethod
    def load(cls, name_or_folder: str | Path) -> VisionFeatures:
        """Load from a folder or hub id.

        Raises:
            ModelError: There is no vision encoder there.
        """
        return cls(VisionEncoder.load(name_or_folder))

    @property
    def name(self) -> str:
        """The last part of the hub id or folder, such as "clip-vit-base-patch32"."""
        return self.encoder.name

    def extract(self, images: Sequence[Image.Image]) -> FloatArray:
        """Return the encoder's features, (N, D).

        Raises:
            DataError: There is no image.
        """
        return self.encoder.encode(images)


@dataclass(frozen=True)
class InceptionFeatures:
    """The 2048 features of Inception-v3 that FID and KID are defined on."""

    network: torch.nn.Module
    """From bytes, (batch, 3, height, width) uint8 of any size, to features, (batch, D)."""
    device: torch.device
    name: str = "inception"

    @classmethod
    def load(cls) -> InceptionFeatures:
        """Load torch-fidelity's port of the original network onto `default_device()`; its weights are fetched once.

        Images are scaled to 299 pixels as the original did, without antialiasing, so that figures compare with
        published ones; torchmetrics' own FID does otherwise by default.

        Raises:
            EvaluationError: The extra `metrics` is not installed, or the weights cannot be had.
        """
        device = default_device()
        try:
            from torchmetrics.image.fid import NoTrainInceptionV3

            network = NoTrainInceptionV3("inception-v3-compat", features_list=["2048"], antialias=False)
        except ModuleNotFoundError as error:
            raise EvaluationError(
                f"Expected torchmetrics and torch-fidelity for Inception features, found no "
                f"{error.name or 'torch-fidelity'}. Install them: pip install 'invdiff[metrics]'. Or name a CLIP or "
                "DINOv2 model instead."
            ) from error
        except OSError as error:
            raise EvaluationError(
                f"Expected Inception's weights, could not fetch them ({error}). Connect to the network once: they are "
                "kept in torch.hub's folder. Or name a CLIP or DINOv2 model instead."
            ) from error
        return cls(network.to(device), device)

    @torch.no_grad()
    def extract(self, images: Sequence[Image.Image]) -> FloatArray:
        """Return the network's features, (N, 2048), of images of any sizes.

        Raises:
            EvaluationError: There is no image.
        """
        if not images:
            raise EvaluationError("Expected at least one image, got none. Check what selects the images.")
        features = []
        for _, run in groupby(images, key=lambda image: image.size):  # a batch holds images of one size
            same_size = list(run)
            for start in range(0, len(same_size), BATCH_SIZE):
                pixels = np.stack([np.array(image.convert("RGB")) for image in same_size[start : start + BATCH_SIZE]])
                batch = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(self.device)
                features.append(self.network(batch).float().cpu().numpy())
        return np.asarray(np.concatenate(features), dtype=np.float32)


def load_extractor(spec: str) -> FeatureExtractor:
    """Return the extractor called "inception", or the vision model in a folder or under a hub id.

    Raises:
        EvaluationError: Inception is asked for, but the extra `metrics` is not installed or its weights are absent.
        ModelError: There is no vision encoder there.
    """
    return InceptionFeatures.load() if spec == "inception" else VisionFeatures.load(spec)


@dataclass(frozen=True)
class CLIPScorer:
    """Both towers of a CLIP model: features of images and of prompts, for `clip_t`. Itself an extractor."""

    encoder: VisionEncoder
    tokenizer: Any

    @classmethod
    def load(cls, name_or_folder: str | Path) -> CLIPScorer:
        """Load a whole CLIP model from a folder or hub id.

        Raises:
            ModelError: There is no vision encoder there.
            EvaluationError: It is not a whole CLIP model, or has no tokenizer.
        """
        encoder = VisionEncoder.load(name_or_folder)
        if not isinstance(encoder.model, CLIPModel):
            raise EvaluationError(
                f"Expected a CLIP model with both towers at {name_or_folder}, got a {type(encoder.model).__name__}. "
                "Give a folder or hub id such as openai/clip-vit-base-patch32."
            )
        try:
            return cls(encoder, load_tokenizer(str(name_or_folder)))
        except ModelError as error:
            raise EvaluationError(str(error)) from error

    @property
    def name(self) -> str:
        """The last part of the hub id or folder."""
        return self.encoder.name

    def extract(self, images: Sequence[Image.Image]) -> FloatArray:
        """Return the projected features of images, (N, D), not normalised.

        Raises:
            DataError: There is no image.
        """
        return self.encoder.encode(images)

    @torch.no_grad()
    def text_features(self, prompts: Sequence[str]) -> FloatArray:
        """Return the projected features of prompts, (N, D), not normalised; each distinct prompt is computed once.

        CLIP reads 77 tokens: what goes beyond is not seen.

        Raises:
            EvaluationError: There is no prompt.
        """
        if isinstance(prompts, str) or not prompts:
            raise EvaluationError(f"Expected a list of at least one prompt, got {prompts!r}. Give one per image.")
        model = self.encoder.model
        distinct = list(dict.fromkeys(prompts))
        features = []
        for start in range(0, len(distinct), BATCH_SIZE):
            tokens = self.tokenizer(
                distinct[start : start + BATCH_SIZE],
                padding=True,
                truncation=True,
                max_length=model.config.text_config.max_position_embeddings,
                return_tensors="pt",
            ).to(model.device)
            output = model.get_text_features(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
            features.append(pooled(output).float().cpu().numpy())
        position = {prompt: index for index, prompt in enumerate(distinct)}
        return np.asarray(np.concatenate(features)[[position[prompt] for prompt in prompts]], dtype=np.float32)
