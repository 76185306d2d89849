"""The commands that make a report's parts again, written out as far as the parts tell their settings."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from ..config import AuditConfig, DemoConfig, GenerateConfig, TrainConfig
from ..evaluation.results import Results
from ..options import Config
from .part_names import without_paths
from .sources import Sources

MOST_PROMPTS = 24
"""Prompts that a command lists; more are in a file."""
OPTIONS: Mapping[type[Config], str] = {
    DemoConfig: "num_images severity steps images_per_prompt seed",
    AuditConfig: "solver num_groups contrast_draws vision_encoder words_model min_images resolution batch_size seed",
    TrainConfig: "mode steps batch_size learning_rate penalty rounds width seed",
    GenerateConfig: "scale guidance_scale images_per_prompt num_inference_steps resolution batch_size seed",
}
"""Settings that the step's command has an option for."""


def commands(sources: Sources) -> list[tuple[str, str]]:
    """Return what each command does, and the command for a shell, in order."""
    demo = sources.measured.settings if sources.measured else {}
    if demo:
        return [("All of it, one command", _line(["invdiff", "demo"], DemoConfig, demo, "demo"))]
    module, names = sources.module or {}, sources.names
    model = model_name(module)
    found = []
    if sources.audit:
        words = ["invdiff", "audit", model, *names.data, "--output", names.audit]
        found.append(("Audit", _line(words, AuditConfig, sources.audit.audit.settings, "audit")))
    training = mapping(mapping(module.get("record")).get("training"))
    if training:
        words = ["invdiff", "train", model, names.data[0], names.audit, "--output", names.module, *names.data[1:]]
        found.append(("Train", _line(words, TrainConfig, training, "train")))
    for name, generated in sources.images.items():
        for folder, drawn in zip(generated.folders, generated.settings, strict=True):
            if drawn:
                found.append(_generate(name, folder, drawn, model, names.module))
    if sources.measured:
        found.append(("Evaluate", shlex.join(_evaluate(sources, sources.measured.results))))
    return found


def model_name(module: Mapping[str, Any]) -> str:
    """Return the base model by its hub id, or by the last part of its folder: reports are forwarded."""
    hub_id = mapping(mapping(module.get("record")).get("base")).get("hub_id")
    return str(hub_id or re.split(r"[/\\\\]", str(module.get("base_model") or "MODEL").rstrip("/\\"))[-1])


def mapping(value: Any) -> Mapping[str, Any]:
    """Return a mapping as it is, and an empty one for anything else that a file may hold."""
    return value if isinstance(value, Mapping) else {}


def _generate(name: str, folder: str, drawn: Mapping[str, Any], model: str, module: str) -> tuple[str, str]:
    title, words = f"Generate: {name}", ["invdiff", "generate", model]
    prompts = _prompts(drawn)
    if _fit(prompts):
        words += prompts
    else:
        words += ["--prompts-file", "prompts.txt"]
        title += f"; prompts.txt has the {len(prompts):,} prompts of its settings below, one a line"
    if drawn.get("module"):
        mix = _mix(drawn.get("environments"))
        words += ["--module", module, *(["--environments", mix] if mix else [])]
        title += "; its groups, in the settings below, can be given in Python only" if mix is None else ""
    own = {key: value for key, value in drawn.items() if key != "scale" or drawn.get("module")}
    return title, _line([*words, "--output", folder], GenerateConfig, own, "generate")


def say_more(drawn: Mapping[str, Any]) -> bool:
    """Whether the settings of generated images say more than the command that draws them."""
    return not _fit(_prompts(drawn)) or bool(drawn.get("module") and _mix(drawn.get("environments")) is None)


def _prompts(drawn: Mapping[str, Any]) -> list[str]:
    prompts = drawn.get("prompts")
    return [str(prompt) for prompt in prompts] if isinstance(prompts, list) else []


def _fit(prompts: Sequence[str]) -> bool:
    """Whether prompts can stand in a command."""
    return len(prompts) <= MOST_PROMPTS and not any(prompt.startswith("-") for prompt in prompts)


def _mix(environments: Any) -> str | None:
    """Return a target mix as the option takes it, "" where none is needed; None where the option cannot say it."""
    if environments is None:
        return ""
    try:
        shares = [[float(share) for share in factor] for factor in environments]
        given = any(isinstance(share, int) for factor in environments for share in factor)
    except (TypeError, ValueError):
        return None
    if not given and all(max(factor) - min(factor) < 1e-6 for factor in shares if factor):
        return ""
    return ",".join(f"{share:g}" for share in shares[0]) if not given and len(shares) == 1 else None


def _evaluate(sources: Sources, results: Results) -> list[str]:
    folders = []
    for model in results.models:
        generated = sources.images.get(model)
        folders += [f"{model}={folder}" for folder in (generated.folders if generated else [model])]
    command = ["invdiff", "evaluate", *folders, "--annotator", results.annotator.name or "ANNOTATOR"]
    measured = next(iter(next(m for m in results.models.values() if m).values()))
    for attribute in measured.attributes:
        command += ["--attribute", attribute] if " x " not in attribute else []
    command += ["--subject-attribute", results.subject_attribute] if results.subject_attribute else []
    if results.target:
        command += ["--target", ",".join(f"{name}={share:g}" for name, share in results.target.items())]
    if results.annotator.min_confidence:
        command += ["--min-confidence", f"{results.annotator.min_confidence:g}"]
    command += ["--baseline", results.baseline] if results.baseline not in ("", "base") else []
    command += _extractors(measured.quality, results.annotator.name)
    command += ["--reference", "REFERENCE"] if results.reference_images else []
    command += ["--confidence", f"{results.confidence:g}"] if results.confidence != 0.95 else []
    file_name = sources.names.results
    return command + (["--output", file_name] if file_name != "results.json" else [])


def _extractors(figures: Iterable[str], annotator: str) -> list[str]:
    """Return the options for the models that figures name, all but the annotator."""
    named = [name.removesuffix(")").partition(" (")[::2] for name in figures if name.endswith(")")]
    clip = [of for figure, of in named if figure == "CLIP-T"]
    words = ["--lpips"] if any(figure.startswith("LPIPS") for figure, _ in named) else []
    words += [word for of in clip[:1] for word in ("--clip", of)]
    others = dict.fromkeys(of for figure, of in named if figure != "CLIP-T" and not figure.startswith("LPIPS"))
    return words + [word for of in others if of not in (annotator, *clip) for word in ("--features", of)]


def _line(words: Sequence[str], config: type[Config], values: Mapping[str, Any], step: str) -> str:
    """Return a command with the settings that differ from the defaults.

    Those that have no option are written into a settings file first.
    """
    options: list[str] = []
    rest: dict[str, Any] = {}
    values = without_paths(values)
    for item in fields(config):
        default, value = getattr(config, item.name), values.get(item.name)
        if value is None or value == (list(default) if isinstance(default, tuple) else default):
            continue
        if item.name in OPTIONS[config].split() and not isinstance(value, list | Mapping):
            options += [_flag(item.name), f"{value:.10g}" if isinstance(value, float) else str(value)]
        else:
            rest[item.name] = value
    if not rest:
        return shlex.join([*words, *options])
    file = f"{step}-settings.json"
    write = f"{shlex.join(['printf', '%s', json.dumps(rest)])} > {file}"
    return f"{write} && {shlex.join([*words, *options, '--config', file])}"


def _flag(name: str) -> str:
    return "--steps" if name == "num_inference_steps" else "--" + name.replace("_", "-")
