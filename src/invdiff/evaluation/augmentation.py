"""The augmentation test: what a classifier learns from generated images, measured on real ones.

A classifier trained on images that carry an accident leans on it, and fails on the group that contradicts it. So the
accuracy of the worst group of real test images tells how far a model's images are free of the accident, with no
annotator in between (Sagawa et al., "Distributionally robust neural networks", ICLR 2020, for worst-group accuracy;
Hou et al., "InvDiff", KDD 2025, for the test). The mean over groups belongs beside it: images can also be too poor,
or too much alike, to learn the subject from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ..config import AugmentationConfig
from ..data.captioned import CaptionedImages
from ..errors import DataError, EvaluationError, TrainingError
from ..progress import progress_bar
from ..seeds import derived_seed, generator
from .annotators.conv import ConvAnnotator
from .annotators.conv_training import read_pixels, train_network
from .annotators.labelled import read_targets
from .annotators.pixels import normalise, to_pixels
from .augmentation_results import (
    MIN_GROUP,
    AugmentationResults,
    TrainedOn,
    group_accuracy,
    over_seeds,
)
from .describe import open_image
from .manifest import Folders, Row, common_prompts, read_manifest, resolve_folders, scale_keys
from .subjects import named_subjects

__all__ = ["AugmentationConfig", "AugmentationResults", "augmentation_test"]

REAL = "real"
"""The row of a classifier trained on real images alone."""
MIN_TRAINING = 10
"""Generated images of a subject below which there is nothing to learn."""


class _Column(NamedTuple):
    """One attribute of N images."""

    classes: tuple[str, ...]
    values: NDArray[np.int64]
    """Class indices, (N,)."""


@dataclass(frozen=True, eq=False)
class _Images:
    """N labelled images in memory."""

    pixels: torch.Tensor
    """uint8, (N, 3, resolution, resolution)."""
    labels: NDArray[np.int64]
    """Class indices, (N,)."""

    def __add__(self, other: _Images) -> _Images:
        return _Images(torch.cat([self.pixels, other.pixels]), np.concatenate([self.labels, other.labels]))

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class _Test:
    """Real test images."""

    images: _Images
    groups: list[str]
    """Each image's group."""
    sizes: Mapping[str, int]
    """Group to number of images, of groups that are large enough."""
    notes: list[str]
    """Which groups are not."""


