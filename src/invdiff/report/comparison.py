"""Which models and which guidance scale a report compares, and their images of the same seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image

from ..errors import EvaluationError
from ..evaluation.images import Row, scale_keys
from ..evaluation.results import UNSTATED, Measures, Results
from .charts import BASE_COLOUR, SERIES_COLOURS
from .document import Pair
from .plots import thumb
from .sources import Generated

BASE, GUIDED = "base", "guided"
MOST_MODELS = 8
"""Models shown beside each other."""
LABELS = {BASE: "Base model", GUIDED: "With guidance"}


@dataclass(frozen=True)
class Comparison:
    """Two models at one guidance scale; of one model alone, both names are the same."""

    before: str
    after: str
    key: str
    """The guidance scale as results name it."""
    keys: tuple[str, ...]
    """All guidance scales that both were measured at."""


def choose(results: Results) -> Comparison:
    """Return the baseline, the guided model, and the middle of their guidance scales.

    Where none is called guided, that is the first other one at the strength that its module was trained for.
    """
    models = [model for model, by_scale in results.models.items() if by_scale]
    before = results.baseline or (BASE if BASE in models else models[0])
    others = [model for model in models if model != before]
    others.sort(key=lambda model: (model != GUIDED, results.module_scales.get(model) != 1))
    after = others[0] if others else before
    shared = set(results.models[before]) & set(results.models[after])
    if not shared:
        after, shared = before, set(results.models[before])
    keys = sorted(shared, key=lambda key: float("inf") if key == UNSTATED else float(key))
    return Comparison(before, after, keys[(len(keys) - 1) // 2], tuple(keys))


def choose_images(images: Mapping[str, Generated]) -> Comparison | None:
    """Return the same of images that were not measured; None where there are no two models to compare."""
    if len(images) < 2:
        return None
    before = BASE if BASE in images else next(iter(images))
    after = GUIDED if GUIDED in images else next(model for model in images if model != before)
    present = scale_keys(images[after].rows)
    keys = tuple(key for key in scale_keys(images[before].rows) if key in present)
    return Comparison(before, after, keys[(len(keys) - 1) // 2], keys) if keys else None


def in_order(results: Results, chosen: Comparison, *, most: int = MOST_MODELS) -> list[str]:
    """Return the models that are shown: the two compared, then the others."""
    return list(dict.fromkeys([chosen.before, chosen.after, *results.models]))[:most]


def label(model: str) -> str:
    """Return a model's name for people."""
    return LABELS.get(model, model)


def colours(models: Sequence[str], before: str, after: str) -> dict[str, str]:
    """Return a colour for each model: grey for the one that others are compared with."""
    others = [after, *(model for model in models if model not in (before, after))]
    chosen = {model: SERIES_COLOURS[place % len(SERIES_COLOURS)] for place, model in enumerate(others)}
    return chosen | {before: BASE_COLOUR}


def measures_of(results: Results, model: str, key: str) -> Measures | None:
    """Return a model's measures at one guidance scale, where it has them."""
    return results.models.get(model, {}).get(key)


def same_seeds(images: Mapping[str, Generated], chosen: Comparison) -> dict[str, list[tuple[Row, Row]]]:
    """Return prompt to what both models drew from the same seeds, in the order of the first one's manifest."""
    if chosen.before == chosen.after or not {chosen.before, chosen.after} <= images.keys():
        return {}
    theirs = {(row.prompt, row.seed): row for row in images[chosen.after].rows if row.scale_key == chosen.key}
    pairs: dict[str, list[tuple[Row, Row]]] = {}
    for row in images[chosen.before].rows:
        other = theirs.get((row.prompt, row.seed))
        if row.scale_key == chosen.key and row.seed is not None and other is not None:
            pairs.setdefault(row.prompt, []).append((row, other))
    return pairs


def picture(pair: tuple[Row, Row], chosen: Comparison) -> Pair:
    """Return a pair small enough to embed.

    Raises:
        EvaluationError: An image is absent or damaged.
    """
    sides = [
        thumb(open_row(row), f"{label(model)}: {row.prompt[:200]}, seed {row.seed}")
        for row, model in zip(pair, (chosen.before, chosen.after), strict=True)
    ]
    return Pair(*sides)


def open_row(row: Row) -> Image.Image:
    """Return a generated image as RGB.

    Raises:
        EvaluationError: It is absent or damaged.
    """
    try:
        with Image.open(row.path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise EvaluationError(
            f"Expected a readable image at {row.path}, found something else ({error}). Run the same "
            "`invdiff generate` again, or remove its row from the manifest."
        ) from error
