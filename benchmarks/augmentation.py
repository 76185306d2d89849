"""The augmentation test: what a classifier learns from generated images, measured on real ones.

    python benchmarks/augmentation.py base=out/base guided=out/guided --test photos --subject bird --attribute place

A classifier trained on images with a spurious attribute relies on it, and fails on the group that contradicts it. So
the accuracy of the worst group of real test images tells how far a model's images are free of the spurious attribute,
with no annotator in between (Sagawa et al., "Distributionally robust neural networks", ICLR 2020, for worst-group
accuracy; Hou et al., "InvDiff", KDD 2025, for the test). The mean over groups belongs beside it: images can also be
too poor, or too much alike, to learn the subject from.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from invdiff.data.captioned import CaptionedImages
from invdiff.data.images import read_image
from invdiff.errors import EvaluationError, TrainingError
from invdiff.evaluation.annotators.conv import ConvAnnotator, normalise, read_pixels, to_pixels, train_network
from invdiff.evaluation.annotators.labels import load_labelled_images, read_targets
from invdiff.evaluation.evaluate import named_subjects
from invdiff.evaluation.fairness.intervals import share_interval
from invdiff.evaluation.images import Folders, Row, common_prompts, read_images, resolve_folders, scale_keys
from invdiff.files import write_json
from invdiff.options import Config
from invdiff.progress import progress_bar
from invdiff.seeds import derived_seed, generator

REAL = "real"
"""The row of a classifier trained on real images alone."""
MIN_IMAGES = 10
"""Generated images of a subject, and test images of a group, below which there is nothing to learn or to judge."""


@dataclass(frozen=True)
class AugmentationConfig(Config):
    """How classifiers are trained: the annotators' small conv net, on subjects alone, all images drawn alike."""

    steps: int = 400
    """Optimiser steps, the same for every classifier."""
    batch_size: int = 64
    """Images per step."""
    learning_rate: float = 3e-3
    """Peak of the one-cycle schedule."""
    resolution: int = 64
    """Side in pixels that images are resized to."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One classifier for each: seeds of drawn images, weights and batches."""

    def check(self) -> None:
        """Check ranges."""
        for name, least in (("steps", 1), ("batch_size", 1), ("resolution", 8)):
            self.require(name, getattr(self, name) >= least, f"at least {least}")
        self.require("learning_rate", self.learning_rate > 0, "more than 0")
        self.require("seeds", 0 < len(self.seeds) == len(set(self.seeds)), "different seeds, at least one")


