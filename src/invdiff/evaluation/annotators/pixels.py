"""Images as the convolutional annotator takes them."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image


def to_pixels(image: Image.Image, resolution: int) -> torch.Tensor:
    """Return an image's centre square at `resolution` as uint8, (3, resolution, resolution)."""
    image = image.convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    if image.width != image.height:  # cropped first: a box given to `resize` lets its surroundings bleed in
        image = image.crop((left, top, left + side, top + side))
    if side != resolution:
        image = image.resize((resolution, resolution), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """Return uint8 pixels as float32 in [-1, 1], same shape."""
    return pixels.float() / 127.5 - 1
