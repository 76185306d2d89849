"""Evaluate folders of generated images alike: fairness, quality, and what guidance left as it was."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..config import EvaluateConfig
from ..data.captioned import CaptionedImages
from ..data.images import about_unreadable
from ..errors import EvaluationError, check_kinds
from ..models.encoders import ClipEncoder
from ..progress import progress_bar
from ..text import label_of
from .annotate import Described, Judge, Question, describe_images
from .annotators.annotations import class_names
from .annotators.audited import AuditAnnotator
from .annotators.labels import GivenLabels
from .fairness.correction import correct_for_annotator
from .images import Folders, Row, common_prompts, read_images, resolve_folders, scale_keys
from .measure import measure, preserve
from .quality.extractors import FeatureExtractor, load_extractor, lpips_network
from .quality.figures import common_group_size
from .results import CANNOT_TELL, AnnotatorRecord, Measures, Results


def evaluate(
    images: Mapping[str, Folders] | str | Path,
    annotator: Judge,
    attribute: str | Sequence[str],
    *,
    reference: CaptionedImages | Described | None = None,
    extractors: Sequence[FeatureExtractor] = (),
    config: EvaluateConfig | None = None,
    progress: bool = True,
) -> Results:
    """Look at every generated image once and measure every model at every guidance scale.

    Any tool's images will do: a folder with a manifest of `file_name` and `prompt`. Every fairness figure comes with
    the floor of a perfectly fair sampler at as many images, an interval that holds at the fair point too, and, where
    the annotator's errors on held-out images are known, a figure corrected for them.

    Args:
        images: Model name to its folder of images with a manifest, or to several, one for each guidance scale; or
            one such folder.
        annotator: The source of classes: an annotator, or `GivenLabels` for columns of the manifest.
        attribute: The sensitive attribute, or several: the first gives the headline figures, and of several the
            intersection is measured too.
        reference: Real images, or their descriptions by `annotate.describe_images`, for distances.
        extractors: Further features, beside `config.features`. One that has `text_features` measures CLIP-T too, as
            the model `config.clip` does.
        config: The settings.
        progress: Show progress bars.

    Raises:
        DataError: An image is damaged.
        EvaluationError: Folders, manifests or images are absent, damaged or do not fit together, an attribute, class
            or model is unknown, or features are not finite or do not fit the reference's.
    """
    check_kinds(annotator=(annotator, Judge), config=(config, EvaluateConfig | None))
    check_kinds(reference=(reference, CaptionedImages | Described | None))
    config = config or EvaluateConfig()
    attributes = (attribute,) if isinstance(attribute, str) else tuple(attribute)
    subject = config.subject_attribute
    asked = [*attributes, subject] if subject else [*attributes]
    if not attributes or len(set(asked)) < len(asked):
        raise EvaluationError(f"Expected one attribute or more, all different, and another as subject, got {asked}.")
    rows_by_model = {model: read_images(*folders) for model, folders in resolve_folders(images).items()}
    if isinstance(annotator, GivenLabels):
        all_rows = [row for rows in rows_by_model.values() for row in rows]
        annotator.discover([row.values for row in all_rows], [row.place for row in all_rows])
    for name in asked:
        if name not in annotator.attributes:
            known, why = ", ".join(annotator.attributes), ""
            if isinstance(annotator, AuditAnnotator) and name in annotator.unjudged:
                why = ", of which the audit has no judge, since too few images are surely in one of its groups"
            raise EvaluationError(f"Expected an attribute of the annotator, {known}, got {name!r}{why}. Choose one.")
    prompts = common_prompts(rows_by_model)
    baseline = config.baseline or ("base" if "base" in rows_by_model else "")
    if baseline and baseline not in rows_by_model:
        raise EvaluationError(f"Expected a baseline among {', '.join(rows_by_model)}, got {baseline!r}.")
    classes = class_names(annotator.attributes, EvaluationError)
    target, of_first = {label_of(name): share for name, share in config.target.items()}, classes[attributes[0]]
    if target and sorted(map(label_of, config.target)) != sorted(of_first):
        wanted, given = f"each class of {attributes[0]} ({', '.join(of_first)})", ", ".join(config.target)
        raise EvaluationError(f"Expected a target share for {wanted}, got {given}. Give one for each.")
    confusion = {name: annotator.confusion(name, config.min_confidence) for name in asked}
    corrections, warnings = dict(confusion), []
    for name, matrix in confusion.items():
        try:
            if matrix is not None:
                correct_for_annotator(np.ones((1, matrix.shape[1])), matrix)
        except EvaluationError as error:
            corrections[name] = None
            told = f"no figure of {name} is corrected for the errors of {annotator.name}: {error}"
            warnings.append(told.rstrip("."))
    network = lpips_network() if config.lpips else None
    specs = dict.fromkeys(spec for spec in config.features if spec != config.clip)
    extractors = [*extractors, *map(load_extractor, specs), *([ClipEncoder.load(config.clip)] if config.clip else [])]
    clip: Any = next((extractor for extractor in extractors if hasattr(extractor, "text_features")), None)
    settings: Any = {"min_confidence": config.min_confidence, "batch_size": config.batch_size}
    settings |= {"extractors": extractors, "progress": progress}
    if reference is not None:
        ours = [*filter(None, [annotator.feature_name]), *(extractor.name for extractor in extractors)]
        theirs = ours if isinstance(reference, CaptionedImages) else list(reference.features)
        if not set(ours) & set(theirs):
            told = " and ".join(", ".join(names) or "none" for names in (ours, theirs))
            raise EvaluationError(f"Expected features that images and reference share, got {told}. Name some.")
    if isinstance(reference, CaptionedImages):
        reference = describe_images(reference, annotator, **settings)
    parts: dict[tuple[str, str], tuple[list[Row], Described]] = {}
    with progress_bar("annotating", sum(map(len, rows_by_model.values())), enabled=progress) as bar:
        for model, rows in rows_by_model.items():
            seen = describe_images(rows, annotator, bar=bar, **settings)
            for key in scale_keys(rows):
                places = [place for place, row in enumerate(rows) if row.scale_key == key]
                parts[model, key] = [rows[place] for place in places], seen.take(places)
    unsplit = annotator.unsplit if isinstance(annotator, AuditAnnotator) else {}
    apart: dict[str, set[str]] = {}
    for name in attributes:  # of models that are compared, figures are of the same prompts
        apart[name] = set(prompts) & unsplit.get(name, set())
        for own, found in parts.values():
            named = {row.prompt for row, of in zip(own, found.classes[name], strict=True) if of < len(classes[name])}
            apart[name] |= set(prompts) - named
        if len(apart[name]) == len(prompts):
            raise EvaluationError(
                f"Expected a prompt whose images have classes of {name} in every model, found none: at a confidence "
                f"of {config.min_confidence:g} the annotator names none, or the audit splits no such prompt by it."
            )
    for own, found in parts.values():  # those of single groups, too
        aside = [row.prompt in apart[attributes[0]] for row in own]
        found.classes[attributes[0]][aside] = len(of_first)
    question = Question(
        attributes=attributes,
        classes=classes,
        confusion=corrections,
        subject_of=named_subjects(prompts, classes[subject]) if subject else {},
        target=tuple(target[name] for name in of_first) if target else None,
        reference=reference,
        clip=clip,
        lpips=network,
        apart=apart,
        config=config,
    )
    size = common_group_size([known for _, known in parts.values()], question)
    models: dict[str, dict[str, Measures]] = {model: {} for model in rows_by_model}
    with progress_bar("measuring", len(parts), enabled=progress) as bar:
        for (model, key), part in parts.items():
            measures = measure(*part, question, size)
            if model != baseline and (baseline, key) in parts:
                measures = replace(measures, preservation=preserve(*part, *parts[baseline, key], question))
            models[model][key] = measures
            bar.advance()
    scales = {model: {row.scale for row in rows} for model, rows in rows_by_model.items()}
    accuracy = {name: None if of is None else _accuracy(of) for name, of in confusion.items()}
    counts = {name: None if of is None else of.tolist() for name, of in confusion.items()}
    results = Results(
        models=models,
        attribute=attributes[0],
        classes={name: classes[name] for name in asked},
        subject_attribute=subject,
        annotator=AnnotatorRecord(annotator.name, config.min_confidence, accuracy, counts),
        target=target,
        baseline=baseline,
        reference_images=0 if reference is None else len(reference),
        module_scales={model: scale for model, (scale, *others) in scales.items() if scale is not None and not others},
    )
    return replace(results, notes=(*warnings, *_notes(results, annotator, question, prompts)))


def _accuracy(confusion: np.ndarray) -> float | None:
    """The share of held-out images with the right class, of those that have any; (true class, class or none)."""
    known = confusion[:, : len(confusion)]
    return float(np.trace(known) / known.sum()) if known.any() else None


def named_subjects(prompts: Sequence[str], classes: Sequence[str]) -> dict[str, int]:
    """Prompt to the index of its subject's class: the longest class name in the prompt as a word.

    An underscore of a class name stands for a space; prompts that name no class, or several, are left out. A class in
    the name of another ("bird" in "water bird") is not named beside it.
    """
    found = {}
    patterns = {name: re.compile(rf"(?i)(?<!\w){re.escape(name.replace('_', ' '))}(?!\w)") for name in classes}
    for prompt in prompts:
        named = [name for name, pattern in patterns.items() if pattern.search(prompt)]
        longest = max(named, key=len, default="")
        if named and all(patterns[name].search(longest.replace("_", " ")) for name in named):
            found[prompt] = classes.index(longest)
    return found


def _notes(results: Results, annotator: Judge, question: Question, prompts: Sequence[str]) -> list[str]:
    """What a reader should know before trusting the figures."""
    reference, notes = question.reference, [annotator.note] if isinstance(annotator, AuditAnnotator) else []
    for name in question.attributes:
        if (agreement := results.annotator.accuracy[name]) is not None and isinstance(annotator, AuditAnnotator):
            notes.append(f"judge and audit agree on {name} in {agreement:.1%} of the training images left out")
        if isinstance(annotator, GivenLabels):
            notes.append(f"classes of {name} are those that labels name: {', '.join(question.classes[name])}")
        elif results.annotator.confusion[name] is None:
            unknown = f"how {annotator.name} errs on {name} is not known, so no figure is corrected for it"
            notes.append(f"{unknown}: measure it on labelled images")
        if left := [prompt for prompt in prompts if prompt in question.apart[name]]:
            why = f"of which nothing is told in some model's images, first {left[0]!r}"
            notes.append(f"figures of {name} leave out {len(left)} of {len(prompts)} prompts, {why}")
        every, unsure = Counter[str](), []
        for model, key, measures in results.each():
            counts = sum(map(Counter, measures.attributes[name].counts.values()), Counter[str]())
            every += counts
            if none := counts[CANNOT_TELL]:
                unsure.append(f"{none:,} of {counts.total():,} of {model} at guidance scale {key}")
        if unsure:
            notes.append(f"images without a class of {name} are outside its figures: {'; '.join(unsure)}")
        absent = [group for group in question.classes[name] if not every[group]]
        notes += [f"no image of any model was annotated {group!r} ({name})" for group in absent]
    if len(question.attributes) > 1:
        notes.append("figures of intersections are not corrected for the annotator's errors")
    unnamed = [prompt for prompt in prompts if prompt not in question.subject_of]
    if (subject := results.subject_attribute) and unnamed:
        several = f"class of {subject}, or several, ({', '.join(question.classes[subject])})"
        named = f"{len(unnamed)} of {len(prompts)} prompts name no {several}"
        notes.append(f"{named} and are left out of accuracy, first {unnamed[0]!r}")
    if reference is not None and question.attributes[0] not in reference.classes:
        notes.append(f"the reference's {question.attributes[0]} is not known, so groups are not compared with its own")
    if reference is not None and reference.unreadable:
        total = len(reference) + len(reference.unreadable)
        notes.append("of the reference, " + about_unreadable(reference.unreadable, total).rstrip("."))
    numbers = sorted({sum(row.values()) for *_, of in results.each() for row in of.first.counts.values()})
    if len(numbers) > 1:
        weighed = "accuracy and CLIP-T weigh a prompt by its images"
        larger = "distances such as Fréchet's are larger of fewer images"
        notes.append(f"images of a prompt number {numbers[0]:,} to {numbers[-1]:,}: {weighed}, and {larger}")
    for model, key, measures in results.each():
        said = [of.note for of in measures.attributes.values()]
        said += [measures.subject_accuracy.note] if measures.subject_accuracy else []
        if len(question.attributes) > 1:
            joint = measures.attributes.get(" x ".join(question.attributes))
            if missing := len(prompts) - len(joint.counts if joint else ()):
                said.append(f"figures of the intersection leave out {missing} of {len(prompts)} prompts")
        if results.baseline and key not in results.models[results.baseline]:
            said.append(f"{results.baseline} has no images at this guidance scale to compare seed by seed")
        notes += [f"{model} at guidance scale {key}: {note}" for note in dict.fromkeys(said) if note]
    return notes
