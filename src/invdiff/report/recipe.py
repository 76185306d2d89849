"""How to make a report's figures again: commands, versions, fingerprints, seeds; and what they do not prove."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ..auditing.edits import CURATION
from ..config import AuditConfig
from ..evaluation.results import Results
from .commands import commands, mapping, say_more
from .document import Missing, Recipe, Table
from .part_names import without_paths
from .sources import Sources
from .style import percent
from .training_data import labels
from .words import quoted, sentences


def recipe(sources: Sources, *, version: str) -> Recipe:
    """Return how to make it again."""
    settings = _settings(sources)
    missing = []
    if sources.module is None:
        missing.append(
            Missing(
                "No module was given, so how it was trained and with which versions is not known here.",
                "invdiff report RUN --module module",
            )
        )
    if sources.audit and sources.audit.audit.edits.changed:
        words = f"People changed this audit: put its {CURATION} beside the one that these commands make"
        missing.append(Missing(f"{words}, before you train."))
    return Recipe(
        commands=commands(sources),
        facts=[table for table in (_fingerprints(sources), _versions(sources, version), _seeds(sources)) if table],
        settings=[(step, json.dumps(values, indent=2, sort_keys=True)) for step, values in settings.items()],
        missing=missing,
    )


def _settings(sources: Sources) -> dict[str, Mapping[str, Any]]:
    """Return the settings of every step that tells them."""
    settings: dict[str, Mapping[str, Any]] = {}
    if sources.measured and sources.measured.settings:
        settings["Demo"] = sources.measured.settings
    if sources.audit:
        known = {item.name for item in fields(AuditConfig)}
        settings["Audit"] = {name: v for name, v in sources.audit.audit.settings.items() if name in known}
    training = mapping(mapping((sources.module or {}).get("record")).get("training"))
    if training:
        settings["Train"] = training
    for model, generated in sources.images.items():
        for folder, drawn in zip(generated.folders, generated.settings, strict=True):
            if say_more(drawn):
                settings[f"Generate: {model}, {folder}"] = drawn
    return {step: without_paths(values) for step, values in settings.items() if values}


def _fingerprints(sources: Sources) -> Table | None:
    rows: list[list[str]] = []
    if sources.audit:
        facts = sources.audit.audit.settings
        rows += [
            [words, str(facts[name])]
            for name, words in (
                ("model_fingerprint", "model that was audited"),
                ("denoiser_fingerprint", "its denoiser: weights and noise schedule"),
                ("data_fingerprint", "data: captions and images"),
            )
            if facts.get(name)
        ]
    record = mapping((sources.module or {}).get("record"))
    trained_on = mapping(record.get("base")).get("denoiser_fingerprint")
    if trained_on:
        rows.append(["denoiser the module was trained beside", str(trained_on)])
    for model, generated in sources.images.items():
        drawn_by = dict.fromkeys(
            (str(entry.get("model", "")), str(entry.get("module") or "")) for entry in generated.settings if entry
        )
        for pipeline, module in drawn_by:
            rows.append([f"pipeline that drew {quoted(model)}", pipeline])
            rows += [[f"module that drew {quoted(model)}", module]] if module else []
    if sources.measured:
        rows.append([f"results ({sources.measured.file_name})", sources.measured.fingerprint])
    return (
        Table(("What", "Fingerprint"), rows, "Fingerprints: another one, another model, set or file") if rows else None
    )


def _versions(sources: Sources, version: str) -> Table:
    versions = mapping(mapping((sources.module or {}).get("record")).get("versions"))
    rows = [[f"{name}, when training", str(number)] for name, number in versions.items() if number]
    return Table(("What", "Version"), [*rows, ["invdiff, of this report", version]], "Versions")


def _seeds(sources: Sources) -> Table | None:
    rows: list[list[str]] = []
    if sources.measured and "seed" in sources.measured.settings:
        rows.append(["demo", str(sources.measured.settings["seed"])])
    if sources.audit and "seed" in sources.audit.audit.settings:
        rows.append(["audit", str(sources.audit.audit.settings["seed"])])
    training = mapping(mapping((sources.module or {}).get("record")).get("training"))
    if "seed" in training:
        rows.append(["training", str(training["seed"])])
    for model, generated in sources.images.items():
        seeds = sorted({str(entry["seed"]) for entry in generated.settings if "seed" in entry})
        if seeds:
            rows.append([f"images of {quoted(model)}", ", ".join(seeds)])
    return Table(("Step", "Seed"), rows, "Seeds") if rows else None


def limits(sources: Sources) -> list[str]:
    """Return what the figures do not prove, in plain words."""
    words = []
    if sources.audit:
        words += [
            "Hidden groups were inferred without labels. A group may mix several things, or follow one that does not "
            "matter, and others may have gone unfound. "
            + (
                "Names of groups are people's words for what they saw in the images."
                if sources.audit.audit.edits.named
                else "Groups have numbers because nobody named them: look at their images before you call them "
                "anything."
            ),
        ]
    if sources.measured:
        words += [_annotator(sources.measured.results)]
        words += [
            "The figures hold for the prompts, guidance scales and numbers of images measured here. Other prompts, "
            "another fine-tune, adapters or samplers need figures of their own.",
            f"Intervals ({sources.measured.results.confidence:.0%}) are of drawing images from these models. They say "
            "nothing about training: a module trained again with another seed gives other figures.",
            _of_data(sources, sources.measured.results),
            "Bias is measured on the attribute that was asked for. Images can still differ between groups in quality "
            "and stereotype, and in attributes that nobody measured. Even shares do not make a model fair.",
        ]
    words.append("Which mix is right depends on the use. It is your choice; no figure here makes it.")
    if sources.measured:
        words += sentences(sources.measured.results.notes)
        words += [f"This results file does not tell {absent}." for absent in sources.measured.absent]
    return words


def _of_data(sources: Sources, results: Results) -> str:
    if labels(sources.audit, results):
        return (
            "Shares of training data are counts of labels that somebody wrote down; those of generated images are "
            "what an annotator sees. Where the two mean different things by a class, their shares differ too."
        )
    return (
        "The shares of the audit's groups in the data and the shares of an annotator's classes in generated images "
        "are two different things. That they correspond is for your eyes to judge."
    )


def _annotator(results: Results) -> str:
    name = results.annotator.name
    accuracy = results.annotator.accuracy.get(results.attribute)
    who = f"An annotator ({quoted(name)})" if name else "An annotator"
    how = (
        f"On held-out images it is right about {quoted(results.attribute)} in {percent(accuracy)}."
        if isinstance(accuracy, int | float)
        else "How often it errs is not known."
    )
    return f"{who} named the classes, and its mistakes enter every figure. {how} Its classes are appearances."