def augmentation_test(
    folders: Mapping[str, Folders] | str | Path,
    test: CaptionedImages,
    *,
    subject_attribute: str,
    attribute: str,
    subject_of: Mapping[str, str] | None = None,
    guidance_scale: float | None = None,
    train: CaptionedImages | None = None,
    config: AugmentationConfig | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    progress: bool = True,
) -> AugmentationResults:
    """Train classifiers on each model's images and measure them on real images, group by group.

    A generated image's label is the subject that its prompt names. Every model gives as many images of each subject,
    the fewest that any of them has, and the same steps and seeds, so that only the images differ. Classifiers see
    subjects alone and draw images uniformly: nothing in training knows of the attribute.

    Args:
        folders: Models and their images, as for `evaluate`; of prompts that do not state the attribute.
        test: Real images with both attributes, balanced or not. Groups are the combinations of the two.
        subject_attribute: What classifiers tell apart: a column of `test` whose classes the prompts name.
        attribute: The accident: another column of `test`.
        subject_of: Prompt to subject. By default the longest class name that occurs in the prompt as a word.
            Images of prompts without a subject are left out.
        guidance_scale: Which images to use, where a model has several.
        train: Real training images with the subject in a column, biased as they are. With them a classifier is
            trained on these alone ("real") too, and, for each model, on these and its images ("real + base").
        config: How classifiers are trained.
        seeds: One classifier for each.
        progress: Show progress bars.

    Raises:
        EvaluationError: A folder, manifest or generated image is absent or damaged; no prompt names a subject, or a
            model has too few images of one; models differ in their prompts or have several guidance scales; a
            column is absent, incomplete or of a single class; the groups are too small; or a setting is out of range.
        DataError: More real images are unreadable than their data allows.
        TrainingError: A classifier diverged.
    """
    config = config or AugmentationConfig()
    if not seeds or len(set(seeds)) < len(seeds):
        raise EvaluationError(f"Expected different seeds, at least one, got {list(seeds)}. 0, 1, 2 will do.")
    if subject_attribute == attribute:
        raise EvaluationError(f"Expected two attributes, got {attribute!r} for both. Name the accident as attribute.")
    subjects, accidents = _column(test, subject_attribute, "test"), _column(test, attribute, "test")
    classes = subjects.classes
    rows_by_model, labels, notes = _generated(folders, classes, subject_of, guidance_scale)
    if train is not None and any(model.split(" + ")[0] == REAL for model in rows_by_model):
        raise EvaluationError(f"Expected models of other names than {REAL!r} beside train. Rename that model.")
    per_class = min(
        count for rows in rows_by_model.values() for count in Counter(labels[row.prompt] for row in rows).values()
    )
    scales = {model: rows[0].scale_key for model, rows in rows_by_model.items()}
    if len(set(scales.values())) > 1:
        notes.append(f"models are compared at different guidance scales: {scales}")
    tested = _read_test(test, subjects, accidents, config.resolution, progress)
    real = None if train is None else _read_real(train, subject_attribute, classes, config.resolution, progress)
    for which, data, images in (("test", test, tested.images), ("training", train, real)):
        if data is not None and images is not None and len(images) < len(data):
            notes.append(f"{len(data) - len(images)} of {len(data)} {which} images cannot be read and are left out")

    models: dict[str, TrainedOn] = {}
    sources = len(rows_by_model) * (1 if real is None else 2) + (real is not None)
    with progress_bar("classifiers", sources * len(seeds), enabled=progress) as bar:

        def learn(images: _Images, rows_by_seed: Mapping[int, NDArray[np.int64]], scale: str) -> TrainedOn:
            by_seed = {}
            for seed, rows in rows_by_seed.items():
                classifier = _fit(images, rows, classes, config, seed)
                right = _predict(classifier, tested.images.pixels) == tested.images.labels
                by_seed[str(seed)] = group_accuracy(right, tested.groups)
                bar.advance()
            counts = np.bincount(images.labels[rows_by_seed[seeds[0]]], minlength=len(classes))
            return over_seeds(by_seed, tested.sizes, dict(zip(classes, counts.tolist(), strict=True)), scale)

        if real is not None:
            models[REAL] = learn(real, dict.fromkeys(seeds, np.arange(len(real))), "")
        for model, rows in rows_by_model.items():
            images = _read(rows, labels, config.resolution)
            drawn = {seed: _draw(images.labels, per_class, seed) for seed in seeds}
            models[model] = learn(images, drawn, scales[model])
            if real is not None:
                added = {seed: np.append(np.arange(len(real)), len(real) + own) for seed, own in drawn.items()}
                models[f"{REAL} + {model}"] = learn(real + images, added, scales[model])
    return AugmentationResults(
        models=models,
        subject_attribute=subject_attribute,
        attribute=attribute,
        classes=classes,
        test_images=tested.sizes,
        config=config,
        seeds=tuple(seeds),
        notes=(*notes, *tested.notes),
    )


def _column(data: CaptionedImages, name: str, which: str) -> _Column:
    try:
        classes, targets = read_targets(data, [name])
    except DataError as error:
        raise EvaluationError(f"The {which} images do not do: {error}") from error
    return _Column(classes[name], targets[:, 0])


def _generated(
    folders: Mapping[str, Folders] | str | Path,
    classes: Sequence[str],
    subject_of: Mapping[str, str] | None,
    guidance_scale: float | None,
) -> tuple[dict[str, list[Row]], dict[str, int], list[str]]:
    """Return model to the images whose prompt names a subject, prompt to its class index, and notes."""
    rows_by_model = {
        model: _at_scale(model, [row for folder in several for row in read_manifest(folder)], guidance_scale)
        for model, several in resolve_folders(folders).items()
    }
    prompts = list(dict.fromkeys(row.prompt for rows in rows_by_model.values() for row in rows))
    named = named_subjects(prompts, classes, subject_of)
    labels = {prompt: classes.index(named[prompt]) for prompt in prompts if prompt in named}
    if not labels:
        raise EvaluationError(
            f"Expected prompts that name one of {', '.join(classes)}, got {prompts[0]!r} and {len(prompts) - 1} more "
            "that name none. Say what they show with subject_of."
        )
    chosen = {model: [row for row in rows if row.prompt in labels] for model, rows in rows_by_model.items()}
    for model, rows in chosen.items():
        counts = Counter(labels[row.prompt] for row in rows)
        for index, name in enumerate(classes):
            if counts[index] < MIN_TRAINING:
                raise EvaluationError(
                    f"Expected at least {MIN_TRAINING} images of {name!r}, a class of the test images, from prompts "
                    f"of {model} that name it, got {counts[index]}. Generate more, or test without that class."
                )
    common_prompts(chosen)
    notes = []
    nameless = [prompt for prompt in prompts if prompt not in labels]
    if nameless:
        left_out = sum(len(rows) - len(chosen[model]) for model, rows in rows_by_model.items())
        notes.append(
            f"{len(nameless)} of {len(prompts)} prompts name no subject, first {nameless[0]!r}: their {left_out} "
            "images are left out"
        )
    return chosen, labels, notes


