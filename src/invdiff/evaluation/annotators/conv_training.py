"""Training of the convolutional annotator: pixels, which images are held out, how batches are drawn and varied."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional

from ...data.captioned import CaptionedImages, readable_images
from ...progress import progress_bar

MAX_OVERSAMPLING = 20.0


def to_pixels(image: Image.Image, resolution: int) -> torch.Tensor:
    """An image's centre square as uint8, (3, resolution, resolution)."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    # Cropped first: a box given to `resize` lets its surroundings bleed in.
    square = image.convert("RGB").crop((left, top, left + side, top + side))
    return torch.from_numpy(np.array(square.resize((resolution, resolution), Image.Resampling.BILINEAR))).permute(
        2, 0, 1
    )


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels of uint8 as float32 in [-1, 1], same shape."""
    return pixels.float() / 127.5 - 1


def read_pixels(data: CaptionedImages, resolution: int, *, progress: bool) -> tuple[torch.Tensor, list[int]]:
    """The readable images as uint8, (N, 3, resolution, resolution), and their rows.

    Raises:
        DataError: More images are unreadable than the data allows.
    """
    images = readable_images(data, "reading images", progress=progress)
    rows, pixels = zip(*((row, to_pixels(image, resolution)) for row, image in images), strict=True)
    return torch.stack(pixels), list(rows)


def stratified_share(cells: NDArray[np.int64], share: float, generator: torch.Generator) -> NDArray[np.int64]:
    """Sorted rows that hold a `share` of each cell: at least one where a cell has two, never all.

    Args:
        cells: The number of each image's combination of attributes, (N,).
        share: Between 0 and 1.
        generator: Draws the rows.
    """
    chosen = []
    for cell in np.unique(cells):
        rows = np.flatnonzero(cells == cell)
        count = min(max(round(share * len(rows)), 1), len(rows) - 1)
        chosen.append(rows[torch.randperm(len(rows), generator=generator).numpy()[:count]])
    return np.sort(np.concatenate(chosen))


def even_weights(cells: NDArray[np.int64]) -> torch.Tensor:
    """Weights that draw each cell equally often, no image over 20 times as often as evenly, (N,)."""
    _, inverse, counts = np.unique(cells, return_inverse=True, return_counts=True)
    factors = len(cells) / (len(counts) * counts)
    return torch.from_numpy(np.minimum(factors, MAX_OVERSAMPLING)[inverse.reshape(-1)])


def train_network(
    network: torch.nn.Module,
    pixels: torch.Tensor,
    targets: torch.Tensor,
    *,
    rows: NDArray[np.int64],
    weights: torch.Tensor,
    steps: int,
    batch_size: int,
    learning_rate: float,
    generator: torch.Generator,
    progress: bool,
) -> None:
    """Minimise the sum of the attributes' cross-entropies by AdamW on a one-cycle schedule.

    Args:
        network: From normalised pixels, (batch, 3, height, width), to features and the logits of each attribute,
            (batch, classes), as a `ConvAnnotator`.
        pixels: uint8 images, (N, 3, height, width).
        targets: Class indices, (N, attributes).
        rows: The rows to train on, (M,).
        weights: How often each of them is drawn, (M,).
        steps: Optimiser steps.
        batch_size: Images per step.
        learning_rate: Peak of the schedule.
        generator: Draws batches and their variations.
        progress: Show a progress bar.
    """
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=1e-2)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps + 1)
    with progress_bar("annotator", steps, enabled=progress) as bar:
        for _ in range(steps):
            drawn = torch.multinomial(weights, batch_size, replacement=True, generator=generator).numpy()
            batch = torch.from_numpy(rows[drawn])
            _, logits = network(augment(normalise(pixels[batch]), generator))
            losses = [functional.cross_entropy(part, targets[batch, column]) for column, part in enumerate(logits)]
            loss = torch.stack(losses).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            bar.advance(loss=loss)


def augment(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Vary brightness, contrast, sharpness and noise as a VAE might; never flip: sides may matter.

    Args:
        pixels: Images in [-1, 1], (batch, 3, height, width).
        generator: Draws the variations.
    """

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(len(pixels), 1, 1, 1, generator=generator)

    blurred = functional.avg_pool2d(functional.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    pixels = torch.lerp(pixels, blurred, uniform(0.0, 1.0))
    mean = pixels.mean(dim=(1, 2, 3), keepdim=True)
    pixels = mean + (pixels - mean) * uniform(0.8, 1.2) + uniform(-0.15, 0.15)
    return pixels + uniform(0.0, 0.1) * torch.randn(pixels.shape, generator=generator)
