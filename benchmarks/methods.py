"""One small interface for every way to debias a model that is compared here, and our own ways behind it.

A method is fitted on a `World` and returns what draws: a pipeline, with guidance or with hooks on its denoiser. Rivals
are in rivals/, a file each. Labels, words or reference images that a method is given stand in its `supervision`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from invdiff import Audit, AuditConfig, FinetuneConfig, GenerateConfig, TrainConfig, audit, finetune, train
from invdiff.data.captioned import CaptionedImages
from invdiff.errors import ConfigError
from invdiff.evaluation.calibrate import calibrate
from invdiff.files import read_json, write_json
from invdiff.guidance.base import Guidance
from invdiff.models.load import load_pipeline


@dataclass(frozen=True, eq=False)
class World:
    """A biased set of captioned images and the model that is fine-tuned on it."""

    labelled: CaptionedImages
    """The training images with every true attribute as a column."""
    balanced: CaptionedImages
    """As many images in which the attribute is independent of the caption, with columns."""
    attribute: str
    """The hidden attribute."""
    subject: str
    """The attribute that captions name."""
    prompts: Mapping[str, str]
    """Caption to the subject that it names."""
    words: Mapping[str, str]
    """Class of the hidden attribute to the words that a prompt is given for it, such as "in a forest"."""
    base: Path
    """The unbiased pipeline that is fine-tuned, or the biased one."""
    work: Path
    """Where models and caches of this world are kept, and made again if absent."""
    seed: int = 0
    finetuning: FinetuneConfig | None = field(default_factory=FinetuneConfig)
    """None where `base` is biased as it is."""

    @property
    def data(self) -> CaptionedImages:
        """The training images without labels."""
        return replace(self.labelled, attributes={})

    @property
    def cache(self) -> Path:
        """Encoded images and what audits read of them."""
        return self.work / "cache"

    def biased(self) -> Any:
        """The biased pipeline, loaded anew: a method may change its weights or hook it."""
        if self.finetuning is None:
            return load_pipeline(self.base)
        folder = self.work / "biased"
        finetune(self.data, folder, base=self.base, config=replace(self.finetuning, seed=self.seed))
        return load_pipeline(folder)

    @property
    def found_in(self) -> Path:
        """The folder of `found`."""
        return self.work / "audit"

    @cached_property
    def found(self) -> Audit:
        """What `invdiff audit` finds, without labels."""
        return self.audited("audit", self.data)

    @cached_property
    def true(self) -> Audit:
        """The same of true groups."""
        return self.audited("true", self.labelled, attribute=self.attribute)

    def audited(self, name: str, data: CaptionedImages, **options: Any) -> Audit:
        """The audit of `data`, kept in the folder `name`; `options` as of `invdiff.audit`."""
        folder = self.work / name
        if not (folder / "audit.json").is_file():
            audit(self.biased(), data, cache_dir=self.cache, **options).save(folder)
        return Audit.load(folder)


@dataclass(frozen=True, eq=False)
class Fitted:
    """What draws, and what it took."""

    pipe: Any
    guidance: Guidance | None = None
    hooked: Callable[[int], AbstractContextManager[Any]] = lambda seed: nullcontext()
    """What is put on the pipeline while it draws, if anything; it chooses groups, directions and the like by a seed,
    independently for each image."""
    parameters: int = 0
    """Trained parameters."""
    forwards: float = 0.0
    """Cost of training in forward passes of one image through the denoiser; a backward pass counts as two."""
    sampling: float = 1.0
    """Forward passes of a sample, relative to the plain model's under classifier-free guidance."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """Further figures of the fitting."""


class Method(Protocol):
    """A way to debias a model. Methods are dataclasses: their fields are what a benchmark's YAML may set."""

    supervision: str
    """What it is given beside images and captions: "none", "labels", "words", or "N balanced images"."""

    def fit(self, world: World, folder: Path) -> Fitted:
        """Fit it, keeping what is trained in `folder`: a second call reads that instead of training again."""


@dataclass(frozen=True)
class Biased:
    """The fine-tuned model as it is."""

    supervision = "none"

    def fit(self, world: World, folder: Path) -> Fitted:
        """Nothing is trained."""
        return Fitted(world.biased())


@dataclass(frozen=True)
class Balanced:
    """The base fine-tuned on as many images that are balanced by true labels: the ceiling."""

    supervision = "labels"

    def fit(self, world: World, folder: Path) -> Fitted:
        """Fine-tune as the biased model was."""
        return fine_tuned(world, replace(world.balanced, attributes={}), folder)


