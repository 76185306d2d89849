"""The report as Markdown, for pull requests and model cards: the same figures, with pictures as files beside it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from ..text import escape, one_line
from .document import Changes, Costs, Document, Found, FoundPrompt, Glance, Missing, Recipe, Share, Table
from .training_data import NAME as TRAINING_DATA
from .words import ABSENT, bias, quoted, share_in_words

MOST_CHARACTERS = 300


def render_markdown(document: Document, *, pictures: Mapping[str, str] | None = None) -> str:
    """Return the report as GitHub's Markdown; nothing in it that others wrote is taken for markup.

    Args:
        document: What it says.
        pictures: File names beside the report of "before_after", "groups", "bias" and "scale", those that there are.
    """
    pictures = pictures or {}
    blocks = [
        f"# {_text(document.title)}",
        "## In one glance: what was hidden, and what is left of it?",
        *_glance(document.glance, document.no_results),
        _picture(pictures, "before_after", "The same prompts and seeds before and after"),
        "## What did the audit find?",
        *(_found(document.found) if document.found else [_missing(document.no_audit)]),
        _picture(pictures, "groups", "The images most typical of each hidden group"),
        "## What changed?",
        *(_changes(document.changes) if document.changes else [_missing(document.no_results)]),
        "## What did it cost?",
        _picture(pictures, "bias", "Bias at every guidance scale"),
        _picture(pictures, "scale", "Bias and quality at every scale of the module"),
        *(_costs(document.costs) if document.costs else [_missing(document.no_results)]),
        "## How can I reproduce it?",
        *_recipe(document.recipe),
        "## What do these figures not prove?",
        "\n".join(f"- {_text(line, 1000)}" for line in document.limits),
        f"Written by invdiff {_text(document.version)}.",
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _glance(glance: Glance, no_results: Missing) -> list[str]:
    blocks = [_text(text, 1000) for text in (glance.found, glance.measured) if text]
    if not glance.headlines:
        return [*blocks, _missing(no_results)]
    rows = [
        [
            headline.label,
            f"{bias(headline.value)} ({bias(headline.low)} to {bias(headline.high)})",
            bias(headline.floor),
            headline.corrected or ABSENT,
        ]
        for headline in glance.headlines
    ]
    columns = ("", f"Bias ({glance.confidence:.0%} interval)", "A fair sampler shows", "Corrected for the annotator")
    return [*blocks, _rows(columns, rows), f"Bias {_text(glance.where)}: 0 is even, 1 is always the same class."]


def _found(found: Found) -> list[str]:
    blocks = [_text(text, 1000) for text in (found.summary, found.by_people, found.withheld) if text]
    if found.prompts:
        columns = ("Prompt", "Images", "Groups", "Separation", "Stability", "Evidence")
        blocks.append(_rows(columns, [_found_row(prompt) for prompt in found.prompts]))
        blocks.append(
            ("" if found.named else "Groups have numbers, not names. ")
            + "Separation is the depth of the valley between groups (1 is a gap), "
            "stability the agreement of groups found from independent draws of noise (1 is perfect, 0 is chance)."
        )
    blocks += [_text(found.about_words, 1000)] if found.about_words else []
    return [*blocks, *(_table(table) for table in (found.words, found.others, found.unfound) if table)]


def _found_row(prompt: FoundPrompt) -> list[str]:
    facts = dict(prompt.facts)
    groups = "; ".join(
        f"{group.name}: {share_in_words(group.share)}" + (f", words: {group.words}" if group.words else "")
        for group in prompt.groups
    )
    return [
        prompt.prompt,
        facts["images"],
        groups,
        facts["separation"],
        facts["stability"],
        facts["evidence"],
    ]


def _changes(changes: Changes) -> list[str]:
    blocks = [f"Prompt by prompt, {_text(changes.where)}.", *map(_missing, changes.missing)]
    models = [name for name, _ in changes.models]
    if models:
        blocks += _shares(changes, models)
    blocks += [f"{changes.rest} more prompts are in the results."] if changes.rest else []
    return [*blocks, *map(_table, changes.fairness)]


def _shares(changes: Changes, models: Sequence[str]) -> list[str]:
    """Return the shares of each class under each prompt, and what those of training data are of."""
    grouped = any(prompt.data for prompt in changes.prompts)
    rows = []
    for prompt in changes.prompts:
        groups = "; ".join(f"{share.name}: {share_in_words(share)}" for share in prompt.data)
        for number, of_class in enumerate(prompt.classes):
            shares: dict[str, Share] = {bar.name: bar for bar in of_class.bars}
            row = [prompt.prompt]
            row += [groups or ABSENT if number == 0 else ""] if grouped else []
            row += [of_class.name]
            row += [share_in_words(of_class.data) if of_class.data else ABSENT] if changes.labels else []
            row += [share_in_words(shares[model]) if model in shares else ABSENT for model in models]
            rows.append([*row, f"{of_class.target:.0%}"])
    columns = ["Prompt", *(["Data (the audit's groups)"] if grouped else []), "Class"]
    columns += [TRAINING_DATA] if changes.labels else []
    notes = [f"{quoted(prompt.prompt)}, {prompt.data_note}" for prompt in changes.prompts if prompt.data_note]
    described = " ".join(_text(note, 500) for note in (changes.labels, *notes) if note)
    return [_rows((*columns, *models, "Target"), rows), *([described] if described else [])]


def _costs(costs: Costs) -> list[str]:
    return [*map(_table, costs.tables), *map(_missing, costs.missing)]


def _recipe(recipe: Recipe) -> list[str]:
    commands = [f"{_text(what)}:\n\n{_code(command)}" for what, command in recipe.commands]
    return [*commands, *map(_missing, recipe.missing), *map(_table, recipe.facts)]


def _missing(part: Missing) -> str:
    return _text(part.what, 500) + (f" This makes it:\n\n{_code(part.command)}" if part.command else "")


def _code(text: str) -> str:
    """Return a block that no text inside can end."""
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
    return f"{fence}bash\n{one_line(text)}\n{fence}"


def _picture(pictures: Mapping[str, str], name: str, alt: str) -> str:
    return f"![{alt}]({pictures[name]})" if name in pictures else ""


def _table(table: Table) -> str:
    notes = "\n\n" + " ".join(_text(note, 500) for note in table.notes) if table.notes else ""
    return f"**{_text(table.caption)}**\n\n{_rows(table.columns, table.rows)}{notes}"


def _rows(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [[_text(cell) for cell in row] for row in (columns, *rows)]
    lines.insert(1, ["---"] * len(columns))
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _text(text: str, limit: int = MOST_CHARACTERS) -> str:
    return escape(text, limit)
