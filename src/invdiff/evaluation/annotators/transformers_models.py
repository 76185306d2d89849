"""Load models and image processors from `transformers`, whole or not at all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from transformers import AutoImageProcessor

from ...errors import ModelError
from ...models.encoders import BATCH_SIZE, first_line
from ...models.load import default_device, public_name


def load_model(model_class: Any, name_or_folder: str, kind: str) -> Any:
    """Return a model in float32 on this machine's device, ready to predict.

    Args:
        model_class: A `transformers` model class.
        name_or_folder: A folder or a hub id.
        kind: What it should be, for messages.

    Raises:
        ModelError: There is no such model, or weights are missing: `transformers` would draw them at random.
    """
    try:
        model, report = model_class.from_pretrained(name_or_folder, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"Expected {kind} at {name_or_folder}, could not load it: {first_line(error)} "
            "Give a folder or a hub id of such a model."
        ) from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelError(
            f"Expected all weights of {kind} at {name_or_folder}, found none for {len(missing)}, such as "
            f"{missing[0]}. Give a model that was trained as such."
        )
    return model.float().to(default_device()).eval()


def load_image_processor(name_or_folder: str) -> Any:
    """Return what turns images into a model's pixels.

    Raises:
        ModelError: There is none.
    """
    try:
        return AutoImageProcessor.from_pretrained(name_or_folder)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"Expected an image processor at {name_or_folder}, could not load it: {first_line(error)} "
            "Save the model's own processor beside it."
        ) from error


def pixel_batches(images: Iterable[Image.Image], processor: Any, device: torch.device) -> Iterator[torch.Tensor]:
    """Yield pixels, (batch, 3, height, width), holding the images of one batch at a time."""
    stream = iter(images)
    while batch := list(islice(stream, BATCH_SIZE)):
        rgb = [image.convert("RGB") for image in batch]
        yield processor(images=rgb, return_tensors="pt")["pixel_values"].to(device)


def last_part(name_or_folder: str) -> str:
    """Return the last part of a hub id or the name of a folder."""
    return public_name(name_or_folder).rpartition("/")[2]
