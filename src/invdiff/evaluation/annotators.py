"""Annotators tell which class of each attribute an image shows, for measuring only: all kinds, and how to get one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download

from ..errors import ConfigError, DataError, ModelError
from ..files import read_json, write_json
from .annotations import CANNOT_TELL, Annotations, Annotator
from .conv_annotator import ConvAnnotator
from .given_labels import GivenLabels
from .heldout import HeldOut, Measurable
from .labelled import FOLDER_ATTRIBUTE

__all__ = [
    "CANNOT_TELL",
    "LABELS",
    "Annotations",
    "Annotator",
    "ConvAnnotator",
    "GivenLabels",
    "HeldOut",
    "load_annotator",
    "save_measured",
]

LABELS = "labels"
"""In place of an annotator's name: the classes are read from the manifest."""
MEASURED = "annotator.json"
KINDS = (
    f"Give a folder that `invdiff annotator train` or `invdiff annotator measure` wrote, a CLIP model, an image "
    f"classifier, or {LABELS!r} to read columns of the manifest."
)


def load_annotator(
    spec: str, *, attribute: str | Sequence[str] = "", classes: Mapping[str, Any] | Path | None = None
) -> Annotator | GivenLabels:
    """Return the annotator that `spec` names.

    Args:
        spec: A folder or a hub id of a `ConvAnnotator`, of a `CLIPModel` or of any image classifier from
            `transformers`; a folder that `save_measured` wrote; or "labels" for `GivenLabels`. A folder that is
            called so is `./labels`.
        attribute: For an image classifier, what its classes are classes of ("label" unless given; the first of
            several); for "labels", the columns. Others know their attributes.
        classes: For a CLIP model only: attribute name to class name to prompts, or a YAML or JSON file of that.

    Raises:
        ModelError: There is no annotator of a known kind.
        ConfigError: A CLIP model is given without `classes`, or others with them, or "labels" without attribute.
    """
    attributes = [name for name in ([attribute] if isinstance(attribute, str) else attribute) if name]
    if spec == LABELS:
        _refuse_classes(classes, "columns of labels")
        if not attributes:
            raise ConfigError(f"Expected an attribute beside {LABELS!r}, the column to read, got none. Name it.")
        return GivenLabels(attributes)
    if (Path(spec) / MEASURED).is_file():
        _refuse_classes(classes, "a measured annotator, which has its own")
        return _load_measured(Path(spec))
    config = _read_config(spec)
    architecture = next(iter(config.get("architectures") or ()), "")
    if config.get("_class_name") == ConvAnnotator.__name__:
        _refuse_classes(classes, "a trained annotator, which has its own")
        return ConvAnnotator.from_pretrained(spec)
    if architecture.endswith("ForImageClassification"):
        from .classifier_annotator import ClassifierAnnotator

        _refuse_classes(classes, "an image classifier, which has its own")
        return ClassifierAnnotator(spec, attribute=attributes[0] if attributes else FOLDER_ATTRIBUTE)
    if config.get("model_type") == "clip" and architecture in ("", "CLIPModel"):
        from .clip_annotator import EXAMPLE, ClipAnnotator

        prompts = _class_prompts(classes)
        if prompts is None:
            raise ConfigError(
                f"Expected classes beside the CLIP model {spec}, got none. Give a YAML file of attribute, classes and "
                f"prompts, such as {EXAMPLE}."
            )
        return ClipAnnotator(spec, prompts)
    found = config.get("_class_name") or architecture or config.get("model_type") or "something else"
    raise ModelError(f"Expected an annotator in {spec}, found {found}. {KINDS}")


def save_measured(
    folder: Path,
    held_out: HeldOut,
    spec: str,
    *,
    attribute: str = "",
    classes: Mapping[str, Any] | Path | None = None,
) -> None:
    """Write what an annotator makes of labelled images; `load_annotator(folder)` gives that annotator with it.

    Args:
        folder: Where to write.
        held_out: What `measure_annotator` returned.
        spec: What `load_annotator` was given, and so are `attribute` and `classes`.
        attribute: See `spec`.
        classes: See `spec`.
    """
    source = Path(spec)
    if (source / MEASURED).is_file():  # refer to the annotator itself: its earlier measurement may be removed
        recipe = read_json(source / MEASURED)
    else:
        where = str(source.resolve()) if source.is_dir() else spec
        recipe = {"annotator": where, "attribute": attribute, "classes": _class_prompts(classes)}
    held_out.save(folder)
    write_json(folder / MEASURED, recipe)


def _load_measured(folder: Path) -> Annotator:
    recipe = read_json(folder / MEASURED)
    try:
        annotator = load_annotator(recipe["annotator"], attribute=recipe["attribute"], classes=recipe["classes"])
    except (KeyError, TypeError) as error:
        raise ModelError(f"Expected a measured annotator in {folder}, found {MEASURED} of something else.") from error
    if not isinstance(annotator, Measurable):
        raise ModelError(f"Expected an annotator of images in {folder}, found {recipe['annotator']!r}. {KINDS}")
    try:
        annotator.use_held_out(HeldOut.load(folder))
    except DataError as error:
        raise ModelError(f"Could not load the measured annotator in {folder}: {error}") from error
    return annotator


def _read_config(spec: str) -> dict[str, Any]:
    folder = Path(spec)
    try:
        file = folder / "config.json" if folder.is_dir() else Path(hf_hub_download(spec, "config.json"))
        config = read_json(file)
    except (OSError, ValueError, DataError) as error:
        raise ModelError(f"Expected an annotator in {spec}, found none. {KINDS}") from error
    if not isinstance(config, dict):
        raise ModelError(f"Expected an annotator in {spec}, found a config.json of something else. {KINDS}")
    return config


def _class_prompts(classes: Mapping[str, Any] | Path | None) -> Mapping[str, Any] | None:
    if not isinstance(classes, Path):
        return classes
    from .clip_annotator import read_class_prompts

    return read_class_prompts(classes)


def _refuse_classes(classes: object, what: str) -> None:
    if classes is not None:
        raise ConfigError(f"Expected no classes beside {what}, got some. Only CLIP models take them.")
