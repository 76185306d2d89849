"""Features of any `transformers` vision encoder (CLIP, DINOv2, ...), as further evidence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import ImageOps
from transformers import AutoImageProcessor, AutoModel

from ..data.captioned import CaptionedImages
from ..errors import ModelError
from ..files import fingerprint, read_tensors, write_tensors
from ..pipelines import default_device
from ..progress import progress_bar

BATCH_SIZE = 32


@torch.no_grad()
def encode_vision(
    name_or_folder: str,
    data: CaptionedImages,
    rows: torch.Tensor,
    cache_dir: Path,
    *,
    progress: bool = True,
) -> torch.Tensor:
    """Return the encoder's pooled features of images `rows`, (len(rows), 2, D), float32, cached on disk.

    Each image is seen twice, as it is and mirrored: what changes with that is not a property to group by.

    Args:
        name_or_folder: A folder or a hub id that `AutoModel` and `AutoImageProcessor` can load.
        data: The images.
        rows: Which of them, indices into `data`.
        cache_dir: Where the features are kept.
        progress: Show a progress bar.

    Raises:
        ModelError: There is no vision encoder there.
    """
    key = fingerprint(name_or_folder, data.fingerprint, rows.numpy().tobytes())
    path = cache_dir / f"{key}.safetensors"
    if path.exists():
        return read_tensors(path)["features"]
    try:
        processor = AutoImageProcessor.from_pretrained(name_or_folder)
        model: Any = AutoModel.from_pretrained(name_or_folder)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"Expected a vision encoder at {name_or_folder}, could not load it: {str(error).splitlines()[0]}"
        ) from error
    device = default_device()
    model.to(device).eval()
    features = []
    with progress_bar("vision encoder", len(rows), enabled=progress) as bar:
        for batch in rows.split(BATCH_SIZE):
            images = [data.image(int(row)) for row in batch]
            views = [images, [ImageOps.mirror(image) for image in images]]
            pixels = [processor(view, return_tensors="pt")["pixel_values"].to(device) for view in views]
            features.append(torch.stack([_pooled(model, view).float().cpu() for view in pixels], dim=1))
            bar.advance(len(batch))
    result = torch.cat(features)
    write_tensors(path, {"features": result})
    return result


def _pooled(model: Any, pixel_values: torch.Tensor) -> torch.Tensor:
    """Return one vector per image: the joint embedding of a two-tower model, or the pooled output."""
    if hasattr(model, "get_image_features"):
        output = model.get_image_features(pixel_values=pixel_values)
    else:
        output = model(pixel_values=pixel_values)
    if isinstance(output, torch.Tensor):
        return output
    if getattr(output, "pooler_output", None) is not None:
        return output.pooler_output.flatten(1)
    return output.last_hidden_state[:, 0]
