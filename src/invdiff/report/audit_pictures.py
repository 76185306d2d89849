"""Show what an audit found: the scores of each prompt, and the images of each hidden group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from PIL import Image

from ..auditing.result import Audit, AuditWords, PromptAudit
from ..errors import ConfigError
from .audit_reading import Group, Page, pages_of, rows_by_name
from .style import INK, SOFT, Sheet, colour_of, font, number, percent, plain, shorten, text_width, ticks, wrap
from .words import quoted

if TYPE_CHECKING:
    from ..data.captioned import CaptionedImages

MOST_PROMPTS = 8
OVERVIEW = "groups.png"
OVERVIEW_IMAGES = 8
RARE = 0.15
"""Below this share a group is hard to see unless counts are on a log scale."""
MOST_REASONS = 12

_MARGIN = 64
Images = Callable[[Sequence[int]], list[Image.Image]]


def save_audit_pictures(audit_folder: Path, data: CaptionedImages, *, images_per_group: int = 12) -> list[Path]:
    """Draw an audit into its own folder and return the pictures' paths, the overview first.

    `groups.png` shows every group of the prompts that hide one, or says why none does. `prompt-00.png` and so
    on, largest prompt first and at most 8, show a prompt's scores and each group's most typical and least
    certain images. Pictures of an earlier audit in the same folder are removed.

    Args:
        audit_folder: What `Audit.save` wrote.
        data: The images that were audited, found by name.
        images_per_group: The most images in each row of a `prompt-*.png`.

    Raises:
        AuditError: The folder holds no audit, or one of other images.
        ConfigError: `images_per_group` is below 1.
        DataError: An image cannot be read, or a picture cannot be written.
    """
    audit_folder = Path(audit_folder)
    if images_per_group < 1:
        raise ConfigError(f"Expected images_per_group of at least 1, got {images_per_group}.")
    audit = Audit.load(audit_folder)
    rows = rows_by_name(audit.names, list(data.names))
    pages, words = pages_of(audit)[:MOST_PROMPTS], audit.words

    def images(positions: Sequence[int]) -> list[Image.Image]:
        return [data.image(rows[position]) for position in positions]

    unfound = [prompt for prompt in audit.prompts if not prompt.found]
    written = [overview(pages, unfound, images, words).save(audit_folder / OVERVIEW)]
    for place, page in enumerate(pages):
        sheet = _prompt_sheet(page, images, images_per_group, words)
        written.append(sheet.save(audit_folder / f"prompt-{place:02d}.png"))
    for picture in audit_folder.glob("prompt-[0-9][0-9].png"):
        if picture not in written:
            picture.unlink()
    return written


def _prompt_sheet(page: Page, images: Images, images_per_group: int, words: AuditWords | None) -> Sheet:
    """Lay out one prompt: its scores on the left, its groups on the right."""
    gap, left, plot_width = 6, 100, 470
    right = left + plot_width + 74
    columns = min(images_per_group, 12)
    width = 1800
    side = min((width - _MARGIN - right - (columns - 1) * gap) // columns, 150)
    strips = [_strips(group, images_per_group) for group in page.groups]
    heights = [[-(-len(chosen) // columns) * (side + gap) for _, chosen in pair] for pair in strips]
    blocks = [40 + sum(34 + strip for strip in pair) + 36 for pair in heights]
    top = 210
    height = top + max(sum(blocks) - 36, 520) + _MARGIN

    prompt = page.prompt
    sheet = Sheet(width, height)
    sheet.text(_MARGIN, 92, f"“{prompt.prompt}”", size=36, bold=True, width=width - 2 * _MARGIN)
    facts = [
        f"{page.factor}split by {prompt.evidence}",
        " / ".join(percent(group.share) for group in page.groups),
        f"stability {prompt.stability:.2f}",
        f"separation {prompt.separation:.2f}",
        f"{prompt.num_images:,} images",
    ]
    others = len(prompt.captions) - 1
    facts += [f"{others} more wordings"] if others > 1 else ["1 more wording"] if others else []
    facts += [f"words by {quoted(words.model)}"] if words else []
    sheet.text(_MARGIN, 134, "   ·   ".join(facts), size=21, colour=SOFT, width=width - 2 * _MARGIN)

    plot_height = min(height - top - 30 - _MARGIN - 70, 560)
    draw_histogram(sheet.axes(left, top + 30, plot_width, plot_height), page)
    counts = "images, log scale" if is_rare(page) else "images"
    sheet.text(_MARGIN, top + 6, counts, size=18, colour=SOFT)
    below = top + 30 + plot_height + 66
    meaning = "score, as inferred" if page.by_hand else "score, high for the rarer group"
    sheet.text(left + plot_width / 2, below, meaning, size=18, colour=SOFT, align="center")

    y = top - 16
    for group, pair, strip_heights, block in zip(page.groups, strips, heights, blocks, strict=True):
        sheet.dot(right + 9, y + 15, colour_of(group.index), radius=9)
        label = f"{shorten(group.name, width - _MARGIN - right - 320, 24, bold=True)} · {percent(group.share)}"
        _heading(sheet, right + 28, y + 23, width - _MARGIN, label, group, _told(words, page, group))
        line = y + 40
        for (note, chosen), strip in zip(pair, strip_heights, strict=True):
            sheet.text(right, line + 18, note, size=18, colour=SOFT)
            sheet.images(images(chosen), right, line + 30, side, columns=columns, gap=gap)
            line += 34 + strip
        y += block
    return sheet


def _strips(group: Group, most: int) -> list[tuple[str, list[int]]]:
    """Return two notes with the images that belong to them; no image is shown twice."""
    typical = group.typical[:most]
    uncertain = [position for position in group.uncertain if position not in typical][:most]
    if not typical:
        return [("none under this prompt", [])]
    return [("most typical", typical), ("least certain" if uncertain else "all of this group is shown", uncertain)]


def draw_histogram(axes: Axes, page: Page) -> None:
    """Draw each group's scores in its colour, and where they part."""
    low, high = float(page.scores.min()), float(page.scores.max())
    high = high if high > low else low + 1.0
    edges = np.linspace(low, high, 49)
    tallest = 1
    for group in page.groups:
        counts, _ = np.histogram(page.scores[page.labels == group.index], edges)
        tallest = max(tallest, int(counts.max()))
        axes.bar(edges[:-1], counts, np.diff(edges) * 0.9, align="edge", color=colour_of(group.index), alpha=0.9)
    if is_rare(page):
        axes.set_yscale("log")
        axes.set_ylim(0.7, tallest * 1.7)
        powers = [float(10**power) for power in range(int(np.log10(tallest * 1.7)) + 1)]
        ticks(axes, "y", powers, [f"{power:,.0f}" for power in powers])
    else:
        axes.set_ylim(0, tallest * 1.12)
        steps = [step for step in MaxNLocator(4, integer=True).tick_values(0, tallest) if step <= tallest * 1.12]
        ticks(axes, "y", steps, [f"{step:,.0f}" for step in steps])
    margin = 0.03 * (high - low)
    axes.set_xlim(low - margin, high + margin)
    marks = [mark for mark in MaxNLocator(5).tick_values(low, high) if low - margin <= mark <= high + margin]
    ticks(axes, "x", marks, [number(mark) for mark in marks])
    for cut in (cut for cut in page.cuts if low <= cut <= high):
        axes.axvline(cut, color=INK, linewidth=1.6, linestyle=(0, (4, 3)))
        axes.annotate(
            "cut",
            (cut, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 5),
            textcoords="offset points",
            ha="center",
            color=INK,
            fontproperties=font(17),
        )


