"""What the augmentation test measured: accuracies by group, their spread over seeds, and how they were made."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..config import AugmentationConfig
from ..errors import EvaluationError
from ..files import write_json
from .quality.intervals import share_interval

MIN_GROUP = 10
"""Test images of a group below which its accuracy is chance."""


@dataclass(frozen=True)
class GroupAccuracy:
    """How well one classifier tells the subjects of test images apart."""

    accuracy: float
    """Over all test images, groups too small to judge included."""
    group_mean: float
    """Mean over groups: what accuracy would be on a balanced test set."""
    groups: Mapping[str, float]
    """Group to accuracy."""
    worst_group: str
    """The group of lowest accuracy."""
    worst_accuracy: float
    """Its accuracy."""
    worst_interval: tuple[float, float]
    """Wilson's 95% interval of it, of chance in the test images. It takes the group as named beforehand: the lowest
    of several lies a little lower than its true accuracy on average."""


@dataclass(frozen=True)
class Spread:
    """A figure over classifiers that differ in their seed."""

    mean: float
    sd: float | None
    """Standard deviation over seeds (N - 1); None with a single seed."""


@dataclass(frozen=True)
class TrainedOn:
    """What classifiers learnt from one source of images."""

    train_images: Mapping[str, int]
    """Subject to number of training images."""
    guidance_scale: str
    """Guidance scale of the generated ones: `str(float)`, "unstated", or "" without generated images."""
    accuracy: Spread
    """Accuracy over all test images."""
    group_mean: Spread
    """Mean accuracy over groups."""
    worst_accuracy: Spread
    """Accuracy of each classifier's worst group, whichever it is."""
    groups: Mapping[str, Spread]
    """Group to accuracy."""
    worst_group: str
    """The group of lowest mean accuracy over seeds."""
    worst_interval: tuple[float, float]
    """Wilson's 95% interval of that group's mean accuracy: chance of the test images alone, not of training."""
    by_seed: Mapping[str, GroupAccuracy]
    """Seed to the accuracy of its classifier."""


@dataclass(frozen=True)
class AugmentationResults:
    """What was learnt from each source of images, and how it was measured."""

    models: Mapping[str, TrainedOn]
    """Model name to results; with real training images "real" and "real + base" too."""
    subject_attribute: str
    """What the classifiers tell apart."""
    attribute: str
    """The accident; no classifier is told of it."""
    classes: tuple[str, ...]
    """The subjects."""
    test_images: Mapping[str, int]
    """Group, as "landbird x water", to test images; groups that are too small are left out."""
    config: AugmentationConfig
    """How classifiers were trained."""
    seeds: tuple[int, ...]
    """Seeds of drawn images, weights and batches."""
    notes: tuple[str, ...] = ()
    """What a reader should know before trusting the figures."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types: {"models": {"base": {"worst_accuracy": {"mean": ..., "sd": ...}}}}."""
        return dataclasses.asdict(self)

    def save(self, path: str | Path) -> None:
        """Write everything as JSON."""
        write_json(Path(path), self.to_dict())


def group_accuracy(right: ArrayLike, groups: Sequence[str]) -> GroupAccuracy:
    """Return accuracy over all images, on average over groups and in the worst group.

    Args:
        right: Whether each image's subject was told, boolean, (N,).
        groups: Each image's group, (N,). Groups of fewer than ten images count in `accuracy` only.

    Raises:
        EvaluationError: Sizes disagree, `right` is not boolean, or no group has ten images.
    """
    told = np.asarray(right)
    if told.dtype != np.bool_ or told.shape != (len(groups),):
        raise EvaluationError(
            f"Expected true or false for each of {len(groups)} images, got {told.dtype} of shape {told.shape}. "
            "Compare predictions with labels."
        )
    sizes = {name: count for name, count in sorted(Counter(groups).items()) if count >= MIN_GROUP}
    if not sizes:
        raise EvaluationError(f"Expected a group of at least {MIN_GROUP} images, got none. Give more test images.")
    members = np.asarray(groups)
    successes = {name: int(told[members == name].sum()) for name in sizes}
    accuracies = {name: successes[name] / size for name, size in sizes.items()}
    worst = min(accuracies, key=lambda name: accuracies[name])
    return GroupAccuracy(
        accuracy=float(told.mean()),
        group_mean=float(np.mean(list(accuracies.values()))),
        groups=accuracies,
        worst_group=worst,
        worst_accuracy=accuracies[worst],
        worst_interval=share_interval(successes[worst], sizes[worst]),
    )


def over_seeds(
    by_seed: Mapping[str, GroupAccuracy], sizes: Mapping[str, int], train_images: Mapping[str, int], scale: str
) -> TrainedOn:
    """Return the means and standard deviations of classifiers trained alike but for their seed.

    Args:
        by_seed: Seed to its classifier's accuracy; at least one.
        sizes: Group to number of test images.
        train_images: Subject to number of training images.
        scale: Guidance scale of the generated ones, "" without any.
    """
    fits = list(by_seed.values())
    groups = {name: _spread([fit.groups[name] for fit in fits]) for name in sizes}
    worst = min(groups, key=lambda name: groups[name].mean)
    return TrainedOn(
        train_images=train_images,
        guidance_scale=scale,
        accuracy=_spread([fit.accuracy for fit in fits]),
        group_mean=_spread([fit.group_mean for fit in fits]),
        worst_accuracy=_spread([fit.worst_accuracy for fit in fits]),
        groups=groups,
        worst_group=worst,
        worst_interval=share_interval(round(groups[worst].mean * sizes[worst]), sizes[worst]),
        by_seed=by_seed,
    )


def _spread(values: Sequence[float]) -> Spread:
    return Spread(float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None)
