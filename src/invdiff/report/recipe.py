"""How to make a report's figures again: commands, versions, fingerprints, seeds; and what they do not prove."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from ..config import AuditConfig, Config, DemoConfig, GenerateConfig, TrainConfig
from ..evaluation.results import Results
from .document import Missing, Recipe, Table
from .sources import Sources
from .style import percent
from .words import quoted, sentences

MOST_PROMPTS = 6
_OPTIONS: Mapping[type[Config], str] = {
    DemoConfig: "num_images severity steps images_per_prompt seed",
    AuditConfig: "solver num_groups contrast_draws vision_encoder min_images resolution batch_size seed",
    TrainConfig: "mode steps batch_size learning_rate penalty rounds width seed",
    GenerateConfig: "scale guidance_scale images_per_prompt num_inference_steps resolution batch_size seed",
}
"""Settings that the step's command has an option for."""


def recipe(sources: Sources, *, version: str) -> Recipe:
    """Return how to make it again."""
    commands, settings = _commands(sources), _settings(sources)
    missing = []
    if sources.module is None:
        missing.append(
            Missing(
                "No module was given, so how it was trained and with which versions is not known here.",
                "invdiff report RUN --module module",
            )
        )
    return Recipe(
        commands=commands,
        facts=[table for table in (_fingerprints(sources), _versions(sources, version), _seeds(sources)) if table],
        settings=[(step, json.dumps(values, indent=2, sort_keys=True)) for step, values in settings.items()],
        missing=missing,
    )


def _commands(sources: Sources) -> list[tuple[str, str]]:
    demo = sources.measured.settings if sources.measured else {}
    if demo:
        return [("All of it, one command", shlex.join(["invdiff", "demo", *_options(DemoConfig, demo)]))]
    module = sources.module or {}
    model = _model(module)
    commands = []
    if sources.audit:
        options = _options(AuditConfig, sources.audit.fingerprint_facts)
        commands.append(("Audit", shlex.join(["invdiff", "audit", model, "DATA", "--output", "audit", *options])))
    training = _mapping(_mapping(module.get("record")).get("training"))
    if training:
        command = ["invdiff", "train", model, "DATA", "audit", "--output", "module"]
        commands.append(("Train", shlex.join([*command, *_options(TrainConfig, training)])))
    for name, generated in sources.images.items():
        for drawn in generated.settings:
            prompts = [str(prompt) for prompt in drawn.get("prompts") or []]
            command = ["invdiff", "generate", model, *prompts[:MOST_PROMPTS]]
            command += ["--prompts-file", "FILE"] if len(prompts) > MOST_PROMPTS else []
            command += ["--module", "module"] if drawn.get("module") else []
            own = {key: value for key, value in drawn.items() if key != "scale" or drawn.get("module")}
            command += ["--output", _folder(name, drawn, len(generated.settings)), *_options(GenerateConfig, own)]
            commands.append((f"Generate: {name}", shlex.join(command)))
    if sources.measured:
        commands.append(("Evaluate", shlex.join(_evaluate(sources, sources.measured.results))))
    return commands


def _model(module: Mapping[str, Any]) -> str:
    """Return the base model by its hub id, or by the last part of its folder: reports are forwarded."""
    hub_id = _mapping(_mapping(module.get("record")).get("base")).get("hub_id")
    return str(hub_id or re.split(r"[/\\\\]", str(module.get("base_model") or "MODEL").rstrip("/\\"))[-1])


def _evaluate(sources: Sources, results: Results) -> list[str]:
    folders = []
    for model in results.models:
        generated = sources.images.get(model)
        drawn: Sequence[Mapping[str, Any]] = generated.settings if generated and generated.settings else [{}]
        folders += [f"{model}={_folder(model, entry, len(drawn))}" for entry in drawn]
    command = ["invdiff", "evaluate", *folders, "--annotator", results.annotator.name or "ANNOTATOR"]
    for attribute in next(iter(next(m for m in results.models.values() if m).values())).attributes:
        command += ["--attribute", attribute] if " x " not in attribute else []
    command += ["--subject-attribute", results.subject_attribute] if results.subject_attribute else []
    if results.target:
        command += ["--target", ",".join(f"{name}={share:g}" for name, share in results.target.items())]
    if results.annotator.min_confidence:
        command += ["--min-confidence", f"{results.annotator.min_confidence:g}"]
    command += ["--reference", "DATA"] if results.reference_images else []
    return command + (["--confidence", f"{results.confidence:g}"] if results.confidence != 0.95 else [])


