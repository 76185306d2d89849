"""A whole report: the one view that both HTML and Markdown are written from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version

from ..evaluation.results import Estimate, Measures, Results
from .audit_view import Found, found, summary
from .compare import BASE, GUIDED, Comparison, compare, label, measured, same_seeds
from .figures import ABSENT, Missing, Table, bias, corrected, estimate, quoted
from .read import Run
from .reproduce import Reproduce, limits, reproduce
from .results_view import EVALUATE, PAIRS, Changes, Costs, Pair, changes, costs, pair_of, where

NO_AUDIT = Missing("No audit was given, so no hidden group is shown.", "invdiff audit MODEL DATA --output audit")
NO_RESULTS = Missing("No results were given, so nothing was measured here.", EVALUATE)


@dataclass(frozen=True)
class Headline:
    """The Bias of one model."""

    label: str
    bias: Estimate
    corrected: str
    """The same corrected for the annotator's errors, in words; "" where it makes no difference or is not known."""


@dataclass(frozen=True)
class Glance:
    """The report in a few lines."""

    sentences: Sequence[str]
    """What was hidden; how strong it is and what it is now."""
    headlines: Sequence[Headline]
    """Before and after, or fewer."""
    table: Table
    """The same in words."""
    where: str
    """At which guidance scale, on how many images."""
    names: tuple[str, str]
    """Of the models in pairs: the one above and the one below."""
    pairs: Sequence[Pair]


@dataclass(frozen=True)
class View:
    """A whole report; None for a section whose parts were not given."""

    title: str
    version: str
    """Of invdiff."""
    confidence: float
    glance: Glance
    found: Found | None
    changes: Changes | None
    costs: Costs | None
    reproduce: Reproduce
    limits: Sequence[str]
    no_audit: Missing = NO_AUDIT
    no_results: Missing = NO_RESULTS


def view_of(run: Run, *, title: str) -> View:
    """The content of a report of these parts."""
    results, own = run.results, version("invdiff")
    chosen = compare(results, run.images)
    confidence = results.confidence if results else 0.95
    return View(
        title=title,
        version=own,
        confidence=confidence,
        glance=glance(run, chosen, confidence),
        found=found(run, run.audit, confidence) if run.audit else None,
        changes=changes(run, chosen) if chosen else None,
        costs=costs(run, chosen, results) if chosen and results else None,
        reproduce=reproduce(run, own),
        limits=limits(run),
    )


def glance(run: Run, chosen: Comparison | None, confidence: float) -> Glance:
    """The report in a few lines."""
    models: Mapping[str, Measures] = {}
    pairs: list[Pair] = []
    if chosen:
        both = (chosen.before, chosen.after)
        models = {model: m for model, m in measured(run.results, chosen).items() if model in both}
        by_prompt = same_seeds(run.images, chosen).values()
        turns = [pair for place in range(PAIRS) for of_prompt in by_prompt for pair in of_prompt[place : place + 1]]
        pairs = [pair_of(pair, chosen) for pair in turns[:PAIRS]]
    headlines = [Headline(label(m), of.bias_estimate, corrected(of.bias_estimate)) for m, of in models.items()]
    rows = [[h.label, estimate(h.bias), bias(h.bias.floor), h.corrected or ABSENT] for h in headlines]
    columns = ("", f"Bias ({confidence:.0%} interval)", "A fair sampler shows", "Corrected for the annotator")
    return Glance(
        sentences=[
            *([summary(run.audit)] if run.audit else []),
            *([_verdict(run.results, chosen, headlines)] if run.results and chosen else []),
        ],
        headlines=headlines,
        table=Table(columns, rows),
        where=where(models, chosen) if chosen else "",
        names=(label(chosen.before), label(chosen.after)) if chosen else ("", ""),
        pairs=pairs,
    )


def _verdict(results: Results, chosen: Comparison, headlines: Sequence[Headline]) -> str:
    """What the two figures say, and no more than their intervals allow."""
    before = headlines[0].bias
    of = "the base model" if chosen.before == BASE else quoted(chosen.before)
    words = f"Bias of {quoted(results.attribute)} in images of {of} is {bias(before.value)}"
    if len(headlines) < 2:
        by_chance = f"A fair sampler would show about {bias(before.floor)} by chance alone."
        return f"{words}. {by_chance} No guided model was measured beside it."
    after = headlines[1].bias
    of = "with guidance" if chosen.after == GUIDED else f"of {quoted(chosen.after)}"
    words += f"; {of} it is {bias(after.value)}."
    if after.low <= after.floor:
        words += (
            f" That cannot be distinguished from a fair sampler, which would show about {bias(after.floor)} by chance "
            f"alone; as much as {bias(after.high)} is possible too."
        )
        overlap = after.high >= before.low
        return words + (" But the two intervals overlap: these images do not prove a change." if overlap else "")
    if after.high < before.low:
        return words + f" It is less, but more than the {bias(after.floor)} that a fair sampler would show by chance."
    if after.low > before.high:
        return words + " It is more: on these images guidance did harm."
    return words + " The two intervals overlap: these images do not prove a change."
