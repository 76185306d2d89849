"""The model card of a guidance module: its base model, groups, training, figures and limits.

The card is written from the module's config, which may come from the hub, and quotes captions from anywhere: all text
is escaped, and a record that is not in the form of `training_record` counts as absent.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import UndefinedError

from ..config import TrainConfig
from ..errors import ConfigError, first_line
from ..models.families import family_of
from ..models.load import loras_of
from ..text import escape, one_line

if TYPE_CHECKING:
    from ..auditing.result import Audit

TEMPLATE = Path(__file__).with_name("card_template.md")
MOST_PROMPTS = 100  # splits of prompts by hidden factors that a record keeps
MOST_FOUND, MOST_NOT_FOUND = 25, 10  # splits, and prompts without hidden groups, that a card lists
MOST_NAMES = 50  # groups of a prompt, and names of groups, that a card lists
HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")  # the name of a model on the hub


def training_record(
    pipe: Any,
    audit: Audit,
    *,
    base_model: str,
    num_images: int,
    config: TrainConfig,
    rounds: int,
    log: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """The statements of a card about a training run, in JSON types; the losses are those of its last round."""
    last = [row for row in log if row.get("round") == log[-1].get("round")]
    ends = last[0], last[-1]

    def named(index: int) -> dict[str, Any]:
        prompt = audit.prompts[index]
        return {"prompt": prompt.prompt[:300], "num_captions": len(prompt.captions), "num_images": prompt.num_images}

    sizes = [prompt.num_images for prompt in audit.prompts]
    unfound = [index for index, prompt in enumerate(audit.prompts) if not prompt.found]
    unfound.sort(key=lambda index: -sizes[index])
    splits = [
        named(split.prompt)
        | {"factor": factor.name, "losses": [row["group_losses"][place][split.prompt] for row in ends]}
        | {name: getattr(split, name) for name in ("evidence", "shares", "separation", "agreement")}
        for place, factor in enumerate(audit.factors)
        for split in factor.splits
    ]
    record = {
        "base": {
            "hub_id": base_model if HUB_ID.fullmatch(base_model) else None,
            "loras": [name for name, _ in loras_of(pipe)],
            "pipeline": type(pipe).__name__,
            "family": family_of(pipe).title,
            "denoiser_fingerprint": audit.settings.get("denoiser_fingerprint"),
        },
        "data": {"fingerprint": audit.settings.get("data_fingerprint"), "num_images": num_images},
        "own_images": "own_images_of" in audit.settings,
        "solver": audit.settings.get("solver"),
        "resolution": audit.settings.get("resolution", 0),
        "group_names": audit.group_names,
        "changed_by_people": {"left_out": int((~audit.kept).sum()), "cuts_moved": len(audit.edits.prompts_cut)},
        "num_prompts": len(sizes),
        "num_found": len(sizes) - len(unfound),
        "caveats": audit.caveats,
        **({"asked": audit.asked} if audit.asked else {}),
        "splits": splits[:MOST_PROMPTS],
        "unfound": list(map(named, unfound[:MOST_NOT_FOUND])),
        "losses_at": [row["step"] for row in ends],
        "training": config.to_dict() | {"rounds": rounds},
        "versions": {package: version(package) for package in ("invdiff", "torch", "diffusers")},
    }
    return _plain(record)


def with_figures(record: Any, results: Any) -> dict[str, Any]:
    """A record with the figures of generated images, or `ConfigError`; see `GuidanceModule.add_figures`."""
    rows = []  # model, guidance scale, metric, value, lower and upper end of its interval
    try:
        for model, scale, measures in results.each():
            bias = measures.attributes[results.attribute].overall["bias"]
            stated = {"Bias": bias, "subject accuracy": measures.subject_accuracy}
            stated |= {**measures.quality, **measures.preservation}
            known = {name: of for name, of in stated.items() if of and of.value is not None}
            of_model = [[name, of.value, of.low, of.high] for name, of in known.items()]
            of_model.insert(1, ["floor of Bias", bias.floor, None, None])
            of_model.append(["fewest images of a prompt", measures.images_per_prompt, None, None])
            rows += [[model, scale, *row] for row in of_model]
        figures = {
            "annotator": results.annotator.name,
            "annotator_accuracy": results.annotator.accuracy.get(results.attribute),
            "guided": [model for model, scale in results.module_scales.items() if scale],
            "rows": sorted(rows, key=lambda row: (row[2][-1] in "\"'", row[0] != "base")),  # of single prompts last
        }
    except (AttributeError, KeyError, TypeError) as error:
        raise ConfigError(
            f"Expected the results of an evaluation, got {type(results).__name__} ({first_line(error)}). Give what "
            "`evaluate` returned, or Results.load of the file that `invdiff evaluate` wrote."
        ) from error
    record = dict(record) if isinstance(record, Mapping) else {}
    before = record.get("figures") if isinstance(record.get("figures"), Mapping) else {}
    return _plain({**record, "figures": {**before, results.attribute: figures}})


def render_card(config: Mapping[str, Any], *, num_parameters: int, source: str) -> str:
    """The model card of a module's config, Markdown with YAML front matter; `source` is a hub id or a folder."""
    record = config.get("record")
    try:
        return _render(config, record if isinstance(record, Mapping) else {}, num_parameters, source)
    except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError, UndefinedError):
        return _render(config, {}, num_parameters, source)


