"""How good a model's images are, how different, and how they compare with reference images, group by group too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...errors import EvaluationError
from ...models.encoders import ClipEncoder
from ...seeds import derived_seed
from ..describe import Described, open_image
from ..manifest import Row
from ..question import Question
from ..results import Quantity
from . import distances
from .intervals import mean_interval, share_interval

if TYPE_CHECKING:
    import torch

NEIGHBOURS = 5
"""k of precision, recall, density and coverage."""
MIN_KERNEL = 3
"""Images of each side that the kernel distance's interval needs."""
LPIPS = Callable[["torch.Tensor", "torch.Tensor"], "torch.Tensor"]
"""From two batches of images to the mean distance of their pairs."""
LPIPS_IMAGES = 20
"""Images of each prompt that LPIPS compares in pairs."""
MIN_GROUP = 50
"""Images of a group below which distances to a reference are mostly error."""


def quality_figures(
    rows: Sequence[Row], seen: Described, reference: Described | None, clip: ClipEncoder | None, question: Question
) -> dict[str, Quantity]:
    """Return distances to the reference, diversity within prompts and, with `clip`, how well prompts are shown."""
    figures: dict[str, Quantity] = {}
    of_prompt: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        of_prompt.setdefault(row.prompt, []).append(place)
    for name, features in seen.features.items():
        if reference is not None and name in reference.features:
            figures |= _against(features, reference.features[name], name, question)
        figures[f"Vendi score ({name})"] = _where_defined(_diversity, features, list(of_prompt.values()))
    if clip is not None:
        texts = clip.text_features([row.prompt for row in rows])
        shown = _where_defined(_agreement, seen.features[clip.name], texts, question.confidence)
        figures[f"CLIP-T ({clip.name})"] = shown
    return figures


def _where_defined(figure: Callable[..., Quantity], *arguments: Any) -> Quantity:
    """Return the figure, or why it is not defined: a row of zeros, say, has no direction."""
    try:
        return figure(*arguments)
    except EvaluationError as error:
        return Quantity(None, note=f"not defined: {error}")


def _diversity(features: NDArray[Any], prompts: Sequence[Sequence[int]]) -> Quantity:
    scores = [distances.vendi_score(features[members]) for members in prompts]
    return Quantity(float(np.mean(scores)), note="mean over prompts")


def _agreement(images: NDArray[Any], texts: NDArray[Any], confidence: float) -> Quantity:
    cosines = distances.paired_cosines(images, texts)
    return Quantity(float(cosines.mean()), *mean_interval(cosines, confidence=confidence))


def _cmmd(features: NDArray[Any], reference: NDArray[Any]) -> Quantity:
    note = f"{len(features)} against {len(reference)} images; falls as their number grows"
    return Quantity(distances.cmmd(features, reference), note=note)


def lpips_figures(rows: Sequence[Row], network: LPIPS) -> dict[str, Quantity]:
    """Return the diversity of each prompt's first images, prompt by prompt: pixels of one are held at a time."""
    paths: dict[str, list[Path]] = {}
    for row in rows:
        paths.setdefault(row.prompt, []).append(row.path)
    diversity = [
        distances.lpips_diversity([open_image(path) for path in of_prompt[:LPIPS_IMAGES]], distance=network)
        for of_prompt in paths.values()
    ]
    note = f"mean over prompts, of all pairs of the first {LPIPS_IMAGES} images at most"
    return {"LPIPS diversity (alexnet)": Quantity(float(np.mean(diversity)), note=note)}


def _against(features: NDArray[Any], reference: NDArray[Any], name: str, question: Question) -> dict[str, Quantity]:
    """Return the distances and neighbourhood figures of features against a reference's."""
    sizes = f"{len(features)} against {len(reference)} images"
    frechet = distances.frechet_distance(features, reference)
    figures = {frechet_name(name): Quantity(frechet, note=f"{sizes}; falls as their number grows")}
    if min(len(features), len(reference)) < MIN_KERNEL:
        figures[f"KID ({name})"] = Quantity(None, note=f"not defined at {sizes}: needs {MIN_KERNEL} of each")
    else:
        low, high = distances.kernel_distance_interval(features, reference, confidence=question.confidence)
        figures[f"KID ({name})"] = Quantity((low + high) / 2, low, high, note=sizes)  # symmetric about its value
    figures[f"CMMD ({name})"] = _where_defined(_cmmd, features, reference)
    return figures | _neighbourhood(features, reference, name, question)


