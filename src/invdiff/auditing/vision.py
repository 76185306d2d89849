"""Features of any `transformers` vision encoder (CLIP, DINOv2, ...), as further evidence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import ImageOps

from ..data.captioned import CaptionedImages
from ..files import fingerprint, read_tensors, write_tensors
from ..models.encoders import BATCH_SIZE, VisionEncoder
from ..progress import progress_bar


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
    encoder = VisionEncoder.load(name_or_folder)
    features = []
    with progress_bar("vision encoder", len(rows), enabled=progress) as bar:
        for batch in rows.split(BATCH_SIZE):
            images = [data.image(int(row)) for row in batch]
            views = [images, [ImageOps.mirror(image) for image in images]]
            features.append(np.stack([encoder.extract(view) for view in views], axis=1))
            bar.advance(len(batch))
    result = torch.from_numpy(np.concatenate(features))
    write_tensors(path, {"features": result})
    return result
