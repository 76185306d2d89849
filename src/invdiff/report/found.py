"""What the audit found: groups under each prompt, the evidence, and the images most typical of each."""

from __future__ import annotations

from collections.abc import Sequence

from ..auditing.edits import Edits
from ..auditing.result import AuditWords, Candidate, PromptAudit
from .audit_reading import Group, Page
from .document import Found, FoundGroup, FoundPrompt, Missing, Table, Thumb
from .plots import histogram, thumb
from .sources import AuditSource
from .style import colour_of, percent
from .words import counted, quoted, share_of

MOST_PROMPTS = 8
"""Prompts shown in detail."""
MOST_ROWS = 40
MOST_CANDIDATES = 6
IMAGES_PER_GROUP = 12
UNCERTAIN = 4


def found(source: AuditSource, *, confidence: float) -> Found:
    """Return what the audit found."""
    audit = source.audit
    pages, further = source.pages[:MOST_PROMPTS], source.pages[MOST_PROMPTS:]
    missing = []
    if pages and source.data is None:
        missing.append(
            Missing("The audited images were not given, so none is shown here.", "invdiff report RUN --data DATA")
        )
    return Found(
        summary=summary(source),
        by_people=by_people(audit.edits),
        withheld=withheld(source),
        named=audit.edits.named,
        words_by=words_by(audit.words) if audit.words and pages else "",
        about_words=about_words(audit.words, pages) if audit.words and pages else "",
        words=_words_over_all(audit.words, audit.edits) if audit.words and pages else None,
        prompts=[_prompt(page, source, confidence) for page in pages],
        others=_others(further, named=audit.edits.named) if further else None,
        unfound=unfound_table([prompt for prompt in audit.prompts if not prompt.found]),
        missing=missing,
    )


def withheld(source: AuditSource) -> str:
    """Return which of the telling images are not shown, and why; "" where all are, or none is given."""
    pages = source.pages[:MOST_PROMPTS] if source.data is not None else []
    chosen = {at for page in pages for group in page.groups for at in (*_typical(group), *_uncertain(group))}
    outside = sum(not source.may_show(at) for at in chosen)
    if not outside:
        return ""
    verb, whose = ("is", "its file lies") if outside == 1 else ("are", "their files lie")
    return (
        f"{outside:,} of {counted(len(chosen), 'image')} {verb} not shown here: {whose} outside the data's folder, "
        "which only has a name or a link, and a report is passed on. Copy such files into the folder to show them."
    )


def summary(source: AuditSource) -> str:
    """Return what was found, in a sentence or two."""
    prompts = source.audit.prompts
    images = len(source.audit.names) - len(source.audit.edits.left_out)
    hiding = [prompt for prompt in prompts if prompt.found]
    if not hiding:
        return (
            f"The audit found no hidden group in {counted(images, 'image')} under {counted(len(prompts), 'prompt')}. "
            "That is no proof that there is none: no split was at once separated, stable under new noise and "
            "unbalanced enough to be believed."
        )
    filled = [[share for share in prompt.shares if share > 0] for prompt in hiding]
    smallest = [min(shares) for shares in filled if len(shares) > 1]
    rare = ""
    if smallest:  # people may have put all images of a prompt in one group
        low, high = percent(min(smallest)), percent(max(smallest))
        of = low if low == high else f"{low} to {high}"
        rare = f"; the smallest group holds {of} of a prompt's images"
    solver = source.audit.settings.get("solver")
    forced = (
        f" The solver “{solver}” splits whatever it is given, so the split alone proves nothing: look at separation "
        "and stability."
        if solver in ("exact", "gradient")
        else ""
    )
    return (
        f"Under {len(hiding):,} of {counted(len(prompts), 'prompt')}, the training images fall into groups that the "
        f"prompt does not name{rare}.{forced}"
    )


def by_people(edits: Edits) -> str:
    """Return what people changed about an audit, in a sentence or two; "" where they changed nothing."""
    left_out, moved = len(edits.left_out), len(edits.cuts)
    parts = []
    if left_out:
        parts.append(f"{counted(left_out, 'image')} {'is' if left_out == 1 else 'are'} left out")
    if moved:
        parts.append(f"cuts between groups were moved by hand under {counted(moved, 'prompt')}")
    if edits.named:
        parts.append("names of groups are people's words")
    listed = " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))
    before = " Separation and stability are of the groups as inferred." if left_out or moved else ""
    return f"People changed this audit: {listed}.{before}" if parts else ""


def words_by(words: AuditWords) -> str:
    """Return who chose the words for groups, and from how many, beside the words."""
    return f"says {quoted(words.model)}, asked about {words.vocabulary:,} words"