def frechet_name(features: str) -> str:
    """Return what the Fréchet distance on these features is called: FID on Inception's alone."""
    return f"FID ({features})" if features == "inception" else f"Frechet distance ({features})"


def _neighbourhood(
    features: NDArray[Any], reference: NDArray[Any], name: str, question: Question
) -> dict[str, Quantity]:
    needed = NEIGHBOURS + 1
    labels = [f"{figure} ({name})" for figure in ("precision", "recall", "density", "coverage")]
    if min(len(features), len(reference)) < needed:
        why = f"not defined at {len(features)} against {len(reference)} images: needs {needed} of each"
        return {label: Quantity(None, note=why) for label in labels}
    found = distances.precision_recall_density_coverage(features, reference, k=NEIGHBOURS)
    totals = {0: len(features), 1: len(reference), 3: len(reference)}
    figures = {}
    for place, (label, value) in enumerate(zip(labels, found, strict=True)):
        if place in totals:
            total = totals[place]
            ends = share_interval(round(value * total), total, confidence=question.confidence)
            figures[label] = Quantity(float(value), *ends)
        else:
            figures[label] = Quantity(float(value))
    return figures


def group_figures(
    seen: Described, reference: Described | None, right: NDArray[np.int64], question: Question, even: int
) -> dict[str, dict[str, Quantity]]:
    """Return figures of `even` images of each class of the first attribute, against as many of the reference's."""
    attribute = question.attributes[0]
    names = question.classes[attribute]
    rng = np.random.default_rng(derived_seed("groups", question.seed))
    members = [rng.permutation(np.flatnonzero(seen.classes[attribute] == index)) for index in range(len(names))]
    real: list[NDArray[np.int64]] = []
    if reference is not None and attribute in reference.classes:
        real = [rng.permutation(np.flatnonzero(reference.classes[attribute] == index)) for index in range(len(names))]
    sizes = [min(len(mine), len(theirs)) for mine, theirs in zip(members, real, strict=False)]
    groups: dict[str, dict[str, Quantity]] = {}
    for index, (group, mine) in enumerate(zip(names, members, strict=True)):
        figures = {"images": Quantity(float(len(mine)))}
        known = right[mine][right[mine] >= 0]
        if len(known):
            figures["subject accuracy"] = share(known, question.confidence)
        elif (right >= 0).any():
            figures["subject accuracy"] = Quantity(None, note="not defined: no image of this class")
        for name in reference.features if reference is not None and real else ():
            if name not in seen.features:
                continue
            if sizes[index] < MIN_GROUP:
                why = f"not defined at {len(mine)} against {len(real[index])} images: needs {MIN_GROUP} of each"
                figures[frechet_name(name)] = Quantity(None, note=why)
                continue
            assert reference is not None
            ours, theirs = seen.features[name][mine[:even]], reference.features[name][real[index][:even]]
            note = f"{even} images of each group against as many"
            apart = {frechet_name(name): Quantity(distances.frechet_distance(ours, theirs))}
            apart |= _neighbourhood(ours, theirs, name, question)
            figures |= {label: replace(figure, note=note) for label, figure in apart.items()}
        groups[group] = figures
    return groups


def common_group_size(seen: Sequence[Described], reference: Described | None, question: Question) -> int:
    """Return how many images of each group distances are of, for all models and scales alike: they depend on it.

    It is the fewest that any group has, of those with enough, in any model's images at any scale and the reference's.
    """
    if reference is None or question.attributes[0] not in reference.classes:
        return 0
    attribute = question.attributes[0]
    sizes = [
        int((known.classes[attribute] == index).sum())
        for known in (*seen, reference)
        for index in range(len(question.classes[attribute]))
    ]
    return min((size for size in sizes if size >= MIN_GROUP), default=0)


def share(successes: NDArray[Any], confidence: float) -> Quantity:
    """Return the share of images that have a property, (N,), with its interval."""
    total, count = len(successes), int(np.sum(successes))
    return Quantity(count / total, *share_interval(count, total, confidence=confidence))
