"""Features of images from any pretrained `transformers` vision model (CLIP, DINOv2, ...)."""

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
from transformers import AutoImageProcessor, AutoModel

from .errors import DataError, ModelError
from .pipelines import default_device, public_name

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
            reason = str(error).strip().split("\n")[0]
            raise ModelError(f"Expected a vision encoder at {source}, could not load it: {reason}") from error
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


def pooled(output: Any) -> torch.Tensor:
    """Return one vector per row, (batch, D), of what a transformers model put out."""
    if isinstance(output, torch.Tensor):  # get_image_features before transformers 5
        return output
    if getattr(output, "pooler_output", None) is not None:
        return output.pooler_output.flatten(1)
    return output.last_hidden_state[:, 0]
