"""The model card of a guidance module: what it was made for, of what, what was measured, and what is not known.

A record may come from the hub and captions from anywhere: nothing in either is trusted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from math import inf
from typing import Any

import yaml

from ..text import escape
from .record import HUB_ID, PACKAGES

UNKNOWN = "not known"
MOST_NAMES = 50
MOST_FOUND, MOST_NOT_FOUND = 25, 10
"""Prompts with and without hidden groups that a card lists."""


def render_card(config: Mapping[str, Any], *, num_parameters: int, source: str) -> str:
    """Return the model card, Markdown with YAML front matter.

    Args:
        config: The module's config, its record included. Whatever is absent or malformed is "not known".
        num_parameters: Of the module.
        source: Where a reader finds the module: a hub id, or words for a folder.
    """
    record = _mapping(config.get("record"))
    base = _mapping(record.get("base"))
    hub_id = base.get("hub_id")
    if not isinstance(hub_id, str) or not HUB_ID.fullmatch(hub_id):
        hub_id = ""
    sections = [
        _front_matter(hub_id),
        f"# Guidance module for {_base_name(config, hub_id)}",
        "A small network of the kind that [invdiff](https://github.com/invdiff/invdiff) trains beside a frozen "
        "diffusion model, whose weights it does not change. It shifts the model's prediction so that hidden groups "
        "of training images, such as one background under a caption, are drawn more evenly or in a mix that the "
        "user chooses. This card states what it was made of and what was measured; please read the limits.",
        _usage(config, record, hub_id, source),
        _made_for(config, record, hub_id, num_parameters),
        _groups(record),
        _training(record),
        _figures(record),
        _limits(config, record),
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(hub_id: str) -> str:
    metadata: dict[str, Any] = {"library_name": "diffusers"}
    if hub_id:
        metadata |= {"base_model": hub_id, "base_model_relation": "adapter"}
    metadata["tags"] = ["invdiff", "guidance", "fairness", "debiasing"]
    return f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---"


def _base_name(config: Mapping[str, Any], hub_id: str) -> str:
    # Of a local folder only the last part: cards are public.
    name = hub_id or re.split(r"[/\\]", str(config.get("base_model") or "").rstrip("/\\"))[-1]
    return escape(name) if name else "an unnamed model"


def _usage(config: Mapping[str, Any], record: Mapping[str, Any], hub_id: str, source: str) -> str:
    prompts = [str(prompt.get("prompt")) for prompt in _items(record.get("prompts")) if prompt.get("found")]
    harmless = [prompt for prompt in prompts if re.fullmatch(r"[A-Za-z0-9 ,.'-]{1,80}", prompt)]
    call = f'"{(harmless or ["a photo of ..."])[0]}", num_images_per_prompt=8'
    if not config.get("prompt_dim"):
        call = "class_labels=[0] * 8" if config.get("num_classes") else "batch_size=8"
    base = hub_id or "path/to/the/base/model"
    target = ""
    if config.get("mode") == "balanced":
        even = []
        for number in map(int, config["num_groups"]):
            share = round(1 / number, 2)
            even.append([round(1 - share * (number - 1), 2), *[share] * (number - 1)])
        target = (
            "\n\nThe group of each image is drawn from a target mix: uniform, unless proportions are given, "
            f"`attach(pipe, module, environments={even[0] if len(even) == 1 else even})`."
        )
    return (
        "## Use\n\n```python\n"
        "from diffusers import DiffusionPipeline\nfrom invdiff import GuidanceModule, attach\n\n"
        f"pipe = DiffusionPipeline.from_pretrained({json.dumps(base)})\n"
        f"module = GuidanceModule.from_pretrained({json.dumps(source)})\n"
        "with attach(pipe, module, scale=1.0):  # 0 is the base model, bit for bit\n"
        f"    images = pipe({call}).images\n```\n\n"
        "`attach` compares the denoiser with the one the module was trained beside, and refuses others." + target
    )


def _made_for(config: Mapping[str, Any], record: Mapping[str, Any], hub_id: str, num_parameters: int) -> str:
    base, data = _mapping(record.get("base")), _mapping(record.get("data"))
    versions = _mapping(record.get("versions"))
    where = "" if hub_id else " (a local folder)" if config.get("base_model") and base else ""
    groups = ", ".join(str(int(number)) for number in config["num_groups"])
    rows = [
        ("Base model", _base_name(config, hub_id) + where),
        ("Family", _joined(_text(base.get("family")), _text(base.get("pipeline")))),
        ("Denoiser", f"{_text(config.get('denoiser_class'))}, predicts {_text(config.get('prediction_type'))}"),
        ("Denoiser fingerprint (weights and noise schedule)", _text(base.get("denoiser_fingerprint"))),
        ("Data fingerprint (captions and images)", _text(data.get("fingerprint"))),
        ("Training images", _number(data.get("num_images"), ",")),
        ("Mode", _text(config.get("mode"))),
        ("Groups of each hidden factor", groups),
        ("Parameters of the module", f"{num_parameters:,}"),
        ("Versions", _joined(*(f"{name} {_text(versions.get(name))}" for name in PACKAGES))),
    ]
    return "## What it was made of\n\n" + _table(("", ""), rows)


def _groups(record: Mapping[str, Any]) -> str:
    title = "## Hidden groups\n\n"
    prompts = _items(record.get("prompts"))
    if not prompts:
        return title + "Not known: this module was saved without a record of the groups it was trained on."
    found = [prompt for prompt in prompts if prompt.get("found")]
    rest = [prompt for prompt in prompts if not prompt.get("found")]
    total, num_found = (_number(record.get(name), ",") for name in ("num_prompts", "num_found"))
    solver = record.get("solver")
    forced = ""
    if solver in ("exact", "gradient"):
        forced = f" The solver `{solver}` splits every prompt, separated or not: these two figures tell."
    shown, hidden = found[:MOST_FOUND], rest[:MOST_NOT_FOUND]
    paragraphs = [
        f"Inferred under {num_found} of {total} prompts, without labels, from the evidence named here. "
        f"{_names(record)} Separation is the depth of "
        "the valley between neighbouring groups (1 is a gap), stability the agreement of groups found from "
        "independent noises (adjusted Rand index; 1 is perfect, 0 is chance)." + forced + _changed(record),
        _table(
            ("Prompt", "Images", "Share of groups 0, 1, ...", "Evidence", "Separation", "Stability"),
            [
                (
                    _prompt_name(prompt),
                    _number(prompt.get("num_images"), ","),
                    _numbers(prompt.get("shares"), ".1%"),
                    _text(prompt.get("evidence")),
                    _number(prompt.get("separation"), ".2f"),
                    _number(prompt.get("stability"), ".2f"),
                )
                for prompt in shown
            ],
        ),
    ]
    if hidden:
        names = "; ".join(f"{_prompt_name(p)} ({_number(p.get('num_images'), ',')} images)" for p in hidden)
        paragraphs.append(f"Nothing was found, which does not mean that nothing is there, under: {names}.")
    num_shown, number = len(shown) + len(hidden), record.get("num_prompts")
    if isinstance(number, int) and number > num_shown:
        paragraphs.append(f"{number - num_shown:,} further prompts are left out here.")
    return title + "\n\n".join(paragraphs)


def _names(record: Mapping[str, Any]) -> str:
    """Say what the groups are called, and by whom."""
    factors = _list(record.get("group_names"))
    named = [
        (f"factor {factor}, " if len(factors) > 1 else "") + f"group {group} is “{_text(name)}”"
        for factor, names in enumerate(factors)
        for group, name in enumerate(_list(names))
        if isinstance(name, str) and name
    ]
    if not named:
        return "Groups have numbers, not names: what they show can be seen in the pictures of the audit."
    return f"Names of groups are people's words for what they saw in its pictures: {'; '.join(named[:MOST_NAMES])}."


def _changed(record: Mapping[str, Any]) -> str:
    """Say how people changed the groups before training; "" where they did not."""
    changed = _mapping(record.get("changed_by_people"))
    counts = {
        "images left out": changed.get("left_out"),
        "prompts whose cuts between groups were moved by hand": changed.get("cuts_moved"),
    }
    words = [f"{what}: {count:,}" for what, count in counts.items() if type(count) is int and 0 < count < 10**12]
    return f" People changed the groups before training; {', '.join(words)}." if words else ""


def _training(record: Mapping[str, Any]) -> str:
    title = "## Training\n\n"
    training = _mapping(record.get("training"))
    if not training:
        return title + "Not known: this module was saved without a record of its training."
    names = {
        "steps": "steps a round",
        "rounds": "rounds",
        "batch_size": "images a step",
        "learning_rate": "learning rate",
        "penalty": "lambda, the weight of the variance of group losses",
        "caption_dropout": "captions dropped",
        "seed": "seed",
    }
    settings = "; ".join(f"{words}: {_number(training.get(name), 'g')}" for name, words in names.items())
    start, end = (_number(step, ",") for step in _pair(record.get("losses_at")))
    header = ("Prompt", "Group", f"Loss at step {start}", f"Loss at the end (step {end})")
    rows = []
    for prompt in [prompt for prompt in _items(record.get("prompts")) if prompt.get("found")][:MOST_FOUND]:
        before, after = (_list(losses) for losses in _pair(prompt.get("losses")))
        for group in range(max(len(before), len(after))):
            values = (_number(losses[group], ".3f") if group < len(losses) else UNKNOWN for losses in (before, after))
            rows.append((_prompt_name(prompt), str(group), *values))
    return (
        f"{title}{settings[0].upper()}{settings[1:]}.\n\n"
        "Loss of each group, relative to the frozen model's own mean loss at the same noise (moving means). A lower "
        "loss says that training images are predicted better, not that generated images are balanced.\n\n"
        + _table(header, rows)
    )


def _figures(record: Mapping[str, Any]) -> str:
    title = "## Figures\n\n"
    all_figures = _mapping(record.get("figures"))
    if not all_figures:
        return (
            f"{title}None: images of this module have not been measured, or nobody has added the figures. Nothing "
            "on this card says what the module changes in generated images."
        )
    paragraphs = [
        "Measured on generated images of the base model and of the guided one, as labelled by an annotator. Bias "
        "is the mean over prompts of the difference in share between classes: 0 is even, 1 (of two classes) always "
        "the same class. The floor is the Bias expected of a perfectly fair sampler with as many images; a Bias "
        "near it cannot be told from none. In brackets its interval, which holds near the floor too."
    ]
    for attribute, figures in sorted(all_figures.items()):
        figures = _mapping(figures)
        accuracy = _number(figures.get("annotator_accuracy"), ".1%")
        paragraphs.append(
            f"Attribute: {_text(attribute)}. Annotator: {_text(figures.get('annotator'))}, held-out accuracy "
            f"{accuracy}."
        )
        rows = []
        models = _mapping(figures.get("models"))
        for model in sorted(models, key=lambda name: (name != "base", name)):
            for scale, measures in sorted(_mapping(models[model]).items(), key=lambda item: _sort_key(item[0])):
                measures = _mapping(measures)
                low, high = (_number(bound, ".2f") for bound in _pair(measures.get("bias_ci")))
                rows.append(
                    (
                        _text(model),
                        _text(scale),
                        f"{_number(measures.get('bias'), '.2f')} ({low} to {high})",
                        _number(measures.get("bias_floor"), ".3f"),
                        _number(measures.get("accuracy"), ".1%", absent="-"),
                        _number(measures.get("frechet"), ".2f", absent="-"),
                        _number(measures.get("images_per_prompt"), ","),
                    )
                )
        header = (
            "Model",
            "Guidance scale",
            "Bias",
            "Floor",
            "Shows its subject",
            "Fréchet distance",
            "Images a prompt",
        )
        paragraphs.append(_table(header, rows))
    return title + "\n\n".join(paragraphs)


def _limits(config: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    limits = [
        "Groups were inferred without labels. A group may mix several things, or follow one that does not matter, and "
        "others may have gone unfound. The tool does not know what they show; any names are people's words.",
        "The module was trained on the prompts and weights above. With other prompts, a further fine-tuned model, "
        "adapters or other samplers, its effect is unknown until measured.",
        "Fewer differences in one attribute do not make a model fair. The images can still differ in quality or "
        "in stereotype between groups, and in attributes that nobody measured.",
        "Which mix is fair depends on the use and is the user's choice; this module and its figures do not decide it.",
        "No licence is stated here. The terms of the base model and of the training images still apply.",
    ]
    if config.get("mode") == "balanced":
        limits.insert(
            2,
            "The mix asked for is a mix of inferred groups. It is the mix of what people see in the images only as "
            "far as the groups are right.",
        )
    if _mapping(record.get("figures")):
        limits.insert(
            0,
            "The figures hold for the prompts, guidance scales and numbers of images measured. The annotator errs, "
            "its mistakes enter every figure, and its classes of people are appearances, not identities.",
        )
    return "## Limits\n\n" + "\n".join(f"- {limit}" for limit in limits)


# Values that are not trusted.


def _text(value: Any) -> str:
    return (isinstance(value, str) and escape(value)) or UNKNOWN


def _number(value: Any, form: str, *, absent: str = UNKNOWN) -> str:
    known = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e18  # NaN is not
    return format(value, form) if known else absent


def _numbers(values: Any, form: str) -> str:
    return " / ".join(_number(value, form) for value in _list(values)) or UNKNOWN


def _sort_key(scale: Any) -> tuple[float, str]:
    try:
        return float(scale), str(scale)
    except ValueError:
        return inf, str(scale)


def _prompt_name(prompt: Mapping[str, Any]) -> str:
    others = prompt.get("num_captions")
    more = f" and {others - 1:,} more captions" if isinstance(others, int) and others > 1 else ""
    return _text(prompt.get("prompt")) + more


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else []


def _items(value: Any) -> list[Mapping[str, Any]]:
    return [item for item in _list(value) if isinstance(item, Mapping)]


def _pair(value: Any) -> tuple[Any, Any]:
    values = [*_list(value), None, None]
    return values[0], values[1]


def _joined(*parts: str) -> str:
    return ", ".join(dict.fromkeys(parts))


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
