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
    data: Share | None = None
    """Of the training images, where the data has labels of its own."""


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
    words: str
    """What tells it apart, in a CLIP model's words, or that nothing does; "" where none was asked."""
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
    by_people: str
    """What people changed about it, "" where nothing."""
    withheld: str
    """Which images are not shown although they are given, and why; "" where there are none."""
    named: bool
    """Whether any group has a name; else all have numbers."""
    words_by: str
    """Who chose the words under groups, and from how many; "" where nobody did."""
    about_words: str
    """What these words are worth."""
    words: Table | None
    """Those over all prompts."""
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
    """The audit's groups of its training images; empty where the data's own labels tell more."""
    data_note: str
    """What the shares of training data are of, where there are some."""
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
    labels: str
    """Where the shares of training data come from; "" where there are none."""
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
    """Over the guidance scale."""
    over_module_scale: Sequence[Plot]
    """Over the strength of the guidance module, where it was measured at several."""
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
