"""What guidance changed: shares in data, base and guided images per prompt, and every fairness metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..evaluation.annotators.annotations import CANNOT_TELL
from ..evaluation.results import AttributeMeasures, Estimate, Measures, Results
from .audit_reading import Page
from .comparison import (
    Comparison,
    choose,
    choose_images,
    colours,
    label,
    measures_of,
    picture,
    same_seeds,
)
from .document import ChangedPrompt, Changes, ClassShares, Missing, Share, Table
from .sources import Sources
from .style import colour_of
from .training_data import Labels, labels
from .words import ABSENT, at_scale, bias, counted, quoted, sentences, share_of, with_interval

MOST_PROMPTS = 8
MOST_MODELS = 8
PAIRS_PER_PROMPT = 8
METRICS = {
    "bias": "Bias: 0 is even, 1 is always one class",
    "fairness_discrepancy": "distance of the shares to the target: 0 is on target",
    "parity_gap": "largest share less the smallest: 0 is even",
    "kl_to_target": "divergence from the target, nats: 0 is on target",
    "normalised_entropy": "entropy over its maximum: 1 is even",
    "worst_group_ratio": "smallest share over the largest: 1 is even",
}
NO_IMAGES = Missing(
    "No generated images were given, so none is shown.", "invdiff report RUN --images base=DIR --images guided=DIR"
)


def changes(sources: Sources) -> Changes | None:
    """Return what changed; None where nothing was measured and no two models' images were given."""
    results = sources.measured.results if sources.measured else None
    chosen = choose(results) if results else choose_images(sources.images)
    if chosen is None:
        return None
    pairs = same_seeds(sources.images, chosen)
    measured = _measured(results, chosen)
    prompts = list(next(iter(measured.values())).shares) if measured else list(pairs)
    confidence = results.confidence if results else 0.95
    pages = sources.audit.pages if sources.audit else ()
    known = labels(sources.audit, results) if results else None
    shown = [
        ChangedPrompt(
            prompt=prompt,
            data=[] if known and known.under(prompt) else _data_shares(prompt, pages, confidence),
            data_note=known.note(prompt) if known else "",
            classes=_classes(prompt, measured, results, chosen, known) if results else [],
            pairs=[picture(pair, chosen) for pair in pairs.get(prompt, [])[:PAIRS_PER_PROMPT]],
        )
        for prompt in prompts[:MOST_PROMPTS]
    ]
    tints = colours(list(measured) or [chosen.before, chosen.after], chosen.before, chosen.after)
    return Changes(
        where=where(measured, chosen),
        models=[(label(model), tints[model]) for model in measured],
        names=(label(chosen.before), label(chosen.after)),
        attribute=results.attribute if results else "",
        labels=known.origin if known else "",
        prompts=shown,
        rest=max(len(prompts) - MOST_PROMPTS, 0),
        fairness=_fairness(measured) if measured else [],
        missing=_missing(sources, pairs, chosen),
    )


def where(measured: Mapping[str, Measures], chosen: Comparison) -> str:
    """Return at which guidance scale, and on how many images, in words."""
    words = at_scale(chosen.key)
    if len(chosen.keys) > 1:
        words += f", the middle one of {len(chosen.keys)} measured" if measured else f", one of {len(chosen.keys)}"
    fewest = min((measures.images_per_prompt for measures in measured.values()), default=0)
    return words + (f"; {counted(fewest, 'image')} of each prompt and model" if fewest else "")


def _measured(results: Results | None, chosen: Comparison) -> dict[str, Measures]:
    """Return the measures of every model at the chosen guidance scale, the two compared first."""
    if results is None:
        return {}
    order = dict.fromkeys([chosen.before, chosen.after, *results.models])
    found = {model: measures_of(results, model, chosen.key) for model in order}
    return {model: measures for model, measures in list(found.items())[:MOST_MODELS] if measures is not None}


def _data_shares(prompt: str, pages: Sequence[Page], confidence: float) -> list[Share]:
    """Return the audit's groups under a prompt: of what training images show, all that is known without labels."""
    page = next((page for page in pages if prompt in (page.prompt.prompt, *page.prompt.captions)), None)
    if page is None:
        return []
    total = len(page.labels)
    return [share_of(g.name, g.size, total, confidence=confidence, colour=colour_of(g.index)) for g in page.groups]


