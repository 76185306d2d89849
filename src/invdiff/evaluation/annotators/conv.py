"""A small convolutional annotator that is trained on labelled images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from huggingface_hub import snapshot_download
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional

from ...data.captioned import CaptionedImages, readable_images
from ...errors import DataError
from ...files import atomic_folder
from ...models.encoders import model_name
from ...models.load import load_complete, loading
from ...progress import progress_bar
from ...seeds import generator as derived_generator
from .annotations import Annotations, class_names
from .heldout import MEASURED, SUMMARY, TENSORS, HeldOut, Measurable, combinations, fit_temperature
from .labels import read_targets

NUM_FEATURES = 64
MIN_CALIBRATION = 20  # held-out images below which a temperature is mostly noise: all of them are measured instead
MAX_OVERSAMPLING = 20.0  # how much oftener than evenly an image of a rare combination of attributes may be drawn


class ConvAnnotator(Measurable, ModelMixin, ConfigMixin):
    """A small conv net that annotates several attributes at once and gives 64 features for each image.

    Four convolutions see the image beside its two coordinates ("left" stays "left" after global averaging) and feed
    one linear head per attribute, whose logits are divided by the temperature that `calibrate` sets.
    """

    @register_to_config
    def __init__(
        self,
        *,
        attributes: Mapping[str, Sequence[str]],
        resolution: int = 64,
        temperatures: Mapping[str, float] | None = None,
    ) -> None:
        classes = class_names(attributes)
        super().__init__()
        self.name = self.feature_name = "annotator"
        # Sorted because diffusers sorts the keys of a saved config, and the heads must keep their order.
        self.attributes = dict(sorted(classes.items()))
        layers = []
        for channels, width, stride in ((5, 24, 2), (24, 48, 2), (48, 64, 2), (64, NUM_FEATURES, 1)):
            convolution = torch.nn.Conv2d(channels, width, 3, stride=stride, padding=1)
            layers.append(torch.nn.Sequential(convolution, torch.nn.GroupNorm(8, width), torch.nn.ReLU(inplace=True)))
        self.trunk = torch.nn.Sequential(*layers)
        self.heads = torch.nn.Linear(NUM_FEATURES, sum(map(len, self.attributes.values())))

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Features, (batch, 64), and each attribute's uncalibrated logits, (batch, classes), of pixels in [-1, 1]."""
        batch, _, height, width = pixels.shape
        y, x = (torch.linspace(-1, 1, n, device=pixels.device, dtype=pixels.dtype) for n in (height, width))
        coordinates = torch.stack(torch.meshgrid(y, x, indexing="ij")).expand(batch, -1, -1, -1)
        features = self.trunk(torch.cat([pixels, coordinates], dim=1)).mean(dim=(2, 3))
        return features, list(self.heads(features).split(list(map(len, self.attributes.values())), dim=1))

    @torch.no_grad()
    def predict(self, images: Iterable[Image.Image], *, batch_size: int = 64) -> Annotations:
        """Annotate `images`, a batch at a time; an iterator is never held in memory as a whole."""
        self.eval()
        stream = iter(images)
        features = [np.zeros((0, NUM_FEATURES), np.float32)]
        probabilities = {name: [np.zeros((0, len(names)), np.float32)] for name, names in self.attributes.items()}
        while batch := list(islice(stream, batch_size)):
            pixels = torch.stack([to_pixels(image, self.config["resolution"]) for image in batch])
            batch_features, logits = self.forward(normalise(pixels.to(self.device)))
            # Copied: torch's own small pieces, kept, break up the heap, and memory grew by 20 KB an image.
            features.append(batch_features.float().cpu().numpy().copy())
            for name, values in zip(self.attributes, logits, strict=True):
                probabilities[name].append(self._calibrated(name, values).cpu().numpy().copy())
        joined = {name: np.concatenate(parts) for name, parts in probabilities.items()}
        return Annotations(self.attributes, joined, np.concatenate(features))

    @torch.no_grad()
    def calibrate(self, pixels: torch.Tensor, targets: NDArray[np.int64], *, seed: int = 0) -> None:
        """Fit each attribute's temperature on half of the held-out images and measure on the other half.

        Images are uint8, (N, 3, resolution, resolution), targets class indices, (N, attributes), stratified over
        combinations. With fewer than 20 images to fit on, all are measured and probabilities stay.
        """
        self.eval()
        batches = [self.forward(normalise(batch.to(self.device)))[1] for batch in pixels.split(64)]
        logits = [torch.cat(parts).float().cpu() for parts in zip(*batches, strict=True)]
        fitted = stratified_share(combinations(targets), 0.5, derived_generator("calibrate", seed))
        named, temperatures = [*zip(self.attributes, logits, targets.T, strict=True)], None
        if len(fitted) < MIN_CALIBRATION:
            fitted = fitted[:0]
        else:
            temperatures = {name: fit_temperature(values[fitted], truth[fitted]) for name, values, truth in named}
        self.register_to_config(temperatures=temperatures)
        judged = np.setdiff1d(np.arange(len(targets)), fitted)
        probabilities = {name: self._calibrated(name, values[judged]).numpy() for name, values, _ in named}
        self.use_held_out(HeldOut(self.attributes, probabilities, truth={n: t[judged] for n, _, t in named}))

    def save_pretrained(self, save_directory: str | PathLike[str], **kwargs: Any) -> None:
        """Write weights, config and what was measured on held-out images into a folder."""
        folder = Path(save_directory)
        with atomic_folder(folder) as temporary:
            super().save_pretrained(temporary, **kwargs)  # type: ignore[misc]  # Measurable comes first
        for name in (MEASURED, TENSORS, SUMMARY):  # another annotator's would be taken for this one's
            (folder / name).unlink(missing_ok=True)
        if self.held_out is not None:
            self.held_out.save(folder)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | PathLike[str], **kwargs: Any) -> ConvAnnotator:
        """Load from a folder or hub id, ready to `predict`; it is called as the folder is."""
        path = str(pretrained_model_name_or_path)
        remedy = "Give a folder that `save_pretrained` wrote, or train one with `ConvAnnotator.fit`."
        with loading("an annotator", path, remedy):
            config: Any = cls.load_config(path)
            found = config.get("_class_name") or "something else"
            if found != cls.__name__:
                raise ValueError(f"found {found}")
            model = load_complete(super(), path, use_safetensors=True, **kwargs)
            folder = Path(path)
            if not folder.is_dir():
                files = [TENSORS, SUMMARY]
                folder = Path(snapshot_download(path, revision=kwargs.get("revision"), allow_patterns=files))
        if (folder / TENSORS).is_file():
            model.use_held_out(HeldOut.load(folder))
        model.name = model.feature_name = model_name(path)
        return model

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
        """Train on labelled images, then calibrate and measure on a share `holdout` of each combination of attributes.

        Where attributes go together, a net can read one off the other, and Bias measured with it is wrong. So batches
        are drawn evenly over their combinations (none more than 20 times as often as it occurs). Images are held in
        memory at `resolution`: 12 KB each at 64 pixels. The global generator is left alone.
        """
        classes, targets = read_targets(data, attributes)
        class_names(classes, DataError)
        images = readable_images(data, "reading images", progress=progress)
        readable, read = zip(*((row, to_pixels(image, resolution)) for row, image in images), strict=True)
        pixels, targets = torch.stack(read), targets[list(readable)]
        generator = torch.Generator().manual_seed(seed)
        cells = combinations(targets)
        held_out = stratified_share(cells, holdout, generator)
        if len(held_out) == 0:
            raise DataError("Expected two images of the same attributes, to hold one out, found none. Give more.")
        rows = np.setdiff1d(np.arange(len(pixels)), held_out)
        counts = np.bincount(cells[rows])  # each cell is drawn equally often, within a limit
        weights = np.minimum(len(rows) / (len(counts) * counts), MAX_OVERSAMPLING)[cells[rows]]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            model = cls(attributes=classes, resolution=resolution)
        model.train()
        truth, chances = torch.from_numpy(targets), torch.from_numpy(weights)
        optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=1e-2)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps + 1)
        with progress_bar("annotator", steps, enabled=progress) as bar:
            for _ in range(steps):
                drawn = torch.multinomial(chances, batch_size, replacement=True, generator=generator).numpy()
                batch = torch.from_numpy(rows[drawn])
                _, logits = model(augment(normalise(pixels[batch]), generator))
                losses = [functional.cross_entropy(part, truth[batch, column]) for column, part in enumerate(logits)]
                loss = torch.stack(losses).sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                scheduler.step()
                bar.advance(loss=loss)
        model.calibrate(pixels[held_out], targets[held_out], seed=seed)
        return model

    def _calibrated(self, attribute: str, logits: torch.Tensor) -> torch.Tensor:
        temperatures = self.config["temperatures"] or {}
        return (logits.float() / temperatures.get(attribute, 1.0)).softmax(dim=1)


