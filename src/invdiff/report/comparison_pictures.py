"""Show what guidance changed: images before and after, and Bias against guidance scale."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from PIL import Image

from ..errors import ConfigError, EvaluationError
from .style import INK, PALETTE, SOFT, Sheet, colour_of, number, percent, shorten, text_width, ticks

MANIFEST = "manifest.jsonl"
LABELS = {"base": "Base model", "guided": "With guidance"}
MODEL_COLOURS = {"base": "#6f7b8a", "guided": PALETTE[1]}
OTHER_COLOURS = (*PALETTE[2:4], PALETTE[5], PALETTE[0], *PALETTE[6:])

_MARGIN = 64
_SMALLEST = 100
"""Images smaller than this, in pixels, go on a second line instead."""

Shares = Mapping[str, Mapping[str, Mapping[str, float]]]


@dataclass(frozen=True)
class _Pair:
    base: Path
    guided: Path


@dataclass(frozen=True)
class _Point:
    scale: float
    bias: float
    low: float
    high: float


def save_before_after(
    path: Path,
    base_dir: Path,
    guided_dir: Path,
    *,
    guidance_scale: float | None = None,
    prompts: Sequence[str] | None = None,
    columns: int = 8,
    title: str = "Same prompts, same seeds",
    shares: Shares | None = None,
) -> Path:
    """Draw images of the base model above those of the guided model from the same prompts and seeds.

    Args:
        path: The PNG to write, 1600 pixels wide.
        base_dir: A folder that `generate` wrote without a module.
        guided_dir: One that it wrote with a module, from the same seeds.
        guidance_scale: Which images to take where a folder holds several; by default the only one.
        prompts: Which prompts to show, two side by side; by default the first two that both folders have.
        columns: The most images of each model and prompt; they go on two lines where one would be too small.
        title: The heading.
        shares: "base" and "guided" to prompt to class to share, as in `Measures.shares`: a bar below the images.

    Raises:
        EvaluationError: A folder has no usable manifest, an image is absent or damaged, the folders share no
            prompt and seed at one guidance scale, or `shares` lacks a prompt.
        ConfigError: `columns` is below 1 or `prompts` is empty.
    """
    if columns < 1:
        raise ConfigError(f"Expected columns of at least 1, got {columns}.")
    if prompts is not None and not prompts:
        raise ConfigError("Expected at least one prompt, got none.")
    guidance_scale, pairs = _pairs(Path(base_dir), Path(guided_dir), guidance_scale)
    chosen = list(pairs)[:2] if prompts is None else list(prompts)
    absent = [prompt for prompt in chosen if prompt not in pairs]
    if absent:
        raise EvaluationError(
            f"Expected images of {absent[0]!r} from the same seeds in {base_dir} and {guided_dir}, found none; "
            f"both have {', '.join(map(repr, pairs))}. Choose among these, or generate them."
        )
    if shares is not None:
        _check_shares(shares, chosen)

    width, gap, gutter, top = 1600, 8, 72, 200
    across = min(len(chosen), 2)
    block_width = (width - 2 * _MARGIN - (across - 1) * gutter) // across
    most = min(columns, max(len(pairs[prompt]) for prompt in chosen))
    lines = -(-most * (_SMALLEST + gap) // block_width)
    per_line = -(-most // lines)
    side = min((block_width - (per_line - 1) * gap) // per_line, 240)
    strip = lines * side + (lines - 1) * gap
    bar = 58 if shares is not None else 0
    model_height = 46 + strip + bar
    block_height = 46 + 2 * (model_height + 30)
    sheet = Sheet(width, top - 20 + -(-len(chosen) // across) * (block_height + 34))

    sheet.text(_MARGIN, 92, title, size=42, bold=True, width=width - 2 * _MARGIN)
    subtitle = "Each image of the base model, and what guidance makes of the same starting noise"
    scale = f"   ·   guidance scale {guidance_scale:g}"
    sheet.text(_MARGIN, 136, subtitle + scale, size=23, colour=SOFT, width=width - 2 * _MARGIN)
    for place, prompt in enumerate(chosen):
        line, column = divmod(place, across)
        x = _MARGIN + column * (block_width + gutter)
        y = top + line * (block_height + 34)
        sheet.text(x, y + 22, f"“{prompt}”", size=29, bold=True, width=block_width)
        y += 46
        for model in ("base", "guided"):
            sheet.text(x, y + 30, LABELS[model], size=22, bold=model == "guided", colour=INK)
            files = [getattr(pair, model) for pair in pairs[prompt][:most]]
            sheet.images([_open(file) for file in files], x, y + 46, side, columns=per_line, gap=gap)
            if shares is not None:
                shown = per_line * (side + gap) - gap
                _labelled_bar(sheet, x, y + 46 + strip + 16, shown, shares[model][prompt])
            y += model_height + 30
    return sheet.save(Path(path))


def save_bias_curve(path: Path, results: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Path:
    """Draw Bias against guidance scale, one line per model, with intervals and the finite-sample floor.

    Args:
        path: The PNG to write, 1400 pixels wide.
        results: Model to guidance scale to "bias", "bias_floor" and "bias_ci", as `Results.to_dict()` returns.

    Raises:
        EvaluationError: `results` holds nothing to draw.
    """
    curves, floors = _read_curves(results)
    scales = sorted({point.scale for curve in curves.values() for point in curve})
    if not scales:
        raise EvaluationError("Expected results of at least one model, got none. Run `invdiff evaluate`.")

    width, height, left, top, plot_height, name_size = 1400, 860, _MARGIN + 56, 190, 510, 22
    names = {model: shorten(LABELS.get(model, model), 320, name_size, bold=True) for model in curves}
    colours = _model_colours(curves)
    widest = max(text_width(name, name_size, bold=True) for name in names.values())
    plot_width = width - left - _MARGIN - 28 - widest
    sheet = Sheet(width, height)
    sheet.text(_MARGIN, 92, "Bias at every guidance scale", size=40, bold=True)
    subtitle = "How far apart the classes' shares are: 0 is balanced, 1 is always the same class"
    sheet.text(_MARGIN, 136, subtitle, size=23, colour=SOFT, width=width - 2 * _MARGIN)
    sheet.text(left + plot_width / 2, height - 94, "guidance scale", size=20, colour=SOFT, align="center")

    axes = sheet.axes(left, top, plot_width, plot_height)
    spread = (scales[-1] - scales[0]) or 1.0
    limits = (scales[0] - 0.04 * spread, scales[-1] + 0.04 * spread)
    top_value = max(1.0, *(point.high for curve in curves.values() for point in curve))
    axes.set_xlim(*limits)
    axes.set_ylim(0, 1.04 * top_value)
    ticks(axes, "x", scales, [number(scale) for scale in scales], size=20)
    levels = [0, 0.25, 0.5, 0.75, 1]
    ticks(axes, "y", levels, [number(level) for level in levels], size=20)
    for floor in floors:
        line = [(limits[0], floor[0][1]), *floor, (limits[1], floor[-1][1])]
        axes.plot(*zip(*line, strict=True), color=SOFT, linewidth=2, linestyle=(0, (1, 2)), zorder=1)
    for place, (model, curve) in enumerate(curves.items()):
        # Side by side, so that intervals do not cover each other.
        shift = 0.006 * spread * (place - (len(curves) - 1) / 2)
        _draw_curve(axes, curve, colours[model], shift)
    heights = [curve[-1].bias for curve in curves.values()]
    for model, value in zip(curves, apart(heights, 0.06 * top_value), strict=True):
        y = top + plot_height * (1 - value / (1.04 * top_value)) + 8
        sheet.text(left + plot_width + 18, y, names[model], size=name_size, bold=True, colour=colours[model])
    sheet.dotted(_MARGIN, height - 54, 44)
    note = "what a perfectly fair sampler would show on as many images"
    sheet.text(left, height - 48, note, size=18, colour=SOFT)
    return sheet.save(Path(path))


def apart(values: Sequence[float], gap: float) -> list[float]:
    """Return `values` moved as little as it takes for no two to be closer than `gap`, in the same order."""
    order = sorted(range(len(values)), key=lambda index: values[index])
    clusters: list[list[int]] = []
    centres: list[float] = []
    for index in order:
        clusters.append([index])
        centres.append(values[index])
        while len(clusters) > 1:
            reach = gap * (len(clusters[-1]) + len(clusters[-2])) / 2
            if centres[-1] - centres[-2] >= reach:
                break
            merged = clusters[-2] + clusters[-1]
            clusters[-2:], centres[-2:] = [merged], [sum(values[i] for i in merged) / len(merged)]
    moved = [0.0] * len(values)
    for cluster, centre in zip(clusters, centres, strict=True):
        for place, index in enumerate(cluster):
            moved[index] = centre + gap * (place - (len(cluster) - 1) / 2)
    return moved


def _read_curves(
    results: Mapping[str, Mapping[str, Mapping[str, Any]]],
) -> tuple[dict[str, list[_Point]], list[tuple[tuple[float, float], ...]]]:
    """Return each model's points by guidance scale, and the different floors: (scale, floor) pairs."""
    try:
        curves = {
            model: sorted(
                (
                    _Point(float(scale), float(at["bias"]), float(at["bias_ci"][0]), float(at["bias_ci"][1]))
                    for scale, at in by_scale.items()
                ),
                key=lambda point: point.scale,
            )
            for model, by_scale in results.items()
            if by_scale
        }
        floors = {
            tuple(sorted((float(scale), round(float(at["bias_floor"]), 4)) for scale, at in by_scale.items()))
            for by_scale in results.values()
            if by_scale
        }
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        raise EvaluationError(
            f"Expected model to guidance scale to bias, bias_floor and bias_ci, got something else ({error!r}). "
            "Give what `Results.to_dict()` returns."
        ) from error
    return curves, sorted(floors)


