"""Judge folders of generated images with one ruler: fairness, quality, and what guidance left as it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import EvaluationError
from ..models.encoders import ClipEncoder
from ..progress import progress_bar
from .annotators.given_labels import GivenLabels
from .describe import Described, Judge, describe_rows
from .fairness.correction import correct_for_annotator
from .manifest import Folders, Row, common_prompts, module_scale, read_model, resolve_folders, scale_keys
from .measure import measure, preserve
from .quality.diversity import lpips_network
from .quality.extractors import FeatureExtractor
from .quality.figures import common_group_size
from .question import Question
from .results import AnnotatorRecord, AttributeMeasures, Measures, Quantity, Results
from .subjects import named_subjects

__all__ = ["AnnotatorRecord", "AttributeMeasures", "Folders", "Measures", "Quantity", "Results", "evaluate"]


def evaluate(
    folders: Mapping[str, Folders] | str | Path,
    annotator: Judge,
    *,
    attribute: str | Sequence[str],
    subject_attribute: str | None = None,
    subject_of: Mapping[str, str] | None = None,
    reference: Described | None = None,
    reference_features: ArrayLike | None = None,
    extractors: Sequence[FeatureExtractor] = (),
    clip: ClipEncoder | None = None,
    lpips: bool = False,
    target: Mapping[str, float] | None = None,
    baseline: str | None = None,
    min_confidence: float = 0.0,
    confidence: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = True,
) -> Results:
    """Look at every generated image once and measure every model at every guidance scale.

    Any tool's images will do: a folder with a manifest of `file_name` and `prompt`. Every fairness figure comes with
    the floor of a perfectly fair sampler at as many images, an interval that is honest at the fair point too, and,
    where held-out labels tell how the annotator errs, a figure corrected for it.

    Args:
        folders: Model name to its folder of images with a manifest, or to several, one for each guidance scale; or
            one such folder; or a folder with such subfolders, each named after its model.
        annotator: What names the classes.
        attribute: The sensitive attribute, or several: the first gives the headline figures, and of several the
            intersection is measured too.
        subject_attribute: The attribute that prompts name, for accuracy.
        subject_of: Prompt to its class of `subject_attribute`. By default the longest class name that occurs
            in the prompt as a word. Prompts without a class are left out of accuracy.
        reference: Real images as `describe_reference` saw them, for distances, also class by class.
        reference_features: In its place, the annotator's features of reference images alone, (M, D).
        extractors: Further features for distances, diversity and preservation.
        clip: Scores how well images show their prompts (CLIP-T); its image features serve as an extractor too.
        lpips: Measure the diversity of each prompt's images by LPIPS; needs the extra `metrics`.
        target: Class of the first attribute to desired share, for the distances to a target; uniform by default.
        baseline: The model that others are compared with, seed by seed; by default "base" where there is one.
        min_confidence: Images whose most probable class is less probable are "cannot tell".
        confidence: Nominal coverage of all intervals.
        num_resamples: Resamples of each interval.
        seed: Seed of the resamples.
        batch_size: Images in memory at a time.
        progress: Show a progress bar.

    Raises:
        EvaluationError: A folder, manifest or image is absent or damaged, a manifest mixes module scales, a prompt
            has fewer than two images or is not everywhere, an attribute, class or model is unknown, features are not
            finite or of another size than the reference's, or a setting is out of range.
    """
    attributes = (attribute,) if isinstance(attribute, str) else tuple(attribute)
    _check_settings(attributes, subject_attribute, subject_of, min_confidence, confidence, num_resamples, batch_size)
    rows_by_model = {model: read_model(several) for model, several in resolve_folders(folders).items()}
    if isinstance(annotator, GivenLabels):
        annotator.discover([row.values for rows in rows_by_model.values() for row in rows])
    asked = [*attributes, *([subject_attribute] if subject_attribute else [])]
    check_attributes(annotator, asked)
    prompts = common_prompts(rows_by_model)
    named: Mapping[str, str] = {}
    if subject_attribute is not None:
        _check_prompts(prompts, subject_of)
        named = named_subjects(prompts, annotator.attributes[subject_attribute], subject_of)
    baseline = _baseline(list(rows_by_model), baseline)
    if reference is None and reference_features is not None:
        reference = Described({}, {}, {annotator.feature_name: np.asarray(reference_features, dtype=np.float32)})
    extractors = [*extractors, *([clip] if clip is not None else [])]
    confusion = {name: annotator.confusion(name, min_confidence) for name in asked}
    corrections, warnings = _corrections(confusion, annotator.name)
    question = Question(
        attributes=attributes,
        classes=annotator.attributes,
        confusion=corrections,
        min_confidence=min_confidence,
        subject_attribute=subject_attribute,
        subject_of=named,
        target=_target(target, attributes[0], annotator.attributes[attributes[0]]),
        confidence=confidence,
        num_resamples=num_resamples,
        seed=seed,
    )

    network = lpips_network() if lpips else None
    seen: dict[str, Described] = {}
    with progress_bar("annotating", sum(map(len, rows_by_model.values())), enabled=progress) as bar:
        for model, rows in rows_by_model.items():
            seen[model] = describe_rows(
                rows, annotator, extractors=extractors, min_confidence=min_confidence, batch_size=batch_size, bar=bar
            )
    _check_reference(reference, seen, min_confidence)
    at = {
        model: {key: _at(rows, seen[model], key) for key in scale_keys(rows)} for model, rows in rows_by_model.items()
    }
    size = common_group_size([known for by_key in at.values() for _, known in by_key.values()], reference, question)
    models: dict[str, dict[str, Measures]] = {}
    with progress_bar("measuring", sum(map(len, at.values())), enabled=progress) as bar:
        for model, by_key in at.items():
            models[model] = {}
            for key, (rows, known) in by_key.items():
                measures = measure(
                    rows, known, question, reference=reference, group_size=size, clip=clip, lpips=network
                )
                if baseline and model != baseline and key in at[baseline]:
                    measures = replace(measures, preservation=preserve(rows, known, *at[baseline][key], question))
                models[model][key] = measures
                bar.advance()
    return Results(
        models=models,
        attribute=attributes[0],
        classes={name: tuple(annotator.attributes[name]) for name in dict.fromkeys(asked)},
        subject_attribute=subject_attribute or "",
        annotator=_record(annotator, confusion, min_confidence),
        target=dict(target or {}),
        baseline=baseline,
        confidence=confidence,
        reference_images=0 if reference is None else len(reference),
        module_scales={
            model: scale for model, rows in rows_by_model.items() if (scale := module_scale(rows)) is not None
        },
        notes=(*warnings, *_notes(models, annotator, question, prompts, reference, baseline)),
    )


def _at(rows: Sequence[Row], seen: Described, key: str) -> tuple[list[Row], Described]:
    chosen = [index for index, row in enumerate(rows) if row.scale_key == key]
    return [rows[index] for index in chosen], seen.take(chosen)


def _check_settings(
    attributes: Sequence[str],
    subject_attribute: str | None,
    subject_of: Mapping[str, str] | None,
    min_confidence: float,
    confidence: float,
    num_resamples: int,
    batch_size: int,
) -> None:
    if not attributes or len(set(attributes)) < len(attributes):
        raise EvaluationError(f"Expected different attributes, at least one, got {list(attributes)}.")
    if subject_attribute is None and subject_of is not None:
        raise EvaluationError("Expected subject_attribute beside subject_of, got None. Name the attribute.")
    if subject_attribute in attributes:
        raise EvaluationError(
            f"Expected a subject_attribute other than the sensitive ones, got {subject_attribute!r} for both."
        )
    for name, number, least in (("batch_size", batch_size, 1), ("num_resamples", num_resamples, 20)):
        if number < least:
            raise EvaluationError(f"Expected a {name} of at least {least}, got {number}.")
    if not 0 < confidence < 1:
        raise EvaluationError(f"Expected a confidence above 0 and below 1, got {confidence}. 0.95 is usual.")
    if not 0 <= min_confidence < 1:
        raise EvaluationError(f"Expected a min_confidence of at least 0 and below 1, got {min_confidence}.")


def check_attributes(annotator: Judge, attributes: Sequence[str]) -> None:
    """Raise `EvaluationError` unless the annotator knows every attribute."""
    for name in attributes:
        if name not in annotator.attributes:
            raise EvaluationError(
                f"Expected an attribute that the annotator knows, got {name!r}; it knows "
                f"{', '.join(annotator.attributes) or 'none'}. Choose one of these, or train another."
            )


def _target(target: Mapping[str, float] | None, attribute: str, classes: Sequence[str]) -> tuple[float, ...] | None:
    if target is None:
        return None
    if set(target) != set(classes):
        raise EvaluationError(
            f"Expected a target share for each class of {attribute} ({', '.join(classes)}), got {', '.join(target)}."
        )
    shares: NDArray[Any] = np.array([target[name] for name in classes], dtype=np.float64)
    if not np.isfinite(shares).all() or (shares <= 0).any() or abs(shares.sum() - 1) > 1e-6:
        raise EvaluationError(
            f"Expected target shares above 0 (from a share of 0 the divergence is infinite) that sum to 1, got "
            f"{dict(target)}."
        )
    return tuple(shares.tolist())


def _baseline(models: Sequence[str], baseline: str | None) -> str:
    if baseline is None:
        return "base" if "base" in models else ""
    if baseline not in models:
        raise EvaluationError(f"Expected a baseline among {', '.join(models)}, got {baseline!r}.")
    return baseline


def _check_prompts(prompts: Sequence[str], subject_of: Mapping[str, str] | None) -> None:
    for prompt in subject_of or ():
        if prompt not in prompts:
            raise EvaluationError(
                f"Expected prompts of the images in subject_of, got {prompt!r}; there are "
                f"{', '.join(map(repr, prompts))}."
            )


def _check_reference(reference: Described | None, seen: Mapping[str, Described], min_confidence: float) -> None:
    if reference is None:
        return
    if reference.classes and reference.min_confidence != min_confidence:
        raise EvaluationError(
            f"Expected a reference described at the images' min_confidence, {min_confidence:g}, got one at "
            f"{reference.min_confidence:g}. Describe it again."
        )
    features = next(iter(seen.values())).features
    shared = reference.features.keys() & features.keys()
    if not shared:
        raise EvaluationError(
            f"Expected reference features among those of the images ({', '.join(features) or 'none'}), got "
            f"{', '.join(reference.features) or 'none'}. Name an extractor of features, or leave the reference out."
        )
    for name in shared:
        ours, theirs = features[name].shape, reference.features[name].shape
        if len(theirs) != 2 or theirs[1] != ours[1]:
            raise EvaluationError(
                f"Expected reference features of {name} of shape (M, {ours[1]}), got {theirs}. Use one extractor."
            )


def _corrections(
    confusion: Mapping[str, NDArray[Any] | None], annotator: str
) -> tuple[dict[str, NDArray[Any] | None], list[str]]:
    """Return the confusion matrices that figures can be corrected by, and why the others cannot."""
    usable: dict[str, NDArray[Any] | None] = {}
    warnings = []
    for name, matrix in confusion.items():
        usable[name] = matrix
        if matrix is not None:
            try:
                correct_for_annotator(np.ones((1, matrix.shape[1])), matrix)
            except EvaluationError as error:
                usable[name] = None
                warnings.append(f"no figure of {name} is corrected for the errors of {annotator}: {error}".rstrip("."))
    return usable, warnings


def _record(annotator: Judge, confusion: Mapping[str, NDArray[Any] | None], min_confidence: float) -> AnnotatorRecord:
    accuracy = {
        name: None if matrix is None else float(np.trace(matrix) / np.sum(matrix))
        for name, matrix in confusion.items()
    }
    tables = {name: None if matrix is None else np.asarray(matrix).tolist() for name, matrix in confusion.items()}
    return AnnotatorRecord(annotator.name, min_confidence, accuracy, tables)


def _notes(
    models: Mapping[str, Mapping[str, Measures]],
    annotator: Judge,
    question: Question,
    prompts: Sequence[str],
    reference: Described | None,
    baseline: str,
) -> list[str]:
    """Return what a reader should know before trusting the figures."""
    measured = [
        (f"{model} at guidance scale {key}", measures)
        for model, by_scale in models.items()
        for key, measures in by_scale.items()
    ]
    notes = []
    for name in question.attributes:
        if annotator.confusion(name, question.min_confidence) is None and not isinstance(annotator, GivenLabels):
            notes.append(
                f"how {annotator.name} errs on {name} is not known, so no figure is corrected for it: measure it on "
                "labelled images"
            )
        for group in question.classes[name]:
            counts = [row.get(group, 0) for _, m in measured for row in m.attributes[name].counts.values()]
            if not sum(counts):
                notes.append(f"no image of any model was annotated {group!r} ({name})")
    if len(question.attributes) > 1:
        notes.append("figures of intersections are not corrected for the annotator's errors")
    if question.subject_attribute is not None:
        unnamed = [prompt for prompt in prompts if prompt not in question.subject_of]
        if unnamed:
            notes.append(
                f"{len(unnamed)} of {len(prompts)} prompts name no class of {question.subject_attribute} "
                f"({', '.join(question.classes[question.subject_attribute])}) and are left out of accuracy, first "
                f"{unnamed[0]!r}"
            )
    if reference is not None and question.attributes[0] not in reference.classes:
        notes.append(
            f"the reference's {question.attributes[0]} is not known, so groups are not compared with its groups"
        )
    for where, measures in measured:
        notes += [f"{where}: {entry.note}" for entry in list(measures.attributes.values())[:1] if entry.note]
        if baseline and not where.startswith(f"{baseline} at ") and not measures.preservation:
            notes.append(f"{where}: {baseline} has no images at this guidance scale to compare with seed by seed")
    return notes
