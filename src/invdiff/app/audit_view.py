"""What tab Audit says of a prompt and its groups, as values and HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr
import numpy as np

from ..report.audit_view import candidates_table, unfound_table
from ..report.figures import counted, quoted, share_of
from ..report.groups import Group, Split
from ..report.plots import histogram, thumb
from ..report.theme import colour_of
from ..text import one_line
from .archive import AuditBook
from .pictures import Pictures, framed
from .pieces import notice, piece

CONFIDENCE = 0.95
MOST_PER_GROUP = 60
LEFT_OUT = "left out"
NO_DATA = "The audited images were not given, so none is shown: give them with `invdiff ui --data DATA`."


class AuditView:
    """Turns audits into the values of tab Audit's components.

    Args:
        pictures: Where images go.
        groups: The most groups that an audit has.
    """

    def __init__(self, pictures: Pictures, groups: int) -> None:
        self._pictures, self._groups = pictures, groups

    def shown(self, book: AuditBook, kept: Split | None, page: Split | None, count: int) -> list[Any]:
        """Return the values of the tab's `outputs`; images that `page` has in another group than `kept` are marked."""
        out = list(book.edits.left_out)
        count = min(max(count, 1), MOST_PER_GROUP)
        positions: dict[str, list[int]] = {LEFT_OUT: out[:MOST_PER_GROUP]}
        rest = f", of which {MOST_PER_GROUP} are shown" if len(out) > MOST_PER_GROUP else ""
        left = [notice(f"{counted(len(out), 'image')} left out{rest}."), self.images(book, positions[LEFT_OUT], {})]
        if page is None or kept is None:
            nothing: list[Any] = [gr.update(visible=False), "", [], []]
            words = notice("No hidden group was found: see below why not.")
            return [words, "", "", *left, tables(book, None), positions, *nothing * self._groups]
        before = dict(zip(kept.rows.tolist(), kept.labels.tolist(), strict=True))
        now = zip(page.rows.tolist(), page.labels.tolist(), strict=True)
        moved = {position: before[position] for position, label in now if before[position] != label}
        blocks: list[Any] = []
        for group in range(self._groups):
            if group >= len(page.groups):
                blocks += [gr.update(visible=False), "", [], []]
                continue
            of = page.groups[group]
            typical, near = of.typical[:count], nearest_images(of, page)[:count]
            positions |= {f"typical {group}": typical, f"nearest {group}": near}
            share = share_of(of.name, of.size, len(page.labels), confidence=CONFIDENCE, colour=colour_of(of.index))
            told = book.words.of(page.index, group, page.factor_index) if book.words is not None else None
            head = piece("group", share, told.line if told is not None else "")
            images = [self.images(book, shelf, moved) for shelf in (typical, near)]
            blocks += [gr.update(visible=True), head, *images]
        told_of = piece("facts", facts(page)) + (notice(NO_DATA) if book.data is None else "")
        whole = [told_of, piece("plot", histogram(page)), moves(kept, page)]
        return [*whole, *left, tables(book, page), positions, *blocks]

    def images(self, book: AuditBook, positions: Sequence[int], moved: Mapping[int, int]) -> list[tuple[str, str]]:
        """Return images with their names; those that moved are framed in the colour of the group they leave."""
        if book.data is None:
            return []
        shown = []
        for at in positions:
            image, name = book.image(at), one_line(book.names[at], 80)
            if at in moved:
                image, name = framed(image, colour_of(moved[at])), f"moved: {name}"
            shown.append((self._pictures.path(image), name))
        return shown

    def sliders(self, book: AuditBook, page: Split | None) -> list[Any]:
        """Return updates of the sliders of cuts."""
        cuts = page.cuts if page is not None and book.is_movable(page) else []
        sliders = []
        for index in range(self._groups - 1):
            if page is None or index >= len(cuts):
                sliders.append(gr.update(visible=False))
                continue
            low, high = float(page.scores.min()), float(page.scores.max())
            step = 10.0 ** np.floor(np.log10(max(high - low, 1e-6) / 200))
            which = f" ({index + 1} of {len(cuts)})" if len(cuts) > 1 else ""
            sliders.append(
                gr.update(
                    minimum=float(np.floor(low / step) * step),
                    maximum=float(np.ceil(high / step) * step),
                    step=step,
                    value=briefly(cuts[index], page),
                    label=f"Score at which the groups part{which}",
                    visible=True,
                )
            )
        return sliders

    def given_name(self, book: AuditBook, page: Split | None, group: int) -> str:
        """Return what people called a group, "" where nobody did."""
        factor = page.factor_index if page is not None else 0
        names = book.edits.names[factor] if factor < len(book.edits.names) else ()
        return names[group] if group < len(names) else ""

    def details(self, book: AuditBook, position: int) -> str:
        """Return an image, and what is known of it."""
        told = [("score", f"{book.score(position):.2f}"), ("prompt", f"“{book.prompt_of(position)}”")]
        if book.data is not None:
            told.append(("caption", f"“{book.data.captions[book.row(position)]}”"))
        if position in book.edits.left_out:
            told.append(("counts", "no: it was left out"))
        name = book.names[position]
        picture = thumb(book.image(position), f"Image {name}") if book.data is not None else None
        return piece("image", picture, name, told)