def is_rare(page: Page) -> bool:
    """Whether the counts of a group would vanish beside the others'."""
    return min((group.share for group in page.groups if group.size), default=1.0) < RARE


def _heading(sheet: Sheet, x: float, y: float, end: float, label: str, group: Group, told: list[str]) -> None:
    """Write a group's label, the words that tell it apart as far as there is room, and how many images it has."""
    count, after = _images_in_words(group.size), x + text_width(label, 24, bold=True) + 24
    sheet.text(x, y, label, size=24, bold=True)
    sheet.text(end, y, count, size=18, colour=SOFT, align="right")
    room = end - text_width(count, 18) - 24 - after
    fitting = [line for line in accumulate(told, "{}, {}".format) if text_width(line, 20) <= room]
    if fitting:
        sheet.text(after, y, fitting[-1], size=20, colour=SOFT)


def _told(words: AuditWords | None, page: Page, group: Group) -> list[str]:
    """Return the words that tell a group apart."""
    entry = words.of(page.index, group.index, page.factor_index) if words else None
    return [plain(told.word) for told in entry.words] if entry else []


def overview(
    pages: Sequence[Page], unfound: list[PromptAudit], images: Images, words: AuditWords | None = None
) -> Sheet:
    """Lay out the groups of all prompts: two prompts side by side, one row per group; or say why there are none.

    Args:
        pages: The prompts that hide groups; those shown are the caller's choice.
        unfound: The other prompts.
        images: Returns the images at positions in the audit.
        words: What tells the groups apart, in a CLIP model's words.
    """
    if not pages:
        return _nothing_found(unfound)
    width, gap, gutter, top = 1600, 8, 72, 176
    across = min(len(pages), 2)
    block_width = (width - 2 * _MARGIN - (across - 1) * gutter) // across
    columns = OVERVIEW_IMAGES // across
    side = (block_width - (columns - 1) * gap) // columns
    strip = across * side + (across - 1) * gap
    tallest = [max(len(page.groups) for page in pages[i : i + across]) for i in range(0, len(pages), across)]
    heights = [112 + count * (strip + 96) for count in tallest]
    notes = _reasons(unfound, width - 2 * _MARGIN)
    sheet = Sheet(width, top + sum(heights) + (40 + _notes_height(notes) if notes else 0))

    sheet.text(_MARGIN, 88, "Hidden groups", size=40, bold=True)
    subtitle = "Images under the same prompt, split without labels. Each group's most typical images"
    subtitle += f", and words that {quoted(words.model)} chose." if words else "."
    sheet.text(_MARGIN, 128, subtitle, size=22, colour=SOFT, width=width - 2 * _MARGIN)
    for place, page in enumerate(pages):
        line, column = divmod(place, across)
        x = _MARGIN + column * (block_width + gutter)
        y = top + sum(heights[:line])
        sheet.text(x, y + 34, f"“{page.prompt.prompt}”", size=28, bold=True, width=block_width)
        sheet.share_bar(x, y + 54, block_width, [group.share for group in page.groups])
        y += 84
        for group in page.groups:
            sheet.dot(x + 9, y + 28, colour_of(group.index), radius=9)
            name = shorten(page.factor + group.name, block_width - 290, 24, bold=True)
            label = f"{name} · {percent(group.share)}"
            _heading(sheet, x + 28, y + 36, x + block_width, label, group, _told(words, page, group))
            chosen = images(group.typical[:OVERVIEW_IMAGES])
            if not chosen:
                sheet.text(x + 28, y + 76, "none under this prompt", size=20, colour=SOFT)
            sheet.images(chosen, x, y + 54, side, columns=columns, gap=gap)
            y += strip + 96
    _write_reasons(sheet, notes, top + sum(heights))
    return sheet