def _render(config: Mapping[str, Any], record: Mapping[str, Any], num_parameters: int, source: str) -> str:
    hub_id = record.get("base", {}).get("hub_id") or ""
    hub_id = hub_id if HUB_ID.fullmatch(hub_id) else ""
    # Of a local folder only the last part: cards are public.
    base_name = hub_id or re.split(r"[/\\]", str(config.get("base_model") or "").rstrip("/\\"))[-1]
    found, not_found = record.get("splits", []), record.get("unfound", [])[:MOST_NOT_FOUND]
    harmless = [p["prompt"] for p in found if re.fullmatch(r"[A-Za-z0-9 ,.'-]{1,80}", p["prompt"])]
    found = found[:MOST_FOUND]
    call = f'"{(harmless or ["a photo of ..."])[0]}", num_images_per_prompt=8'
    others = {"DiTTransformer2DModel": "class_labels=[0] * 8", "UNet2DModel": "batch_size=8"}
    call = others.get(str(config.get("denoiser_class")), call)
    shares = [(round(1 / number, 2), number - 1) for number in config["num_groups"]]
    mix = [[round(1 - share * others, 2), *[share] * others] for share, others in shares]
    group_names = record.get("group_names", ())
    factors = config.get("factor_names") or [f"factor {m + 1}" for m in range(len(config["num_groups"]))]
    names = [
        (f"{factors[factor]}, " if len(group_names) > 1 else "") + f"group {group} is “{_text(name)}”"
        for factor, of_factor in enumerate(group_names)
        for group, name in enumerate(of_factor[:MOST_NAMES])
        if name
    ]
    figures = record.get("figures", {})
    results = [
        EvalResult(
            task_type="text-to-image",
            dataset_type="generated-images",
            dataset_name=one_line(f"{model} images at guidance scale {scale}, annotated for {attribute}", 200),
            metric_type=one_line(metric, 120),
            metric_value=value,
        )
        for attribute, entry in figures.items()
        for model, scale, metric, value, _, _ in entry["rows"]
        if model in entry["guided"] and metric != "fewest images of a prompt"
    ]
    data = ModelCardData(
        library_name="diffusers",
        base_model=hub_id or None,
        base_model_relation="adapter" if hub_id else None,
        tags=["invdiff", "guidance", "fairness", "debiasing"],
        model_name=one_line(source, 120) if figures else None,
        eval_results=results or None,
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        config=config,
        record={"base": {}, "data": {}, "versions": {}, **record},
        is_local=bool(config.get("base_model") and record and not hub_id),
        base_name=escape(base_name) or "an unnamed model",
        base=json.dumps(hub_id or "path/to/the/base/model"),
        source=json.dumps(source),
        call=call,
        mix=(mix[0] if len(mix) == 1 else mix) if config.get("mode") == "balanced" else None,
        num_parameters=num_parameters,
        factors=factors,
        names="; ".join(names[:MOST_NAMES]),
        found=found,
        not_found=not_found,
        num_left=int(record.get("num_prompts", 0)) - len({split["prompt"] for split in found}) - len(not_found),
        losses=[
            (prompt, group, *pair)
            for prompt in found
            for group, pair in enumerate(zip_longest(*(losses or () for losses in prompt["losses"])))
            if group < MOST_NAMES
        ],
        figures=figures,
        text=_text,
        number=_number,
        most=MOST_NAMES,
    )
    return re.sub(r"\n{3,}", "\n\n", str(card)).rstrip() + "\n"  # blocks that are left out leave blank lines


def _text(value: Any, limit: int = 120) -> str:
    return (isinstance(value, str) and escape(value, limit)) or "not known"


def _number(value: Any, form: str) -> str:
    known = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e18  # NaN is not
    return format(value, form) if known else "not known"


def _plain(value: Any) -> Any:
    """Plain JSON types; numbers that JSON does not have become None."""
    return json.loads(json.dumps(value), parse_constant=lambda number: None)
