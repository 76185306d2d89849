"""The models and the guidance scale that a report compares, their images of the same seeds, and their curves."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ..evaluation.images import Row, pairs_of, scale_keys
from ..evaluation.results import UNSTATED, Measures, Quantity, Results, scale_order
from .plots import Chart, Line
from .read import Run

BASE, GUIDED = "base", "guided"
LABELS = {BASE: "Base model", GUIDED: "With guidance"}
MOST_MODELS = 8  # models shown beside each other


@dataclass(frozen=True)
class Comparison:
    """Two models at one guidance scale; of one model alone, both names are the same."""

    before: str
    after: str
    key: str  # the guidance scale as results name it
    keys: list[str]  # all guidance scales that both have, ascending
    measures: Mapping[str, Measures] = field(default_factory=dict)  # of models at this scale, the two first
    pairs: Mapping[str, list[tuple[Row, Row]]] = field(default_factory=dict)  # by prompt, in the first one's order


def label(model: str) -> str:
    """A model's name for people."""
    return LABELS.get(model, model)


def compare(run: Run) -> Comparison | None:
    """The baseline, the guided model and the middle of their guidance scales; None where there are not two models.

    Without a model called guided, it is the first other one at the strength that its module was trained for.
    """
    results, images = run.results, run.images
    if results is not None:
        scales = {model: list(by_scale) for model, by_scale in results.models.items() if by_scale}
    elif len(images) > 1:
        scales = {model: scale_keys(generated.rows) for model, generated in images.items()}
    else:
        return None
    before = (results.baseline if results else "") or (BASE if BASE in scales else next(iter(scales)))
    strengths = results.module_scales if results else {}
    after = min((m for m in scales if m != before), key=lambda m: (m != GUIDED, strengths.get(m) != 1), default=before)
    keys = sorted(set(scales[before]) & set(scales[after]), key=scale_order)
    if not keys and results is not None:
        after, keys = before, sorted(scales[before], key=scale_order)
    if not keys:
        return None
    key = keys[(len(keys) - 1) // 2]
    at_key = results.at(key) if results else {}
    shown = [model for model in _in_order(results, before, after) if model in at_key] if results else []
    pairs: dict[str, list[tuple[Row, Row]]] = {}
    if before != after and {before, after} <= images.keys():
        mine, theirs = images[before].rows, images[after].rows
        for place, other in pairs_of(mine, theirs):
            if mine[place].scale_key == key:
                pairs.setdefault(mine[place].prompt, []).append((mine[place], theirs[other]))
    return Comparison(before, after, key, keys, {model: at_key[model] for model in shown}, pairs)


def _in_order(results: Results, before: str, after: str) -> list[str]:
    return list(dict.fromkeys([before, after, *results.models]))[:MOST_MODELS]


def over_guidance(results: Results, chosen: Comparison) -> list[Chart]:
    """Every figure over the guidance scale, one line for each model; none of fewer than two scales."""
    lines = {}
    for model in _in_order(results, chosen.before, chosen.after):
        by_scale = {float(key): found for key, found in results.models[model].items() if key != UNSTATED}
        lines[label(model)] = dict(sorted(by_scale.items()))
    if len({scale for line in lines.values() for scale in line}) < 2:
        return []
    return charts_of(results, lines, "guidance scale", base=label(chosen.before) if len(lines) > 1 else "")


def modules_by_scale(results: Results, chosen: Comparison) -> dict[str, dict[float, Measures]]:
    """The modules that were measured at two strengths or more: name to strength, rising, to measures.

    Strength 0 is the plain model. "guided-0.5" and "guided-1" are of one module, unless two are of one strength.
    """
    at_key, scales = results.at(chosen.key), results.module_scales
    plain = sorted((model for model in at_key if scales.get(model) == 0), key=lambda model: model != chosen.before)
    start = [(0.0, at_key[model]) for model in plain[:1]]
    lines: dict[str, list[tuple[float, Measures]]] = {}
    for model, measures in at_key.items():
        if scale := scales.get(model):
            named = re.fullmatch(r"(.+?)[-_ ]*(\d+(?:\.\d+)?)", model)
            stem = named[1] if named and float(named[2]) == scale else model
            lines.setdefault(label(stem), []).append((scale, measures))
    return {
        name: dict(sorted((*start, *line), key=lambda point: point[0]))
        for name, line in lines.items()
        if 1 < len(line) == len(dict(line))
    }


def over_module(results: Results, chosen: Comparison) -> list[Chart]:
    """Every figure over the strength of the module, one line for each module; none of fewer than two strengths."""
    return charts_of(results, modules_by_scale(results, chosen), "scale of the module")


def charts_of(
    results: Results, lines: Mapping[str, Mapping[float, Measures]], x_name: str, *, base: str = ""
) -> list[Chart]:
    """Every figure of these lines over one x axis, that of `base` in grey."""
    by = results.criterion
    titles: dict[str, tuple[Callable[[Measures], Quantity | None], float | None]] = {  # figure, and end of the y axis
        f"{by.name}: 0 is {by.fair}, {by.greatest:.2g} is {by.unfair}": (results.judged, by.greatest),
        "Subject right: share of images with the prompt's subject": (lambda m: m.subject_accuracy, 1.0),
        "Fréchet distance: lower is closer to real images": (lambda m: Quantity(m.frechet), None),
    }
    places = {name: place for place, name in enumerate(name for name in lines if name != base)}
    floors = [[(x, results.judged(m).floor) for x, m in line.items()] for line in lines.values() if line]
    charts: list[Chart] = []
    for title, (figure, top) in titles.items():
        drawn = []
        for name, line in lines.items():
            found = [(x, figure(measures) or Quantity(None)) for x, measures in line.items()]
            if any(q.value is not None for _, q in found):
                drawn.append(Line(name, [(x, q.value, q.low, q.high) for x, q in found], places.get(name)))
        if drawn:
            charts.append(Chart(title, x_name, drawn, top, () if charts else floors))
    return charts