def _at_scale(model: str, rows: list[Row], guidance_scale: float | None) -> list[Row]:
    keys = scale_keys(rows)
    if guidance_scale is None:
        if len(keys) > 1:
            raise EvaluationError(
                f"Expected images of {model} at one guidance scale, found {', '.join(keys)}. Choose guidance_scale."
            )
        return rows
    chosen = [row for row in rows if row.scale_key == str(float(guidance_scale))]
    if not chosen:
        raise EvaluationError(
            f"Expected images of {model} at guidance scale {float(guidance_scale)}, found {', '.join(keys)}. "
            "Choose another, or generate them."
        )
    return chosen


def _judged_groups(
    groups: Sequence[str], subjects: Sequence[str], accidents: Sequence[str]
) -> tuple[dict[str, int], list[str]]:
    """Return the size of each group that is large enough, and notes on the others."""
    found = Counter(groups)
    grid = {subject: [f"{subject} x {accident}" for accident in accidents] for subject in subjects}
    judged = {subject: [name for name in names if found[name] >= MIN_GROUP] for subject, names in grid.items()}
    short = {name: found[name] for names in grid.values() for name in names if found[name] < MIN_GROUP}
    if not all(judged.values()) or all(len(names) < 2 for names in judged.values()):
        raise EvaluationError(
            f"Expected at least {MIN_GROUP} test images of each subject, and of one subject in two groups, got "
            f"{', '.join(f'{count} of {name}' for name, count in short.items())}. Give more test images of these."
        )
    notes = [
        f"{name} is left out of groups: {count} test images, fewer than {MIN_GROUP}" for name, count in short.items()
    ]
    return {name: found[name] for names in judged.values() for name in names}, notes


def _read_test(test: CaptionedImages, subjects: _Column, accidents: _Column, resolution: int, progress: bool) -> _Test:
    pixels, readable = read_pixels(test, resolution, progress=progress)
    groups = [
        f"{subjects.classes[subjects.values[row]]} x {accidents.classes[accidents.values[row]]}" for row in readable
    ]
    sizes, notes = _judged_groups(groups, subjects.classes, accidents.classes)
    return _Test(_Images(pixels, subjects.values[readable]), groups, sizes, notes)


def _read_real(
    train: CaptionedImages, subject_attribute: str, classes: tuple[str, ...], resolution: int, progress: bool
) -> _Images:
    column = _column(train, subject_attribute, "training")
    if column.classes != classes:
        raise EvaluationError(
            f"Expected training images of the subjects {', '.join(classes)} as in the test images, got "
            f"{', '.join(column.classes)}. Use the same names, and leave the others out."
        )
    pixels, readable = read_pixels(train, resolution, progress=progress)
    return _Images(pixels, column.values[readable])


def _read(rows: Sequence[Row], labels: Mapping[str, int], resolution: int) -> _Images:
    pixels = torch.stack([to_pixels(open_image(row.path), resolution) for row in rows])
    return _Images(pixels, np.array([labels[row.prompt] for row in rows], dtype=np.int64))


def _draw(labels: NDArray[np.int64], per_class: int, seed: int) -> NDArray[np.int64]:
    """Return rows of `per_class` different images of each class, class by class."""
    numbers = generator("augmentation images", seed)
    own = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    return np.concatenate([rows[torch.randperm(len(rows), generator=numbers).numpy()[:per_class]] for rows in own])


def _fit(
    images: _Images, rows: NDArray[np.int64], classes: Sequence[str], config: AugmentationConfig, seed: int
) -> ConvAnnotator:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derived_seed("augmentation weights", seed))
        classifier = ConvAnnotator(attributes={"subject": classes}, resolution=config.resolution)
    train_network(
        lambda batch: classifier.forward(batch)[1],
        list(classifier.parameters()),
        images.pixels,
        torch.from_numpy(images.labels)[:, None],
        rows=rows,
        weights=torch.ones(len(rows)),
        steps=config.steps,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        generator=generator("augmentation batches", seed),
        progress=False,
    )
    return classifier.eval()


@torch.no_grad()
def _predict(classifier: ConvAnnotator, pixels: torch.Tensor) -> NDArray[np.int64]:
    """Return each image's most probable class, (N,)."""
    logits = torch.cat([classifier.forward(normalise(batch))[1][0] for batch in pixels.split(64)])
    if not logits.isfinite().all():
        raise TrainingError("Expected finite logits of the classifier, got NaN or infinity. Lower learning_rate.")
    return logits.argmax(dim=1).numpy()