def briefly(cut: float, page: Split) -> float:
    """Return a cut with as few digits as part the same images."""
    above = page.scores >= cut
    short = (round(cut, digits) for digits in range(2, 8))
    return next((value for value in short if np.array_equal(page.scores >= value, above)), cut)


def nearest_images(group: Group, page: Split) -> list[int]:
    """Return the group's images by how near their scores are to a cut; by doubt where scores part nothing."""
    if not page.cuts:
        return list(group.uncertain)
    own = np.flatnonzero(page.labels == group.index)
    distance = np.abs(page.scores[own][:, None] - np.array(page.cuts)[None]).min(axis=1)
    ordered: list[int] = page.rows[own[np.argsort(distance, kind="stable")]].tolist()
    return ordered


def moves(before: Split, after: Split) -> str:
    """Return how many images a moved cut takes from one group to another, in words."""
    names = {group.index: group.name for group in before.groups}
    words = []
    for old in names:
        for new in names:
            count = int(np.count_nonzero((before.labels == old) & (after.labels == new)))
            if old != new and count:
                words.append(f"{counted(count, 'image')} from {quoted(names[old])} to {quoted(names[new])}")
    return notice(f"Would move {'; '.join(words)}. Not kept yet.") if words else ""


def facts(page: Split) -> list[tuple[str, str]]:
    """Return what is known of the groups of a prompt, as name and value."""
    prompt = page.prompt
    return [
        ("images", f"{prompt.num_images:,}"),
        ("separation", f"{prompt.separation:.2f}"),
        ("stability", f"{prompt.stability:.2f}"),
        ("evidence", prompt.evidence),
        *([("changed", "by hand")] if page.by_hand else []),
    ]


def tables(book: AuditBook, page: Split | None) -> str:
    """Return the splits considered under a prompt, and the prompts under which nothing was found."""
    considered = candidates_table(page.prompt.candidates) if page is not None else None
    unfound = unfound_table([prompt for prompt in book.prompts if not prompt.found])
    return "".join(piece("table", table) for table in (considered, unfound) if table is not None)


def kept_so_far(book: AuditBook) -> str:
    """Return what people changed so far, in words."""
    edits = book.edits
    named = sum(bool(name) for names in edits.names for name in names)
    parts = [
        f"{counted(named, 'name')}" if named else "",
        f"{counted(len(edits.left_out), 'image')} left out" if edits.left_out else "",
        f"{counted(len(edits.cuts), 'prompt')} parted by hand" if edits.cuts else "",
    ]
    return "Beside the audit: " + (", ".join(filter(None, parts)) or "no changes") + "."
