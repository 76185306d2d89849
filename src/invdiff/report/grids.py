"""Pictures of images in rows: the groups that an audit found, and what guidance changed."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from matplotlib.transforms import Bbox, TransformedBbox
from PIL import Image, ImageDraw, ImageOps

from ..auditing.result import AuditWords
from ..data.images import read_image
from ..text import one_line, or_dash
from .compare import BASE, GUIDED, Comparison, label
from .figures import LOOK, at_scale, counted, percent
from .plots import colour_of, draw_histogram, is_rare, save_picture
from .read import MOST_PROMPTS, Group, Parts, Run, Split, read_run

if TYPE_CHECKING:
    from ..data.captioned import CaptionedImages

MOST_REASONS = 12
OVERVIEW = "groups.png"
WIDTH, MARGIN, GUTTER, GAP = 1600, 64, 72, 8
FULL = WIDTH - 2 * MARGIN
"""Pixels between the margins."""

Paint = Callable[[Axes, float, float], object]
Row = tuple[float, Paint | None]
"""Height in pixels, and a function that draws there, called with the left and the upper edge; None leaves it empty."""


def save_audit_pictures(audit_folder: str | Path, data: CaptionedImages) -> list[Path]:
    """Draw an audit into its own folder and return the pictures' paths, the overview first.

    `groups.png` shows the groups of the prompts that hide one, or why none does; `prompt-00.png` and so on, largest
    first and at most 8, a prompt's scores and images. Earlier pictures are removed; images are found by name.
    """
    folder = Path(audit_folder)
    run = read_run(Parts(audit=folder, data=data))
    written = [folder / OVERVIEW]
    save_groups(written[0], run)
    for place, split in enumerate(run.splits[:MOST_PROMPTS]):
        written.append(folder / f"prompt-{place:02d}.png")
        _save_prompt(written[-1], split, run, run.audit.words if run.audit else None)
    for picture in set(folder.glob("prompt-[0-9][0-9].png")) - set(written):
        picture.unlink()
    return written


def save_groups(path: Path, run: Run) -> None:
    """Draw the groups of an audit, two prompts side by side; below them, why other prompts hide none."""
    assert run.audit is not None
    splits, words = run.splits[:MOST_PROMPTS], run.audit.words
    title, subtitle = "No hidden group was found", "No split into groups was clear enough to be believed."
    if splits:
        title = "Hidden groups"
        subtitle = "Images under the same prompt, split without labels. Each group's most typical images"
        subtitle += f", and words that “{one_line(words.model, 40)}” chose." if words else f". {LOOK}"
    bands: list[Sequence[Sequence[Row]]] = [[_title(title, subtitle)]]
    across = min(len(splits), 2) or 1
    width = _column(across)
    for start in range(0, len(splits), across):
        band = []
        for split in splits[start : start + across]:
            column = [_text(f"“{split.prompt.prompt}”", width, size=28), _bar([g.share for g in split.groups], width)]
            for group in split.groups:
                column += [(26, None), *_heading(group, split, words, width, name=split.factor + group.name)]
                column += _strip(run.images_at(group.typical[:8]), width, columns=8 // across)
            band.append([*column, (48, None)])
        bands.append(band)
    unfound = [prompt for prompt in run.audit.prompts if not prompt.found]
    for prompt in sorted(unfound, key=lambda prompt: -prompt.num_images)[:MOST_REASONS]:
        heading = f"“{one_line(prompt.prompt, 70)}” · {counted(prompt.num_images, 'image')}"
        lines = textwrap.wrap(one_line(prompt.reason, 400), 140, max_lines=2, placeholder="…")
        reasons = [_text(line, FULL, size=19, height=28, soft=True) for line in lines]
        bands.append([[(22, _rule), _text(heading, FULL, size=22, height=32), *reasons, (18, None)]])
    if len(unfound) > MOST_REASONS:
        bands.append([[(22, _rule), _text(f"and {len(unfound) - MOST_REASONS} more: see audit.json", FULL, size=22)]])
    _save(path, bands)


def save_before_after(path: Path, chosen: Comparison) -> None:
    """Draw what both models made of the same prompts and seeds, of two prompts, with the shares of each class."""
    both, models, pairs = (chosen.before, chosen.after), chosen.measures, dict(list(chosen.pairs.items())[:2])
    subtitle = "Both models' images of the same starting noise"
    if both == (BASE, GUIDED):
        subtitle = "Each image of the base model, and what guidance makes of the same starting noise"
    subtitle += f" · {at_scale(chosen.key).removeprefix('at ')}"
    band: list[Sequence[Row]] = []
    width = _column(len(pairs))
    for prompt, shown in pairs.items():
        column: list[Row] = [_text(f"“{prompt}”", width, size=29, height=54)]
        with_shares = all(model in models and prompt in models[model].shares for model in both)
        for side, model in enumerate(both):
            column += [_text(label(model), width, size=22, height=36, bold=side == 1)]
            images = [read_image(pair[side].path) for pair in shown[:8]]
            column += _strip(images, width, columns=4 if len(pairs) > 1 else 8)
            if with_shares:
                shares = models[model].shares[prompt]
                column += [(16, None), _bar(list(shares.values()), width), _key(shares, width)]
            column += [(28, None)]
        band.append(column)
    _save(path, [[_title("Same prompts, same seeds", subtitle)], band])


def _save_prompt(path: Path, split: Split, run: Run, words: AuditWords | None) -> None:
    """Draw one prompt: its scores on the left, its groups on the right."""
    prompt, others = split.prompt, len(split.prompt.captions) - 1
    facts = [
        counted(prompt.num_images, "image"),
        " / ".join(percent(group.share) for group in split.groups),
        f"separation {or_dash(split.figures.separation)}",
        f"agreement {or_dash(split.figures.agreement)}",
        counted(others, "more wording") if others else "",
        f"split by {split.figures.evidence}",
        f"words by “{one_line(words.model, 40)}”" if words else "",
    ]
    left, groups = 480, []
    right = FULL - left - GUTTER
    for group in split.groups:
        typical = group.typical[:12]
        uncertain = [position for position in group.uncertain if position not in typical][:12]
        groups += _heading(group, split, words, right, name=group.name)
        for note, chosen in (("most typical", typical), ("least certain", uncertain)):
            if chosen:
                groups += [_text(note, right, size=18, height=34, soft=True)]
                groups += _strip(run.images_at(chosen), right, columns=12)
        groups += [(36, None)]
    height = max(sum(height for height, _ in groups) - 36, 480)

    def scores(axes: Axes, x: float, y: float) -> None:
        width, tall = axes.bbox.size
        own = axes.figure.add_axes(
            ((x + 40) / width, 1 - (y + height - 70) / tall, 440 / width, (height - 130) / tall)
        )
        draw_histogram(own, split)
        own.set_xlabel("score, as inferred" if split.by_hand else "score, high for the rarer group")
        own.set_title("images, log scale" if is_rare(split) else "images", pad=30)

    title = _title(f"{split.factor}“{prompt.prompt}”", " · ".join(filter(None, facts)))
    _save(path, [[title], [[(height, scores)], groups]], starts=(0, left + GUTTER))


def _column(across: int) -> float:
    """Width of one of several columns."""
    return (FULL - (across - 1) * GUTTER) / across


def _save(path: Path, bands: Sequence[Sequence[Sequence[Row]]], starts: Sequence[float] = ()) -> None:
    """Draw bands below each other, each of columns side by side, each of rows below each other."""
    heights = [max(sum(height for height, _ in column) for column in band) for band in bands]
    height = sum(heights) + 1.5 * MARGIN

    def draw(figure: Figure) -> None:
        figure.set_layout_engine("none")
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set(xlim=(0, WIDTH), ylim=(height, 0), autoscale_on=False)
        top = MARGIN / 2
        for band, tall in zip(bands, heights, strict=True):
            for place, column in enumerate(band):
                start = starts[place] if len(starts) == len(band) else place * (_column(len(band)) + GUTTER)
                y = top
                for row, paint in column:
                    if paint:
                        paint(axes, MARGIN + start, y)
                    y += row
            top += tall

    save_picture(path, draw, WIDTH, height)


def _rule(axes: Axes, x: float, y: float) -> None:
    axes.plot((x, x + FULL), (y, y), color=rcParams["grid.color"], linewidth=1.2, marker="")


def _title(title: str, subtitle: str) -> list[Row]:
    return [_text(title, FULL, size=40, height=70), _text(subtitle, FULL, size=22, height=76, soft=True)]


def _text(
    words: str, width: float, *, size: float, height: float | None = None, bold: bool = True, soft: bool = False
) -> tuple[float, Paint]:
    """One line of text, cut to about `width` pixels, and never drawn outside."""
    bold = bold and not soft
    line = one_line(words, int(width / size / (0.6 if bold else 0.54)))

    def draw(axes: Axes, x: float, y: float) -> None:
        colour = rcParams["axes.labelcolor" if soft else "text.color"]
        weight = "bold" if bold else "normal"
        text = axes.text(x, y + 1.1 * size, line, fontsize=0.72 * size, weight=weight, color=colour, clip_on=True)
        text.set_clip_box(TransformedBbox(Bbox.from_bounds(x, y, width, 2 * size), axes.transData))

    return height or 1.6 * size, draw


def _heading(group: Group, split: Split, words: AuditWords | None, width: float, *, name: str) -> list[Row]:
    """A group's name and share, how many images it has, and the words that separate it from the others."""
    entry = words.of(split.index, group.index, split.factor_index) if words else None
    label = f"{one_line(name, int(width / 15) - 16)} · {percent(group.share)}"
    _, write = _text(label, width - 170, size=24)

    def draw(axes: Axes, x: float, y: float) -> None:
        axes.plot(x + 9, y + 18, "o", color=colour_of(group.index), markersize=13, markeredgewidth=0)
        write(axes, x + 28, y)
        axes.text(x + width, y + 26, counted(group.size, "image"), ha="right", color=rcParams["axes.labelcolor"])

    rows: list[Row] = [(40, draw)]
    if entry and entry.words:
        rows.append(_text(entry.line, width, size=20, height=34, soft=True))
    return rows if group.size else [*rows, _text("none under this prompt", width, size=20, soft=True)]


