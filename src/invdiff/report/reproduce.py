"""The section of a report on how to make its figures again."""

import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from typing import Any

from ..config import AuditConfig, DemoConfig, EvaluateConfig, GenerateConfig, TrainConfig
from ..evaluation.results import AUDIT, UNSTATED, Results
from ..options import command_options, mix_options, with_prompts
from .compare import BASE
from .figures import Table, at_scale, quoted
from .read import Run, without_paths

MOST_WORDS = 24  # prompts that a command lists; more are in a file


def reproduce(run: Run, version: str) -> dict[str, Any]:
    """Commands with their titles, fingerprints, versions and seeds, and settings of steps as JSON."""
    settings = {step: without_paths(values) for step, values in _settings(run).items() if values}
    return {
        "commands": commands(run),
        "facts": _facts(run, version),
        "settings": [(step, json.dumps(values, indent=2, sort_keys=True)) for step, values in settings.items()],
    }


def commands(run: Run) -> list[tuple[str, str]]:
    """What each command does, and the command for a shell, in order, as far as the parts tell their settings."""
    demo = run.results.run.get("settings") if run.results else None
    if demo and not (run.audit and run.audit.asked):
        return [("All of it, one command", shlex.join(["invdiff", "demo", *command_options(DemoConfig, demo)]))]
    base = str(run.module.get("base_model") or "MODEL").rstrip("/\\")
    model = str(_record(run, "base").get("hub_id") or re.split(r"[/\\]", base)[-1])
    names = {"audit": ["audit"], "module": ["module"], "data": ["DATA"], **run.names}
    (audit,), (module,), (data, *columns) = names["audit"], names["module"], names["data"]
    audited = run.audit.settings if run.audit else {}
    own = _each("--prompt", audited.get("own_images_of", ()))
    adapted = [model, *_each("--lora", audited.get("loras", ()))]
    adapted += ["--dtype", str(audited["dtype"])] if "dtype" in audited else []
    found = []
    if run.audit:
        options = command_options(AuditConfig, without_paths(audited))
        asked, title = audited.get("asked", {}), "Audit"
        options += _each("--attribute", asked.get("attribute", {}))
        options += _each("--ask", [f"{name}: {', '.join(of['values'])}" for name, of in asked.get("ask", {}).items()])
        if asked.get("labels"):
            options, title = [*options, "--labels", "labels.csv"], "Audit; labels.csv has the labels that were given"
        found.append((title, ["audit", *adapted, *(own or [data, *columns]), "--output", audit, *options]))
    if training := _record(run, "training"):
        options = command_options(TrainConfig, without_paths(training))
        mixes = run.module.get("mixes")
        options += _each("--calibrate", mixes if isinstance(mixes, dict) else ())
        images = [] if own else [data, *columns]
        found.append(("Train", ["train", *adapted, *images[:1], audit, "--output", module, *images[1:], *options]))
    for name, folder, drawn in _drawn(run):
        title, prompts, listed, mix = f"Generate: {name}", *_said(run, drawn)
        if len(run.images[name].folders) > 1:
            title += f" {at_scale(str(drawn.get('guidance_scale', UNSTATED)))}"
        if not listed:
            title += f"; prompts.txt has the {len(prompts):,} prompts of its settings below, one a line"
        title += "; its groups, in the settings below, can be given in Python only" if mix is None else ""
        values = without_paths(drawn)
        words = [] if listed else ["--prompts-file", "prompts.txt"]
        if drawn.get("module"):
            words += ["--module", module, *(mix or [])]
        else:
            values.pop("scale", None)
        words += ["--output", folder, *command_options(GenerateConfig, values)]
        found.append((title, with_prompts(["generate", *adapted], prompts if listed else (), words)))
    if run.results:
        judge = [run.results.annotator.name or "ANNOTATOR"]
        if judge == [AUDIT]:
            judge = [audit, "--annotator-model", model, *_each("--annotator-lora", audited.get("loras", ()))]
        found.append(("Evaluate", _evaluate(run, run.results, judge)))
    return [(title, shlex.join(["invdiff", *words])) for title, words in found]


def _each(option: str, values: Iterable[object]) -> list[str]:
    """An option that is given once for each value."""
    return [word for value in values for word in (option, str(value))]