def _classes(
    prompt: str, measured: Mapping[str, Measures], results: Results, chosen: Comparison, known: Labels | None
) -> list[ClassShares]:
    tints = colours(list(measured), chosen.before, chosen.after)
    first = next(iter(measured.values())).first
    names = list(first.shares.get(prompt, {}))
    return [
        ClassShares(
            name=name,
            target=float(results.target.get(name, 0.0)) if results.target else 1 / len(names),
            data=known.share(prompt, name, confidence=results.confidence) if known else None,
            bars=[
                _bar(label(model), measures, prompt, name, results.confidence, tints[model])
                for model, measures in measured.items()
                if prompt in measures.shares and name in measures.shares[prompt]
            ],
        )
        for name in names
    ]


def _bar(model: str, measures: Measures, prompt: str, name: str, confidence: float, colour: str) -> Share:
    counts = {of: n for of, n in measures.first.counts.get(prompt, {}).items() if of != CANNOT_TELL}
    if counts:
        return share_of(model, counts[name], sum(counts.values()), confidence=confidence, colour=colour)
    total = measures.images_per_prompt  # results of an older version kept no counts
    count = round(measures.shares[prompt][name] * total)
    return share_of(model, count, total, confidence=confidence, colour=colour)


def _fairness(measured: Mapping[str, Measures]) -> list[Table]:
    """Return each attribute's metrics, mean over prompts."""
    names = dict.fromkeys(name for measures in measured.values() for name in measures.attributes)
    tables = []
    for attribute in names:
        spreads = {model: measures.attributes.get(attribute) for model, measures in measured.items()}
        tables.append(_metrics(attribute, spreads))
    return tables


def _metrics(attribute: str, spreads: Mapping[str, AttributeMeasures | None]) -> Table:
    known = {model: spread for model, spread in spreads.items() if spread is not None}
    metrics = dict.fromkeys(name for spread in known.values() for name in spread.overall)
    rows = []
    for metric in metrics:
        entries = {model: spread.overall.get(metric) for model, spread in known.items()}
        rows.append([METRICS.get(metric, metric), *(_estimate(entry) for entry in entries.values())])
        floors = {f"{entry.floor:.3f}" for entry in entries.values() if entry is not None}
        rows[-1].append(" / ".join(sorted(floors)))
        if any(corrected_in_words(entry) for entry in entries.values()):
            rows.append(
                ["… corrected for the annotator's errors"]
                + [_corrected(entry) for entry in entries.values()]
                + [ABSENT]
            )
    for metric in metrics:
        entries = {model: spread.subject_right.get(metric) for model, spread in known.items()}
        if metric == "bias" and any(entries.values()):
            rows.insert(1, ["… among images whose subject is right", *map(_estimate, entries.values()), ABSENT])
    notes = [spread.note for spread in known.values() if spread.note]
    columns = ("Mean over prompts", *map(label, known), "A fair sampler shows")
    return Table(columns, rows, f"How evenly the classes of {quoted(attribute)} are drawn", sentences(notes))


def _estimate(entry: Estimate | None) -> str:
    return ABSENT if entry is None else with_interval(bias(entry.value), bias(entry.low), bias(entry.high))


def _corrected(entry: Estimate | None) -> str:
    if entry is None or entry.corrected is None:
        return ABSENT
    ends = [None if end is None else bias(end) for end in (entry.corrected_low, entry.corrected_high)]
    return with_interval(bias(entry.corrected), *ends)


def corrected_in_words(entry: Estimate | None) -> str:
    """Return a figure corrected for the annotator's errors; "" where that is not known or changes no digit."""
    if entry is None or entry.corrected is None or abs(entry.corrected - entry.value) < 0.0005:
        return ""
    return _corrected(entry)


def _missing(sources: Sources, pairs: Mapping[str, object], chosen: Comparison) -> list[Missing]:
    missing = []
    if sources.measured is None:
        missing.append(
            Missing(
                "These images were not measured, so nothing is said of shares.",
                "invdiff evaluate base=DIR guided=DIR --annotator ANNOTATOR --attribute ATTRIBUTE",
            )
        )
    elif chosen.before == chosen.after:
        missing.append(
            Missing(
                f"Only {quoted(label(chosen.before))} was measured here: nothing is compared.",
                "invdiff evaluate base=DIR guided=DIR --annotator ANNOTATOR --attribute ATTRIBUTE",
            )
        )
    if not pairs and chosen.before != chosen.after:
        if {chosen.before, chosen.after} <= sources.images.keys():
            words = f"The images given share no seed of a prompt {at_scale(chosen.key)}, so no pair is shown."
            missing.append(Missing(words, "invdiff generate MODEL PROMPT --module module --output guided"))
        else:
            missing.append(NO_IMAGES)
    return missing
