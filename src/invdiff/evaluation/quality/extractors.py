"""Networks that images are compared by: Inception-v3, any vision model of `transformers`, and LPIPS."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations, groupby
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ...errors import EvaluationError
from ...models.encoders import BATCH_SIZE, VisionEncoder
from ...models.load import default_device

LPIPS = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""From two batches of images in [-1, 1], each (batch, 3, height, width), to the mean distance of their pairs."""
PAIRS_PER_BATCH = 16


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
        with _metrics("Inception features (or name a CLIP or DINOv2 model instead)", "Inception", "torch-fidelity"):
            from torchmetrics.image.fid import NoTrainInceptionV3

            network = NoTrainInceptionV3("inception-v3-compat", features_list=["2048"], antialias=False)
            return cls(network.to(default_device()), default_device())

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
    with _metrics("LPIPS", "AlexNet", "torchvision"):
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        network = LearnedPerceptualImagePatchSimilarity(net_type="alex").to(default_device())
        return lambda first, second: network(first.to(network.device), second.to(network.device))


@torch.no_grad()
def lpips_diversity(images: Sequence[Image.Image], distance: LPIPS) -> float:
    """How different images of one prompt are: the mean of `distance`, as of `lpips_network`, over all their pairs.

    Zhang et al., "The unreasonable effectiveness of deep features as a perceptual metric" (CVPR 2018), with AlexNet.
    """
    sizes = {image.size for image in images}
    if len(images) < 2 or len(sizes) != 1:
        raise EvaluationError(f"Expected two images or more of one size, got {len(images)} of {len(sizes)} sizes.")
    pixels = torch.stack([torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) for image in images])
    pairs = torch.tensor(list(combinations(range(len(images)), 2)))
    total = 0.0
    for batch in pairs.split(PAIRS_PER_BATCH):
        first, second = (pixels[batch[:, side]].float() / 127.5 - 1 for side in (0, 1))
        total += float(distance(first, second)) * len(batch)
    if not np.isfinite(total):
        raise EvaluationError(f"Expected finite LPIPS distances, got a sum of {total}. Look at the images.")
    return total / len(pairs)


@contextmanager
def _metrics(use: str, weights: str, part: str) -> Iterator[None]:
    """Say what to do where a network of torchmetrics, which needs `part`, cannot be loaded in the block."""
    try:
        yield
    except ModuleNotFoundError as error:
        found = f"found no {error.name or part}. Install them: pip install 'invdiff[metrics]'."
        raise EvaluationError(f"Expected torchmetrics and {part} for {use}, {found}") from error
    except OSError as error:
        remedy = "Connect to the network once: they are kept in torch.hub's folder."
        raise EvaluationError(f"Expected {weights}'s weights for {use}, found none ({error}). {remedy}") from error
