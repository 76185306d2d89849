"""What a model card states beyond a module's own settings: a record of plain JSON types in the module's config."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..auditing.result import Audit, PromptAudit
from ..config import TrainConfig
from ..errors import ConfigError
from ..files import read_json

MOST_PROMPTS = 100
"""Prompts that a record keeps, those with hidden groups first."""
PACKAGES = ("invdiff", "torch", "diffusers")
"""Packages whose versions are recorded."""
HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
"""What names a model on the hub."""
_MEASURES = ("bias", "bias_floor", "accuracy", "frechet", "images_per_prompt")


def training_record(
    *,
    base_model: str,
    pipeline: str,
    family: str,
    denoiser_fingerprint: str,
    data_fingerprint: str,
    num_images: int,
    audits: tuple[Audit, Audit],
    config: TrainConfig,
    rounds: int,
    log: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Return what a model card states of a training run, as plain JSON types.

    Args:
        base_model: Folder or hub id that the pipeline was loaded from.
        pipeline: Class name of the pipeline.
        family: The denoiser's family, for people.
        denoiser_fingerprint: Of all weights of the denoiser and its noise schedule.
        data_fingerprint: Of the captioned images.
        num_images: How many there are.
        audits: What the first round trained on, and the last.
        config: The settings.
        rounds: Rounds that were run.
        log: Rows with "step" and the "group_losses" of each prompt.
    """
    first, last = audits
    start, end = _group_losses(log[:1], first), _group_losses(log[-1:], last)
    prompts = sorted(first.prompts, key=lambda prompt: (not prompt.found, -prompt.num_images))
    return _plain(
        {
            "base": {
                "hub_id": base_model if HUB_ID.fullmatch(base_model) and not Path(base_model).exists() else None,
                "pipeline": pipeline,
                "family": family,
                "denoiser_fingerprint": denoiser_fingerprint,
            },
            "data": {"fingerprint": data_fingerprint, "num_images": num_images},
            "solver": first.settings.get("solver"),
            "group_names": first.group_names,
            "changed_by_people": {"left_out": int((~first.kept).sum()), "cuts_moved": len(first.edits.cuts)},
            "num_prompts": len(prompts),
            "num_found": sum(prompt.found for prompt in prompts),
            "prompts": [
                _prompt_record(prompt) | {"losses": [start.get(prompt.prompt), end.get(prompt.prompt)]}
                for prompt in prompts[:MOST_PROMPTS]
            ],
            "losses_at": [row.get("step") for row in (*log[:1], *log[-1:])],
            "training": config.to_dict() | {"rounds": rounds},
            "versions": {package: _version(package) for package in PACKAGES},
        }
    )


def _prompt_record(prompt: PromptAudit) -> dict[str, Any]:
    return {
        "prompt": prompt.prompt[:300],
        "num_captions": len(prompt.captions),
        "num_images": prompt.num_images,
        "found": prompt.found,
        "evidence": prompt.evidence,
        "shares": prompt.shares,
        "separation": prompt.separation,
        "stability": prompt.stability,
    }


def _group_losses(log: Sequence[Mapping[str, Any]], audit: Audit) -> dict[str, Any]:
    losses = log[0]["group_losses"] if log else []
    return {prompt.prompt: row for prompt, row in zip(audit.prompts, losses, strict=False) if prompt.found}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def with_figures(
    record: Any, results: Any, *, attribute: str, annotator: str, annotator_accuracy: float | None
) -> dict[str, Any]:
    """Return a record with the figures of generated images; see `GuidanceModule.add_figures`."""
    record = dict(record) if isinstance(record, Mapping) else {}
    figures = dict(record["figures"]) if isinstance(record.get("figures"), Mapping) else {}
    where, document = "", results
    if isinstance(results, str | Path):
        where, document = f" in {results}", read_json(Path(results))
    elif hasattr(results, "to_dict"):
        document = results.to_dict()
    stated: dict[str, Any] = {}
    if isinstance(document, Mapping) and "models" in document:
        stated, document = dict(document), document["models"]
    attribute = attribute or str(stated.get("attribute", ""))
    judge = stated.get("annotator")
    judge = judge if isinstance(judge, Mapping) else {}
    accuracies = judge.get("accuracy")
    if annotator_accuracy is None and isinstance(accuracies, Mapping):
        annotator_accuracy = accuracies.get(attribute)
    figures[attribute] = {
        "models": _models(document, where),
        "annotator": annotator or str(judge.get("name", "")),
        "annotator_accuracy": annotator_accuracy,
        "confidence": stated.get("confidence"),
    }
    return _plain({**record, "figures": figures})


def _models(results: Any, where: str) -> dict[str, Any]:
    """Return model to guidance scale to figures."""
    try:
        return {
            str(model): {
                "unstated" if scale == "unstated" else str(float(scale)): {
                    name: measures.get(name) for name in _MEASURES
                }
                | {"bias": float(measures["bias"]), "bias_ci": list(measures["bias_ci"])}
                for scale, measures in by_scale.items()
            }
            for model, by_scale in results.items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"Expected the results of an evaluation{where}, got something else ({error!r}). Give what `evaluate` "
            "returned, or the results.json that `invdiff evaluate` wrote."
        ) from error


def _plain(value: Any) -> Any:
    """Return plain JSON types; numbers that JSON does not have become None."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
