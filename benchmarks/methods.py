"""One small interface for every way to debias a model that is compared here, and our own ways behind it.

A method is fitted on a `World` and returns what draws: a pipeline, with guidance or with hooks on its denoiser. Rivals
are in rivals/, a file each. Labels, words or reference images that a method is given stand in its `supervision`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from invdiff import Audit, FinetuneConfig, TrainConfig, audit, finetune, train
from invdiff.data.captioned import CaptionedImages
from invdiff.evaluation.calibrate import calibrate
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
    """The unbiased pipeline that is fine-tuned."""
    work: Path
    """Where models and caches of this world are kept, and made again if absent."""
    seed: int = 0
    finetuning: FinetuneConfig = field(default_factory=FinetuneConfig)

    @property
    def data(self) -> CaptionedImages:
        """The training images without labels."""
        return replace(self.labelled, attributes={})

    @property
    def cache(self) -> Path:
        """Encoded images and what audits read of them."""
        return self.work / "cache"

    def biased(self) -> Any:
        """The fine-tuned pipeline, loaded anew: a method may change its weights or hook it."""
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
        return self._audit(self.found_in.name)

    @cached_property
    def true(self) -> Audit:
        """The same of true groups."""
        return self._audit("true", attribute=self.attribute)

    def _audit(self, name: str, **options: Any) -> Audit:
        folder = self.work / name
        if (folder / "audit.json").is_file():
            return Audit.load(folder)
        data = self.labelled if options else self.data
        found = audit(self.biased(), data, cache_dir=self.cache, **options)
        found.save(folder)
        return found


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
        data, config = replace(world.balanced, attributes={}), replace(world.finetuning, seed=world.seed)
        pipe = finetune(data, folder, base=world.base, config=config)
        size = sum(weight.numel() for weight in pipe.unet.parameters())
        return Fitted(pipe, parameters=size, forwards=3.0 * config.steps * config.batch_size)


@dataclass(frozen=True)
class Guided:
    """Our guidance. `config` holds entries of `TrainConfig`, `groups` is a name of rivals/groups.py."""

    config: Mapping[str, Any] = field(default_factory=dict)
    groups: str = "audit"
    calibrated: tuple[float, ...] = ()
    """Guidance scales for which the mix of groups is solved for, if any."""

    @property
    def supervision(self) -> str:
        """None, unless groups are the true ones."""
        return "labels" if self.groups == "true" else "none"

    def fit(self, world: World, folder: Path) -> Fitted:
        """Train it beside the frozen model."""
        from rivals.groups import groups_of  # which imports this module

        pipe = world.biased()
        found = groups_of(world, self.groups)
        config = TrainConfig(**{"penalty": 0.0, "seed": world.seed} | dict(self.config))
        guidance = train(pipe, world.data, found, folder, config=config, cache_dir=world.cache)
        if self.calibrated and not guidance.config["mixes"]:
            calibrate(pipe, guidance, world.found_in, folder, guidance_scales=self.calibrated)
        trained = guidance.config["record"]["training"]  # as `auto` was settled
        passes = 3.0 * (2 if config.penalty else 1)
        about = {"null adapter": guidance.config["null_adapter"], "mixes": dict(guidance.config["mixes"] or {})}
        return Fitted(
            pipe,
            guidance,
            parameters=guidance.num_parameters(),
            forwards=passes * trained["steps"] * trained["batch_size"],
            about=about,
        )
