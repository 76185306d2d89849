"""Annotators tell which class of each attribute an image shows, for measuring only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from os import PathLike
from typing import Any, Protocol

import numpy as np
import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError
from torch.nn import functional

from ..data.captioned import CaptionedImages, UnreadableImage
from ..errors import DataError, ModelError
from ..progress import progress_bar

MAX_CLASSES = 50
MAX_OVERSAMPLING = 20.0
MIN_CELL = 10
"""Held-out images below which the accuracy of one combination of attributes is chance."""


@dataclass(frozen=True)
class Annotations:
    """What an annotator saw in N images."""

    attributes: Mapping[str, tuple[str, ...]]
    """Attribute name to class names."""
    probabilities: Mapping[str, NDArray[np.float32]]
    """Attribute name to class probabilities, (N, classes)."""
    features: NDArray[np.float32]
    """Features for Fréchet distances, (N, D)."""

    def labels(self, attribute: str) -> list[str]:
        """Return the most probable class of `attribute` for each image."""
        names = self.attributes[attribute]
        return [names[index] for index in self.probabilities[attribute].argmax(axis=1)]


class Annotator(Protocol):
    """Anything that names the classes in images: `evaluate` needs no more than this."""

    @property
    def attributes(self) -> Mapping[str, tuple[str, ...]]:
        """Attribute name to class names."""
        ...

    def predict(self, images: Iterable[Image.Image]) -> Annotations:
        """Annotate `images`."""
        ...


class ConvAnnotator(ModelMixin, ConfigMixin):
    """A small conv net that annotates several attributes at once and gives 64 features for each image.

    Four convolutions see the image beside its two coordinates (so that "left" can be told from "right" after
    global averaging) and feed one linear head per attribute.

    Args:
        attributes: Attribute name to class names.
        resolution: Side in pixels that images are resized to.
        holdout_accuracy: Attribute name to accuracy on images kept out of training, set by `fit`.
        holdout_worst_group: Attribute name to the lowest held-out accuracy among the combinations of
            attributes with ten images or more, None where there are none. Far below `holdout_accuracy`, it
            means that the annotator leans on another attribute.
        confusion: Attribute name to held-out counts, (true class, predicted class).
    """

    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        *,
        attributes: Mapping[str, Sequence[str]],
        resolution: int = 64,
        holdout_accuracy: Mapping[str, float] | None = None,
        holdout_worst_group: Mapping[str, float | None] | None = None,
        confusion: Mapping[str, Sequence[Sequence[int]]] | None = None,
    ) -> None:
        super().__init__()
        # Sorted because diffusers sorts the keys of a saved config, and the heads must keep their order.
        self.attributes = {name: tuple(attributes[name]) for name in sorted(attributes)}
        self.trunk = torch.nn.Sequential(
            _block(5, 24, stride=2),
            _block(24, 48, stride=2),
            _block(48, 64, stride=2),
            _block(64, 64, stride=1),
        )
        self.heads = torch.nn.Linear(64, sum(len(names) for names in self.attributes.values()))

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return features (batch, 64) and, attribute by attribute, logits (batch, classes).

        Args:
            pixels: Images in [-1, 1], (batch, 3, height, width).
        """
        batch, _, height, width = pixels.shape
        y = torch.linspace(-1, 1, height, device=pixels.device, dtype=pixels.dtype)
        x = torch.linspace(-1, 1, width, device=pixels.device, dtype=pixels.dtype)
        coordinates = torch.stack(torch.meshgrid(y, x, indexing="ij")).expand(batch, -1, -1, -1)
        features = self.trunk(torch.cat([pixels, coordinates], dim=1)).mean(dim=(2, 3))
        logits = self.heads(features).split([len(names) for names in self.attributes.values()], dim=1)
        return features, list(logits)

    @torch.no_grad()
    def predict(self, images: Iterable[Image.Image], *, batch_size: int = 64) -> Annotations:
        """Annotate `images`, a batch at a time; an iterator is never held in memory as a whole."""
        self.eval()
        stream = iter(images)
        features: list[NDArray[np.float32]] = []
        probabilities: dict[str, list[NDArray[np.float32]]] = {name: [] for name in self.attributes}
        while batch := list(islice(stream, batch_size)):
            pixels = torch.stack([to_pixels(image, self.config["resolution"]) for image in batch])
            batch_features, logits = self.forward(_normalise(pixels.to(self.device)))
            features.append(batch_features.float().cpu().numpy())
            for name, values in zip(self.attributes, logits, strict=True):
                probabilities[name].append(values.float().softmax(dim=1).cpu().numpy())
        return Annotations(
            attributes=self.attributes,
            probabilities={
                name: np.concatenate([np.zeros((0, len(classes)), np.float32), *probabilities[name]])
                for name, classes in self.attributes.items()
            },
            features=np.concatenate([np.zeros((0, 64), np.float32), *features]),
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | PathLike[str], **kwargs: Any) -> ConvAnnotator:
        """Load from a folder or hub id, ready to `predict`.

        Raises:
            ModelError: There is no annotator, or its weights are absent, damaged or do not fit its config.
        """
        path = str(pretrained_model_name_or_path)
        remedy = "Give a folder that `save_pretrained` wrote, or train one with `ConvAnnotator.fit`."
        try:
            config: Any = cls.load_config(path)
        except (OSError, ValueError) as error:
            raise ModelError(f"Expected an annotator in {path}, found none. {remedy}") from error
        found = config.get("_class_name")
        if found != cls.__name__:
            raise ModelError(f"Expected an annotator in {path}, found {found or 'something else'}. {remedy}")
        try:
            return super().from_pretrained(path, use_safetensors=True, low_cpu_mem_usage=False, **kwargs)
        except (OSError, ValueError, RuntimeError, SafetensorError, TypeError) as error:
            raise ModelError(f"Could not load the annotator in {path}: {error} {remedy}") from error

    @classmethod
    def fit(
        cls,
        data: CaptionedImages,
        attributes: Sequence[str] | None = None,
        *,
        steps: int = 400,
        batch_size: int = 64,
        learning_rate: float = 3e-3,
        holdout: float = 0.2,
        resolution: int = 64,
        seed: int = 0,
        progress: bool = True,
    ) -> ConvAnnotator:
        """Train on labelled images and record how well held-out ones are annotated.

        Where attributes go together in `data`, a net can read one off the other, and Bias measured with it is
        wrong. So batches are drawn evenly over the combinations of attributes (none more than 20 times as
        often as it occurs), and the held-out accuracy of the worst combination is kept in the config.
        The images are held in memory at `resolution`: 12 KB each at 64 pixels.

        Args:
            data: Images with attributes.
            attributes: Names to learn; all when None.
            steps: Optimiser steps.
            batch_size: Images per step.
            learning_rate: Peak of the one-cycle schedule.
            holdout: Share of each combination of attributes that is kept out of training and measured.
            resolution: Side in pixels.
            seed: Seed of the split, weights, batches and augmentation; the global generator is left alone.
            progress: Show progress bars.

        Raises:
            DataError: An attribute is absent, lacks values, or has one class or more than 50; or more images
                are unreadable than the data allows.
        """
        if steps < 1 or batch_size < 1 or not 0 < holdout < 1:
            raise DataError(
                "Expected steps and batch_size of at least 1 and a holdout between 0 and 1, "
                f"got {steps}, {batch_size} and {holdout}."
            )
        classes, targets = _read_attributes(data, attributes)
        pixels, readable = _read_pixels(data, resolution, progress)
        targets = targets[readable]
        generator = torch.Generator().manual_seed(seed)
        cells = np.unique(targets.numpy(), axis=0, return_inverse=True)[1].reshape(-1)
        held_out = _stratified_holdout(cells, holdout, generator)
        train = np.setdiff1d(np.arange(len(pixels)), held_out)

        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            model = cls(attributes=classes, resolution=resolution)
        weights = _even_weights(cells[train])
        optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=1e-2)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps + 1)
        model.train()
        with progress_bar("annotator", steps, enabled=progress) as bar:
            for _ in range(steps):
                drawn = torch.multinomial(weights, batch_size, replacement=True, generator=generator).numpy()
                rows = torch.from_numpy(train[drawn])
                _, logits = model.forward(_augment(_normalise(pixels[rows]), generator))
                losses = [functional.cross_entropy(part, targets[rows, column]) for column, part in enumerate(logits)]
                loss = torch.stack(losses).sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                scheduler.step()
                bar.advance(loss=loss)
        model.register_to_config(**_measure(model, pixels[held_out], targets[held_out], cells[held_out]))
        return model.eval()


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


