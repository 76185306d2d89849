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
from safetensors import SafetensorError

from ...data.captioned import CaptionedImages
from ...errors import DataError, ModelError, first_line
from ...models.encoders import model_name
from ...seeds import generator as derived_generator
from .annotations import Annotations, check_class_names
from .calibration import expected_calibration_error, fit_temperature
from .conv_training import even_weights, normalise, read_pixels, stratified_share, to_pixels, train_network
from .heldout import MEASURED, SUMMARY, TENSORS, HeldOut, Measurable, combinations
from .labelled import read_targets

NUM_FEATURES = 64
MIN_CALIBRATION = 20
"""Held-out images below which a temperature is mostly noise: all of them are measured instead."""


class ConvAnnotator(Measurable, ModelMixin, ConfigMixin):
    """A small conv net that annotates several attributes at once and gives 64 features for each image.

    Four convolutions see the image beside its two coordinates (so that "left" can be told from "right" after
    global averaging) and feed one linear head per attribute.

    Args:
        attributes: Attribute name to class names.
        resolution: Side in pixels that images are resized to.
        temperatures: Attribute name to what its logits are divided by, set by `calibrate`; None where there were
            too few held-out images to tell.
        holdout_calibration_error: Attribute name to the expected calibration error on images kept out of training and
            calibration, as {"uncalibrated": at temperature 1, "calibrated": as it is}.

    Raises:
        ModelError: A class is called "cannot tell".
    """

    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        *,
        attributes: Mapping[str, Sequence[str]],
        resolution: int = 64,
        temperatures: Mapping[str, float] | None = None,
        holdout_calibration_error: Mapping[str, Mapping[str, float]] | None = None,
    ) -> None:
        check_class_names(attributes, ModelError)
        super().__init__()
        self.name = "annotator"
        # Sorted because diffusers sorts the keys of a saved config, and the heads must keep their order.
        self.attributes = {name: tuple(attributes[name]) for name in sorted(attributes)}
        self.trunk = torch.nn.Sequential(
            _block(5, 24, stride=2),
            _block(24, 48, stride=2),
            _block(48, 64, stride=2),
            _block(64, NUM_FEATURES, stride=1),
        )
        self.heads = torch.nn.Linear(NUM_FEATURES, sum(len(names) for names in self.attributes.values()))

    @property
    def feature_name(self) -> str:
        """What its features are called: as the annotator is."""
        return self.name

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Features, (batch, 64), and, attribute by attribute, uncalibrated logits, (batch, classes).

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
        features = [np.zeros((0, NUM_FEATURES), np.float32)]
        probabilities = {name: [np.zeros((0, len(names)), np.float32)] for name, names in self.attributes.items()}
        while batch := list(islice(stream, batch_size)):
            pixels = torch.stack([to_pixels(image, self.config["resolution"]) for image in batch])
            batch_features, logits = self.forward(normalise(pixels.to(self.device)))
            # Copied: torch's own small pieces, kept, break up the heap, and memory grew by 20 KB an image.
            features.append(batch_features.float().cpu().numpy().copy())
            for name, values in zip(self.attributes, logits, strict=True):
                probabilities[name].append(self._calibrated(name, values).cpu().numpy().copy())
        return Annotations(
            self.attributes,
            {name: np.concatenate(parts) for name, parts in probabilities.items()},
            np.concatenate(features),
        )

    @torch.no_grad()
    def calibrate(self, pixels: torch.Tensor, targets: NDArray[np.int64], *, seed: int = 0) -> None:
        """Fit each attribute's temperature on half of the held-out images and measure on the other half.

        Halves are stratified over combinations of attributes. With fewer than 20 images to fit on, all are
        measured and probabilities stay as the net gives them.

        Args:
            pixels: Images that were kept out of training, uint8, (N, 3, resolution, resolution).
            targets: Their classes, (N, attributes), in the order of `attributes`.
            seed: Seed of the split.
        """
        self.eval()
        batches = [self.forward(normalise(batch.to(self.device)))[1] for batch in pixels.split(64)]
        logits = {
            name: torch.cat([parts[column] for parts in batches]).float().cpu()
            for column, name in enumerate(self.attributes)
        }
        truth = {name: targets[:, column] for column, name in enumerate(self.attributes)}
        fitted = stratified_share(combinations(targets), 0.5, derived_generator("calibrate", seed))
        temperatures = None
        if len(fitted) < MIN_CALIBRATION:
            fitted = fitted[:0]
        else:
            temperatures = {
                name: fit_temperature(logits[name][fitted].numpy(), truth[name][fitted]) for name in logits
            }
        self.register_to_config(temperatures=temperatures)
        judged = np.setdiff1d(np.arange(len(targets)), fitted)
        self.held_out = HeldOut(
            self.attributes,
            {name: self._calibrated(name, logits[name][judged]).numpy() for name in logits},
            {name: truth[name][judged] for name in logits},
        )
        figures = self.held_out.summary()
        raw = {name: logits[name][judged].softmax(dim=1).numpy() for name in logits}
        self.register_to_config(
            holdout_calibration_error={
                name: {
                    "uncalibrated": expected_calibration_error(raw[name], truth[name][judged]),
                    "calibrated": figures[name]["calibration_error"],
                }
                for name in logits
            }
        )

    def save_pretrained(self, save_directory: str | PathLike[str], **kwargs: Any) -> None:
        """Write weights, config and what was measured on held-out images into a folder."""
        super().save_pretrained(save_directory, **kwargs)  # type: ignore[misc]  # Measurable comes first
        folder = Path(save_directory)
        for name in (MEASURED, TENSORS, SUMMARY):  # another annotator's would be taken for this one's
            (folder / name).unlink(missing_ok=True)
        if self.held_out is not None:
            self.held_out.save(folder)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | PathLike[str], **kwargs: Any) -> ConvAnnotator:
        """Load from a folder or hub id, ready to `predict`; it is called as the folder is.

        Raises:
            ModelError: There is no annotator, or its files are absent, damaged or do not fit its config.
        """
        path = str(pretrained_model_name_or_path)
        try:
            config: Any = cls.load_config(path)
            found = config.get("_class_name") or "something else"
            if found != cls.__name__:
                raise ValueError(f"found {found}.")
            model = super().from_pretrained(path, use_safetensors=True, low_cpu_mem_usage=False, **kwargs)
            folder = Path(path)
            if not folder.is_dir():
                files = snapshot_download(path, revision=kwargs.get("revision"), allow_patterns=[TENSORS, SUMMARY])
                folder = Path(files)
            if (folder / TENSORS).is_file():
                model.use_held_out(HeldOut.load(folder))
        except (OSError, ValueError, RuntimeError, SafetensorError, TypeError, DataError) as error:
            raise ModelError(
                f"Expected an annotator in {path}, could not load it: {first_line(error)} "
                "Give a folder that `save_pretrained` wrote, or train one with `ConvAnnotator.fit`."
            ) from error
        model.name = model_name(path)
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
        """Train on labelled images, then calibrate and measure on held-out ones.

        Where attributes go together in `data`, a net can read one off the other, and Bias measured with it is
        wrong. So batches are drawn evenly over the combinations of attributes (none more than 20 times as
        often as it occurs), and the held-out accuracy of the worst combination is kept.
        The images are held in memory at `resolution`: 12 KB each at 64 pixels.

        Args:
            data: Images with attributes.
            attributes: Names to learn; all when None.
            steps: Optimiser steps.
            batch_size: Images per step.
            learning_rate: Peak of the one-cycle schedule.
            holdout: Share of each combination of attributes that is kept out of training: half of it for
                calibration, half to be measured.
            resolution: Side in pixels.
            seed: Seed of the splits, weights, batches and augmentation; the global generator is left alone.
            progress: Show progress bars.

        Raises:
            DataError: An attribute is absent, lacks values, has one class or more than 50, or one called "cannot
                tell"; or more images are unreadable than the data allows; or no two images have the same attributes.
        """
        if steps < 1 or batch_size < 1 or not 0 < holdout < 1:
            raise DataError(
                "Expected steps and batch_size of at least 1 and a holdout between 0 and 1, "
                f"got {steps}, {batch_size} and {holdout}."
            )
        classes, targets = read_targets(data, attributes)
        check_class_names(classes, DataError)
        pixels, readable = read_pixels(data, resolution, progress=progress)
        targets = targets[readable]
        generator = torch.Generator().manual_seed(seed)
        cells = combinations(targets)
        held_out = stratified_share(cells, holdout, generator)
        if len(held_out) == 0:
            raise DataError(
                "Expected two images or more with the same attributes, found none, so no image can be held out. "
                "Give more images or fewer attributes."
            )
        rows = np.setdiff1d(np.arange(len(pixels)), held_out)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            model = cls(attributes=classes, resolution=resolution)
        model.train()
        train_network(
            model,
            pixels,
            torch.from_numpy(targets),
            rows=rows,
            weights=even_weights(cells[rows]),
            steps=steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
            generator=generator,
            progress=progress,
        )
        model.calibrate(pixels[held_out], targets[held_out], seed=seed)
        return model

    def _calibrated(self, attribute: str, logits: torch.Tensor) -> torch.Tensor:
        temperatures = self.config["temperatures"] or {}
        return (logits.float() / temperatures.get(attribute, 1.0)).softmax(dim=1)


def _block(in_channels: int, out_channels: int, *, stride: int) -> torch.nn.Sequential:
    return torch.nn.Sequential(
        torch.nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1),
        torch.nn.GroupNorm(8, out_channels),
        torch.nn.ReLU(inplace=True),
    )
