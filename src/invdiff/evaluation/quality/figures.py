"""How good a model's images are, how different, and how they compare with reference images, group by group too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...data.images import read_image
from ...errors import EvaluationError
from ...models.encoders import ClipEncoder
from ...seeds import derived_seed
from ..annotate import Described, Question
from ..images import Row
from ..results import Quantity
from .distances import cmmd, frechet_distance, kernel_distance, precision_recall_density_coverage
from .diversity import lpips_diversity, paired_cosines, vendi_score
from .intervals import mean_interval, share_interval

if TYPE_CHECKING:
    import torch

LPIPS = Callable[["torch.Tensor", "torch.Tensor"], "torch.Tensor"]
"""From two batches of images to the mean distance of their pairs."""
NEIGHBOURS = 5
"""k of precision, recall, density and coverage."""
MIN_KERNEL = 3
"""Images of each side that the kernel distance's interval needs."""
LPIPS_IMAGES = 20
"""Images of each prompt that LPIPS compares in pairs."""
MIN_GROUP = 50
"""Images of a group below which distances to a reference are mostly error."""


def quality_figures(
    rows: Sequence[Row], seen: Described, reference: Described | None, clip: ClipEncoder | None, question: Question
) -> dict[str, Quantity]:
    """Distances to the reference, diversity within prompts and, with `clip`, how well images show their prompts."""
    figures: dict[str, Quantity] = {}
    for name, features in seen.features.items():
        if reference is not None and name in reference.features:
            figures |= _distances(features, reference.features[name], name, question.confidence)
        figures[f"Vendi score ({name})"] = _where_defined(_diversity, features, rows)
    if clip is not None:
        texts = clip.text_features([row.prompt for row in rows])
        figures[f"CLIP-T ({clip.name})"] = _where_defined(
            _agreement, seen.features[clip.name], texts, question.confidence
        )
    return figures


def lpips_figures(rows: Sequence[Row], network: LPIPS) -> dict[str, Quantity]:
    """Diversity of each prompt's first images, prompt by prompt: pixels of one are held at a time."""
    diversity = [
        lpips_diversity([read_image(rows[place].path) for place in places[:LPIPS_IMAGES]], distance=network)
        for places in _by_prompt(rows)
    ]
    note = f"mean over prompts, of all pairs of the first {LPIPS_IMAGES} images at most"
    return {"LPIPS diversity (alexnet)": Quantity(float(np.mean(diversity)), note=note)}


def group_figures(
    seen: Described, reference: Described | None, right: NDArray[np.int64], question: Question, even: int
) -> dict[str, dict[str, Quantity]]:
    """Figures of `even` images of each class of the first attribute, against as many of the reference's."""
    attribute = question.attributes[0]
    names = question.classes[attribute]
    rng = np.random.default_rng(derived_seed("groups", question.seed))

    def members(of: Described) -> list[NDArray[np.int64]]:
        return [rng.permutation(np.flatnonzero(of.classes[attribute] == index)) for index in range(len(names))]

    ours = members(seen)
    theirs = members(reference) if reference is not None and attribute in reference.classes else []
    groups: dict[str, dict[str, Quantity]] = {}
    for index, (group, mine) in enumerate(zip(names, ours, strict=True)):
        figures = {"images": Quantity(float(len(mine)))}
        known = right[mine][right[mine] >= 0]
        if len(known):
            figures["subject accuracy"] = share(known, question.confidence)
        elif (right >= 0).any():
            figures["subject accuracy"] = Quantity(None, note="not defined: no image of this class")
        for name, real in reference.features.items() if reference is not None and theirs else ():
            if name not in seen.features:
                continue
            if min(len(mine), len(theirs[index])) < MIN_GROUP:
                why = f"not defined at {len(mine)} against {len(theirs[index])} images: needs {MIN_GROUP} of each"
                figures[frechet_name(name)] = Quantity(None, note=why)
                continue
            pair = seen.features[name][mine[:even]], real[theirs[index][:even]]
            apart = {frechet_name(name): Quantity(frechet_distance(*pair))}
            apart |= _neighbourhood(*pair, name, question.confidence)
            note = f"{even} images of each group against as many"
            figures |= {label: replace(figure, note=note) for label, figure in apart.items()}
        groups[group] = figures
    return groups