def fine_tuned(world: World, data: CaptionedImages, folder: Path, found: Audit | None = None) -> Fitted:
    """The base fine-tuned on images as the biased model was, groups that an audit found drawn equally often."""
    config = tuning_of(world)
    pipe: Any = finetune(data, folder, base=world.base, audit=found, config=config)
    size = sum(weight.numel() for weight in pipe.unet.parameters())
    return Fitted(pipe, parameters=size, forwards=3.0 * config.steps * config.batch_size)


def tuning_of(world: World) -> FinetuneConfig:
    """How a method that fine-tunes does so: as the biased model was, with the world's seed.

    Raises:
        ConfigError: The biased model was given as it is.
    """
    if world.finetuning is None:
        raise ConfigError("Expected a benchmark with `finetune`, got one whose model is biased as it is.")
    return replace(world.finetuning, seed=world.seed)


@contextmanager
def stopwatch(folder: Path) -> Iterator[Callable[[], float | None]]:
    """How long the block took to make `folder`, also when asked later; none where another run had begun it."""
    path = folder.with_name(f"{folder.name}.seconds.json")
    start, fresh = time.perf_counter(), not (path.exists() or folder.exists())
    if not path.exists():
        write_json(path, {"seconds": None})
    yield lambda: read_json(path)["seconds"]
    if fresh:
        write_json(path, {"seconds": round(time.perf_counter() - start, 1)})


CALIBRATED = 64
"""Images of each prompt and group that the closed loop draws at each guidance scale."""
GIVEN = {"true": "labels", "words": "words", "few-labels": "40 labels"}
"""Groups to what a method is given with them; the others need nothing."""


@dataclass(frozen=True)
class Guided:
    """Our guidance. `config` holds entries of `TrainConfig`, `groups` is a name of rivals/groups.py."""

    config: Mapping[str, Any] = field(default_factory=dict)
    groups: str = "audit"
    audit: Mapping[str, Any] = field(default_factory=dict)
    """Entries of `AuditConfig` for the groups that are sought."""
    calibrated: tuple[float, ...] = ()
    """Guidance scales for which the mix of groups is solved for, if any."""

    def __post_init__(self) -> None:
        if self.groups != "audit" and (self.audit or self.calibrated):
            raise ConfigError(f"Expected `audit` and `calibrated` with groups 'audit' alone, got {self.groups!r}.")
        AuditConfig.from_dict(dict(self.audit))  # wrong settings are said before hours of work
        self.training()

    def training(self, seed: int = 0) -> TrainConfig:
        """How it is trained."""
        return TrainConfig.from_dict({"penalty": 0.0, "seed": seed} | dict(self.config))

    @property
    def supervision(self) -> str:
        """None, unless groups are told of."""
        return GIVEN.get(self.groups, "none")

    def fit(self, world: World, folder: Path) -> Fitted:
        """Train it beside the frozen model, which stays as it is where the audit finds no groups."""
        from rivals.groups import groups_of  # which imports this module

        pipe = world.biased()
        found = groups_of(world, self.groups, self.audit)
        search = found.forwards_per_image * len(world.data) if self.groups != "true" else 0.0
        if not found.biased:
            return Fitted(pipe, forwards=search, about={"groups found": 0})
        config = self.training(world.seed)
        guidance = train(pipe, world.data, found, folder, config=config, cache_dir=world.cache)
        if self.calibrated and not guidance.config["mixes"]:
            calibrate(pipe, guidance, world.found_in, folder, guidance_scales=self.calibrated, images=CALIBRATED)
        trained = guidance.config["record"]["training"]  # as `auto` was settled
        passes = (3.0 if self.through_the_model(config) else 1.0) + (1.0 if config.penalty else 0.0)
        drawn = CALIBRATED * max(found.num_groups) * sum(of.found for of in found.prompts)
        drawn *= GenerateConfig.num_inference_steps * sum(2 if scale > 1 else 1 for scale in self.calibrated)
        about = {"null adapter": guidance.config["null_adapter"], "mixes": dict(guidance.config["mixes"] or {})}
        return Fitted(
            pipe,
            guidance,
            parameters=guidance.num_parameters(),
            forwards=search + passes * trained["steps"] * trained["batch_size"] + drawn,
            about=about,
        )

    def through_the_model(self, config: TrainConfig) -> bool:
        """Whether gradients go through the frozen model, not only through what stands beside it."""
        return config.chosen_backend != "module"