def _strip(images: Sequence[Image.Image], width: float, *, columns: int) -> list[Row]:
    """Images as squares with round corners in rows of `columns`."""
    if not images:
        return []
    side = int((width - (columns - 1) * GAP) / columns)
    height = -(-len(images) // columns) * (side + GAP) - GAP
    sheet = Image.new("RGBA", (int(width), height))
    mask = Image.new("L", (4 * side, 4 * side))  # drawn large for smooth corners
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, 4 * side - 1, 4 * side - 1), side // 4, fill=255)
    mask = mask.resize((side, side), Image.Resampling.LANCZOS)
    for place, image in enumerate(images):
        square = ImageOps.fit(image.convert("RGB"), (side, side), Image.Resampling.BICUBIC)
        sheet.paste(square, (place % columns * (side + GAP), place // columns * (side + GAP)), mask)

    def draw(axes: Axes, x: float, y: float) -> None:
        axes.imshow(np.asarray(sheet), extent=(x, x + sheet.width, y + height, y), aspect="auto", zorder=1)

    return [(height, draw)]


def _bar(shares: Sequence[float], width: float) -> Row:
    """Shares as one bar of coloured parts; what is above zero never vanishes."""

    def draw(axes: Axes, x: float, y: float) -> None:
        box = FancyBboxPatch((x, y), width, 14, "round,pad=0,rounding_size=7", color=rcParams["grid.color"], lw=0)
        axes.add_patch(box)
        lengths = [max(share * width, 6.0) if share > 0 else 0.0 for share in shares]
        ends = np.cumsum(lengths) * min(width / max(sum(lengths), 1.0), 1.0)
        for index, (start, end) in enumerate(pairwise([0.0, *ends])):
            part = Rectangle((x + start, y), end - start, 14, color=colour_of(index), lw=0)
            axes.add_patch(part).set_clip_path(box)
            gap = Rectangle((x + end - 1, y), 2 if 0 < end < width - 1 else 0, 14, color=rcParams["figure.facecolor"])
            axes.add_patch(gap)

    return 14, draw


def _key(classes: Mapping[str, float], width: float) -> Row:
    """Classes with their colours and shares, as far as there is room."""

    def draw(axes: Axes, x: float, y: float) -> None:
        end = x + width
        for index, (name, share) in enumerate(classes.items()):
            words = f"{one_line(name, 20)} {percent(share)}"
            if x + 40 + 12 * len(words) > end:
                axes.text(x, y + 34, "…")
                break
            axes.plot(x + 7, y + 27, "o", color=colour_of(index), markersize=10, markeredgewidth=0)
            axes.text(x + 24, y + 34, words)
            x += 52 + 12 * len(words)

    return 42, draw
