"""What an evaluation measured: figures with their intervals, floors and corrections, as objects, JSON and a table."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import EvaluationError
from ..files import read_json, write_json, write_text
from .estimates import Estimate

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


@dataclass(frozen=True)
class AttributeMeasures:
    """How one attribute's classes are spread over a model's images."""

    counts: Mapping[str, Mapping[str, int]]
    """Prompt to class to images; "cannot tell" is a class of its own where a confidence was asked for."""
    shares: Mapping[str, Mapping[str, float]]
    """Prompt to class to share of the images that have a class."""
    overall: Mapping[str, Estimate]
    """Fairness metric to estimate, mean over prompts."""
    subject_right: Mapping[str, Estimate]
    """The same among images that show the subject their prompt names; empty where none is named."""
    by_prompt: Mapping[str, Mapping[str, Estimate]]
    """Prompt to fairness metric to estimate."""
    softmax_discrepancy: Quantity
    """Fairness discrepancy of mean probabilities instead of labels."""
    note: str = ""


@dataclass(frozen=True)
class Measures:
    """What was measured on one model's images at one guidance scale."""

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
    def bias(self) -> float:
        """Mean over prompts of the mean over pairs of classes of the difference in share."""
        return self.first.overall["bias"].value

    @property
    def bias_floor(self) -> float:
        """Bias expected of a perfectly fair sampler with as many images."""
        return self.first.overall["bias"].floor

    @property
    def bias_ci(self) -> tuple[float, float]:
        """Interval of Bias, honest near the fair point too; see `intervals.interval`."""
        return self.first.overall["bias"].low, self.first.overall["bias"].high

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
    def shares(self) -> Mapping[str, Mapping[str, float]]:
        """Prompt to class of the first attribute to share of its images."""
        return self.first.shares

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types: the headline figures, then everything."""
        headline = {
            "bias": self.bias,
            "bias_floor": self.bias_floor,
            "bias_ci": list(self.bias_ci),
            "accuracy": self.accuracy,
            "frechet": self.frechet,
            "images_per_prompt": self.images_per_prompt,
            "shares": {prompt: dict(shares) for prompt, shares in self.shares.items()},
        }
        return headline | dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Measures:
        """Read what `to_dict` returned."""
        subject = values["subject_accuracy"]
        return cls(
            images_per_prompt=values["images_per_prompt"],
            attributes={name: _attribute_from(entry) for name, entry in values["attributes"].items()},
            subject_accuracy=None if subject is None else Quantity(**subject),
            quality=_quantities(values["quality"]),
            by_group={name: _quantities(entry) for name, entry in values["by_group"].items()},
            preservation=_quantities(values["preservation"]),
        )


@dataclass(frozen=True)
class AnnotatorRecord:
    """Who judged, and how well."""

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
    """Model name (such as "base" and "guided") to `str(float(guidance_scale))` to measures."""
    attribute: str = ""
    """The sensitive attribute that headline figures are of."""
    classes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Attribute to class names."""
    subject_attribute: str = ""
    """The attribute that prompts name; "" where none was given."""
    annotator: AnnotatorRecord = field(default_factory=lambda: AnnotatorRecord(""))
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

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types: {"attribute": ..., "models": {"base": {"3.0": {"bias": ...}}}}."""
        document: dict[str, Any] = {
            item.name: getattr(self, item.name) for item in dataclasses.fields(self) if item.name != "models"
        }
        return document | {
            "classes": {name: list(classes) for name, classes in self.classes.items()},
            "annotator": dataclasses.asdict(self.annotator),
            "target": dict(self.target),
            "module_scales": dict(self.module_scales),
            "notes": list(self.notes),
            "models": self.models_to_dict(),
        }

    def models_to_dict(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Return the measures as plain JSON types: {"base": {"3.0": {"bias": ...}}, "guided": ...}."""
        return {
            model: {scale: measures.to_dict() for scale, measures in by_scale.items()}
            for model, by_scale in self.models.items()
        }

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
        """Read the JSON that `save` wrote.

        Raises:
            EvaluationError: The file holds other things than results.
            DataError: The file is absent or is not JSON.
        """
        try:
            return cls.from_dict(read_json(Path(path)))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise EvaluationError(
                f"Expected the results of an evaluation in {path}, found something else ({error!r}). "
                "Give a file that `invdiff evaluate` wrote, or evaluate again."
            ) from error

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Results:
        """Read what `to_dict` returned."""
        models = {
            model: {scale: Measures.from_dict(measures) for scale, measures in by_scale.items()}
            for model, by_scale in values["models"].items()
        }
        return cls(
            models=models,
            **{name: values[name] for name in ("attribute", "subject_attribute", "baseline", "confidence")},
            classes={name: tuple(classes) for name, classes in values["classes"].items()},
            annotator=AnnotatorRecord(**values["annotator"]),
            target=values["target"],
            reference_images=values["reference_images"],
            # Older files do not have it.
            module_scales={model: float(scale) for model, scale in values.get("module_scales", {}).items()},
            notes=tuple(values["notes"]),
        )

    def table(self) -> Iterator[dict[str, Any]]:
        """Yield every figure as one row of `TABLE_COLUMNS`; what does not apply is None."""
        for model, by_scale in self.models.items():
            for scale, measures in by_scale.items():
                for row in _rows(measures):
                    yield dict.fromkeys(TABLE_COLUMNS) | {"model": model, "guidance_scale": scale} | row