def _draw_curve(axes: Axes, curve: Sequence[_Point], colour: str, shift: float) -> None:
    x = [point.scale + shift for point in curve]
    axes.vlines(x, [p.low for p in curve], [p.high for p in curve], color=colour, alpha=0.35, linewidth=7)
    axes.plot(x, [p.bias for p in curve], color=colour, linewidth=3)
    axes.plot(x, [p.bias for p in curve], "o", color=colour, markersize=9, mec="white", mew=1.8, clip_on=False)


def _model_colours(models: Iterable[str]) -> dict[str, str]:
    names = list(models)
    others = [model for model in names if model not in MODEL_COLOURS]
    cycle = {model: OTHER_COLOURS[place % len(OTHER_COLOURS)] for place, model in enumerate(others)}
    return {model: MODEL_COLOURS.get(model) or cycle[model] for model in names}


def _pairs(base_dir: Path, guided_dir: Path, guidance_scale: float | None) -> tuple[float, dict[str, list[_Pair]]]:
    """Return the guidance scale, and prompt to images of the same seeds, in the base manifest's order."""
    base, guided = _read_manifest(base_dir), _read_manifest(guided_dir)
    if guidance_scale is None:
        found = sorted({key[0] for key in (*base, *guided)})
        if len(found) > 1:
            raise EvaluationError(
                f"Expected images of one guidance scale in {base_dir} and {guided_dir}, found "
                f"{', '.join(f'{scale:g}' for scale in found)}. Pass guidance_scale, or generate both alike."
            )
        guidance_scale = found[0]
    pairs: dict[str, list[_Pair]] = {}
    for key, file in base.items():
        if key[0] == guidance_scale and key in guided:
            pairs.setdefault(key[1], []).append(_Pair(file, guided[key]))
    if not pairs:
        raise EvaluationError(
            f"Expected images of the same prompts and seeds at guidance scale {guidance_scale:g} in {base_dir} "
            f"and {guided_dir}, found none. Generate both with the same prompts and seed."
        )
    return guidance_scale, pairs