def common_group_size(seen: Sequence[Described], reference: Described | None, question: Question) -> int:
    """Images of each group that distances are of, for all models and scales alike: they depend on it.

    It is the fewest that any group has, of those with enough, in any model's images at any scale and the reference's.
    """
    attribute = question.attributes[0]
    if reference is None or attribute not in reference.classes:
        return 0
    sizes = [
        int((known.classes[attribute] == index).sum())
        for known in (*seen, reference)
        for index in range(len(question.classes[attribute]))
    ]
    return min((size for size in sizes if size >= MIN_GROUP), default=0)


def frechet_name(features: str) -> str:
    """Name of the Fréchet distance on these features: FID on Inception's alone."""
    return f"FID ({features})" if features == "inception" else f"Frechet distance ({features})"


def share(successes: NDArray[Any], confidence: float) -> Quantity:
    """Share of images that have a property, given as (N,), with its interval."""
    total, count = len(successes), int(np.sum(successes))
    return Quantity(count / total, *share_interval(count, total, confidence=confidence))


def _where_defined(figure: Callable[..., Quantity], *arguments: Any) -> Quantity:
    """The figure, or why it is not defined: a row of zeros, say, has no direction."""
    try:
        return figure(*arguments)
    except EvaluationError as error:
        return Quantity(None, note=f"not defined: {error}")


def _by_prompt(rows: Sequence[Row]) -> list[list[int]]:
    """The places of the images of each prompt."""
    places: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        places.setdefault(row.prompt, []).append(place)
    return list(places.values())


def _diversity(features: NDArray[Any], rows: Sequence[Row]) -> Quantity:
    scores = [vendi_score(features[places]) for places in _by_prompt(rows)]
    return Quantity(float(np.mean(scores)), note="mean over prompts")


def _agreement(images: NDArray[Any], texts: NDArray[Any], confidence: float) -> Quantity:
    cosines = paired_cosines(images, texts)
    return Quantity(float(cosines.mean()), *mean_interval(cosines, confidence=confidence))


def _distances(features: NDArray[Any], reference: NDArray[Any], name: str, confidence: float) -> dict[str, Quantity]:
    """Every distance of features, (N, D), to a reference's, (M, D)."""
    sizes = f"{len(features)} against {len(reference)} images"
    falling = f"{sizes}; falls as their number grows"
    figures = {frechet_name(name): Quantity(frechet_distance(features, reference), note=falling)}
    if min(len(features), len(reference)) < MIN_KERNEL:
        figures[f"KID ({name})"] = Quantity(None, note=f"not defined at {sizes}: needs {MIN_KERNEL} of each")
    else:
        figures[f"KID ({name})"] = Quantity(*kernel_distance(features, reference, confidence=confidence), note=sizes)
    figures[f"CMMD ({name})"] = _where_defined(lambda: Quantity(cmmd(features, reference), note=falling))
    return figures | _neighbourhood(features, reference, name, confidence)


def _neighbourhood(
    features: NDArray[Any], reference: NDArray[Any], name: str, confidence: float
) -> dict[str, Quantity]:
    labels = [f"{figure} ({name})" for figure in ("precision", "recall", "density", "coverage")]
    if min(len(features), len(reference)) <= NEIGHBOURS:
        sizes = f"{len(features)} against {len(reference)} images"
        why = f"not defined at {sizes}: needs {NEIGHBOURS + 1} of each"
        return {label: Quantity(None, note=why) for label in labels}
    found = precision_recall_density_coverage(features, reference, k=NEIGHBOURS)
    figures = {}
    for label, value, total in zip(labels, found, (len(features), len(reference), 0, len(reference)), strict=True):
        ends = share_interval(round(value * total), total, confidence=confidence) if total else (None, None)
        figures[label] = Quantity(value, *ends)  # density is no share: it has no interval
    return figures
