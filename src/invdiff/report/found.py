"""What the audit found: groups under each prompt, the evidence, and the images most typical of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .audit_reading import Group, Page
from .document import Found, FoundGroup, FoundPrompt, Missing, Table, Thumb
from .plots import histogram, thumb
from .sources import AuditSource
from .style import colour_of, percent
from .words import counted, share_of

MOST_PROMPTS = 8
"""Prompts shown in detail."""
MOST_ROWS = 40
MOST_CANDIDATES = 6
IMAGES_PER_GROUP = 12
UNCERTAIN = 4


def found(source: AuditSource, *, confidence: float) -> Found:
    """Return what the audit found."""
    prompts = source.document["prompts"]
    pages, further = source.pages[:MOST_PROMPTS], source.pages[MOST_PROMPTS:]
    missing = []
    if pages and source.data is None:
        missing.append(
            Missing("The audited images were not given, so none is shown here.", "invdiff report RUN --data DATA")
        )
    return Found(
        summary=summary(source),
        prompts=[_prompt(page, source, confidence) for page in pages],
        others=_others(further) if further else None,
        unfound=_unfound([prompt for prompt in prompts if not prompt["found"]]),
        missing=missing,
    )


def summary(source: AuditSource) -> str:
    """Return what was found, in a sentence or two."""
    prompts = source.document["prompts"]
    images = len(source.document["names"])
    hiding = [prompt for prompt in prompts if prompt["found"]]
    if not hiding:
        return (
            f"The audit found no hidden group in {counted(images, 'image')} under {counted(len(prompts), 'prompt')}. "
            "That is no proof that there is none: no split was at once separated, stable under new noise and "
            "unbalanced enough to be believed."
        )
    smallest = [min(share for share in prompt["shares"] if share > 0) for prompt in hiding]
    low, high = percent(min(smallest)), percent(max(smallest))
    rare = low if low == high else f"{low} to {high}"
    solver = source.fingerprint_facts.get("solver")
    forced = (
        f" The solver “{solver}” splits whatever it is given, so the split alone proves nothing: look at separation "
        "and stability."
        if solver in ("exact", "gradient")
        else ""
    )
    return (
        f"Under {len(hiding):,} of {counted(len(prompts), 'prompt')}, the training images fall into groups that the "
        f"prompt does not name; the smallest group holds {rare} of a prompt's images.{forced}"
    )


def group_name(index: int) -> str:
    """Return what a group is called: a number, since nobody named it."""
    return f"group {index}"


def _prompt(page: Page, source: AuditSource, confidence: float) -> FoundPrompt:
    prompt = page.prompt
    facts = [
        ("images", f"{prompt['num_images']:,}"),
        ("wordings", f"{len(prompt['captions']):,}"),
        ("separation", f"{prompt['separation']:.2f}"),
        ("stability", f"{prompt['stability']:.2f}"),
        ("evidence", page.factor + str(prompt["evidence"])),
    ]
    total = len(page.labels)
    return FoundPrompt(
        prompt=prompt["prompt"],
        facts=facts,
        groups=[_group(group, source, total, confidence) for group in page.groups],
        histogram=histogram(page),
        candidates=_candidates(prompt.get("candidates") or []),
    )


def _group(group: Group, source: AuditSource, total: int, confidence: float) -> FoundGroup:
    typical = group.typical[:IMAGES_PER_GROUP]
    uncertain = [position for position in group.uncertain if position not in typical][:UNCERTAIN]
    name = group_name(group.index)
    return FoundGroup(
        name=name,
        share=share_of(name, group.size, total, confidence=confidence, colour=colour_of(group.index)),
        typical=_thumbs(typical, source, f"typical of {name}"),
        uncertain=_thumbs(uncertain, source, f"{name}, uncertain"),
    )


def _thumbs(positions: Sequence[int], source: AuditSource, what: str) -> list[Thumb]:
    if source.data is None:
        return []
    names = source.document["names"]
    return [thumb(source.data.image(source.rows[at]), f"{what}: {names[at]}") for at in positions]


def _others(pages: Sequence[Page]) -> Table:
    rows = [
        [
            page.prompt["prompt"],
            f"{page.prompt['num_images']:,}",
            " / ".join(percent(group.share) for group in page.groups),
            f"{page.prompt['separation']:.2f}",
            f"{page.prompt['stability']:.2f}",
        ]
        for page in pages[:MOST_ROWS]
    ]
    return _cut(
        Table(("Prompt", "Images", "Groups", "Separation", "Stability"), rows, "Further prompts that hide groups"),
        len(pages),
    )


def _unfound(prompts: Sequence[Mapping[str, Any]]) -> Table | None:
    if not prompts:
        return None
    ordered = sorted(prompts, key=lambda prompt: -prompt["num_images"])
    rows = [[prompt["prompt"], f"{prompt['num_images']:,}", prompt["reason"]] for prompt in ordered[:MOST_ROWS]]
    caption = "Prompts under which nothing was found, and why"
    return _cut(Table(("Prompt", "Images", "Why not"), rows, caption), len(ordered))


def _candidates(candidates: Sequence[Mapping[str, Any]]) -> Table | None:
    if not candidates:
        return None
    rows = [
        [
            str(entry["evidence"]),
            " / ".join(percent(share) for share in entry["shares"]),
            f"{entry['separation']:.2f}",
            f"{entry['stability']:.2f}",
            "yes" if entry["accepted"] else "no",
        ]
        for entry in candidates[:MOST_CANDIDATES]
    ]
    columns = ("Evidence", "Shares", "Separation", "Stability", "Passes")
    return _cut(Table(columns, rows, "Splits that were considered, best first"), len(candidates))


def _cut(table: Table, total: int) -> Table:
    rest = total - len(table.rows)
    notes = [f"{rest:,} more: see audit.json."] if rest > 0 else []
    return Table(table.columns, table.rows, table.caption, notes)