def _nothing_found(prompts: list[PromptAudit]) -> Sheet:
    """Say plainly that nothing was found, and why."""
    width = 1600
    notes = _reasons(prompts, width - 2 * _MARGIN)
    sheet = Sheet(width, 176 + _notes_height(notes))
    sheet.text(_MARGIN, 88, "No hidden group was found", size=40, bold=True)
    subtitle = "No split of a prompt's images was at once separated, stable and unbalanced."
    sheet.text(_MARGIN, 128, subtitle, size=22, colour=SOFT)
    _write_reasons(sheet, notes, 152)
    return sheet


def _reasons(prompts: list[PromptAudit], width: float) -> list[tuple[str, list[str]]]:
    """Return why each prompt hides nothing, as headings with lines of text; the largest prompts first."""
    ordered = sorted(prompts, key=lambda prompt: -prompt.num_images)
    notes = [
        (
            f"“{shorten(prompt.prompt, 0.75 * width, 22, bold=True)}” · {_images_in_words(prompt.num_images)}",
            wrap(prompt.reason, width, 19),
        )
        for prompt in ordered[:MOST_REASONS]
    ]
    rest = len(ordered) - len(notes)
    return [*notes, (f"and {rest} more: see audit.json", [])] if rest else notes


def _notes_height(notes: list[tuple[str, list[str]]]) -> int:
    return sum(62 + 28 * len(lines) for _, lines in notes) + 40


def _write_reasons(sheet: Sheet, notes: list[tuple[str, list[str]]], y: float) -> None:
    width = sheet.width - 2 * _MARGIN
    for heading, lines in notes:
        sheet.rule(_MARGIN, y, width)
        sheet.text(_MARGIN, y + 40, heading, size=22, bold=True, width=width)
        for place, line in enumerate(lines):
            sheet.text(_MARGIN, y + 70 + 28 * place, line, size=19, colour=SOFT)
        y += 62 + 28 * len(lines)


def _images_in_words(count: int) -> str:
    return "1 image" if count == 1 else f"{count:,} images"
