"""Networks whose features images are compared by: Inception-v3, or any vision model of `transformers`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ...errors import EvaluationError
from ...models.encoders import BATCH_SIZE, VisionEncoder
from ...models.load import default_device


@runtime_checkable
class FeatureExtractor(Protocol):
    """What turns images into the features that a metric compares, such as a `VisionEncoder` or a `ClipEncoder`."""

    @property
    def name(self) -> str:
        """Label of the figures measured with it: they compare with those of the same name only."""

    def extract(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        """Features, one row per image, (N, D), float32."""


def load_extractor(spec: str) -> FeatureExtractor:
    """Load the extractor called "inception", or the vision model in a folder or under a hub id.

    Raises:
        EvaluationError: Inception is asked for, but the extra `metrics` is not installed or its weights are absent.
        ModelError: There is no vision encoder there.
    """
    return InceptionFeatures.load() if spec == "inception" else VisionEncoder.load(spec)


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
    def extract(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        """Features of images of any sizes, (N, 2048).

        Raises:
            EvaluationError: There is no image.
        """
        if not images:
            raise EvaluationError("Expected at least one image, got none. Check what selects the images.")
        features = []
        for _, run in groupby(images, key=lambda image: image.size):  # a batch holds images of one size
            pixels = torch.stack([torch.from_numpy(np.array(image.convert("RGB"))) for image in run])
            for batch in pixels.permute(0, 3, 1, 2).split(BATCH_SIZE):
                features.append(self.network(batch.to(self.device)).float().cpu().numpy())
        return np.concatenate(features, dtype=np.float32)