def _record(run: Run, part: str) -> Mapping[str, Any]:
    """A part of how the module was made; empty where its file holds something else."""
    record = run.module.get("record")
    found = record.get(part) if isinstance(record, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def _drawn(run: Run) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Model, folder and settings of all generated images that state their settings."""
    for model, generated in run.images.items():
        for folder, drawn in zip(generated.folders, generated.settings, strict=True):
            if drawn:
                yield model, folder, drawn


def _said(run: Run, drawn: Mapping[str, Any]) -> tuple[Sequence[str], bool, list[str] | None]:
    """Prompts, whether a command can list them, and the options of the target mix, None where they cannot say it."""
    given = drawn.get("prompts")
    prompts = [str(prompt) for prompt in given] if isinstance(given, list) else []
    listed = len(prompts) <= MOST_WORDS
    if drawn.get("draws") == "iid":
        return prompts, listed, ["--environments", "iid"]
    names: Any = run.module.get("factor_names")
    with suppress(TypeError):  # neither proportions of each factor nor whole numbers, the groups of each image
        factors = [list(factor) for factor in (drawn.get("module") and drawn.get("environments")) or ()]
        if all(isinstance(share, float) for factor in factors for share in factor):
            known = isinstance(names, list) and len(names) == len(factors)
            return prompts, listed, mix_options(factors, names if known else ())
        if all(isinstance(shares, list) for factor in factors for shares in factor):
            return prompts, listed, ["--environments", "calibrated"]
    return prompts, listed, None


def _evaluate(run: Run, results: Results, judge: Sequence[str]) -> list[str]:
    folders = {model: run.images[model].folders if model in run.images else [model] for model in results.models}
    words = ["evaluate", *(f"{model}={folder}" for model, of_model in folders.items() for folder in of_model)]
    first = next(measures for _, _, measures in results.each())
    measured = list(first.attributes)  # of several, the last is how they intersect
    words += ["--annotator", *judge, *_each("--attribute", measured[:-1] or measured)]
    named = [name.removesuffix(")").partition(" (")[::2] for name in first.quality if name.endswith(")")]
    clip = next((of for figure, of in named if figure == "CLIP-T"), "")
    lpips = {of for figure, of in named if figure.startswith("LPIPS")}
    values = vars(results) | {
        "baseline": "" if results.baseline == BASE else results.baseline,
        "min_confidence": results.annotator.min_confidence,
        "features": tuple(dict.fromkeys(of for _, of in named if of not in (results.annotator.name, clip, *lpips))),
        "clip": clip,
        "lpips": bool(lpips),
    }
    words += command_options(EvaluateConfig, values)
    words += ["--reference", "REFERENCE"] if results.reference_images else []
    (file,) = run.names.get("results", ["results.json"])
    return words + (["--output", file] if file != "results.json" else [])


def _settings(run: Run) -> dict[str, Mapping[str, Any]]:
    """The settings of every step, of images only where their command cannot say them."""
    known = {item.name for item in fields(AuditConfig)}
    settings: dict[str, Mapping[str, Any]] = {
        "Demo": run.results.run.get("settings", {}) if run.results else {},
        "Audit": {name: value for name, value in (run.audit.settings if run.audit else {}).items() if name in known},
        "Train": _record(run, "training"),
    }
    for model, folder, drawn in _drawn(run):
        _, listed, mix = _said(run, drawn)
        if not listed or mix is None:
            settings[f"Generate: {model}, {folder}"] = drawn
    return settings


def _facts(run: Run, version: str) -> list[Table]:
    audited = run.audit.settings if run.audit else {}
    prints = [
        ("model that was audited", audited.get("model_fingerprint")),
        ("its denoiser: weights and noise schedule", audited.get("denoiser_fingerprint")),
        ("data: captions and images", audited.get("data_fingerprint")),
        ("denoiser the module was trained beside", _record(run, "base").get("denoiser_fingerprint")),
    ]
    stated = [(step.lower(), values) for step, values in _settings(run).items() if not step.startswith("Generate")]
    for model, _, drawn in _drawn(run):
        prints.append((f"pipeline that drew {quoted(model)}", drawn.get("model")))
        prints.append((f"module that drew {quoted(model)}", drawn.get("module")))
        stated.append((f"images of {quoted(model)}", drawn))
    prints.append(("results", run.results_digest))
    seeds: dict[str, dict[str, None]] = {}
    for step, values in stated:
        if "seed" in values:
            seeds.setdefault(step, {})[str(values["seed"])] = None
    once = list(dict.fromkeys((words, str(digest)) for words, digest in prints if digest))
    versions = [(f"{name}, when training", str(number)) for name, number in _record(run, "versions").items() if number]
    return [
        Table(("What", "Fingerprint"), once, "Fingerprints: where one differs, so does the model, data or file"),
        Table(("What", "Version"), [*versions, ("invdiff, of this report", version)], "Versions"),
        Table(("Step", "Seed"), [(step, ", ".join(of_step)) for step, of_step in seeds.items()], "Seeds"),
    ]