def _folder(model: str, drawn: Mapping[str, Any], number: int) -> str:
    scale = drawn.get("guidance_scale")
    return f"{model}-cfg-{scale:g}" if number > 1 and isinstance(scale, int | float) else model


def _options(config: type[Config], values: Mapping[str, Any]) -> list[str]:
    """Return options for the settings that differ from the defaults; `--config` where one has no option."""
    words: list[str] = []
    rest = False
    for item in fields(config):
        default, value = getattr(config, item.name), values.get(item.name)
        if value is None or _plain(value) == _plain(default):
            continue
        if item.name in _OPTIONS[config].split() and not isinstance(value, list | tuple | Mapping):
            words += [_flag(item.name), f"{value:g}" if isinstance(value, float) else str(value)]
        else:
            rest = True
    return [*words, "--config", "SETTINGS.json"] if rest else words


def _flag(name: str) -> str:
    return "--steps" if name == "num_inference_steps" else "--" + name.replace("_", "-")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _settings(sources: Sources) -> dict[str, Mapping[str, Any]]:
    """Return the settings of every step that tells them."""
    settings: dict[str, Mapping[str, Any]] = {}
    if sources.measured and sources.measured.settings:
        settings["Demo"] = sources.measured.settings
    if sources.audit:
        known = {item.name for item in fields(AuditConfig)}
        settings["Audit"] = {name: v for name, v in sources.audit.fingerprint_facts.items() if name in known}
    training = _mapping(_mapping((sources.module or {}).get("record")).get("training"))
    if training:
        settings["Train"] = training
    return {step: values for step, values in settings.items() if values}


def _fingerprints(sources: Sources) -> Table | None:
    rows: list[list[str]] = []
    if sources.audit:
        facts = sources.audit.fingerprint_facts
        rows += [
            [words, str(facts[name])]
            for name, words in (
                ("model_fingerprint", "model that was audited"),
                ("denoiser_fingerprint", "its denoiser: weights and noise schedule"),
                ("data_fingerprint", "data: captions and images"),
            )
            if facts.get(name)
        ]
    record = _mapping((sources.module or {}).get("record"))
    trained_on = _mapping(record.get("base")).get("denoiser_fingerprint")
    if trained_on:
        rows.append(["denoiser the module was trained beside", str(trained_on)])
    for model, generated in sources.images.items():
        drawn_by = dict.fromkeys(
            (str(entry.get("model", "")), str(entry.get("module") or "")) for entry in generated.settings
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
    versions = _mapping(_mapping((sources.module or {}).get("record")).get("versions"))
    rows = [[f"{name}, when training", str(number)] for name, number in versions.items() if number]
    return Table(("What", "Version"), [*rows, ["invdiff, of this report", version]], "Versions")


def _seeds(sources: Sources) -> Table | None:
    rows: list[list[str]] = []
    if sources.measured and "seed" in sources.measured.settings:
        rows.append(["demo", str(sources.measured.settings["seed"])])
    if sources.audit and "seed" in sources.audit.fingerprint_facts:
        rows.append(["audit", str(sources.audit.fingerprint_facts["seed"])])
    training = _mapping(_mapping((sources.module or {}).get("record")).get("training"))
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
            "matter, and others may have gone unfound. Groups have numbers because nobody named them: look at their "
            "images before you call them anything.",
        ]
    if sources.measured:
        words += [_annotator(sources.measured.results)]
        words += [
            "The figures hold for the prompts, guidance scales and numbers of images measured here. Other prompts, "
            "another fine-tune, adapters or samplers need figures of their own.",
            f"Intervals ({sources.measured.results.confidence:.0%}) are of drawing images from these models. They say "
            "nothing about training: a module trained again with another seed gives other figures.",
            "The shares of the audit's groups in the data and the shares of an annotator's classes in generated "
            "images are two different things. That they correspond is for your eyes to judge.",
            "Bias is measured on the attribute that was asked for. Images can still differ between groups in quality "
            "and stereotype, and in attributes that nobody measured. Even shares do not make a model fair.",
        ]
    words.append("Which mix is right depends on the use. It is your choice; no figure here makes it.")
    if sources.measured:
        words += sentences(sources.measured.results.notes)
        words += [f"This results file does not tell {absent}." for absent in sources.measured.absent]
    return words


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


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