def augmentation_test(
    folders: Mapping[str, Folders] | str | Path,
    test: CaptionedImages,
    *,
    subject_attribute: str,
    attribute: str,
    train: CaptionedImages | None = None,
    config: AugmentationConfig | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Train classifiers on each model's images and measure them on real images, group by group.

    A generated image's label is the subject that its prompt names. Every model gives as many images of each subject,
    the fewest that any of them has, and the same steps and seeds, so that only the images differ. Classifiers see
    subjects alone: nothing in training reads the attribute.

    Args:
        folders: Models and their images at one guidance scale, as for `evaluate`.
        test: Real images with both attributes, balanced or not. Groups are the combinations of the two.
        subject_attribute: What classifiers tell apart: a column of `test` whose classes the prompts name.
        attribute: The spurious attribute: another column of `test`.
        train: Real training images with the subject in a column. A classifier is then trained on these alone
            ("real"), and, for each model, on these and its images ("real + base").
        config: How classifiers are trained.
        progress: Show a progress bar.

    Returns:
        {"models": {model: {"train_images", "accuracy", "group_mean", "worst_accuracy", "groups", "worst_group",
        "worst_interval", "by_seed"}}, "test_images": {group: images}, "notes": [...], ...}: figures over seeds are
        {"mean", "sd"}; the interval is Wilson's, of the worst group on average, of chance in the test images alone.

    Raises:
        EvaluationError: Images, prompts, columns or groups do not allow the test.
        DataError: More real images are unreadable than their data allows.
        TrainingError: A classifier diverged.
    """
    config = config or AugmentationConfig()
    if subject_attribute == attribute:
        raise EvaluationError(f"Expected two attributes, got {attribute!r} for both. Give the spurious one.")
    names, targets = read_targets(test, [subject_attribute, attribute])
    subjects = names[subject_attribute]
    columns = {name: targets[:, place] for place, name in enumerate(names)}
    rows_by_model, labels, notes = _generated(folders, subjects)
    pixels, readable = read_pixels(test, config.resolution, progress=progress)
    if len(readable) < len(test):
        notes.append(f"{len(test) - len(readable)} of {len(test)} test images cannot be read and are left out")
    truth = columns[subject_attribute][readable]
    spurious = columns[attribute][readable]
    groups = [f"{subjects[s]} x {names[attribute][a]}" for s, a in zip(truth, spurious, strict=True)]
    all_groups = {name: [f"{name} x {other}" for other in names[attribute]] for name in subjects}
    sizes = _judged_groups(groups, all_groups, notes)
    real = _read_real(train, subject_attribute, subjects, config, notes, progress) if train is not None else None
    if real is not None and REAL in {model.split(" + ")[0] for model in rows_by_model}:
        raise EvaluationError(f"Expected models of other names than {REAL!r} beside train. Rename that model.")

    per_class = min(
        count for rows in rows_by_model.values() for count in Counter(labels[row.prompt] for row in rows).values()
    )
    sources: dict[str, tuple[torch.Tensor, NDArray[np.int64], int]] = {} if real is None else {REAL: (*real, 0)}
    for model, rows in rows_by_model.items():
        images = torch.stack([to_pixels(read_image(row.path), config.resolution) for row in rows])
        own = np.array([labels[row.prompt] for row in rows], dtype=np.int64)
        sources[model] = images, own, per_class
        if real is not None:
            joined = torch.cat([real[0], images]), np.concatenate([real[1], own])
            sources[f"{REAL} + {model}"] = *joined, per_class
    models = {}
    with progress_bar("classifiers", len(sources) * len(config.seeds), enabled=progress) as bar:
        for source, (images, own, drawn) in sources.items():
            kept = len(real[1]) if real is not None and source.startswith(REAL) else 0
            by_seed = {}
            for seed in config.seeds:
                rows = np.append(np.arange(kept), kept + _draw(own[kept:], drawn, seed)).astype(np.int64)
                right = _predict(_fit(images, own, rows, subjects, config, seed), pixels) == truth
                by_seed[str(seed)] = group_accuracy(right, groups, sizes)
                bar.advance()
            counts = np.bincount(own[rows], minlength=len(subjects)).tolist()
            models[source] = {"train_images": dict(zip(subjects, counts, strict=True))} | _over_seeds(by_seed, sizes)
    return {
        "models": models,
        "subject_attribute": subject_attribute,
        "attribute": attribute,
        "classes": list(subjects),
        "test_images": sizes,
        "config": config.to_dict(),
        "notes": notes,
    }


def _generated(
    folders: Mapping[str, Folders] | str | Path, classes: Sequence[str]
) -> tuple[dict[str, list[Row]], dict[str, int], list[str]]:
    """Model to the images whose prompt names a subject, prompt to its class index, and notes."""
    all_rows = {
        model: [row for folder in several for row in read_images(folder)]
        for model, several in resolve_folders(folders).items()
    }
    scales = {model: scale_keys(rows) for model, rows in all_rows.items()}
    for model, keys in scales.items():
        if len(keys) > 1:
            raise EvaluationError(f"Expected images of {model} at one guidance scale, got {', '.join(keys)}.")
    notes = []
    if len({keys[0] for keys in scales.values()}) > 1:
        notes.append(f"models differ in guidance scale: {', '.join(f'{m} {keys[0]}' for m, keys in scales.items())}")
    prompts = list(dict.fromkeys(row.prompt for rows in all_rows.values() for row in rows))
    named = named_subjects(prompts, classes)
    labels = {prompt: classes.index(named[prompt]) for prompt in prompts if prompt in named}
    chosen = {model: [row for row in rows if row.prompt in labels] for model, rows in all_rows.items()}
    for model, rows in chosen.items():
        counts = Counter(labels[row.prompt] for row in rows)
        for index, name in enumerate(classes):
            if counts[index] < MIN_IMAGES:
                raise EvaluationError(
                    f"Expected at least {MIN_IMAGES} images of {model} from prompts that name {name!r}, got "
                    f"{counts[index]}. Generate more."
                )
    common_prompts(chosen)
    left_out = sum(map(len, all_rows.values())) - sum(map(len, chosen.values()))
    if left_out:
        notes.append(f"{len(prompts) - len(labels)} of {len(prompts)} prompts name no subject: {left_out} images out")
    return chosen, labels, notes


def _judged_groups(groups: Sequence[str], of_subject: Mapping[str, Sequence[str]], notes: list[str]) -> dict[str, int]:
    """The size of each group with enough test images; notes name the others."""
    found = Counter(groups)
    judged = [[name for name in names if found[name] >= MIN_IMAGES] for names in of_subject.values()]
    short = [f"{found[n]} of {n}" for names in of_subject.values() for n in names if found[n] < MIN_IMAGES]
    if not all(judged) or max(map(len, judged)) < 2:
        raise EvaluationError(
            f"Expected at least {MIN_IMAGES} test images of each subject, and of one subject in two groups, got "
            f"{', '.join(short)}. Give more test images of these."
        )
    if short:
        notes.append(f"groups left out, with fewer than {MIN_IMAGES} test images: {', '.join(short)}")
    return {name: found[name] for names in judged for name in names}


def _read_real(
    train: CaptionedImages,
    subject: str,
    classes: Sequence[str],
    config: AugmentationConfig,
    notes: list[str],
    progress: bool,
) -> tuple[torch.Tensor, NDArray[np.int64]]:
    names, targets = read_targets(train, [subject])
    if names[subject] != classes:
        raise EvaluationError(
            f"Expected training images of the subjects {', '.join(classes)} as in the test images, got "
            f"{', '.join(names[subject])}. Use the same names, and leave the others out."
        )
    pixels, readable = read_pixels(train, config.resolution, progress=progress)
    if len(readable) < len(train):
        notes.append(f"{len(train) - len(readable)} of {len(train)} training images cannot be read and are left out")
    return pixels, targets[readable, 0]


def _draw(labels: NDArray[np.int64], per_class: int, seed: int) -> NDArray[np.int64]:
    """Rows of `per_class` different images of each class, class by class."""
    numbers = generator("augmentation images", seed)
    own = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    drawn = [rows[torch.randperm(len(rows), generator=numbers).numpy()[:per_class]] for rows in own]
    return np.concatenate([np.empty(0, dtype=np.int64), *drawn])


def _fit(
    images: torch.Tensor,
    labels: NDArray[np.int64],
    rows: NDArray[np.int64],
    classes: Sequence[str],
    config: AugmentationConfig,
    seed: int,
) -> ConvAnnotator:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derived_seed("augmentation weights", seed))
        classifier = ConvAnnotator(attributes={"subject": classes}, resolution=config.resolution)
    train_network(
        classifier,
        images,
        torch.from_numpy(labels)[:, None],
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
    """Each image's most probable class, (N,)."""
    logits = torch.cat([classifier.forward(normalise(batch))[1][0] for batch in pixels.split(64)])
    if not logits.isfinite().all():
        raise TrainingError("Expected finite logits of the classifier, got NaN or infinity. Lower learning_rate.")
    return logits.argmax(dim=1).numpy()


def group_accuracy(right: NDArray[np.bool_], groups: Sequence[str], sizes: Mapping[str, int]) -> dict[str, Any]:
    """Accuracy over all images, on average over groups, of each group and of the worst.

    Args:
        right: Whether each image's subject was recognised, (N,).
        groups: Each image's group, (N,).
        sizes: Number of images of the groups that are judged.
    """
    members = np.asarray(groups)
    accuracies = {name: float(right[members == name].mean()) for name in sizes}
    worst = min(accuracies, key=lambda name: accuracies[name])
    return {
        "accuracy": float(right.mean()),
        "group_mean": float(np.mean(list(accuracies.values()))),
        "groups": accuracies,
        "worst_group": worst,
        "worst_accuracy": accuracies[worst],
    }


def _over_seeds(by_seed: Mapping[str, Mapping[str, Any]], sizes: Mapping[str, int]) -> dict[str, Any]:
    def spread(values: Sequence[float]) -> dict[str, float | None]:
        return {"mean": float(np.mean(values)), "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None}

    fits = list(by_seed.values())
    groups = {name: spread([fit["groups"][name] for fit in fits]) for name in sizes}
    worst = min(groups, key=lambda name: groups[name]["mean"] or 0.0)
    return {
        **{name: spread([fit[name] for fit in fits]) for name in ("accuracy", "group_mean", "worst_accuracy")},
        "groups": groups,
        "worst_group": worst,
        "worst_interval": share_interval(round((groups[worst]["mean"] or 0.0) * sizes[worst]), sizes[worst]),
        "by_seed": dict(by_seed),
    }


def main() -> None:
    """Test the folders that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", metavar="NAME=FOLDER", help="generated images of one model")
    parser.add_argument("--test", required=True, help="real images with both attributes in columns")
    parser.add_argument("--train", help="real training images with the subject in a column")
    parser.add_argument("--subject", required=True, help="the attribute that prompts name")
    parser.add_argument("--attribute", required=True, help="the spurious attribute")
    parser.add_argument("--config", type=Path, help="YAML or JSON of AugmentationConfig")
    parser.add_argument("--output", type=Path, default=Path("out/augmentation.json"))
    arguments = parser.parse_args()
    folders: dict[str, list[Path]] = {}
    for word in arguments.images:
        name, _, folder = word.rpartition("=")
        folders.setdefault(name or Path(folder).name, []).append(Path(folder))
    found = augmentation_test(
        folders,
        load_labelled_images(arguments.test),
        subject_attribute=arguments.subject,
        attribute=arguments.attribute,
        train=load_labelled_images(arguments.train) if arguments.train else None,
        config=AugmentationConfig.from_file(arguments.config) if arguments.config else None,
    )
    write_json(arguments.output, found)
    print(json.dumps({model: row["worst_accuracy"] for model, row in found["models"].items()}, indent=2))
    print(f"Everything is in {arguments.output}.")


if __name__ == "__main__":
    main()
