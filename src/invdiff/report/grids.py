"""Pictures beside audits and Markdown: the groups that were found, what guidance changed, and its figures.

A picture is made of parts, each an image of its own: lines of text, strips of images, a histogram. Lengths are pixels.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
from matplotlib.axes import Axes
from PIL import Image, ImageDraw, ImageFont, ImageOps

from ..auditing.result import AuditWords
from ..data.images import read_image
from ..files import save_image
from ..text import one_line, or_dash
from .compare import BASE, GUIDED, Comparison, label
from .figures import LOOK, at_scale, counted, percent
from .plots import INK, PAPER, SOFT, Chart, colour_of, draw_chart, draw_histogram, is_rare, render
from .read import MOST_PROMPTS, Parts, Run, Split, read_run

if TYPE_CHECKING:
    from ..data.captioned import CaptionedImages

MOST_REASONS = 12
FULL, MARGIN, GAP = 1472, 64, 8
SCORES, GUTTER = 480, 72  # width of a histogram, and what parts it from the groups beside it
COLUMNS = 8
FONTS = Path(matplotlib.get_data_path(), "fonts", "ttf")


def save_audit_picture(audit_folder: str | Path, data: CaptionedImages) -> Path:
    """Draw an audit into its own folder as `groups.png`, and return its path; images are found by name."""
    path = Path(audit_folder) / "groups.png"
    save_groups(path, read_run(Parts(audit=path.parent, data=data)))
    return path


def save_groups(path: Path, run: Run) -> None:
    """Draw the scores and groups of the prompts that hide one, at most 8; below them, why other prompts hide none."""
    assert run.audit is not None
    splits, words = run.splits[:MOST_PROMPTS], run.audit.words
    title, subtitle = "No hidden group was found", "No split into groups was clear enough to be believed."
    if splits:
        title, subtitle = "Hidden groups", f"Images under the same prompt, split without labels. {LOOK}"
    parts = [*_title(title, subtitle), *(part for split in splits for part in _of_split(split, run, words))]
    unfound = sorted((prompt for prompt in run.audit.prompts if not prompt.found), key=lambda p: -p.num_images)
    for prompt in unfound[:MOST_REASONS]:
        parts.append(text(f"“{one_line(prompt.prompt, 70)}” · {counted(prompt.num_images, 'image')}", 22, bold=True))
        lines = textwrap.wrap(one_line(prompt.reason, 400), 130, max_lines=2, placeholder="…")
        parts += [*(text(line, 19, soft=True) for line in lines), _space(18)]
    if len(unfound) > MOST_REASONS:
        parts.append(text(f"and {len(unfound) - MOST_REASONS} more: see audit.json", 22))
    _save(path, parts)


def save_before_after(path: Path, chosen: Comparison) -> None:
    """Draw what both models made of the same prompts and seeds, of two prompts, with the shares of each class."""
    both = (chosen.before, chosen.after)
    subtitle = "Both models' images of the same starting noise"
    if both == (BASE, GUIDED):
        subtitle = "Each image of the base model, and below it what guidance makes of the same starting noise"
    parts = _title("Same prompts, same seeds", f"{subtitle} · {at_scale(chosen.key).removeprefix('at ')}")
    for prompt, pairs in list(chosen.pairs.items())[:2]:
        parts.append(text(f"“{prompt}”", 29, bold=True))
        for side, model in enumerate(both):
            shares = chosen.measures[model].shares.get(prompt, {}) if model in chosen.measures else {}
            of_classes = [f"{one_line(name, 20)} {percent(share)}" for name, share in shares.items()]
            parts.append(text(" · ".join([label(model), *of_classes]), 22, bold=side == 1))
            parts += [strip([read_image(pair[side].path) for pair in pairs[:COLUMNS]]), _space(12)]
        parts.append(_space(24))
    _save(path, parts)


def save_charts(path: Path, charts: Sequence[Chart], *, title: str) -> None:
    """Draw charts below each other."""
    _save(path, [*_title(title), *(_plotted(partial(draw_chart, chart=chart), FULL, 400) for chart in charts)])


def _of_split(split: Split, run: Run, words: AuditWords | None) -> list[Image.Image]:
    """One prompt: its scores on the left, its groups on the right."""
    prompt, others = split.prompt, len(split.prompt.captions) - 1
    facts = [
        counted(prompt.num_images, "image"),
        f"separation {or_dash(split.figures.separation)}",
        f"agreement {or_dash(split.figures.agreement)}",
        counted(others, "more wording") if others else "",
        f"split by {split.figures.evidence}",
        f"words by “{one_line(words.model, 40)}”" if words else "",
    ]
    width, groups = FULL - SCORES - GUTTER, []
    for group in split.groups:
        entry = words.of(split.index, group.index, split.factor_index) if words else None
        heading = f"{one_line(group.name, 30)} · {percent(group.share)} · {counted(group.size, 'image')}"
        groups.append(text(heading, 24, width, bold=True, dot=colour_of(group.index)))
        groups += [text(entry.line, 20, width, soft=True)] if entry and entry.words else []
        for note, positions in zip(("most typical", "least certain"), group.shown, strict=True):
            if positions:
                groups += [text(note, 18, width, soft=True), strip(run.images_at(positions[:COLUMNS]), width)]
        groups.append(_space(24))
    beside = _below(groups)

    def scores(axes: Axes) -> None:
        draw_histogram(axes, split, log_scale=is_rare(split))
        axes.set_xlabel("score, as inferred" if split.by_hand else "score, high for the rarer group")
        axes.set_title("images, log scale" if is_rare(split) else "images", pad=30)

    histogram = _plotted(scores, SCORES, max(min(beside.height, 600), 360))
    both = Image.new("RGB", (FULL, max(beside.height, histogram.height)), PAPER)
    both.paste(histogram)
    both.paste(beside, (SCORES + GUTTER, 0))
    title = text(f"{split.factor}“{prompt.prompt}”", 29, bold=True)
    return [title, text(" · ".join(filter(None, facts)), 20, soft=True), _space(16), both, _space(24)]


def text(
    words: str, size: int, width: int = FULL, *, bold: bool = False, soft: bool = False, dot: str = ""
) -> Image.Image:
    """One line of text, cut where it is wider than `width`, after a dot of a colour where one is given."""
    font, line = ImageFont.truetype(FONTS / f"DejaVuSans{'-Bold' * bold}.ttf", size), one_line(words, 200)
    indent = 1.2 * size if dot else 0
    while font.getlength(line) > width - indent:
        line = one_line(line, len(line) - 1)
    image = Image.new("RGB", (width, round(1.6 * size)), PAPER)
    draw = ImageDraw.Draw(image)
    if dot:
        draw.ellipse((0, 0.4 * size, 0.8 * size, 1.2 * size), fill=dot)
    draw.text((indent, 1.1 * size), line, SOFT if soft else INK, font, anchor="ls")
    return image


def strip(images: Sequence[Image.Image], width: int = FULL) -> Image.Image:
    """At most 8 images as squares with round corners, side by side."""
    side = (width - (COLUMNS - 1) * GAP) // COLUMNS
    row = Image.new("RGB", (width, side), PAPER)
    mask = Image.new("L", (4 * side, 4 * side))  # drawn large for smooth corners
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, 4 * side - 1, 4 * side - 1), side // 4, fill=255)
    mask = mask.resize((side, side), Image.Resampling.LANCZOS)
    for place, image in enumerate(images):
        square = ImageOps.fit(image.convert("RGB"), (side, side), Image.Resampling.BICUBIC)
        row.paste(square, (place * (side + GAP), 0), mask)
    return row


def _title(title: str, subtitle: str = "") -> list[Image.Image]:
    return [text(title, 40, bold=True), *([text(subtitle, 22, soft=True)] if subtitle else []), _space(30)]


def _plotted(draw: Callable[[Axes], object], width: int, height: int) -> Image.Image:
    return Image.open(io.BytesIO(render(draw, width, height)))


def _space(height: int) -> Image.Image:
    return Image.new("RGB", (1, height), PAPER)


def _below(parts: Sequence[Image.Image]) -> Image.Image:
    whole, top = Image.new("RGB", (max(part.width for part in parts), sum(part.height for part in parts)), PAPER), 0
    for part in parts:
        whole.paste(part, (0, top))
        top += part.height
    return whole


def _save(path: Path, parts: Sequence[Image.Image]) -> None:
    save_image(path, ImageOps.expand(_below(parts), MARGIN, PAPER).save)
