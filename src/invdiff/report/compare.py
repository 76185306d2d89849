"""The models and the guidance scale that a report compares, their images of the same seeds, and their curves."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..evaluation.images import Row, module_scale, scale_keys
from ..evaluation.results import UNSTATED, Measures, Results, scale_order
from .plots import Chart, Line
from .read import Generated, Run

BASE, GUIDED = "base", "guided"
LABELS = {BASE: "Base model", GUIDED: "With guidance"}
MOST_MODELS = 8
"""Models shown beside each other."""
CHARTS = (
    ("Bias: 0 is even, 1 is always the same class", 1.0),
    ("Subject right: share of images with the prompt's subject", 1.0),
    ("Fréchet distance: lower is closer to real images", None),
)
"""Title, and where the y axis ends at least."""


@dataclass(frozen=True)
class Comparison:
    """Two models at one guidance scale; of one model alone, both names are the same."""

    before: str
    after: str
    key: str
    """The guidance scale as results name it."""
    keys: Sequence[str]
    """All guidance scales that both have, ascending."""


def label(model: str) -> str:
    """A model's name for people."""
    return LABELS.get(model, model)


def compare(results: Results | None, images: Mapping[str, Generated]) -> Comparison | None:
    """The baseline, the guided model, and the middle of their guidance scales.

    Where no model is called guided, it is the first other one at the strength that its module was trained for. Of
    images that were not measured, those of two models are compared; None where there are not two.
    """
    if results is not None:
        scales = {model: list(by_scale) for model, by_scale in results.models.items() if by_scale}
        before = results.baseline or (BASE if BASE in scales else next(iter(scales)))
        strengths = results.module_scales
    elif len(images) > 1:
        scales = {model: scale_keys(generated.rows) for model, generated in images.items()}
        before, strengths = BASE if BASE in scales else next(iter(scales)), {}
    else:
        return None
    others = sorted((m for m in scales if m != before), key=lambda m: (m != GUIDED, strengths.get(m) != 1))
    after = next(iter(others), before)
    keys = sorted(set(scales[before]) & set(scales[after]), key=scale_order)
    if not keys and results is not None:
        after, keys = before, sorted(scales[before], key=scale_order)
    return Comparison(before, after, keys[(len(keys) - 1) // 2], keys) if keys else None


def measured(results: Results | None, chosen: Comparison) -> dict[str, Measures]:
    """Model to measures at the guidance scale compared, the two models compared first."""
    if results is None:
        return {}
    order = list(dict.fromkeys([chosen.before, chosen.after, *results.models]))[:MOST_MODELS]
    return {model: results.models[model][chosen.key] for model in order if chosen.key in results.models[model]}


def same_seeds(images: Mapping[str, Generated], chosen: Comparison) -> dict[str, list[tuple[Row, Row]]]:
    """Prompt to what both models drew from the same seeds, in the order of the first one's manifest."""
    if chosen.before == chosen.after or not {chosen.before, chosen.after} <= images.keys():
        return {}
    theirs = {(row.prompt, row.seed): row for row in images[chosen.after].rows if row.scale_key == chosen.key}
    pairs: dict[str, list[tuple[Row, Row]]] = {}
    for row in images[chosen.before].rows:
        other = theirs.get((row.prompt, row.seed))
        if row.scale_key == chosen.key and row.seed is not None and other is not None:
            pairs.setdefault(row.prompt, []).append((row, other))
    return pairs


def over_guidance(results: Results, chosen: Comparison) -> list[Chart]:
    """Every figure over the guidance scale, one line for each model; none of fewer than two scales."""
    lines = {}
    for model in list(dict.fromkeys([chosen.before, chosen.after, *results.models]))[:MOST_MODELS]:
        by_scale = {float(key): found for key, found in results.models[model].items() if key != UNSTATED}
        lines[label(model)] = dict(sorted(by_scale.items()))
    if len({scale for line in lines.values() for scale in line}) < 2:
        return []
    return _charts(lines, "guidance scale", base=label(chosen.before) if len(lines) > 1 else "")


def over_module_scale(modules: Mapping[str, Mapping[float, Measures]]) -> list[Chart]:
    """Every figure over the strength of the guidance module, at one guidance scale."""
    return _charts(modules, "scale of the module", base="")


def modules_by_scale(run: Run, chosen: Comparison) -> dict[str, dict[float, Measures]]:
    """The modules that were measured at two strengths or more: name to strength, rising, to measures.

    Strength 0 is the plain model. Models are of one module where their `generate.json` says so; where that is not
    given, where their names are the same but for the strength at the end, such as "guided-0.5" and "guided-1". A
    module that was measured twice at one strength is left out: which of the two belongs to the line is not known.
    """
    results, images = run.results, run.images
    at_key = results.at(chosen.key) if results else {}
    strengths = {model: results.module_scales.get(model) for model in at_key} if results else {}
    for model in at_key:
        if strengths[model] is None and model in images:
            strengths[model] = module_scale(images[model].rows)
    plain = sorted((model for model, scale in strengths.items() if scale == 0), key=lambda m: m != chosen.before)
    same: dict[str, dict[str, float]] = {}
    for model, scale in strengths.items():
        if scale:
            same.setdefault(_module_of(model, scale, images.get(model)), {})[model] = scale
    found = []
    for models in same.values():
        line = {scale: at_key[model] for model, scale in models.items()}
        if len(line) == len(models) > 1:
            first, scale = next(iter(models.items()))
            start = {0.0: at_key[plain[0]]} if plain else {}
            found.append((first, _stem(first, scale), dict(sorted((start | line).items()))))
    stems = [stem for _, stem, _ in found]
    return {label(stem if stems.count(stem) == 1 else first): line for first, stem, line in found}


def _module_of(model: str, scale: float, generated: Generated | None) -> str:
    """What is the same for one module at all strengths."""
    settings = generated.settings[0] if generated and generated.settings else {}
    if not settings.get("module"):
        return _stem(model, scale)
    same = ("module", "environments", "num_inference_steps", "resolution", "scheduler", "model")
    return json.dumps([settings.get(name) for name in same])


def _stem(model: str, scale: float) -> str:
    """A model's name without its module's scale at the end, such as "guided" of "guided-0.5"."""
    ending = re.search(r"[-_ =]*(?:scale|delta)?[-_ =]*([0-9]+(?:[.][0-9]+)?)$", model[-40:], re.IGNORECASE)
    if ending is None or float(ending[1]) != scale:
        return model
    return model[: -len(ending[0])] or model


def _charts(lines: Mapping[str, Mapping[float, Measures]], x_name: str, *, base: str) -> list[Chart]:
    places = {name: place for place, name in enumerate(name for name in lines if name != base)}
    charts = []
    for title, top in CHARTS:
        drawn = []
        for name, by_scale in lines.items():
            points = [(scale, *_figure(title, measures)) for scale, measures in by_scale.items()]
            if any(point[1] is not None for point in points):
                drawn.append(Line(name, points, places.get(name)))
        floors = [[(scale, m.bias_floor) for scale, m in line.items()] for line in lines.values() if line]
        if drawn:
            charts.append(Chart(title, x_name, drawn, top, floors if title.startswith("Bias") else ()))
    return charts


def _figure(title: str, measures: Measures) -> tuple[float | None, float | None, float | None]:
    if title.startswith("Bias"):
        return measures.bias, *measures.bias_ci
    if title.startswith("Fréchet"):
        return measures.frechet, None, None
    subject = measures.subject_accuracy
    return (subject.value, subject.low, subject.high) if subject else (None, None, None)
