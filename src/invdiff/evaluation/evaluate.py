"""Measure folders of generated images: Bias, accuracy and Fréchet distance at every guidance scale."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from ..errors import EvaluationError
from ..files import read_json, write_json
from ..progress import Bar, progress_bar
from . import fairness
from .annotators import Annotator
from .quality import frechet_distance

MANIFEST = "manifest.jsonl"


Folders = str | Path | Sequence[str | Path]
"""Where a model's images lie."""


@dataclass(frozen=True)
class Measures:
    """What was measured on one model's images at one guidance scale."""

    bias: float
    """Mean over prompts of the mean over pairs of classes of the difference in share."""
    bias_floor: float
    """Bias expected of a perfectly fair sampler with as many images."""
    bias_ci: tuple[float, float]
    """Bootstrap interval of Bias; see `fairness.bias_interval` for where to trust it."""
    accuracy: float | None
    """Share of images that show the subject their prompt names; None where no prompt names one."""
    frechet: float | None
    """Fréchet distance of the annotator's features to the reference's; None without a reference."""
    images_per_prompt: int
    """Images of the prompt that has the fewest."""
    shares: Mapping[str, Mapping[str, float]]
    """Prompt to class to share of its images."""


@dataclass(frozen=True)
class Results:
    """Measures by model and guidance scale."""

    models: Mapping[str, Mapping[str, Measures]]
    """Model name (such as "base" and "guided") to `str(float(guidance_scale))` to measures."""

    def to_dict(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Return plain JSON types: {"base": {"3.0": {"bias": ...}}, "guided": ...}."""
        return {
            model: {
                scale: {**dataclasses.asdict(measures), "bias_ci": list(measures.bias_ci)}
                for scale, measures in by_scale.items()
            }
            for model, by_scale in self.models.items()
        }

    def save(self, path: str | Path) -> None:
        """Write as JSON."""
        write_json(Path(path), self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> Results:
        """Read what `save` wrote.

        Raises:
            EvaluationError: The file holds other things than results.
            DataError: The file is absent or is not JSON.
        """
        values = read_json(Path(path))
        try:
            return cls(
                {
                    model: {
                        scale: Measures(**{**measures, "bias_ci": tuple(measures["bias_ci"])})
                        for scale, measures in by_scale.items()
                    }
                    for model, by_scale in values.items()
                }
            )
        except (AttributeError, KeyError, TypeError) as error:
            raise EvaluationError(
                f"Expected the results of an evaluation in {path}, found something else ({error!r}). "
                "Give a file that `invdiff evaluate` wrote, or evaluate again."
            ) from error


@dataclass(frozen=True)
class _Row:
    path: Path
    prompt: str
    guidance_scale: float
    scale: float


def evaluate(
    folders: Mapping[str, Folders] | str | Path,
    annotator: Annotator,
    *,
    attribute: str,
    subject_attribute: str | None = None,
    subject_of: Mapping[str, str] | None = None,
    reference_features: ArrayLike | None = None,
    confidence: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = True,
) -> Results:
    """Annotate generated images once each and measure every model at every guidance scale.

    Only the annotator's labels are used. Its mistakes enter every figure: check its held-out accuracy.

    Args:
        folders: Model name to its folder of images with `manifest.jsonl`, or to several, one for each
            guidance scale; or one such folder; or a folder with such subfolders, each named after its model.
        annotator: What names the classes.
        attribute: The sensitive attribute that Bias is measured on.
        subject_attribute: The attribute that prompts name, for accuracy.
        subject_of: Prompt to its class of `subject_attribute`. By default the longest class name that occurs
            in the prompt as a word. Prompts without a class are left out of accuracy.
        reference_features: The same annotator's features of reference images, (M, D).
        confidence: Nominal coverage of `bias_ci`.
        num_resamples: Bootstrap resamples of `bias_ci`.
        seed: Seed of the bootstrap.
        batch_size: Images in memory at a time.
        progress: Show a progress bar.

    Raises:
        EvaluationError: A folder, manifest or image is absent or damaged, a manifest mixes module scales,
            a prompt has fewer than two images or is not everywhere, or an attribute or class is unknown.
    """
    attributes = [attribute] if subject_attribute is None else [attribute, subject_attribute]
    _check_attributes(annotator, attributes)
    if subject_attribute is None and subject_of is not None:
        raise EvaluationError("Expected subject_attribute beside subject_of, got None. Name the attribute.")
    if batch_size < 1:
        raise EvaluationError(f"Expected a batch_size of at least 1, got {batch_size}.")
    rows_by_model = {
        model: [row for folder in several for row in _read_manifest(folder)]
        for model, several in _resolve(folders).items()
    }
    prompts = _common_prompts(rows_by_model)
    named: Mapping[str, str] = {}
    if subject_attribute is not None:
        named = _named_subjects(prompts, annotator.attributes[subject_attribute], subject_of)

    models: dict[str, dict[str, Measures]] = {}
    with progress_bar("annotating", sum(map(len, rows_by_model.values())), enabled=progress) as bar:
        for model, rows in rows_by_model.items():
            labels, features = _annotate(rows, annotator, attributes, batch_size, bar)
            models[model] = {}
            for guidance_scale in sorted({row.guidance_scale for row in rows}):
                chosen = [index for index, row in enumerate(rows) if row.guidance_scale == guidance_scale]
                images = [rows[index].prompt for index in chosen]
                counts = _count(images, [labels[attribute][i] for i in chosen], annotator.attributes[attribute])
                table = np.array(list(counts.values()))
                correct = [
                    labels[subject_attribute][i] == named[rows[i].prompt]
                    for i in chosen
                    if subject_attribute is not None and rows[i].prompt in named
                ]
                models[model][str(guidance_scale)] = Measures(
                    bias=fairness.bias(table),
                    bias_floor=fairness.bias_floor(table.sum(axis=1), table.shape[1]),
                    bias_ci=fairness.bias_interval(
                        table, confidence=confidence, num_resamples=num_resamples, seed=seed
                    ),
                    accuracy=float(np.mean(correct)) if correct else None,
                    frechet=None
                    if reference_features is None
                    else frechet_distance(features[chosen], reference_features),
                    images_per_prompt=int(table.sum(axis=1).min()),
                    shares={
                        prompt: dict(zip(annotator.attributes[attribute], share.tolist(), strict=True))
                        for prompt, share in zip(counts, fairness.shares(table), strict=True)
                    },
                )
    return Results(models)


def _annotate(
    rows: Sequence[_Row], annotator: Annotator, attributes: Sequence[str], batch_size: int, bar: Bar
) -> tuple[dict[str, list[str]], NDArray[Any]]:
    """Return labels by attribute and features, (N, D), holding the pixels of one batch at a time."""
    labels: dict[str, list[str]] = {name: [] for name in attributes}
    features = []
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        seen = annotator.predict([_open_image(row.path) for row in batch])
        for name in labels:
            labels[name] += seen.labels(name)
        features.append(np.asarray(seen.features))
        bar.advance(len(batch))
    return labels, np.concatenate(features)


def _check_attributes(annotator: Annotator, attributes: Sequence[str]) -> None:
    for name in attributes:
        if name not in annotator.attributes:
            raise EvaluationError(
                f"Expected an attribute that the annotator knows, got {name!r}; it knows "
                f"{', '.join(annotator.attributes) or 'none'}. Choose one of these, or train another."
            )


def _resolve(folders: Mapping[str, Folders] | str | Path) -> dict[str, list[Path]]:
    if isinstance(folders, Mapping):
        if not folders or any(not isinstance(given, str | Path) and not given for given in folders.values()):
            raise EvaluationError("Expected at least one folder of images of each model, got none.")
        return {
            model: [Path(given)] if isinstance(given, str | Path) else [Path(folder) for folder in given]
            for model, given in folders.items()
        }
    folder = Path(folders)
    inside = {child.name: child for child in sorted(folder.glob("*")) if (child / MANIFEST).is_file()}
    if inside and not (folder / MANIFEST).is_file():
        return {model: [child] for model, child in inside.items()}
    return {folder.resolve().name: [folder]}


def _read_manifest(folder: Path) -> list[_Row]:
    manifest = folder / MANIFEST
    try:
        lines = manifest.read_text(encoding="utf-8").split("\n")  # captions may hold other line breaks
    except FileNotFoundError as error:
        raise EvaluationError(
            f"Expected {MANIFEST} in {folder}, found none. Give a folder that `invdiff generate` wrote."
        ) from error
    except UnicodeDecodeError as error:
        raise EvaluationError(f"Expected UTF-8 in {manifest}, found something else. Generate again.") from error
    rows = [_read_row(line, folder, number) for number, line in enumerate(lines, start=1) if line.strip()]
    if not rows:
        raise EvaluationError(f"Expected images in {manifest}, found none. Generate them first.")
    seen: set[Path] = set()
    for row in rows:
        if row.path in seen:
            raise EvaluationError(f"Expected each image once in {manifest}, found {row.path} again. Remove it.")
        seen.add(row.path)
    absent = [row.path for row in rows if not row.path.is_file()]
    if absent:
        raise EvaluationError(
            f"Expected the {len(rows)} images that {manifest} names, found {len(absent)} absent, first "
            f"{absent[0]}. Run the same `invdiff generate` again: it makes what is missing."
        )
    scales = sorted({row.scale for row in rows})
    if len(scales) > 1:
        raise EvaluationError(
            f"Expected images of one module scale in {folder}, found {scales}. Generate each scale into a "
            "folder of its own and pass them as {name: folder}."
        )
    for child in sorted(folder.iterdir()):
        if child.is_dir() and not any(child.iterdir()):
            raise EvaluationError(
                f"Expected images in {child}, found none: generation stopped early. Run it again, or remove "
                "the folder."
            )
    for guidance_scale in sorted({row.guidance_scale for row in rows}):
        counts = Counter(row.prompt for row in rows if row.guidance_scale == guidance_scale)
        prompt, fewest = counts.most_common()[-1]
        if fewest < 2:
            raise EvaluationError(
                f"Expected at least 2 images per prompt in {folder}, found {fewest} of {prompt!r} at "
                f"guidance scale {guidance_scale}. Generate more."
            )
    return rows


def _read_row(line: str, folder: Path, number: int) -> _Row:
    try:
        values = json.loads(line)
        return _Row(
            path=folder / values["file_name"],
            prompt=str(values["prompt"]),
            guidance_scale=float(values["guidance_scale"]),
            scale=float(values["scale"]),
        )
    except (ValueError, TypeError, KeyError) as error:
        raise EvaluationError(
            f"Expected a JSON object with file_name, prompt, guidance_scale and scale in line {number} of "
            f"{folder / MANIFEST}, found something else ({error!r}). Remove the line and generate again."
        ) from error


def _common_prompts(rows_by_model: Mapping[str, Sequence[_Row]]) -> list[str]:
    """Return the prompts in order; every model must have each at every guidance scale."""
    prompts = list(dict.fromkeys(row.prompt for rows in rows_by_model.values() for row in rows))
    for model, rows in rows_by_model.items():
        for guidance_scale in sorted({row.guidance_scale for row in rows}):
            present = {row.prompt for row in rows if row.guidance_scale == guidance_scale}
            absent = [prompt for prompt in prompts if prompt not in present]
            if absent:
                raise EvaluationError(
                    f"Expected images of the same prompts everywhere, found none of {absent[0]!r} in {model} "
                    f"at guidance scale {guidance_scale}. Generate them, or evaluate the folders apart: "
                    "averages over different prompts cannot be compared."
                )
    return prompts


def _named_subjects(
    prompts: Sequence[str], classes: Sequence[str], subject_of: Mapping[str, str] | None
) -> dict[str, str]:
    if subject_of is not None:
        for prompt, name in subject_of.items():
            if name not in classes:
                raise EvaluationError(
                    f"Expected a class that the annotator knows for {prompt!r}, got {name!r}; it knows "
                    f"{', '.join(classes)}."
                )
        return dict(subject_of)
    found = {prompt: _class_in(prompt, classes) for prompt in prompts}
    return {prompt: name for prompt, name in found.items() if name is not None}


def _class_in(prompt: str, classes: Sequence[str]) -> str | None:
    for name in sorted(classes, key=len, reverse=True):
        words = re.escape(name.replace("_", " "))
        if re.search(rf"(?<!\w){words}(?!\w)", prompt, flags=re.IGNORECASE):
            return name
    return None


def _count(prompts: Sequence[str], labels: Sequence[str], classes: Sequence[str]) -> dict[str, list[int]]:
    """Return prompt to images per class, prompts in order of appearance."""
    table = Counter(zip(prompts, labels, strict=True))
    return {prompt: [table[prompt, name] for name in classes] for prompt in prompts}


def _open_image(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise EvaluationError(
            f"Expected a readable image in {path}, found something else ({error}). Delete it and run "
            "`invdiff generate` again."
        ) from error
