"""Networks that images are compared by: Inception-v3, any vision model of `transformers`, and LPIPS."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ...errors import EvaluationError
from ...models.encoders import BATCH_SIZE, VisionEncoder
from ...models.load import default_device
from .diversity import LPIPS


@runtime_checkable
class FeatureExtractor(Protocol):
    """The features of images that a metric compares, such as a `VisionEncoder`'s or a `ClipEncoder`'s."""

    @property
    def name(self) -> str:
        """Label of the figures measured with it: they compare with those of the same name only."""

    def extract(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        """Features, one row per image, (N, D), float32."""


def load_extractor(spec: str) -> FeatureExtractor:
    """The extractor called "inception", or the vision model in a folder or under a hub id."""
    return InceptionFeatures.load() if spec == "inception" else VisionEncoder.load(spec)


@dataclass(frozen=True)
class InceptionFeatures:
    """The 2048 features of Inception-v3 that FID and KID are defined on."""

    network: torch.nn.Module  # from bytes, (batch, 3, height, width) uint8 of any size, to features, (batch, D)
    device: torch.device
    name: str = "inception"

    @classmethod
    def load(cls) -> InceptionFeatures:
        """torch-fidelity's port of the original network on `default_device()`; its weights are fetched once.

        Images are scaled without antialiasing, as the original did, so that figures compare with published ones.
        """

        def network() -> torch.nn.Module:
            from torchmetrics.image.fid import NoTrainInceptionV3

            return NoTrainInceptionV3("inception-v3-compat", features_list=["2048"], antialias=False)

        use = "Inception features (or name a CLIP or DINOv2 model instead)"
        return cls(_with_metrics(network, use, "Inception", "torch-fidelity"), default_device())

    @torch.no_grad()
    def extract(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        """Features of images of any sizes, (N, 2048)."""
        if not images:
            raise EvaluationError("Expected at least one image, got none. Check what selects the images.")
        features = []
        for _, run in groupby(images, key=lambda image: image.size):  # a batch holds images of one size
            pixels = torch.stack([torch.from_numpy(np.array(image.convert("RGB"))) for image in run])
            for batch in pixels.permute(0, 3, 1, 2).split(BATCH_SIZE):
                features.append(self.network(batch.to(self.device)).float().cpu().numpy())
        return np.concatenate(features, dtype=np.float32)


def lpips_network() -> LPIPS:
    """LPIPS with AlexNet, on `default_device()`: load it once for many prompts."""

    def load() -> torch.nn.Module:
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        return LearnedPerceptualImagePatchSimilarity(net_type="alex")

    network: Any = _with_metrics(load, "LPIPS", "AlexNet", "torchvision")
    return lambda first, second: network(first.to(network.device), second.to(network.device))


def _with_metrics(load: Callable[[], Any], use: str, weights: str, part: str) -> Any:
    """A network of torchmetrics, which needs `part`, on `default_device()`, or what to do to have it."""
    try:
        return load().to(default_device())
    except ModuleNotFoundError as error:
        raise EvaluationError(
            f"Expected torchmetrics and {part} for {use}, found no {error.name or part}. Install them: "
            "pip install 'invdiff[metrics]'."
        ) from error
    except OSError as error:
        remedy = "Connect to the network once: they are kept in torch.hub's folder."
        raise EvaluationError(f"Expected {weights}'s weights for {use}, found none ({error}). {remedy}") from error
