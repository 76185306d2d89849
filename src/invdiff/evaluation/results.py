"""Results of an evaluation: figures with intervals, floors and corrections, as objects, JSON and a table."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import EvaluationError
from ..files import read_json, write_json, write_text

CANNOT_TELL = "cannot tell"
"""The label of an image that an annotator is not confident about."""
UNSTATED = "unstated"
"""The guidance scale of images whose manifest names none."""
HEADLINE = ("bias", "bias_floor", "bias_ci", "accuracy", "frechet", "images_per_prompt", "shares")
"""Properties of `Measures` that its JSON form opens with."""
TABLE_COLUMNS = (
    *("model", "guidance_scale", "kind", "attribute", "figure", "of"),
    *("value", "low", "high", "floor", "corrected", "corrected_low", "corrected_high"),
    *("sd_over_prompts", "unbiased_square", "note"),
)


@dataclass(frozen=True)
class Quantity:
    """One figure; None where it is not defined, and then `note` says why."""

    value: float | None
    low: float | None = None
    """Lower end of its interval; None where it has none."""
    high: float | None = None
    """Upper end."""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Estimate(Quantity):
    """A fairness metric's mean over prompts and what is known about its error."""

    value: float
    low: float
    high: float
    """Interval of the mean over these prompts; it says nothing about other prompts."""
    floor: float
    """Expected value for a sampler that draws from the target, with as many images."""
    sd_over_prompts: float | None = None
    """Standard deviation of the prompts' values; None for one prompt."""
    unbiased_square: float | None = None
    """Unbiased estimate of the SQUARED discrepancy, of fairness_discrepancy only: no other metric has one."""
    corrected: float | None = None
    """The value corrected for the annotator's errors; None without a usable confusion matrix."""
    corrected_low: float | None = None
    corrected_high: float | None = None


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
        """Bias expected of a perfectly fair sampler with as many images."""
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

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types: the headline figures, then everything."""
        return _plain({name: getattr(self, name) for name in HEADLINE} | dataclasses.asdict(self))


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
    """Facts about the run that made the images, as plain JSON types, such as `invdiff demo` adds: its "settings",
    its "seconds" and how well its "audit" recovered the hidden groups."""

    def each(self) -> Iterator[tuple[str, str, Measures]]:
        """Model, guidance scale and measures of everything that was measured."""
        for model, by_scale in self.models.items():
            for scale, measures in by_scale.items():
                yield model, scale, measures

    def at(self, scale: str) -> dict[str, Measures]:
        """Model to measures of those that were measured at one guidance scale."""
        return {model: by_scale[scale] for model, by_scale in self.models.items() if scale in by_scale}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types: {"attribute": ..., "models": {"base": {"3.0": {"bias": ...}}}}."""
        about = {item.name: getattr(self, item.name) for item in dataclasses.fields(self) if item.name != "models"}
        models: dict[str, dict[str, Any]] = {model: {} for model in self.models}
        for model, scale, measures in self.each():
            models[model][scale] = measures.to_dict()
        return _plain(about | {"annotator": dataclasses.asdict(self.annotator)}) | {"models": models}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Results:
        """Results from what `to_dict` returned.

        Raises:
            EvaluationError: It is something else, or holds no measures.
        """
        try:
            results = _read(cls, values, "the document")
            for _, scale, measures in results.each():
                _ = (measures.bias, measures.shares, scale_order(scale))
        except (KeyError, StopIteration, TypeError, ValueError, ZeroDivisionError) as error:
            raise EvaluationError(
                f"Expected the results of an evaluation, found something else ({error!r}). Give a file that "
                "`invdiff evaluate` or `invdiff demo` wrote, or evaluate again."
            ) from error
        if not any(results.models.values()):
            raise EvaluationError("Expected measures of at least one model, found none. Evaluate again.")
        return results

    def save(self, path: str | Path) -> None:
        """Write everything as JSON, and every figure as a row of `table_path(path)` beside it.

        Raises:
            EvaluationError: The path ends in .csv.
        """
        table = table_path(path)
        write_json(Path(path), self.to_dict())
        stream = io.StringIO(newline="")
        writer = csv.DictWriter(stream, TABLE_COLUMNS)
        writer.writeheader()
        writer.writerows(self.table())
        write_text(table, stream.getvalue())

    @classmethod
    def load(cls, path: str | Path) -> Results:
        """Results from the JSON that `save` wrote.

        Raises:
            EvaluationError: The file holds other things than results, or no measures.
            DataError: The file is absent or is not JSON.
        """
        document = read_json(Path(path))
        try:
            return cls.from_dict(document)
        except EvaluationError as error:
            raise EvaluationError(f"{path}: {error}") from error

    def table(self) -> Iterator[dict[str, Any]]:
        """Every figure as one row of `TABLE_COLUMNS`; what does not apply is None."""
        for model, scale, measures in self.each():
            for row in _rows(measures):
                yield dict.fromkeys(TABLE_COLUMNS) | {"model": model, "guidance_scale": scale} | row