def to_pixels(image: Image.Image, resolution: int) -> torch.Tensor:
    """An image's centre square as uint8, (3, resolution, resolution)."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    # Cropped first: a box given to `resize` lets its surroundings bleed in.
    square = image.convert("RGB").crop((left, top, left + side, top + side))
    small = square.resize((resolution, resolution), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1)


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels of uint8 as float32 in [-1, 1], same shape."""
    return pixels.float() / 127.5 - 1


def stratified_share(cells: NDArray[np.int64], share: float, generator: torch.Generator) -> NDArray[np.int64]:
    """Sorted rows that hold a `share` of each of `cells`, (N,): at least one where a cell has two, never all."""
    chosen = []
    for cell in np.unique(cells):
        rows = np.flatnonzero(cells == cell)
        count = min(max(round(share * len(rows)), 1), len(rows) - 1)
        chosen.append(rows[torch.randperm(len(rows), generator=generator).numpy()[:count]])
    return np.sort(np.concatenate(chosen))


def augment(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Images in [-1, 1] varied in brightness, contrast, sharpness and noise as by a VAE, unflipped: sides matter."""

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(len(pixels), 1, 1, 1, generator=generator)

    blurred = functional.avg_pool2d(functional.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    pixels = torch.lerp(pixels, blurred, uniform(0.0, 1.0))
    mean = pixels.mean(dim=(1, 2, 3), keepdim=True)
    pixels = mean + (pixels - mean) * uniform(0.8, 1.2) + uniform(-0.15, 0.15)
    return pixels + uniform(0.0, 0.1) * torch.randn(pixels.shape, generator=generator)
