"""Results of an evaluation: figures with intervals, floors and corrections, as objects, JSON and a table."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..data.tables import MANIFESTS
from ..errors import EvaluationError, found_else
from ..files import read_json, write_json, write_text
from ..options import typed
from .fairness.metrics import METRICS, target_shares

CANNOT_TELL = "cannot tell"  # the label of an image that an annotator is not confident about
AUDIT = "the audit"  # the name of an audit as annotator
UNSTATED = "unstated"  # the guidance scale of images whose manifest names none
HEADLINE = ("bias", "bias_floor", "bias_ci", "accuracy", "frechet", "images_per_prompt", "shares")
"""Properties of `Measures` that its JSON form opens with; for readers of the file, not read back."""
TABLE_COLUMNS = (
    *("model", "guidance_scale", "kind", "attribute", "figure", "of"),
    *("value", "low", "high", "floor"),
    *("corrected", "corrected_low", "corrected_high", "corrected_floor"),
    *("sd_over_prompts", "unbiased_square", "note"),
)


@dataclass(frozen=True)
class Quantity:
    """One figure; None where it is not defined, and then `note` says why."""

    value: float | None
    low: float | None = None  # lower end of its interval; None where it has none
    high: float | None = None  # upper end
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Estimate(Quantity):
    """A fairness metric's mean over prompts and what is known about its error."""

    value: float
    low: float
    high: float  # interval of the mean over these prompts; it says nothing about other prompts
    floor: float  # expected value for a sampler that draws from the target, with as many images and no mistakes
    sd_over_prompts: float | None = None  # standard deviation of the prompts' values; None for one prompt
    unbiased_square: float | None = None  # unbiased estimate of the SQUARED fairness_discrepancy alone
    corrected: float | None = None  # the value corrected for the annotator's errors, where they are known well enough
    corrected_low: float | None = None
    corrected_high: float | None = None
    corrected_floor: float | None = None  # what it would be for that sampler


@dataclass(frozen=True)
class AttributeMeasures:
    """How one attribute's classes are spread over a model's images."""

    counts: Mapping[str, Mapping[str, int]]
    """Prompt to class to images; "cannot tell" is a class of its own where a confidence was asked for."""
    overall: Mapping[str, Estimate]
    """Fairness metric to estimate, mean over prompts."""
    subject_right: Mapping[str, Estimate] = field(default_factory=dict)
    """The same among images that show the subject their prompt names; empty where none is named."""
    by_prompt: Mapping[str, Mapping[str, Estimate]] = field(default_factory=dict)
    """Prompt to fairness metric to estimate; empty for one prompt."""
    softmax_discrepancy: Quantity = Quantity(None)
    """Fairness discrepancy of mean probabilities instead of labels."""
    note: str = ""

    @property
    def shares(self) -> dict[str, dict[str, float]]:
        """Prompt to class to share of the images that have a class."""
        shares = {}
        for prompt, counts in self.counts.items():
            known = {name: count for name, count in counts.items() if name != CANNOT_TELL}
            shares[prompt] = {name: count / sum(known.values()) for name, count in known.items()}
        return shares


@dataclass(frozen=True)
class Measures:
    """Measures of one model's images at one guidance scale."""

    images_per_prompt: int
    """Images of the prompt that has the fewest."""
    attributes: Mapping[str, AttributeMeasures]
    """By attribute, the first asked for first; of several attributes, their intersection too ("gender x age")."""
    subject_accuracy: Quantity | None = None
    """Share of images that show the subject their prompt names; None where no prompt names one."""
    quality: Mapping[str, Quantity] = field(default_factory=dict)
    """Figure, with the name of its features, to value: "Frechet distance (birds-annotator)"."""
    by_group: Mapping[str, Mapping[str, Quantity]] = field(default_factory=dict)
    """Class of the first attribute to figure to value: is the minority drawn as well as the majority?"""
    preservation: Mapping[str, Quantity] = field(default_factory=dict)
    """How far images moved from those that the baseline draws from the same seeds; empty for the baseline."""

    @property
    def first(self) -> AttributeMeasures:
        """The attribute that was asked for first."""
        return next(iter(self.attributes.values()))

    @property
    def bias_estimate(self) -> Estimate:
        """Bias of the first attribute with all that is known about its error."""
        return self.first.overall["bias"]

    @property
    def bias(self) -> float:
        """Mean over prompts of the mean over pairs of classes of the difference in share."""
        return self.bias_estimate.value

    @property
    def bias_floor(self) -> float:
        """Bias expected of a perfectly fair sampler with as many images, each drawn independently."""
        return self.bias_estimate.floor

    @property
    def bias_ci(self) -> tuple[float, float]:
        """Interval of Bias that holds near the fair point too; see `fairness.intervals.interval`."""
        return self.bias_estimate.low, self.bias_estimate.high

    @property
    def accuracy(self) -> float | None:
        """Share of images that show the subject their prompt names; None where no prompt names one."""
        return None if self.subject_accuracy is None else self.subject_accuracy.value

    @property
    def frechet(self) -> float | None:
        """Fréchet distance to the reference, on the first features there are; None without a reference."""
        named = (figure.value for name, figure in self.quality.items() if name.startswith(("Frechet distance", "FID")))
        return next(named, None)

    @property
    def shares(self) -> dict[str, dict[str, float]]:
        """Prompt to class of the first attribute to share of its images."""
        return self.first.shares


