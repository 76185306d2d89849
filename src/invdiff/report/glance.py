"""The report in one glance: what was hidden, how strong it is, and what it is now."""

from __future__ import annotations

from collections.abc import Sequence

from ..evaluation.results import Measures, Results
from .changes import corrected_in_words, where
from .comparison import BASE, GUIDED, Comparison, choose, choose_images, label, measures_of, picture, same_seeds
from .document import Glance, Headline, Pair
from .found import summary
from .sources import Sources
from .words import bias, quoted

PAIRS = 8


def glance(sources: Sources) -> Glance:
    """Return the report in a few lines."""
    results = sources.measured.results if sources.measured else None
    chosen = choose(results) if results else choose_images(sources.images)
    measured: dict[str, Measures] = {}
    if results and chosen:
        for model in dict.fromkeys((chosen.before, chosen.after)):
            measures = measures_of(results, model, chosen.key)
            if measures is not None:
                measured[model] = measures
    headlines = [_headline(model, measures) for model, measures in measured.items()]
    return Glance(
        found=summary(sources.audit) if sources.audit else "",
        measured=_verdict(results, headlines) if results else "",
        headlines=headlines,
        where=where(measured, chosen) if chosen else "",
        pairs=_pairs(sources, chosen) if chosen else [],
        confidence=results.confidence if results else 0.95,
    )


def _headline(model: str, measures: Measures) -> Headline:
    estimate = measures.first.overall["bias"]
    return Headline(
        label=label(model),
        model=model,
        value=estimate.value,
        low=estimate.low,
        high=estimate.high,
        floor=estimate.floor,
        corrected=corrected_in_words(estimate),
    )


def _verdict(results: Results, headlines: Sequence[Headline]) -> str:
    """Return what the two figures say, and no more than their intervals allow."""
    before = headlines[0]
    of_before = "the base model" if before.model == BASE else quoted(before.label)
    strong = f"Bias of {quoted(results.attribute)} in images of {of_before} is {bias(before.value)}"
    even = "A fair sampler would show about {} by chance alone."
    if len(headlines) < 2:
        return f"{strong}. {even.format(bias(before.floor))} No guided model was measured beside it."
    after = headlines[1]
    of = "with guidance" if after.model == GUIDED else f"of {quoted(after.label)}"
    now = f"; {of} it is {bias(after.value)}."
    if after.low <= after.floor:
        end = f" That cannot be told from a fair sampler, which would show about {bias(after.floor)} by chance alone;"
        end += f" as much as {bias(after.high)} is possible too."
        if after.high >= before.low:
            end += " But the two intervals overlap: these images do not prove a change."
    elif after.high < before.low:
        end = f" It is less, but more than the {bias(after.floor)} that a fair sampler would show by chance."
    elif after.low > before.high:
        end = " It is more: on these images guidance did harm."
    else:
        end = " The two intervals overlap: these images do not prove a change."
    return strong + now + end


def _pairs(sources: Sources, chosen: Comparison) -> list[Pair]:
    """Return pairs of all prompts in turn."""
    by_prompt = same_seeds(sources.images, chosen)
    turns = [pair for place in range(PAIRS) for pairs in by_prompt.values() for pair in pairs[place : place + 1]]
    return [picture(pair, chosen) for pair in turns[:PAIRS]]