def _block(in_channels: int, out_channels: int, *, stride: int) -> torch.nn.Sequential:
    return torch.nn.Sequential(
        torch.nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1),
        torch.nn.GroupNorm(8, out_channels),
        torch.nn.ReLU(inplace=True),
    )


def _normalise(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.float() / 127.5 - 1


def _augment(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Vary brightness, contrast, sharpness and noise as a VAE might; never flip: sides may matter."""

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(len(pixels), 1, 1, 1, generator=generator)

    blurred = functional.avg_pool2d(functional.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    pixels = torch.lerp(pixels, blurred, uniform(0.0, 1.0))
    mean = pixels.mean(dim=(1, 2, 3), keepdim=True)
    pixels = mean + (pixels - mean) * uniform(0.8, 1.2) + uniform(-0.15, 0.15)
    return pixels + uniform(0.0, 0.1) * torch.randn(pixels.shape, generator=generator)


def _read_attributes(
    data: CaptionedImages, attributes: Sequence[str] | None
) -> tuple[dict[str, tuple[str, ...]], torch.Tensor]:
    """Return class names by attribute, names sorted, and class indices (N, attributes) in that order."""
    known = ", ".join(data.attributes) or "none"
    names = sorted(set(data.attributes if attributes is None else attributes))
    if not names:
        raise DataError(f"Expected at least one attribute to learn, got none; the data has {known}.")
    classes: dict[str, tuple[str, ...]] = {}
    columns = []
    for name in names:
        if name not in data.attributes:
            raise DataError(f"Expected attribute {name!r} in the data, found {known}. Choose one of these.")
        values = ["" if _is_missing(value) else str(value) for value in data.attributes[name]]
        missing = sum(value == "" for value in values)
        if missing:
            raise DataError(
                f"Expected a value of attribute {name!r} for every image, found none for {missing} of "
                f"{len(values)}. Fill them in or leave those images out."
            )
        classes[name] = tuple(sorted(set(values)))
        if not 2 <= len(classes[name]) <= MAX_CLASSES:
            raise DataError(
                f"Expected attribute {name!r} to have 2 to {MAX_CLASSES} classes, "
                f"found {len(classes[name])}. Choose other attributes, or put numbers into a few bins first."
            )
        position = {value: index for index, value in enumerate(classes[name])}
        columns.append([position[value] for value in values])
    return classes, torch.tensor(columns).T


def _is_missing(value: Any) -> bool:
    return value is None or value == "" or value != value  # NaN differs from itself


def _read_pixels(data: CaptionedImages, resolution: int, progress: bool) -> tuple[torch.Tensor, list[int]]:
    """Return the readable images as uint8, (N, 3, resolution, resolution), and their rows."""
    pixels: list[torch.Tensor] = []
    rows: list[int] = []
    with progress_bar("reading images", len(data), enabled=progress) as bar:
        for index in range(len(data)):
            bar.advance()
            try:
                pixels.append(to_pixels(data.image(index), resolution))
            except UnreadableImage as error:
                if index + 1 - len(rows) > data.max_unreadable * len(data):
                    raise DataError(f"Too many images are unreadable; the last: {error}") from error
                continue
            rows.append(index)
    return torch.stack(pixels), rows


def _stratified_holdout(cells: NDArray[np.int64], holdout: float, generator: torch.Generator) -> NDArray[np.int64]:
    """Return sorted rows: a share `holdout` of each cell, at least one where a cell has two, never all."""
    chosen = []
    for cell in np.unique(cells):
        rows = np.flatnonzero(cells == cell)
        count = min(max(round(holdout * len(rows)), 1), len(rows) - 1)
        chosen.append(rows[torch.randperm(len(rows), generator=generator).numpy()[:count]])
    held_out = np.sort(np.concatenate(chosen))
    if len(held_out) == 0:
        raise DataError(
            "Expected two images or more with the same attributes, found none, so no image can be held out. "
            "Give more images or fewer attributes."
        )
    return held_out


def _even_weights(cells: NDArray[np.int64]) -> torch.Tensor:
    _, inverse, counts = np.unique(cells, return_inverse=True, return_counts=True)
    factors = len(cells) / (len(counts) * counts)
    return torch.from_numpy(np.minimum(factors, MAX_OVERSAMPLING)[inverse.reshape(-1)])


@torch.no_grad()
def _measure(
    model: ConvAnnotator, pixels: torch.Tensor, targets: torch.Tensor, cells: NDArray[np.int64]
) -> dict[str, dict[str, Any]]:
    model.eval()
    parts = [model.forward(_normalise(batch))[1] for batch in pixels.split(64)]
    values, counts = np.unique(cells, return_counts=True)
    large = values[counts >= MIN_CELL]
    accuracy: dict[str, float] = {}
    worst: dict[str, float | None] = {}
    confusion: dict[str, list[list[int]]] = {}
    for column, (name, classes) in enumerate(model.attributes.items()):
        predicted = torch.cat([logits[column].argmax(dim=1) for logits in parts])
        flat = targets[:, column] * len(classes) + predicted
        table = torch.bincount(flat, minlength=len(classes) ** 2).reshape(len(classes), len(classes))
        correct = (targets[:, column] == predicted).numpy()
        accuracy[name] = float(correct.mean())
        by_cell = [float(correct[cells == cell].mean()) for cell in large]
        worst[name] = min(by_cell, default=None)
        confusion[name] = table.tolist()
    return {"holdout_accuracy": accuracy, "holdout_worst_group": worst, "confusion": confusion}
