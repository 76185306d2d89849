"""Bias and quality as lines: over the guidance scale, and over the strength of the guidance module (Delta)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..evaluation.images import module_scale
from ..evaluation.results import UNSTATED, Measures, Results
from .charts import BASE_COLOUR, Panel, Point, Series, distinct_floors, numbered_series
from .comparison import Comparison, label
from .sources import Generated
from .words import at_scale

_JOINTS = "-_ ="
_Read = Callable[[Measures], "tuple[float, float | None, float | None] | None"]


@dataclass(frozen=True)
class Curve:
    """One figure over one scale."""

    panel: Panel
    x_name: str
    alt: str
    """All its points, in words."""
    caption: str


@dataclass(frozen=True)
class ModuleLine:
    """One module at several strengths."""

    name: str
    """For people."""
    measures: Mapping[float, Measures]
    """Delta, rising, to what was measured there; 0 is the plain model."""


def _read_bias(measures: Measures) -> tuple[float, float | None, float | None]:
    spread = measures.first.overall["bias"]
    return spread.value, spread.low, spread.high


def _read_subject(measures: Measures) -> tuple[float, float | None, float | None] | None:
    figure = measures.subject_accuracy
    return None if figure is None or figure.value is None else (figure.value, figure.low, figure.high)


def _read_frechet(measures: Measures) -> tuple[float, float | None, float | None] | None:
    return None if measures.frechet is None else (measures.frechet, None, None)


_FIGURES: tuple[tuple[str, _Read, tuple[float, ...], str], ...] = (
    ("Bias", _read_bias, (0.0, 1.0), "Bias of the first attribute: 0 is even, 1 is always the same class."),
    ("subject right", _read_subject, (0.0, 1.0), "Share of images that show the subject their prompt names."),
    ("Fréchet distance", _read_frechet, (0.0,), "Fréchet distance to the reference: lower is closer to real images."),
)


def over_guidance(results: Results, models: Sequence[str], chosen: Comparison) -> list[Curve]:
    """Return every figure over the guidance scale, one line for each model; none of fewer than two scales."""
    stated = {key for model in models for key in results.models[model] if key != UNSTATED}
    if len(stated) < 2:
        return []
    lines = {
        model: {float(key): measures for key, measures in results.models[model].items() if key != UNSTATED}
        for model in models
    }
    order = [model for model in models if model != chosen.before or len(models) == 1]
    tints = {model: numbered_series(place, label(model), ()) for place, model in enumerate(order)}
    tints.setdefault(chosen.before, Series(label(chosen.before), (), BASE_COLOUR))
    styled = [(tints[model], line) for model, line in lines.items()]
    return _curves(styled, "guidance scale", "over guidance scale", "")


def over_module_scale(lines: Sequence[ModuleLine], key: str) -> list[Curve]:
    """Return every figure over the strength of the module, at one guidance scale as results name it."""
    styled = [(numbered_series(place, line.name, ()), line.measures) for place, line in enumerate(lines)]
    where = f"{at_scale(key).capitalize()}; 0 is the base model, 1 is what the module was trained for."
    return _curves(styled, "scale of the module", "over the module's scale", where)


def module_lines(results: Results, images: Mapping[str, Generated], chosen: Comparison) -> list[ModuleLine]:
    """Return the modules that were measured at two strengths or more, each beside the plain model at 0.

    Models are of one module where their `generate.json` says so; where that is not given, where their names are
    the same but for the strength at the end, such as "guided-0.5" and "guided-1". A module that was measured twice at
    one strength is left out: which of the two belongs to the line is not known.

    Args:
        results: What was measured.
        images: The models' images, as far as they are given.
        chosen: What the report compares, and at which guidance scale.
    """
    measured = {model: by_key[chosen.key] for model, by_key in results.models.items() if chosen.key in by_key}
    scales = {model: _scale(model, results, images) for model in measured}
    plain = sorted((model for model, scale in scales.items() if scale == 0), key=lambda model: model != chosen.before)
    modules: dict[str, list[str]] = {}
    for model, scale in scales.items():
        if scale:
            modules.setdefault(_module(model, scale, images), []).append(model)
    found: dict[str, tuple[str, dict[float, Measures]]] = {}
    for models in modules.values():
        line = {scale: measured[model] for model in models if (scale := scales[model])}
        if len(line) > 1 and len(line) == len(models):
            start = {0.0: measured[plain[0]]} if plain else {}
            found[models[0]] = (_stem(models[0], scales[models[0]]), dict(sorted((start | line).items())))
    stems = [stem for stem, _ in found.values()]
    return [
        ModuleLine(label(stem if stems.count(stem) == 1 else first), line) for first, (stem, line) in found.items()
    ]


def _scale(model: str, results: Results, images: Mapping[str, Generated]) -> float | None:
    if model in results.module_scales:
        return results.module_scales[model]
    return module_scale(images[model].rows) if model in images else None


def _module(model: str, scale: float, images: Mapping[str, Generated]) -> str:
    """Return what is the same for one module at all strengths."""
    settings = images[model].settings[:1] if model in images else ()
    if not settings or not settings[0].get("module"):
        return _stem(model, scale)
    same = ("module", "environments", "num_inference_steps", "resolution", "scheduler", "model")
    return json.dumps([settings[0].get(name) for name in same])


def _stem(model: str, scale: float | None) -> str:
    """Return a model's name without its module's scale at the end, such as "guided" of "guided-0.5"."""
    number = re.search(r"[0-9]+([.][0-9]+)?$", model[-20:])
    if number is None or float(number[0]) != scale:
        return model
    stem = model[: -len(number[0])].rstrip(_JOINTS)
    for word in ("scale", "delta"):
        if stem.lower().endswith(word):
            stem = stem[: -len(word)].rstrip(_JOINTS)
    return stem or model


def _curves(lines: Sequence[tuple[Series, Mapping[float, Measures]]], x_name: str, over: str, end: str) -> list[Curve]:
    curves = []
    for name, read, reach, caption in _FIGURES:
        series, floors = [], []
        for look, by_scale in lines:
            figures = [(scale, read(measures)) for scale, measures in sorted(by_scale.items())]
            if any(figure is not None for _, figure in figures):
                points = tuple(Point(x, *figure) if figure else Point(x, None) for x, figure in figures)
                series.append(Series(look.name, points, look.colour, look.marker))
                floors.append([(scale, measures.bias_floor) for scale, measures in by_scale.items()])
        if series:
            dotted = distinct_floors(floors) if name == "Bias" else []
            fair = "Dotted: what a fair sampler shows by chance." if dotted else ""
            alt = f"{name} {over}. {_in_words(series)}"
            panel = Panel(name, series, dotted, reach=reach)
            curves.append(Curve(panel, x_name, alt, " ".join(part for part in (caption, fair, end) if part)))
    return curves


def _in_words(series: Sequence[Series]) -> str:
    words = []
    for one in series:
        values = ", ".join(f"{y:.2f} at {x:g}" for x, y in one.drawn)
        words.append(f"{one.name[:60]}: {values}.")
    return " ".join(words)