@dataclass(frozen=True)
class AnnotatorRecord:
    """The annotator of an evaluation and its held-out errors."""

    name: str
    min_confidence: float = 0.0
    """Below it, the annotator "cannot tell"."""
    accuracy: Mapping[str, float | None] = field(default_factory=dict)
    """Attribute to held-out accuracy; None where it was never measured."""
    confusion: Mapping[str, list[list[float]] | None] = field(default_factory=dict)
    """Attribute to held-out counts (true class, annotated class, last "cannot tell")."""


@dataclass(frozen=True)
class Criterion:
    """The metric that the mix of the first attribute is judged by."""

    metric: str  # its name in `METRICS`
    name: str  # for people
    sampler: str  # who would show the floor by chance
    fair: str  # what 0 means
    unfair: str  # what its greatest value means
    greatest: float


@dataclass(frozen=True)
class Results:
    """Measures by model and guidance scale, and how they were made."""

    models: Mapping[str, Mapping[str, Measures]]
    """Model name (such as "base" and "guided") to `str(float(guidance_scale))`, ascending, to measures."""
    attribute: str = ""
    """The sensitive attribute that headline figures are of."""
    classes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Attribute to class names."""
    subject_attribute: str = ""
    """The attribute that prompts name; "" where none was given."""
    annotator: AnnotatorRecord = AnnotatorRecord("")
    """Who named the classes."""
    target: Mapping[str, float] = field(default_factory=dict)
    """Class to share that the first attribute is measured against; empty for a uniform mix."""
    baseline: str = ""
    """The model that preservation compares with; "" where there is none."""
    confidence: float = 0.95
    """Nominal coverage of all intervals."""
    reference_images: int = 0
    """Real images that quality is measured against."""
    module_scales: Mapping[str, float] = field(default_factory=dict)
    """Model to Delta, the strength of its guidance module, 0 for a plain model; without those whose manifests do not
    say."""
    notes: tuple[str, ...] = ()
    """What a reader should know before trusting the figures."""
    run: Mapping[str, Any] = field(default_factory=dict)
    """Facts about the run that made the images, as plain JSON types, such as `invdiff demo` adds: its "settings" and
    how well its "audit" recovered the hidden groups."""

    def each(self) -> Iterator[tuple[str, str, Measures]]:
        """Model, guidance scale and measures of everything that was measured."""
        for model, by_scale in self.models.items():
            for scale, measures in by_scale.items():
                yield model, scale, measures

    @property
    def criterion(self) -> Criterion:
        """What the first attribute's mix is judged by: its distance to the target where one was given, else Bias."""
        words = ("bias", "Bias", "fair sampler", "even", "always the same class")
        if self.target:
            words = ("fairness_discrepancy", "Distance to the target", "sampler on target", "on target", "farthest")
        classes = next(iter(next(self.each())[2].shares.values()))
        target = target_shares(list(self.target.values()) or None, len(classes))
        return Criterion(*words, METRICS[words[0]].limits(target)[1])

    def judged(self, measures: Measures) -> Estimate:
        """The figure of the criterion."""
        return measures.first.overall[self.criterion.metric]

    def at(self, scale: float | str) -> dict[str, Measures]:
        """Model to measures of those that were measured at a guidance scale, such as 3; `EvaluationError` for none."""
        key = scale if isinstance(scale, str) else str(float(scale))
        if found := {model: by_scale[key] for model, by_scale in self.models.items() if key in by_scale}:
            return found
        known = ", ".join(sorted({key for _, key, _ in self.each()}, key=scale_order))
        raise EvaluationError(f"Expected a guidance scale that was measured ({known}), got {scale}. Choose one.")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types: {"attribute": ..., "models": {"base": {"3.0": {"bias": ...}}}}."""
        document = asdict(self)
        models = document.pop("models")
        for model, scale, measures in self.each():
            models[model][scale] = {name: getattr(measures, name) for name in HEADLINE} | models[model][scale]
        return json.loads(json.dumps(document | {"models": models}))

    def save(self, path: str | Path) -> None:
        """Write everything as JSON, and every figure as a row of `table_path(path)` beside it; `path` is no .csv."""
        table = table_path(path)
        write_json(Path(path), self.to_dict())
        stream = io.StringIO(newline="")
        writer = csv.DictWriter(stream, TABLE_COLUMNS)
        writer.writeheader()
        writer.writerows(self.table())
        write_text(table, stream.getvalue())

    @classmethod
    def load(cls, path: str | Path) -> Results:
        """Results from the JSON that `save` wrote; `EvaluationError` or `DataError` where the file holds none."""
        try:
            results: Results = typed(cls, read_json(Path(path)))
            for _, scale, measures in results.each():
                _ = (measures.bias, results.judged(measures), measures.shares, scale_order(scale))
        except (KeyError, StopIteration, TypeError, ValueError, ZeroDivisionError) as error:
            told = found_else("the results of an evaluation", error, "Evaluate again.")
            raise EvaluationError(f"{path}: {told}") from error
        if not (results.models.get(results.baseline) if results.baseline else any(results.models.values())):
            wanted = results.baseline or "at least one model"
            raise EvaluationError(f"{path}: Expected measures of {wanted}, found none. Evaluate again.")
        return results

    def table(self) -> Iterator[dict[str, Any]]:
        """Every figure as one row of `TABLE_COLUMNS`; what does not apply is None."""
        for model, scale, measures in self.each():
            for kind, attribute, of, figures in _figures(measures):
                about = {"model": model, "guidance_scale": scale, "kind": kind, "attribute": attribute, "of": of}
                for name, figure in figures.items():
                    yield dict.fromkeys(TABLE_COLUMNS) | about | {"figure": name} | asdict(figure)


def scale_order(scale: str) -> float:
    """Sort key of guidance scales as results name them: ascending, "unstated" last."""
    return math.inf if scale == UNSTATED else float(scale)


def table_path(path: str | Path) -> Path:
    """Place of the table beside results at `path`: results.csv beside results.json.

    `EvaluationError` where `path` is a .csv itself, or another file than earlier results or their table would be
    replaced.
    """
    path = Path(path)
    if path.suffix.lower() == ".csv":
        raise EvaluationError(f"Expected a .json file for results, got {path}: the .csv is written beside it.")
    table = path.with_suffix(".csv") if path.suffix == ".json" else path.with_name(path.name + ".csv")
    if {path.name, table.name} & set(MANIFESTS):
        raise EvaluationError(f"Expected a name such as results.json, got {path}, that of a manifest of images.")
    if table.is_file() and table.read_bytes()[:21] not in (b"", b"model,guidance_scale,"):
        raise EvaluationError(f"Expected {table} to be of earlier results, found another table. Name other results.")
    if path.is_file() and path.stat().st_size and b'"models": {' not in path.read_bytes():
        raise EvaluationError(f"Expected {path} to be earlier results, found another file. Choose another (--output).")
    return table


def _figures(measures: Measures) -> Iterator[tuple[str, str | None, str, Mapping[str, Quantity]]]:
    """Kind, attribute, images and name to figure, of all figures."""
    for attribute, entry in measures.attributes.items():
        for prompt, counts in entry.counts.items():
            images = {f"images of {group}": Quantity(float(count)) for group, count in counts.items()}
            yield "count", attribute, f"prompt: {prompt}", images
        yield "fairness", attribute, "all images", entry.overall
        for name, estimate in entry.subject_right.items():
            note = "; ".join(filter(None, (estimate.note, entry.note)))
            yield "fairness", attribute, "subject right", {name: replace(estimate, note=note)}
        for prompt, estimates in entry.by_prompt.items():
            yield "fairness", attribute, f"prompt: {prompt}", estimates
        yield "fairness", attribute, "all images", {"fairness_discrepancy (softmax)": entry.softmax_discrepancy}
    if measures.subject_accuracy is not None:
        yield "quality", None, "all images", {"subject accuracy": measures.subject_accuracy}
    yield "quality", None, "all images", measures.quality
    for group, figures in measures.by_group.items():
        yield "group", None, f"group: {group}", figures
    yield "preservation", None, "pairs of the same seed", measures.preservation
