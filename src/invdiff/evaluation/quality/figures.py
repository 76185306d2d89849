"""How good a model's images are, how different, and how they compare with reference images, group by group too."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...data.images import read_image
from ...errors import EvaluationError
from ...models.encoders import ClipEncoder
from ...seeds import derived_seed
from ..annotate import Described, Question
from ..fairness.intervals import mean_interval, share_interval
from ..images import Row
from ..results import Quantity
from .distances import (
    cmmd,
    frechet_distance,
    kernel_distance,
    paired_cosines,
    precision_recall_density_coverage,
    vendi_score,
)
from .extractors import LPIPS, lpips_diversity

NEIGHBOURS = 5  # k of precision, recall, density and coverage
MIN_KERNEL = 3  # images of each side that the kernel distance's interval needs
LPIPS_IMAGES = 20  # images of each prompt that LPIPS compares in pairs
MIN_GROUP = 50  # images of a group below which distances to a reference are mostly error


def quality_figures(
    rows: Sequence[Row],
    seen: Described,
    reference: Described | None,
    clip: ClipEncoder | None,
    lpips: LPIPS | None,
) -> dict[str, Quantity]:
    """Distances to the reference, diversity within prompts and, with `clip`, how well images show their prompts."""
    by_prompt: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        by_prompt.setdefault(row.prompt, []).append(place)

    def diversity(features: NDArray[Any]) -> Quantity:
        scores = [vendi_score(features[places]) for places in by_prompt.values()]
        return Quantity(float(np.mean(scores)), note="mean over prompts")

    def agreement(images: NDArray[Any], texts: NDArray[Any]) -> Quantity:
        cosines = paired_cosines(images, texts)
        return Quantity(float(cosines.mean()), *mean_interval(cosines))

    figures: dict[str, Quantity] = {}
    for name, features in seen.features.items():
        if reference is not None and name in reference.features:
            figures |= _distances(features, reference.features[name], name)
        figures[f"Vendi score ({name})"] = where_defined(diversity, features)
    if clip is not None:
        texts = clip.text_features([row.prompt for row in rows])
        figures[f"CLIP-T ({clip.name})"] = where_defined(agreement, seen.features[clip.name], texts)
    if lpips is not None:  # pixels of one prompt are held at a time

        def spread(network: LPIPS) -> Quantity:
            scores = [
                lpips_diversity([read_image(rows[place].path) for place in places[:LPIPS_IMAGES]], network)
                for places in by_prompt.values()
            ]
            note = f"mean over prompts, of all pairs of the first {LPIPS_IMAGES} images at most"
            return Quantity(float(np.mean(scores)), note=note)

        figures["LPIPS diversity (alexnet)"] = where_defined(spread, lpips)
    return figures


def group_figures(
    seen: Described, reference: Described | None, right: NDArray[np.int64], question: Question, even: int
) -> dict[str, dict[str, Quantity]]:
    """Figures of `even` images of each class of the first attribute, against as many of the reference's."""
    attribute = question.attributes[0]
    names = question.classes[attribute]
    rng = np.random.default_rng(derived_seed("groups", question.config.seed))
    if reference is not None and attribute not in reference.classes:
        reference = None
    members = [
        [rng.permutation(np.flatnonzero(of.classes[attribute] == index)) for index in range(len(names))]
        for of in (seen, reference)
        if of is not None
    ]
    groups: dict[str, dict[str, Quantity]] = {}
    for index, (group, mine) in enumerate(zip(names, members[0], strict=True)):
        figures = groups[group] = {"images": Quantity(float(len(mine)))}
        known = right[mine][right[mine] >= 0]
        if len(known):
            figures["subject accuracy"] = share(known)
        elif (right >= 0).any():
            figures["subject accuracy"] = Quantity(None, note="not defined: no image of this class")
        for name, real in reference.features.items() if reference is not None else ():
            theirs = members[1][index]
            if name in seen.features and min(len(mine), len(theirs)) < MIN_GROUP:
                figures |= _too_few([frechet_name(name)], mine, theirs, MIN_GROUP)
            elif name in seen.features:
                pair = seen.features[name][mine[:even]], real[theirs[:even]]
                apart = _distances(*pair, name, kernels=False)
                note = f"{even} images of each group against as many"
                figures |= {label: replace(figure, note=note) for label, figure in apart.items()}
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


def _too_few(labels: Iterable[str], ours: NDArray[Any], theirs: NDArray[Any], needed: int) -> dict[str, Quantity]:
    """Figures that are not defined, by label, as either side has fewer images than `needed`."""
    note = f"not defined at {len(ours)} against {len(theirs)} images: needs {needed} of each"
    return {label: Quantity(None, note=note) for label in labels}


def _distances(
    features: NDArray[Any], reference: NDArray[Any], name: str, *, kernels: bool = True
) -> dict[str, Quantity]:
    """Every distance of features, (N, D), to a reference's, (M, D), with or without those of kernels."""
    n, m = len(features), len(reference)
    sizes, kid = f"{n} against {m} images", f"KID ({name})"
    falling = f"{sizes}; falls as their number grows"
    figures = {frechet_name(name): Quantity(frechet_distance(features, reference), note=falling)}
    if kernels and min(n, m) < MIN_KERNEL:
        figures |= _too_few([kid], features, reference, MIN_KERNEL)
    elif kernels:
        figures[kid] = replace(kernel_distance(features, reference), note=sizes)
    if kernels:
        figures[f"CMMD ({name})"] = where_defined(lambda: Quantity(cmmd(features, reference), note=falling))
    # The images that each is a share of; density is no share and has no interval.
    totals = {f"precision ({name})": n, f"recall ({name})": m, f"density ({name})": 0, f"coverage ({name})": m}
    if min(n, m) <= NEIGHBOURS:
        return figures | _too_few(totals, features, reference, NEIGHBOURS + 1)
    found = precision_recall_density_coverage(features, reference, k=NEIGHBOURS)
    for (label, total), value in zip(totals.items(), found, strict=True):
        ends = share_interval(round(value * total), total) if total else ()
        figures[label] = Quantity(value, *ends)
    return figures