def _read_manifest(folder: Path) -> dict[tuple[float, str, int], Path]:
    """Return (guidance scale, prompt, seed) to image."""
    path = folder / MANIFEST
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # prompts may hold other line breaks
        rows = [json.loads(line) for line in lines if line.strip()]
        images = {
            (float(row["guidance_scale"]), str(row["prompt"]), int(row["seed"])): folder / row["file_name"]
            for row in rows
        }
    except FileNotFoundError as error:
        raise EvaluationError(
            f"Expected {MANIFEST} in {folder}, found none. Give a folder that `invdiff generate` wrote."
        ) from error
    except (ValueError, TypeError, KeyError) as error:
        raise EvaluationError(
            f"Expected JSON objects with file_name, prompt, seed and guidance_scale in {path}, found something "
            f"else ({error!r}). Generate again."
        ) from error
    if not images:
        raise EvaluationError(f"Expected images in {path}, found none. Generate them first.")
    return images


def _check_shares(shares: Shares, prompts: Sequence[str]) -> None:
    for model in ("base", "guided"):
        for prompt in prompts:
            if prompt not in shares.get(model, {}):
                raise EvaluationError(
                    f"Expected the {model!r} shares of {prompt!r}, got none. Evaluate the same folders."
                )


def _labelled_bar(sheet: Sheet, x: float, y: float, width: float, shares: Mapping[str, float]) -> None:
    """Draw a share bar with its classes named below, as far as there is room."""
    sheet.share_bar(x, y, width, list(shares.values()))
    place = x
    for index, (name, share) in enumerate(shares.items()):
        label = shorten(f"{name} {percent(share)}", 240, 20)
        end = place + 24 + text_width(label, 20)
        if end > x + width:
            sheet.text(place, y + 42, "…", size=20)
            break
        sheet.dot(place + 7, y + 35, colour_of(index), radius=7)
        sheet.text(place + 24, y + 42, label, size=20)
        place = end + 28


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        reason = "none" if isinstance(error, FileNotFoundError) else f"something else ({error})"
        raise EvaluationError(
            f"Expected a readable image at {path}, found {reason}. Run the same `invdiff generate` again: it makes "
            "what is missing."
        ) from error
