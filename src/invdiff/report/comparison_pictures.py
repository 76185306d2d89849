"""Show what guidance changed: images before and after, and Bias against guidance scale."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import ConfigError, EvaluationError
from .charts import BASE_COLOUR, Panel, Point, Series, distinct_floors, numbered_series, save_line_charts
from .style import INK, SOFT, Sheet, colour_of, percent, shorten, text_width

MANIFEST = "manifest.jsonl"
LABELS = {"base": "Base model", "guided": "With guidance"}

_MARGIN = 64
_SMALLEST = 100
"""Images smaller than this, in pixels, go on a second line instead."""

Shares = Mapping[str, Mapping[str, Mapping[str, float]]]


@dataclass(frozen=True)
class _Pair:
    base: Path
    guided: Path


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
        results: Model to guidance scale to "bias", "bias_floor" and "bias_ci", as `Results.models_to_dict()` returns.

    Raises:
        EvaluationError: `results` holds nothing to draw.
    """
    curves, floors = _read_curves(results)
    if not curves:
        raise EvaluationError("Expected results of at least one model, got none. Run `invdiff evaluate`.")
    panel = Panel("Bias", _model_series(curves), distinct_floors(floors), reach=(0, 1))
    return save_line_charts(
        Path(path),
        [panel],
        title="Bias at every guidance scale",
        subtitle="How far apart the classes' shares are: 0 is balanced, 1 is always the same class",
        x_name="guidance scale",
    )


def _read_curves(
    results: Mapping[str, Mapping[str, Mapping[str, Any]]],
) -> tuple[dict[str, tuple[Point, ...]], list[list[tuple[float, float]]]]:
    """Return each model's Bias by guidance scale, and each model's floors as (scale, floor)."""
    try:
        curves = {
            model: tuple(
                Point(float(scale), float(at["bias"]), float(at["bias_ci"][0]), float(at["bias_ci"][1]))
                for scale, at in sorted(by_scale.items(), key=lambda entry: float(entry[0]))
            )
            for model, by_scale in results.items()
            if by_scale
        }
        floors = [
            [(float(scale), float(at["bias_floor"])) for scale, at in by_scale.items()]
            for by_scale in results.values()
        ]
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        raise EvaluationError(
            f"Expected model to guidance scale to bias, bias_floor and bias_ci, got something else ({error!r}). "
            "Give what `Results.models_to_dict()` returns."
        ) from error
    return curves, floors


def _model_series(curves: Mapping[str, tuple[Point, ...]]) -> list[Series]:
    others = iter(range(1, len(curves) + 1))
    series = []
    for model, points in curves.items():
        name = LABELS.get(model, model)
        if model == "base":
            series.append(Series(name, points, BASE_COLOUR))
        else:
            series.append(numbered_series(0 if model == "guided" else next(others), name, points))
    return series


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
