"""Show what guidance changed: images of the same prompts and seeds, before and after, with the shares of classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import ConfigError, EvaluationError
from ..evaluation.images import Row
from .comparison import BASE, GUIDED, Comparison, label, open_row
from .style import INK, SOFT, Sheet, colour_of, percent, shorten, text_width
from .words import at_scale

_MARGIN = 64
_SMALLEST = 100
"""Images smaller than this, in pixels, go on a second line instead."""

Shares = Mapping[str, Mapping[str, Mapping[str, float]]]


def save_before_after(
    path: Path,
    pairs: Mapping[str, Sequence[tuple[Row, Row]]],
    chosen: Comparison,
    *,
    prompts: Sequence[str] | None = None,
    columns: int = 8,
    title: str = "Same prompts, same seeds",
    shares: Shares | None = None,
) -> Path:
    """Draw images of one model above those that another made of the same prompts and seeds.

    Args:
        path: The PNG to write, 1600 pixels wide.
        pairs: Prompt to what both models drew from the same seeds; see `same_seeds`.
        chosen: The two models, and at which guidance scale.
        prompts: Which prompts to show, two side by side; by default the first two.
        columns: The most images of each model and prompt; they go on two lines where one would be too small.
        title: The heading.
        shares: Model to prompt to class to share, as in `Measures.shares`: a bar below the images.

    Raises:
        EvaluationError: There is no pair of a prompt, an image is absent or damaged, or `shares` lacks a prompt.
        ConfigError: `columns` is below 1 or `prompts` is empty.
    """
    if columns < 1:
        raise ConfigError(f"Expected columns of at least 1, got {columns}.")
    if prompts is not None and not prompts:
        raise ConfigError("Expected at least one prompt, got none.")
    shown = list(pairs)[:2] if prompts is None else list(prompts)
    models = (chosen.before, chosen.after)
    _check(pairs, shown, models, shares)

    width, gap, gutter, top = 1600, 8, 72, 200
    across = min(len(shown), 2)
    block_width = (width - 2 * _MARGIN - (across - 1) * gutter) // across
    most = min(columns, max(len(pairs[prompt]) for prompt in shown))
    lines = -(-most * (_SMALLEST + gap) // block_width)
    per_line = -(-most // lines)
    side = min((block_width - (per_line - 1) * gap) // per_line, 240)
    strip = lines * side + (lines - 1) * gap
    bar = 58 if shares is not None else 0
    model_height = 46 + strip + bar
    block_height = 46 + 2 * (model_height + 30)
    sheet = Sheet(width, top - 20 + -(-len(shown) // across) * (block_height + 34))

    sheet.text(_MARGIN, 92, title, size=42, bold=True, width=width - 2 * _MARGIN)
    subtitle = "What both models make of the same starting noise"
    if models == (BASE, GUIDED):
        subtitle = "Each image of the base model, and what guidance makes of the same starting noise"
    scale = f"   ·   {at_scale(chosen.key).removeprefix('at ')}"
    sheet.text(_MARGIN, 136, subtitle + scale, size=23, colour=SOFT, width=width - 2 * _MARGIN)
    for place, prompt in enumerate(shown):
        line, column = divmod(place, across)
        x = _MARGIN + column * (block_width + gutter)
        y = top + line * (block_height + 34)
        sheet.text(x, y + 22, f"“{prompt}”", size=29, bold=True, width=block_width)
        y += 46
        for number, model in enumerate(models):
            sheet.text(x, y + 30, label(model), size=22, bold=number == 1, colour=INK, width=block_width)
            images = [open_row(pair[number]) for pair in pairs[prompt][:most]]
            sheet.images(images, x, y + 46, side, columns=per_line, gap=gap)
            if shares is not None:
                bar_width = per_line * (side + gap) - gap
                _labelled_bar(sheet, x, y + 46 + strip + 16, bar_width, shares[model][prompt])
            y += model_height + 30
    return sheet.save(Path(path))


def _check(
    pairs: Mapping[str, Sequence[tuple[Row, Row]]],
    prompts: Sequence[str],
    models: tuple[str, str],
    shares: Shares | None,
) -> None:
    if not pairs:
        raise EvaluationError(
            f"Expected images of {models[0]} and {models[1]} from the same prompts and seeds, found none. Generate "
            "both with the same prompts and seed."
        )
    for prompt in prompts:
        if not pairs.get(prompt):
            raise EvaluationError(
                f"Expected images of {prompt!r} from the same seeds of {models[0]} and {models[1]}, found none; both "
                f"have {', '.join(map(repr, pairs))}. Choose among these, or generate them."
            )
        for model in models if shares is not None else ():
            if prompt not in (shares or {}).get(model, {}):
                raise EvaluationError(
                    f"Expected the {model!r} shares of {prompt!r}, got none. Evaluate the same folders."
                )


def _labelled_bar(sheet: Sheet, x: float, y: float, width: float, shares: Mapping[str, float]) -> None:
    """Draw a share bar with its classes named below, as far as there is room."""
    sheet.share_bar(x, y, width, list(shares.values()))
    place = x
    for index, (name, share) in enumerate(shares.items()):
        text = shorten(f"{name} {percent(share)}", 240, 20)
        end = place + 24 + text_width(text, 20)
        if end > x + width:
            sheet.text(place, y + 42, "…", size=20)
            break
        sheet.dot(place + 7, y + 35, colour_of(index), radius=7)
        sheet.text(place + 24, y + 42, text, size=20)
        place = end + 28
