"""What a report says, as plain dataclasses that HTML and Markdown are both written from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Missing:
    """A part that was not given."""

    what: str
    """Such as "No audit was given."."""
    command: str = ""
    """The command that makes it."""


@dataclass(frozen=True)
class Thumb:
    """A small image."""

    uri: str
    """`data:image/...`."""
    alt: str


@dataclass(frozen=True)
class Plot:
    """A picture of figures, on light and on dark paper."""

    light: str
    dark: str
    """`data:image/png...`."""
    alt: str
    """What it shows, in words."""
    caption: str
    width: int
    height: int
    """Pixels."""


@dataclass(frozen=True)
class Pair:
    """What two models drew from one prompt and seed."""

    before: Thumb
    after: Thumb


@dataclass(frozen=True)
class Share:
    """A share of images, from 0 to 1."""

    name: str
    share: float
    low: float | None
    high: float | None
    """Wilson's interval."""
    count: int | None
    total: int | None
    colour: str


@dataclass(frozen=True)
class ClassShares:
    """One class under one prompt: each model's share of it."""

    name: str
    target: float
    bars: Sequence[Share]
    """One for each model, named after it."""


@dataclass(frozen=True)
class Table:
    """Figures in words."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    """The first cell names the row."""
    caption: str
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Headline:
    """The Bias of one model."""

    label: str
    model: str
    value: float
    low: float
    high: float
    floor: float
    corrected: str
    """The same corrected for the annotator's errors, in words; "" where it makes no difference or is not known."""


@dataclass(frozen=True)
class Glance:
    """The report in a few lines."""

    found: str
    """What was hidden."""
    measured: str
    """How strong it is and what it is now."""
    headlines: Sequence[Headline]
    """Before and after, or fewer."""
    where: str
    """At which guidance scale, on how many images."""
    pairs: Sequence[Pair]
    confidence: float


@dataclass(frozen=True)
class FoundGroup:
    """One hidden group."""

    name: str
    share: Share
    typical: Sequence[Thumb]
    uncertain: Sequence[Thumb]


@dataclass(frozen=True)
class FoundPrompt:
    """One prompt that hides groups."""

    prompt: str
    facts: Sequence[tuple[str, str]]
    """Name and value."""
    groups: Sequence[FoundGroup]
    histogram: Plot
    candidates: Table | None


@dataclass(frozen=True)
class Found:
    """What the audit found."""

    summary: str
    prompts: Sequence[FoundPrompt]
    """Those shown in detail."""
    others: Table | None
    """Further prompts that hide groups."""
    unfound: Table | None
    """Prompts under which nothing was found, and why."""
    missing: Sequence[Missing]


@dataclass(frozen=True)
class ChangedPrompt:
    """One prompt before and after."""

    prompt: str
    data: Sequence[Share]
    """The audit's groups of its training images."""
    classes: Sequence[ClassShares]
    pairs: Sequence[Pair]


@dataclass(frozen=True)
class Changes:
    """What guidance changed."""

    where: str
    models: Sequence[tuple[str, str]]
    """Name and colour."""
    names: tuple[str, str]
    """The model above and the one below."""
    attribute: str
    prompts: Sequence[ChangedPrompt]
    rest: int
    """Prompts left out."""
    fairness: Sequence[Table]
    missing: Sequence[Missing]


@dataclass(frozen=True)
class Costs:
    """What guidance cost."""

    tables: Sequence[Table]
    curves: Sequence[Plot]
    missing: Sequence[Missing]


@dataclass(frozen=True)
class Recipe:
    """How to make it again."""

    commands: Sequence[tuple[str, str]]
    """What it does and the command."""
    facts: Sequence[Table]
    settings: Sequence[tuple[str, str]]
    """Of which step, as JSON."""
    missing: Sequence[Missing]


@dataclass(frozen=True)
class Document:
    """A whole report."""

    title: str
    version: str
    """Of invdiff."""
    glance: Glance
    found: Found | None
    changes: Changes | None
    costs: Costs | None
    recipe: Recipe
    limits: Sequence[str]
    no_audit: Missing
    no_results: Missing