def table_path(path: str | Path) -> Path:
    """Return where the table beside results at `path` lies: results.csv beside results.json.

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
                images = _quantity_row(f"images of {group}", f"prompt: {prompt}", Quantity(float(count)))
                yield {"kind": "count", "attribute": attribute} | images
        spread = {"kind": "fairness", "attribute": attribute}
        for name, estimate in entry.overall.items():
            yield spread | _estimate_row(name, "all images", estimate)
        for name, estimate in entry.subject_right.items():
            row = _estimate_row(name, "subject right", estimate)
            yield spread | row | {"note": "; ".join(note for note in (row["note"], entry.note) if note)}
        for prompt, estimates in entry.by_prompt.items():
            for name, estimate in estimates.items():
                yield spread | _estimate_row(name, f"prompt: {prompt}", estimate)
        yield spread | _quantity_row("fairness_discrepancy (softmax)", "all images", entry.softmax_discrepancy)
    if measures.subject_accuracy is not None:
        yield {"kind": "quality"} | _quantity_row("subject accuracy", "all images", measures.subject_accuracy)
    for name, figure in measures.quality.items():
        yield {"kind": "quality"} | _quantity_row(name, "all images", figure)
    for group, figures in measures.by_group.items():
        for name, figure in figures.items():
            yield {"kind": "group"} | _quantity_row(name, f"group: {group}", figure)
    for name, figure in measures.preservation.items():
        yield {"kind": "preservation"} | _quantity_row(name, "pairs of the same seed", figure)


def _estimate_row(name: str, of: str, estimate: Estimate) -> dict[str, Any]:
    known = {key: value for key, value in dataclasses.asdict(estimate).items() if key in TABLE_COLUMNS}
    return {"figure": name, "of": of} | known


def _quantity_row(name: str, of: str, quantity: Quantity) -> dict[str, Any]:
    return {"figure": name, "of": of} | dataclasses.asdict(quantity)


def _quantities(values: Mapping[str, Mapping[str, Any]]) -> dict[str, Quantity]:
    return {name: Quantity(**entry) for name, entry in values.items()}


def _attribute_from(values: Mapping[str, Any]) -> AttributeMeasures:
    def estimates(entries: Mapping[str, Any]) -> dict[str, Estimate]:
        return {name: Estimate(**entry) for name, entry in entries.items()}

    return AttributeMeasures(
        counts=values["counts"],
        shares=values["shares"],
        overall=estimates(values["overall"]),
        subject_right=estimates(values["subject_right"]),
        by_prompt={prompt: estimates(entries) for prompt, entries in values["by_prompt"].items()},
        softmax_discrepancy=Quantity(**values["softmax_discrepancy"]),
        note=values["note"],
    )
