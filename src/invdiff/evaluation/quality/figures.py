"""How good a model's images are, how different, and how they compare with reference images, group by group too."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...data.images import read_image
from ...errors import EvaluationError
from ...seeds import derived_seed
from ..annotate import Described, Question
from ..fairness.intervals import mean_interval, share_interval
from ..images import Row
from ..results import Quantity
from . import distances
from .extractors import LPIPS, lpips_diversity

NEIGHBOURS = 5  # k of precision, recall, density and coverage
MIN_KERNEL = 3  # images of each side that the kernel distance's interval needs
LPIPS_IMAGES = 20  # images of each prompt that LPIPS compares in pairs
MIN_GROUP = 50  # images of a group below which distances to a reference are mostly error


def quality_figures(rows: Sequence[Row], seen: Described, question: Question) -> dict[str, Quantity]:
    """Distances to the reference, diversity within prompts and, by CLIP, how well images show their prompts."""
    reference, clip = question.reference, question.clip
    by_prompt: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        by_prompt.setdefault(row.prompt, []).append(place)

    def diversity(features: NDArray[Any]) -> Quantity:
        scores = [distances.vendi_score(features[places]) for places in by_prompt.values()]
        return Quantity(float(np.mean(scores)), note="mean over prompts")

    def agreement(images: NDArray[Any], texts: NDArray[Any]) -> Quantity:
        cosines = distances.paired_cosines(images, texts)
        return Quantity(float(cosines.mean()), *mean_interval(cosines))

    def spread(network: LPIPS) -> Quantity:
        scores = []
        for places in by_prompt.values():  # pixels of one prompt are held at a time
            scores.append(lpips_diversity([read_image(rows[at].path) for at in places[:LPIPS_IMAGES]], network))
        note = f"mean over prompts, of all pairs of the first {LPIPS_IMAGES} images at most"
        return Quantity(float(np.mean(scores)), note=note)

    figures: dict[str, Quantity] = {}
    for name, features in seen.features.items():
        if reference is not None and name in reference.features:
            figures |= _distances((features, reference.features[name]), name)
        figures[f"Vendi score ({name})"] = where_defined(diversity, features)
    if clip is not None:
        texts = clip.text_features([row.prompt for row in rows])
        figures[f"CLIP-T ({clip.name})"] = where_defined(agreement, seen.features[clip.name], texts)
    if question.lpips is not None:
        figures["LPIPS diversity (alexnet)"] = where_defined(spread, question.lpips)
    return figures


def group_figures(
    seen: Described, right: NDArray[np.int64], question: Question, even: int
) -> dict[str, dict[str, Quantity]]:
    """Figures of `even` images of each class of the first attribute, against as many of the reference's."""
    attribute, reference = question.attributes[0], question.reference
    names = question.classes[attribute]
    rng = np.random.default_rng(derived_seed("groups", question.config.seed))

    def members(described: Described) -> list[NDArray[Any]]:
        return [rng.permutation(np.flatnonzero(described.classes[attribute] == k)) for k in range(len(names))]

    of_images = members(seen)
    of_reference = members(reference) if reference is not None and attribute in reference.classes else []
    groups: dict[str, dict[str, Quantity]] = {}
    for group, mine, theirs in zip_longest(names, of_images, of_reference):
        figures = groups[group] = {"images": Quantity(float(len(mine)))}
        known = right[mine][right[mine] >= 0]
        if len(known):
            figures["subject accuracy"] = share(known)
        elif (right >= 0).any():
            figures["subject accuracy"] = Quantity(None, note="not defined: no image of this class")
        for name, real in reference.features.items() if reference is not None and of_reference else ():
            if name in seen.features and min(len(mine), len(theirs)) < MIN_GROUP:
                figures[frechet_name(name)] = _too_few(len(mine), len(theirs), MIN_GROUP)
            elif name in seen.features:
                pair = seen.features[name][mine[:even]], real[theirs[:even]]
                apart = _distances(pair, name, kernels=False)
                note = f"{even} images of each group against as many"
                figures |= {label: replace(figure, note=note) for label, figure in apart.items()}
    return groups


def common_group_size(seen: Sequence[Described], question: Question) -> int:
    """Images of each group that distances are of, for all models and scales alike: they depend on it.

    It is the fewest that any group has, of those with enough, in any model's images at any scale and the reference's.
    """
    attribute, reference = question.attributes[0], question.reference
    if reference is None or attribute not in reference.classes:
        return 0
    classes = range(len(question.classes[attribute]))
    sizes = [int((of.classes[attribute] == index).sum()) for of in (*seen, reference) for index in classes]
    return min((size for size in sizes if size >= MIN_GROUP), default=0)


def frechet_name(features: str) -> str:
    """Name of the Fréchet distance on these features: FID on Inception's alone."""
    return f"FID ({features})" if features == "inception" else f"Frechet distance ({features})"


def share(successes: NDArray[Any]) -> Quantity:
    """Share of images that have a property, given as (N,), with its interval."""
    total, count = len(successes), int(np.sum(successes))
    return Quantity(count / total, *share_interval(count, total))


def where_defined(figure: Callable[..., Quantity], *arguments: Any) -> Quantity:
    """The figure, or why it is not defined: a row of zeros, say, has no direction."""
    try:
        return figure(*arguments)
    except EvaluationError as error:
        return Quantity(None, note=f"not defined: {error}")


def _too_few(ours: int, theirs: int, needed: int) -> Quantity:
    return Quantity(None, note=f"not defined at {ours} against {theirs} images: needs {needed} of each")


def _distances(pair: tuple[NDArray[Any], NDArray[Any]], name: str, *, kernels: bool = True) -> dict[str, Quantity]:
    """Every distance of features, (N, D), to a reference's, (M, D), with or without those of kernels."""
    n, m = map(len, pair)
    sizes = f"{n} against {m} images"
    falling = f"{sizes}; falls as their number grows"
    figures = {frechet_name(name): Quantity(distances.frechet_distance(*pair), note=falling)}
    if kernels:
        enough = min(n, m) >= MIN_KERNEL
        kid = replace(distances.kernel_distance(*pair), note=sizes) if enough else _too_few(n, m, MIN_KERNEL)
        figures[f"KID ({name})"] = kid
        figures[f"CMMD ({name})"] = where_defined(lambda: Quantity(distances.cmmd(*pair), note=falling))
    # The images that each is a share of; density is no share and has no interval.
    totals = {f"precision ({name})": n, f"recall ({name})": m, f"density ({name})": 0, f"coverage ({name})": m}
    if min(n, m) <= NEIGHBOURS:
        return figures | dict.fromkeys(totals, _too_few(n, m, NEIGHBOURS + 1))
    found = distances.precision_recall_density_coverage(*pair, k=NEIGHBOURS)
    for (label, total), value in zip(totals.items(), found, strict=True):
        ends = share_interval(round(value * total), total) if total else ()
        figures[label] = Quantity(value, *ends)
    return figures