def scale_order(scale: str) -> float:
    """Sort key of guidance scales as results name them: ascending, "unstated" last."""
    return math.inf if scale == UNSTATED else float(scale)


def table_path(path: str | Path) -> Path:
    """Place of the table beside results at `path`: results.csv beside results.json.

    Raises:
        EvaluationError: The path ends in .csv: the results themselves are JSON.
    """
    path = Path(path)
    if path.suffix.lower() == ".csv":
        raise EvaluationError(
            f"Expected a .json file for results, got {path}: the table is written beside it as .csv."
        )
    return path.with_suffix(".csv") if path.suffix == ".json" else path.with_name(path.name + ".csv")


def _rows(measures: Measures) -> Iterator[dict[str, Any]]:
    for attribute, entry in measures.attributes.items():
        for prompt, counts in entry.counts.items():
            for group, count in counts.items():
                images = Quantity(float(count))
                yield _row("count", f"images of {group}", f"prompt: {prompt}", images, attribute)
        figures = {
            "all images": entry.overall,
            "subject right": {
                name: dataclasses.replace(estimate, note="; ".join(filter(None, (estimate.note, entry.note))))
                for name, estimate in entry.subject_right.items()
            },
        } | {f"prompt: {prompt}": estimates for prompt, estimates in entry.by_prompt.items()}
        for of, estimates in figures.items():
            for name, estimate in estimates.items():
                yield _row("fairness", name, of, estimate, attribute)
        softmax = entry.softmax_discrepancy
        yield _row("fairness", "fairness_discrepancy (softmax)", "all images", softmax, attribute)
    if measures.subject_accuracy is not None:
        yield _row("quality", "subject accuracy", "all images", measures.subject_accuracy)
    for name, figure in measures.quality.items():
        yield _row("quality", name, "all images", figure)
    for group, by_name in measures.by_group.items():
        for name, figure in by_name.items():
            yield _row("group", name, f"group: {group}", figure)
    for name, figure in measures.preservation.items():
        yield _row("preservation", name, "pairs of the same seed", figure)


def _row(kind: str, name: str, of: str, figure: Quantity, attribute: str | None = None) -> dict[str, Any]:
    return {"kind": kind, "attribute": attribute, "figure": name, "of": of} | dataclasses.asdict(figure)


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _read(hint: Any, value: Any, where: str) -> Any:
    """A value of type `hint`, one of this module's dataclasses included, from plain JSON types."""
    if hint is Any:
        return value
    arguments = typing.get_args(hint)
    kind = typing.get_origin(hint) or hint
    if kind is types.UnionType:
        return None if value is None else _read(arguments[0], value, where)
    if dataclasses.is_dataclass(kind):
        names = [item.name for item in dataclasses.fields(kind)]
        known = _read(Mapping[str, Any], value, where)
        hints = typing.get_type_hints(kind)
        return hint(**{name: _read(hints[name], known[name], f"{name} in {where}") for name in names if name in known})
    expected: Any = {float: (int, float), Mapping: Mapping, tuple: list}.get(kind, kind)
    if not isinstance(value, expected) or isinstance(value, bool):
        raise TypeError(f"{where} is {value!r:.80}")
    if kind is Mapping:
        return {key: _read(arguments[1], item, f"{key!r} in {where}") for key, item in value.items()}
    if kind in (tuple, list):
        return kind(_read(arguments[0], item, where) for item in value)
    if kind is float and not math.isfinite(value):
        raise ValueError(f"{where} is {value}")
    return value
