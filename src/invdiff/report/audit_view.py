"""The section of a report about its audit: groups under each prompt, the evidence, and their most typical images."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..auditing.edits import Edits
from ..auditing.result import NOT_TESTED, Audit, AuditWords, Candidate, PromptAudit, PromptSplit
from ..data.images import about_unreadable
from ..text import e_value, or_dash
from .figures import ABSENT, LOOK, Table, counted, percent, sentences
from .plots import Thumb, histogram, thumb
from .read import MOST_PROMPTS, Run, Split, shown_path

MOST_ROWS = 40
MOST_CANDIDATES = 6
SAME = ("evidence", "separation", "agreement", "rand_low", "log_e")  # by which a candidate is the split that was taken


def found(run: Run, audit: Audit) -> dict[str, Any]:
    """What the audit found."""
    shown, further = run.splits[:MOST_PROMPTS], run.splits[MOST_PROMPTS:]
    named, words = bool(audit.group_names), audit.words if shown else None
    rows = [[audit.group_name(e.group, e.factor), e.line] for e in (words.groups if words else ()) if e.prompt is None]
    others = []
    for split in further:
        groups = " / ".join((f"{group.name} " if named else "") + percent(group.share) for group in split.groups)
        figures = or_dash(split.figures.separation), or_dash(split.figures.agreement)
        others.append([split.factor + split.prompt.prompt, f"{split.prompt.num_images:,}", groups, *figures])
    columns = ("Prompt", "Images", "Groups", "Separation", "Agreement")
    lost = {shown_path(name): reason for name, reason in audit.unreadable.items()}
    unread = about_unreadable(lost, len(audit.names) + len(lost)) if lost else ""
    return {
        "summary": summary(audit),
        "notes": list(filter(None, [unread, about_edits(audit.edits), another(run), withheld(run), audit.caveats])),
        "named": named,
        "words": words,
        "by_hand": any(split.by_hand for split in shown),
        "prompts": [_prompt(split, run, audit, words) for split in shown],
        "look": LOOK,
        "tables": [
            Table(("Group", "Words"), rows, "Words that separate groups over all prompts"),
            _cut(columns, others, "Further prompts that hide groups", MOST_ROWS),
            unfound_table(audit.prompts),
        ],
    }


def summary(audit: Audit) -> str:
    """What the audit found, in a sentence or two."""
    images = counted(len(audit.names) - len(audit.edits.left_out), "image")
    prompts = counted(len(audit.prompts), "prompt")
    if not audit.biased:
        if audit.asked:
            return f"No prompt of {images} under {prompts} is split by what was asked for. {audit.asked}"
        doubt = "That is no proof that there is none: no split into groups was clear enough to be believed."
        return f"The audit found no hidden group in {images} under {prompts}. {doubt}"
    if not (split := parted(audit)):
        return f"People put the images of every prompt in one group: {images} under {prompts}."
    smallest = [min(shares) for _, shares in split]
    ends = " to ".join(dict.fromkeys([percent(min(smallest)), percent(max(smallest))]))
    whose = "the model's own" if "own_images_of" in audit.settings else "the training"
    words = f"Under {len(dict(split)):,} of {prompts}, {whose} images fall into groups that the prompt does not name"
    words += f", by {len(audit.factors)} hidden factors" if len(audit.factors) > 1 else ""
    words += f"; the smallest group holds {ends} of a prompt's images."
    if (solver := audit.settings.get("solver")) in ("exact", "gradient"):
        words += f" The solver “{solver}” splits any set of images, so the split alone proves nothing: look at "
        words += "separation and agreement."
    return f"{words} {audit.asked}".rstrip()


def parted(audit: Audit) -> list[tuple[int, list[float]]]:
    """Prompt, and shares of its groups that have images, of each split that people have not put in one group."""
    splits = [split for factor in audit.factors for split in factor.splits]
    filled = [(split.prompt, [share for share in split.shares if share > 0]) for split in splits]
    return [(prompt, shares) for prompt, shares in filled if len(shares) > 1]


def about_edits(edits: Edits) -> str:
    """What people changed about an audit, in a sentence or two; "" where they changed nothing."""
    left_out, moved = len(edits.left_out), len(edits.prompts_cut)
    parts = [f"{counted(left_out, 'image')} {'is' if left_out == 1 else 'are'} left out"] if left_out else []
    parts += [f"cuts between groups were moved by hand under {counted(moved, 'prompt')}"] if moved else []
    parts += ["groups have names that people gave them"] if edits.named else []
    listed = " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))
    figures = "Separation, agreement, Rand index and e-value"
    before = f" {figures} are of the groups as inferred." if left_out or moved else ""
    return f"People changed this audit: {listed}.{before}" if parts else ""


def another(run: Run) -> str:
    """That guidance was trained with another audit than this; "" where it was not, or its record does not say it."""
    record = run.module.get("record")
    trained = record.get("audit") if isinstance(record, Mapping) else None
    if run.audit is None or trained in (None, run.audit.fingerprint):
        return ""
    if trained == (run.audit.inferred or run.audit).fingerprint:
        return "The guidance was trained with this audit before people changed it."
    return "The guidance was trained with another audit, or with this one before it was changed."


def withheld(run: Run) -> str:
    """Which images of the section are not shown, and why; "" where all are, or none is given."""
    groups = [group for split in run.splits[:MOST_PROMPTS] for group in split.groups] if run.data is not None else []
    chosen = {at for group in groups for positions in group.shown for at in positions}
    outside = sum(not run.may_show(at) for at in chosen)
    verb, whose = ("is", "its file lies") if outside == 1 else ("are", "their files lie")
    why = f"{whose} outside the data's folder, which only has a name or a link, and a report is passed on"
    words = f"{outside:,} of {counted(len(chosen), 'image')} {verb} not shown here: {why}."
    return f"{words} Copy such files into the folder to show them." if outside else ""


def unfound_table(prompts: Sequence[PromptAudit]) -> Table:
    """Those of the prompts under which nothing was found, the largest first."""
    unfound = sorted((prompt for prompt in prompts if not prompt.found), key=lambda prompt: -prompt.num_images)
    rows = [[prompt.prompt, f"{prompt.num_images:,}", "; ".join(remarks(prompt))] for prompt in unfound]
    return _cut(("Prompt", "Images", "Why not"), rows, "Prompts under which nothing was found, and why", MOST_ROWS)


def remarks(prompt: PromptAudit) -> list[str]:
    """Why a prompt is split or not, else what could have been seen under it, and other notes, in words."""
    return [words for words in (prompt.reason, "" if prompt.found else prompt.power, *prompt.notes) if words]


def proof(of: Candidate | PromptSplit) -> tuple[str, str]:
    """The least Rand index and the e-value of a split; dashes where it was not tested, as one that was asked for."""
    if of.log_e <= NOT_TESTED:
        return ABSENT, ABSENT
    return f"{min(of.rand_low, 0.99):.2f}", e_value(of.log_e)


def candidates_table(candidates: Sequence[Candidate], taken: PromptSplit) -> Table:
    """The splits that were considered under a prompt, best first; that which was `taken` says so."""
    rows = []
    for entry in candidates:
        is_taken = all(getattr(entry, name) == getattr(taken, name) for name in SAME)
        figures = or_dash(entry.separation), or_dash(entry.agreement), *proof(entry)
        why_not = entry.refusal or ("taken" if is_taken else ABSENT)
        rows.append([entry.evidence, " / ".join(map(percent, entry.shares)), *figures, why_not])
    columns = ("Evidence", "Shares", "Separation", "Agreement", "Rand at least", "E-value", "Why not")
    return _cut(columns, rows, "Splits that were considered, best first", MOST_CANDIDATES)


def _prompt(split: Split, run: Run, audit: Audit, words: AuditWords | None) -> dict[str, Any]:
    """One prompt that hides groups, with the images of each."""

    def thumbs(positions: Sequence[int], what: str) -> list[Thumb]:
        shown = [at for at in positions if run.may_show(at)]
        return list(map(thumb, run.images_at(shown), [f"{what}: {audit.names[at]}" for at in shown]))

    prompt, groups, (rand, by_chance) = split.prompt, [], proof(split.figures)
    for group, share in zip(split.groups, split.shares, strict=True):
        entry = words.of(split.index, group.index, split.factor_index) if words else None
        typical = thumbs(group.shown[0], f"typical of {group.name}")
        uncertain = thumbs(group.shown[1], f"{group.name}, uncertain")
        said = entry.line if entry else ""
        groups.append({"share": share, "words": said, "typical": typical, "uncertain": uncertain})
    facts = {
        "images": f"{prompt.num_images:,}",
        "wordings": f"{len(prompt.captions):,}",
        "separation": or_dash(split.figures.separation),
        "agreement": or_dash(split.figures.agreement),
    }
    if rand != ABSENT:
        facts |= {"estimated Rand index with the truth": f"at least {rand}", "e-value against one hump": by_chance}
    return {
        "prompt": prompt.prompt,
        "facts": facts | {"evidence": split.figures.evidence},
        "factor": split.factor,
        "groups": groups,
        "histogram": histogram(split),
        "remarks": sentences(remarks(prompt)),
        "candidates": candidates_table(prompt.candidates, split.figures),
    }


def _cut(columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str, most: int) -> Table:
    rest = len(rows) - most
    return Table(columns, rows[:most], caption, [f"{rest:,} more: see audit.json."] if rest > 0 else [])
