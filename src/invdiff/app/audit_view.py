"""What tab Audit says of a prompt and its groups, as values and HTML."""

from __future__ import annotations

import numpy as np

from ..report.audit_reading import Group, Page
from ..report.found import candidates_table, unfound_table
from ..report.words import counted, quoted
from .archive import AuditBook
from .pieces import notice, piece


def briefly(cut: float, page: Page) -> float:
    """Return a cut with as few digits as part the same images."""
    above = page.scores >= cut
    short = (round(cut, digits) for digits in range(2, 8))
    return next((value for value in short if np.array_equal(page.scores >= value, above)), cut)


def nearest_images(group: Group, page: Page) -> list[int]:
    """Return the group's images by how near their scores are to a cut; by doubt where scores part nothing."""
    if not page.cuts:
        return list(group.uncertain)
    own = np.flatnonzero(page.labels == group.index)
    distance = np.abs(page.scores[own][:, None] - np.array(page.cuts)[None]).min(axis=1)
    ordered: list[int] = page.rows[own[np.argsort(distance, kind="stable")]].tolist()
    return ordered


def moves(before: Page, after: Page) -> str:
    """Return how many images a moved cut takes from one group to another, in words."""
    names = {group.index: group.name for group in before.groups}
    words = []
    for old in names:
        for new in names:
            count = int(np.count_nonzero((before.labels == old) & (after.labels == new)))
            if old != new and count:
                words.append(f"{counted(count, 'image')} from {quoted(names[old])} to {quoted(names[new])}")
    return notice(f"Would move {'; '.join(words)}. Not kept yet.") if words else ""


def facts(page: Page) -> list[tuple[str, str]]:
    """Return what is known of the groups of a prompt, as name and value."""
    prompt = page.prompt
    return [
        ("images", f"{prompt['num_images']:,}"),
        ("separation", f"{prompt['separation']:.2f}"),
        ("stability", f"{prompt['stability']:.2f}"),
        ("evidence", str(prompt["evidence"])),
        *([("changed", "by hand")] if page.by_hand else []),
    ]


def tables(book: AuditBook, page: Page | None) -> str:
    """Return the splits considered under a prompt, and the prompts under which nothing was found."""
    considered = candidates_table(page.prompt.get("candidates") or []) if page is not None else None
    unfound = unfound_table([prompt for prompt in book.prompts if not prompt["found"]])
    return "".join(piece("table", table) for table in (considered, unfound) if table is not None)


def kept_so_far(book: AuditBook) -> str:
    """Return what people changed so far, in words."""
    curation = book.curation
    named = sum(bool(name) for names in curation.names for name in names)
    parts = [
        f"{counted(named, 'name')}" if named else "",
        f"{counted(len(curation.left_out), 'image')} left out" if curation.left_out else "",
        f"{counted(len(curation.cuts), 'prompt')} parted by hand" if curation.cuts else "",
    ]
    return "Beside the audit: " + (", ".join(filter(None, parts)) or "no changes") + "."
