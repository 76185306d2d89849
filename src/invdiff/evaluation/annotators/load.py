"""The one way to get an annotator, of any kind, and to keep what was measured of it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download

from ...errors import ConfigError, ModelError
from ...files import read_json, write_json
from ...models.load import loading
from .annotations import Annotator
from .audited import AuditAnnotator
from .conv import ConvAnnotator
from .heldout import MEASURED, HeldOut, Measurable
from .labels import FOLDER_ATTRIBUTE, GivenLabels
from .pretrained import EXAMPLE, ClassifierAnnotator, ClipAnnotator, class_prompts

LABELS = "labels"  # in place of an annotator's name: the classes are read from the manifest
KINDS = (
    f"Give a folder that `invdiff annotator train` or `invdiff annotator measure` wrote, an audit (with its "
    f"model), a CLIP model, an image classifier, or {LABELS!r} to read columns of the manifest."
)


def load_annotator(
    spec: str,
    *,
    attribute: str | Sequence[str] = "",
    classes: Mapping[str, Any] | Path | None = None,
    model: Any = None,
    loras: Sequence[str] = (),
) -> Annotator | GivenLabels:
    """The annotator that `spec` names: a `ConvAnnotator`, a `CLIPModel` or any image classifier of `transformers`.

    `spec` is a folder, a hub id, or "labels" for `GivenLabels`. `attribute` is what a classifier's classes are classes
    of ("label" unless given, the first of several), or the columns of labels; `classes` is for a CLIP model only:
    attribute to class to prompts, or a YAML or JSON file of that. `model` and `loras` are what `AuditAnnotator` takes,
    where `spec` is the folder of an audit.
    """
    audited = (Path(spec) / "audit.json").is_file()
    if audited != (model is not None):
        given = f"{spec} and {'no model' if audited else 'a model'}"
        raise ConfigError(f"Expected the audited model (--annotator-model) beside an audit and no other, got {given}.")
    if loras and not isinstance(model, str | Path):
        raise ConfigError(f"Expected LoRAs of an audited model by its folder or hub id, got {', '.join(loras)} alone.")
    if audited:
        return AuditAnnotator(spec, model, loras=loras)
    attributes = [name for name in ([attribute] if isinstance(attribute, str) else attribute) if name]
    recipe = None if spec == LABELS else _recipe(Path(spec))
    config = {} if spec == LABELS or recipe else _config(spec)
    architecture = next(iter(config.get("architectures") or ()), "")
    if config.get("model_type") == "clip" and architecture in ("", "CLIPModel"):
        if classes is None:
            raise ConfigError(f"Expected classes beside the CLIP model {spec}, a YAML file such as {EXAMPLE}.")
        return ClipAnnotator(spec, classes)
    if classes is not None:
        raise ConfigError(f"Expected no classes beside {spec}, got some. Only CLIP models take them.")
    if recipe:
        return _load_measured(Path(spec), **recipe)
    if spec == LABELS:
        if not attributes:
            raise ConfigError(f"Expected an attribute beside {LABELS!r}, the column to read, got none. Name it.")
        return GivenLabels(attributes)
    if config.get("_class_name") == ConvAnnotator.__name__:
        return ConvAnnotator.from_pretrained(spec)
    if architecture.endswith("ForImageClassification"):
        return ClassifierAnnotator(spec, attribute=attributes[0] if attributes else FOLDER_ATTRIBUTE)
    found = config.get("_class_name") or architecture or config.get("model_type") or "something else"
    raise ModelError(f"Expected an annotator in {spec}, found {found}. {KINDS}")


def check_measurable(spec: str, folder: Path) -> None:
    """Raise `ConfigError` where `spec` is a measurement itself, or its folder the one to write to."""
    if _recipe(Path(spec)) or folder.resolve() == Path(spec).resolve():
        remedy = "Name the annotator itself and a new folder, which will stand for the measured annotator."
        expected = "Expected an annotator and another folder to write its measurement to"
        raise ConfigError(f"{expected}, got {spec} and {folder}. {remedy}")


def save_measured(
    folder: Path,
    annotator: Measurable,
    held_out: HeldOut,
    *,
    spec: str,
    attribute: str = "",
    classes: Mapping[str, Any] | Path | None = None,
) -> None:
    """Write how an annotator errs on labelled images; `load_annotator(folder)` gives that annotator with it.

    `spec`, `attribute` and `classes` are what `load_annotator` was given; see `check_measurable`.
    """
    check_measurable(spec, folder)
    where = str(Path(spec).resolve()) if Path(spec).is_dir() else spec
    prompts = None if classes is None else class_prompts(classes)
    recipe = {"annotator": where, "attribute": attribute, "classes": prompts, "weights": annotator.weights_digest()}
    held_out.save(folder)
    write_json(folder / MEASURED, recipe)


def _load_measured(folder: Path, annotator: str, attribute: str, classes: Any, weights: str) -> Annotator:
    if annotator == LABELS or _recipe(Path(annotator)):  # the latter may stand for `folder` in turn
        raise ModelError(f"Expected the annotator itself in {folder / MEASURED}, found {annotator}. Measure again.")
    loaded: Any = load_annotator(annotator, attribute=attribute, classes=classes)
    if weights != loaded.weights_digest():
        raise ModelError(f"Expected {annotator} as {folder} measured it, found one of other weights. Measure again.")
    loaded.use_held_out(HeldOut.load(folder))
    return loaded


def _recipe(folder: Path) -> dict[str, Any] | None:
    """What `save_measured` wrote into a folder: "annotator", "attribute", "classes" and "weights"; else None."""
    if not (folder / MEASURED).is_file():
        return None
    recipe = read_json(folder / MEASURED)
    expected = {"annotator", "attribute", "classes", "weights"}
    if not isinstance(recipe, dict) or set(recipe) != expected or not isinstance(recipe["annotator"], str):
        raise ModelError(f"Expected a measured annotator in {folder / MEASURED}, found something else. Measure again.")
    return recipe


def _config(spec: str) -> dict[str, Any]:
    folder = Path(spec)
    with loading("an annotator", spec, KINDS):
        path = folder / "config.json" if folder.is_dir() else Path(hf_hub_download(spec, "config.json"))
        config = json.loads(path.read_text("utf-8"))
    return config if isinstance(config, dict) else {}