def about_words(words: AuditWords, pages: Sequence[Page]) -> str:
    """Return what the words for groups are, and what they are worth."""
    before = " They are of the groups as inferred, before people's changes." if any(p.by_hand for p in pages) else ""
    return (
        f"Words are the opinion of a CLIP model, {quoted(words.model)}, and no proof: of {words.vocabulary:,} words, "
        "those that it finds clearly nearer to a group's images than to the other images of the prompt (a rank test, "
        "corrected for all words; where groups look alike to it, any passes with a chance of at most "
        f"{words.level:.0%}).{before}"
    )


def _words_over_all(words: AuditWords, edits: Edits) -> Table | None:
    """Return what tells groups apart over all prompts, where several hide groups."""
    everywhere = [entry for entry in words.groups if entry.prompt is None]
    rows = [[edits.group_name(entry.group, entry.factor), entry.line] for entry in everywhere]
    return Table(("Group", "Words"), rows, "Words that tell groups apart over all prompts") if rows else None


def _prompt(page: Page, source: AuditSource, confidence: float) -> FoundPrompt:
    prompt = page.prompt
    facts = [
        ("images", f"{prompt.num_images:,}"),
        ("wordings", f"{len(prompt.captions):,}"),
        ("separation", f"{prompt.separation:.2f}"),
        ("stability", f"{prompt.stability:.2f}"),
        ("evidence", page.factor + prompt.evidence),
    ]
    return FoundPrompt(
        prompt=prompt.prompt,
        facts=facts,
        groups=[_group(group, page, source, confidence) for group in page.groups],
        histogram=histogram(page),
        candidates=candidates_table(prompt.candidates),
    )


def _group(group: Group, page: Page, source: AuditSource, confidence: float) -> FoundGroup:
    typical, uncertain = _typical(group), _uncertain(group)
    name = group.name
    told = source.audit.words.of(page.index, group.index, page.factor_index) if source.audit.words else None
    colour = colour_of(group.index)
    return FoundGroup(
        name=name,
        share=share_of(name, group.size, len(page.labels), confidence=confidence, colour=colour),
        words=told.line if told else "",
        typical=_thumbs(typical, source, f"typical of {name}"),
        uncertain=_thumbs(uncertain, source, f"{name}, uncertain"),
    )


def _typical(group: Group) -> list[int]:
    return group.typical[:IMAGES_PER_GROUP]


def _uncertain(group: Group) -> list[int]:
    return [position for position in group.uncertain if position not in _typical(group)][:UNCERTAIN]


def _thumbs(positions: Sequence[int], source: AuditSource, what: str) -> list[Thumb]:
    if source.data is None:
        return []
    names, shown = source.audit.names, filter(source.may_show, positions)
    return [thumb(source.data.image(source.rows[at]), f"{what}: {names[at]}") for at in shown]


def _others(pages: Sequence[Page], *, named: bool) -> Table:
    rows = [
        [
            page.prompt.prompt,
            f"{page.prompt.num_images:,}",
            " / ".join((f"{group.name} " if named else "") + percent(group.share) for group in page.groups),
            f"{page.prompt.separation:.2f}",
            f"{page.prompt.stability:.2f}",
        ]
        for page in pages[:MOST_ROWS]
    ]
    return _cut(
        Table(("Prompt", "Images", "Groups", "Separation", "Stability"), rows, "Further prompts that hide groups"),
        len(pages),
    )


def unfound_table(prompts: Sequence[PromptAudit]) -> Table | None:
    """Return the prompts under which nothing was found, the largest first; None for none."""
    if not prompts:
        return None
    ordered = sorted(prompts, key=lambda prompt: -prompt.num_images)
    rows = [[prompt.prompt, f"{prompt.num_images:,}", prompt.reason] for prompt in ordered[:MOST_ROWS]]
    caption = "Prompts under which nothing was found, and why"
    return _cut(Table(("Prompt", "Images", "Why not"), rows, caption), len(ordered))


def candidates_table(candidates: Sequence[Candidate]) -> Table | None:
    """Return the splits that were considered under a prompt, best first; None for none."""
    if not candidates:
        return None
    rows = [
        [
            entry.evidence,
            " / ".join(percent(share) for share in entry.shares),
            f"{entry.separation:.2f}",
            f"{entry.stability:.2f}",
            "yes" if entry.accepted else "no",
        ]
        for entry in candidates[:MOST_CANDIDATES]
    ]
    columns = ("Evidence", "Shares", "Separation", "Stability", "Passes")
    return _cut(Table(columns, rows, "Splits that were considered, best first"), len(candidates))


def _cut(table: Table, total: int) -> Table:
    rest = total - len(table.rows)
    notes = [f"{rest:,} more: see audit.json."] if rest > 0 else []
    return Table(table.columns, table.rows, table.caption, notes)
