"""What tab Audit says of a prompt and its groups, as values and HTML."""

from __future__ import annotations

import numpy as np

from ..report.audit_reading import Group, Page
from ..report.document import Table
from ..report.style import percent
from ..report.words import counted, quoted
from .archive import AuditBook
from .pieces import notice, piece

MOST_CANDIDATES = 12
MOST_UNFOUND = 40


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
    shown = []
    candidates = (page.prompt.get("candidates") or [])[:MOST_CANDIDATES] if page is not None else []
    if candidates:
        rows = [
            [
                str(entry["evidence"]),
                " / ".join(percent(share) for share in entry["shares"]),
                f"{entry['separation']:.2f}",
                f"{entry['stability']:.2f}",
                "yes" if entry["accepted"] else "no",
            ]
            for entry in candidates
        ]
        columns = ("Evidence", "Shares", "Separation", "Stability", "Passes")
        shown.append(piece("table", Table(columns, rows, "Splits that were considered, best first")))
    unfound = sorted((p for p in book.prompts if not p["found"]), key=lambda p: -p["num_images"])
    if unfound:
        rows = [[p["prompt"], f"{p['num_images']:,}", p["reason"]] for p in unfound[:MOST_UNFOUND]]
        rest = len(unfound) - len(rows)
        notes = [f"{rest:,} more: see audit.json."] if rest else []
        caption = "Prompts under which nothing was found, and why"
        shown.append(piece("table", Table(("Prompt", "Images", "Why not"), rows, caption, notes)))
    return "".join(shown)


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
