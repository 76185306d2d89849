"""One experiment: settings varied in every combination; each cell is audited, trained, drawn and measured once.

A config file says what varies and what is fixed (`Experiment`). Each step's work is kept under a name that follows
from all settings it depends on, so cells share it, also between experiments, and a stopped run goes on.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from subsets import random_subset, with_severity

from invdiff import (
    Audit,
    AuditConfig,
    EvaluateConfig,
    FinetuneConfig,
    GenerateConfig,
    GuidanceModule,
    TrainConfig,
    audit,
    evaluate,
    finetune,
    generate,
    load_captioned_images,
    train,
)
from invdiff.assets import BIRDS_ANNOTATOR, BIRDS_MODEL
from invdiff.data.birds import BirdsWorld, canonical_prompts
from invdiff.data.captioned import CaptionedImages
from invdiff.errors import AuditError, ConfigError
from invdiff.evaluation.annotate import Described, describe_images
from invdiff.evaluation.annotators.annotations import Annotator, check_attribute
from invdiff.evaluation.annotators.labels import GivenLabels
from invdiff.evaluation.annotators.load import load_annotator
from invdiff.evaluation.results import Measures, Results
from invdiff.files import fingerprint, read_json, write_json
from invdiff.models.load import load_pipeline
from invdiff.options import Config

BUNDLED = "birds"
"""The name of the bundled model, world and annotator."""
BUNDLED_IMAGES, BUNDLED_SEVERITY = 3000, 0.95
REFERENCE_IMAGES, REFERENCE_SEED = 2000, 424242
NOT_FOUND = "no hidden group was found"

DATA, AUDIT, TRAIN, GENERATE = "", "audit", "train", "generate"
AXES: dict[str, str] = {
    **dict.fromkeys(("num_images", "severity", "data_seed"), DATA),
    **dict.fromkeys(("solver", "num_groups", "omega", "contrast_draws"), AUDIT),
    **dict.fromkeys(("mode", "penalty", "steps", "learning_rate", "width", "rounds", "seed"), TRAIN),
    **dict.fromkeys(("scale", "guidance_scale", "num_inference_steps"), GENERATE),
}
"""Every setting that may vary, and the step it belongs to."""
OF_PLAIN_MODEL = {"guidance_scale", "num_inference_steps"}
"""Axes that change the images of the plain model; where it is fine-tuned, those of the data do too."""
ALIASES = {"lambda": "penalty", "E": "num_groups", "Delta": "scale"}
"""The paper's letters."""


@dataclass(frozen=True)
class Experiment(Config):
    """What varies, in every combination, and what is fixed."""

    vary: dict
    """Setting to the values it takes. A value may be a mapping that sets others along, such as
    {mode: invariant, steps: 1500}."""
    model: str = BUNDLED
    """The pipeline, by folder or hub id; `birds` is the bundled one."""
    data: str = BUNDLED
    """Captioned images to audit and train on; `birds` draws the bundled world."""
    num_images: int = 0
    """Images taken at random from the data; 0 takes all (3,000 of the bundled world)."""
    severity: float | None = None
    """Share of each caption's images in its most frequent class of `hidden_attribute`; none leaves the data as it
    is (0.95 in the bundled world)."""
    data_seed: int = 0
    """Seed of that choice, and of the bundled world."""
    hidden_attribute: str = ""
    """Column of the data that W is judged by; audit and training never read it."""
    finetune: FinetuneConfig | None = None
    """Fit the model to each data set first; none takes the model as it is."""
    audit: AuditConfig = field(default_factory=AuditConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    prompts: tuple[str, ...] = ()
    """Prompts to draw; none means the bundled world's two."""
    annotator: str = BUNDLED
    """An annotator as for `invdiff evaluate`; `birds` is the bundled one."""
    attribute: str = "background"
    """The sensitive attribute."""
    subject_attribute: str = ""
    """The attribute that prompts name."""
    reference: str = ""
    """Images that quality is measured against; `birds` draws 2,000 balanced ones of the bundled world."""
    min_confidence: float = 0.0
    """Below it the annotator cannot tell."""

    def check(self) -> None:
        """Check names and ranges."""
        self.require("vary", len(self.vary) > 0, "at least one setting to vary")
        for axis, values in self.vary.items():
            if axis not in AXES:
                raise ConfigError(f"Experiment.vary: unknown setting {axis!r}; known are {', '.join(AXES)}.")
            if not isinstance(values, list | tuple) or not values:
                raise ConfigError(f"Experiment.vary: expected a list of values of {axis}, got {values!r}.")
            self._check_values(axis, values)
        self.require("num_images", self.num_images >= 0, "at least 0")
        self.require("severity", self.severity is None or 0 < self.severity <= 1, "a share above 0, up to 1")
        self.require("prompts", bool(self.prompts) or self.data == BUNDLED, "at least one prompt")
        subset = self.data != BUNDLED and (self.severity is not None or "severity" in self.vary)
        self.require("hidden_attribute", bool(self.hidden_attribute or not subset), "the column of the severity")

    def _check_values(self, axis: str, values: list[Any]) -> None:
        """Refuse values that would make two cells alike by their axes, or the plain models of one row differ."""
        named = [value.get(axis) if isinstance(value, dict) else value for value in values]
        along = {ALIASES.get(key, key) for value in values if isinstance(value, dict) for key in value} - {axis}
        for place, value in enumerate(values):
            if isinstance(value, dict) and axis not in value:
                raise ConfigError(f"Experiment.vary: expected {axis} among the settings {value!r} of one value.")
            if named[place] in named[:place]:
                raise ConfigError(f"Experiment.vary: expected different values of {axis}, got {named[place]!r} twice.")
        for name in sorted(along):
            if name in self.vary or name in OF_PLAIN_MODEL or AXES.get(name) == DATA:
                raise ConfigError(
                    f"Experiment.vary: expected {name} to vary on its own, got it set along with {axis}. Give it a "
                    "list of values of its own."
                )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Experiment:
        """Build from a mapping; the steps' settings are mappings of their own.

        Raises:
            ConfigError: A name is unknown, or a value has the wrong type or range.
        """
        values = dict(values)
        parts = {"audit": AuditConfig, "train": TrainConfig, "generate": GenerateConfig, "finetune": FinetuneConfig}
        for name, part in parts.items():
            if isinstance(values.get(name), dict):
                values[name] = part.from_dict(values[name])
        vary = values.get("vary")
        if not isinstance(vary, dict):
            raise ConfigError(f"Experiment.vary: expected a mapping of settings to lists of values, got {vary!r}.")
        values["vary"] = {ALIASES.get(axis, axis): taken for axis, taken in vary.items()}
        if len(values["vary"]) < len(vary):
            raise ConfigError(f"Experiment.vary: expected each setting once, got {', '.join(map(str, vary))}.")
        return super().from_dict(values)

    def with_settings(self, settings: dict[str, Any]) -> Experiment:
        """A copy in which each setting of `settings` has its value; those of the bundled world are filled in."""
        changed: dict[str, Any] = {}
        for name, value in settings.items():
            if name not in AXES:
                raise ConfigError(f"Experiment.vary: unknown setting {name!r}; known are {', '.join(AXES)}.")
            step = AXES[name]
            if step == DATA:
                changed[name] = value
            else:
                changed[step] = replace(changed.get(step, getattr(self, step)), **{name: value})
        config = replace(self, **changed)
        if config.data != BUNDLED:
            return config
        return replace(
            config,
            num_images=config.num_images or BUNDLED_IMAGES,
            severity=BUNDLED_SEVERITY if config.severity is None else config.severity,
            prompts=config.prompts or canonical_prompts(),
        )


@dataclass(frozen=True)
class Cell:
    """One combination of values, and the folder names of its work."""

    axes: dict[str, Any]
    """Varied setting to its value."""
    config: Experiment
    """All settings, with these values."""

    @property
    def data_name(self) -> str:
        """The folder of the data."""
        config = self.config
        column = config.hidden_attribute if config.severity is not None and config.data != BUNDLED else ""
        settings = {name: getattr(config, name) for name in ("data", "num_images", "severity", "data_seed")}
        return _name(f"{config.num_images or 'all'}-images", settings | {"of": column})

    @property
    def model_name(self) -> str:
        """The folder of the fine-tuned model, or the model itself."""
        tune = self.config.finetune
        if tune is None:
            return self.config.model
        return _name("model", {"base": self.config.model, "data": self.data_name, **tune.to_dict()})

    @property
    def audit_name(self) -> str:
        """The folder of the audit; words for groups change none."""
        settings = {k: v for k, v in self.config.audit.to_dict().items() if k not in ("words_model", "words")}
        return _name(self.config.audit.solver, {"model": self.model_name, "data": self.data_name, **settings})

    @property
    def module_name(self) -> str:
        """The folder of the module."""
        config = self.config.train
        return _name(f"{config.mode}-seed-{config.seed}", {"audit": self.audit_name, **config.to_dict()})

    def drawing(self, *, guided: bool) -> GenerateConfig:
        """Settings of the images; the plain model has no scale."""
        return self.config.generate if guided else replace(self.config.generate, scale=1.0)

    def images_name(self, *, guided: bool) -> str:
        """The folder of the images."""
        drawing = self.drawing(guided=guided)
        module = {"module": self.module_name if guided else None}
        settings = {**drawing.to_dict(), "model": self.model_name, "prompts": list(self.config.prompts), **module}
        readable = f"{self.config.train.mode if guided else 'base'}-cfg-{drawing.guidance_scale:g}"
        return _name(readable + (f"-scale-{drawing.scale:g}" if guided else ""), settings)

    @property
    def base_axes(self) -> dict[str, Any]:
        """The values that the plain model's images depend on; None for the others."""
        of_data = {name for name in AXES if AXES[name] == DATA and self.config.finetune is not None}
        return {name: value if name in OF_PLAIN_MODEL | of_data else None for name, value in self.axes.items()}


def _name(readable: str, settings: dict[str, Any]) -> str:
    return f"{readable}-{fingerprint(json.dumps(settings, sort_keys=True))[:10]}"


def cells(config: Experiment) -> list[Cell]:
    """Every combination of the varied settings, the last axis varying fastest.

    Raises:
        ConfigError: A value has the wrong type or range.
    """
    found = []
    for combination in itertools.product(*config.vary.values()):
        settings: dict[str, Any] = {}
        for axis, value in zip(config.vary, combination, strict=True):
            several = value if isinstance(value, dict) else {axis: value}
            settings |= {ALIASES.get(name, name): setting for name, setting in several.items()}
        found.append(Cell({axis: settings[axis] for axis in config.vary}, config.with_settings(settings)))
    return found


class Workshop:
    """The steps of cells, each done once and kept below one folder, which experiments may share."""

    def __init__(self, folder: Path, config: Experiment, *, progress: bool = True) -> None:
        self.folder, self.config, self.progress = folder, config, progress
        self._kept: dict[str, Any] = {}

    def check(self) -> None:
        """Raise before any work where annotator, attributes or reference are not there."""
        for name in filter(None, (self.config.attribute, self.config.subject_attribute)):
            check_attribute(name, self.annotator.attributes)
        _ = self._reference_data

    def data(self, cell: Cell) -> CaptionedImages:
        """The cell's captioned images."""
        return self._once("data", cell.data_name, lambda folder: self._data(cell.config, folder))

    def _data(self, config: Experiment, folder: Path) -> CaptionedImages:
        if config.data == BUNDLED:
            world = BirdsWorld(config.num_images, severity=config.severity or 0.0, seed=config.data_seed)
            return load_captioned_images(world.write(folder, progress=self.progress))
        data = load_captioned_images(config.data)
        if config.severity is not None:
            data = with_severity(data, config.hidden_attribute, config.severity, seed=config.data_seed)
        return random_subset(data, config.num_images, seed=config.data_seed) if config.num_images else data

    def pipeline(self, cell: Cell) -> Any:
        """The cell's plain model."""
        base = BIRDS_MODEL if cell.config.model == BUNDLED else cell.config.model

        def make(folder: Path) -> Any:
            tune = cell.config.finetune
            if tune is None:
                return load_pipeline(base)
            return finetune(self.data(cell), folder, base=base, config=tune, progress=self.progress)

        return self._once("models", cell.model_name, make)

    def audit(self, cell: Cell) -> Audit:
        """The cell's audit, as inferred: an experiment compares settings, not people's changes."""
        return self._once("audits", cell.audit_name, lambda folder: self._audit(cell, folder))

    def _audit(self, cell: Cell, folder: Path) -> Audit:
        pipe, data = self.pipeline(cell), self.data(cell)
        if (folder / "audit.json").is_file():
            found = Audit.load(folder, edited=False)
            if found.settings["data_fingerprint"] != data.fingerprint:
                raise AuditError(
                    f"Expected the images that were audited in {folder}, got others: they have changed. Delete that "
                    "folder, or give another --work."
                )
            return found
        # A cache of its own: what one audit measured would make the next one look cheap.
        found = self._timed(
            folder,
            lambda: audit(pipe, data, config=cell.config.audit, cache_dir=folder / "cache", progress=self.progress),
        )
        found.save(folder)
        return found

    def module(self, cell: Cell) -> GuidanceModule:
        """The cell's module."""
        cache = self.folder / "audits" / cell.audit_name / "cache"
        pipe, data, found = self.pipeline(cell), self.data(cell), self.audit(cell)
        options = {"config": cell.config.train, "cache_dir": cache, "progress": self.progress}
        return self._once(
            "modules",
            cell.module_name,
            lambda folder: self._timed(folder, lambda: train(pipe, data, found, folder, **options)),
        )

    def images(self, cell: Cell, *, guided: bool) -> Path:
        """The folder of the cell's images."""
        return generate(
            self.pipeline(cell),
            cell.config.prompts,
            self.folder / "images" / cell.images_name(guided=guided),
            module=self.module(cell) if guided else None,
            config=cell.drawing(guided=guided),
            environments="iid",  # as floors and intervals of Bias assume
            progress=self.progress,
        )

    def measures(self, cell: Cell, *, guided: bool) -> Measures:
        """Measures of the cell's images, of the guided model beside those of the plain one.

        They are kept under a digest of all that they depend on, contents included.
        """
        folders = {"base": self.images(cell, guided=False)}
        if guided:
            folders["guided"] = self.images(cell, guided=True)
        model = max(folders)
        config = self.config
        judged = [config.attribute, config.subject_attribute, str(config.min_confidence)]
        drawn = [_digest(folder, "generate.json", "manifest.jsonl") for folder in folders.values()]
        digest = fingerprint(*judged, *drawn, self._annotator_digest, self._reference_digest)[:10]
        path = self.folder / "measures" / f"{folders[model].name}-{digest}.json"
        if not path.is_file():
            evaluate(
                folders,
                self.annotator,
                config.attribute,
                reference=self.reference,
                config=EvaluateConfig(
                    subject_attribute=config.subject_attribute, min_confidence=config.min_confidence
                ),
                progress=self.progress,
            ).save(path)
        return next(iter(Results.load(path).models[model].values()))

    @cached_property
    def annotator(self) -> Annotator:
        """The annotator of all images."""
        annotator = load_annotator(self._annotator_name, attribute=self.config.attribute)
        if isinstance(annotator, GivenLabels):
            raise ConfigError("Experiment.annotator: expected one that looks at images, got labels.")
        return annotator

    @cached_property
    def reference(self) -> Described | None:
        """Features and classes of the reference images."""
        confidence = self.config.min_confidence
        if self.config.reference == BUNDLED:
            world = BirdsWorld(REFERENCE_IMAGES, severity=0.5, seed=REFERENCE_SEED)
            images = (world.row(index)["image"] for index in range(len(world)))
            return describe_images(images, self.annotator, min_confidence=confidence)
        if self._reference_data is None:
            return None
        return describe_images(self._reference_data, self.annotator, min_confidence=confidence, progress=self.progress)

    @cached_property
    def _reference_data(self) -> CaptionedImages | None:
        return None if self.config.reference in ("", BUNDLED) else load_captioned_images(self.config.reference)

    @property
    def _annotator_name(self) -> str:
        return str(BIRDS_ANNOTATOR) if self.config.annotator == BUNDLED else self.config.annotator

    @cached_property
    def _annotator_digest(self) -> str:
        folder = Path(self._annotator_name)
        files = sorted(path.name for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
        return _digest(folder, *files) if files else self._annotator_name

    @cached_property
    def _reference_digest(self) -> str:
        data = self._reference_data
        return f"{self.config.reference} {REFERENCE_IMAGES} {REFERENCE_SEED}" if data is None else data.fingerprint

    def _once(self, kind: str, name: str, make: Callable[[Path], Any]) -> Any:
        if (kind, name) not in self._kept:
            self._kept[kind, name] = make(self.folder / kind / name)
        return self._kept[kind, name]

    def _timed(self, folder: Path, step: Callable[[], Any]) -> Any:
        """Keep the seconds of a step that was done in one go."""
        fresh, start = not folder.exists(), time.perf_counter()
        result = step()
        if fresh:
            write_json(folder / "seconds.json", {"seconds": time.perf_counter() - start})
        return result

    def seconds(self, place: str) -> float | None:
        """Seconds of a step; None where it was not done in one go."""
        path = self.folder / place / "seconds.json"
        return read_json(path)["seconds"] if path.is_file() else None


def _digest(folder: Path, *names: str) -> str:
    return fingerprint(*(part for name in names for part in (name, (folder / name).read_bytes())))
