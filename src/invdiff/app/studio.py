"""Draw the same seeds with and without guidance, a few images at a time, so that a page can show and stop them."""

from __future__ import annotations

import contextlib
import math
import shlex
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from PIL import Image

from ..config import GenerateConfig
from ..errors import ConfigError
from ..evaluation.annotators.annotations import Annotator
from ..evaluation.annotators.load import LABELS, load_annotator
from ..guidance.attach import check_fit
from ..guidance.module import GuidanceModule, load_module
from ..models.families import family_of
from ..models.load import denoiser_of, dtype_named, load_pipeline
from ..sampling import Drawing
from .workspace import Workspace

MOST_IMAGES = 64
"""Of one prompt at once."""
LONGEST_PROMPT = 2000
"""Characters; models read far fewer."""
MOST_KEPT = 256
"""Images of the base model that are not drawn again."""
NO_COMMAND = "# The mix of several hidden factors can be given in Python only: attach(..., environments={mix})."
_LARGE = 200_000_000
"""Parameters from which a denoiser on a CPU draws image by image."""


@dataclass(frozen=True)
class Ask:
    """One request for images."""

    prompt: str
    config: GenerateConfig
    mix: tuple[tuple[float, ...], ...] = ()
    """Share of each hidden factor's groups; empty where the module takes no groups."""


@dataclass(frozen=True)
class Shot:
    """One image."""

    image: Image.Image
    seed: int
    classes: dict[str, str]
    """Attribute to the annotator's class."""


@dataclass
class Shown:
    """The images drawn so far."""

    base: list[Shot] = field(default_factory=list)
    guided: list[Shot] = field(default_factory=list)
    seconds: float = 0.0
    stopped: bool = False


@dataclass(eq=False)
class Turn:
    """One request's right to the pipeline."""

    over: bool = False
    stopped: bool = False
    """Over because the visitor pressed Stop, rather than asked for something else."""


class _OverError(Exception):
    """The turn ended while its images were drawn."""


class Studio:
    """A pipeline, its guidance module and an annotator, shared by everyone who has the page open.

    One thread draws at a time. A session's newer request ends its older one within a step of the sampler.

    Args:
        pipe: The pipeline.
        module: A guidance module made for it, or None to draw without.
        annotator: Names the classes in images; None for no counts.
        names: The model and the module as the command line calls them.
    """

    def __init__(
        self,
        pipe: Any,
        module: GuidanceModule | None = None,
        annotator: Annotator | None = None,
        *,
        names: tuple[str, str] = ("MODEL", "MODULE"),
    ) -> None:
        self.pipe, self.module, self.annotator, self.names = pipe, module, annotator, names
        self.needs_prompts = family_of(pipe).needs_prompts
        denoiser = denoiser_of(pipe)
        slow = denoiser.device.type == "cpu" and sum(p.numel() for p in denoiser.parameters()) > _LARGE
        self.batch_size = 1 if slow else 4
        self._lock = threading.Lock()
        self._turns: WeakValueDictionary[str, Turn] = WeakValueDictionary()
        self._kept: OrderedDict[tuple[str, GenerateConfig], list[Shot]] = OrderedDict()

    @property
    def num_groups(self) -> tuple[int, ...]:
        """Groups of each hidden factor that can be asked for; empty where the module takes none."""
        return self.module.num_groups if self.module is not None and self.module.sees_environment else ()

    def next_turn(self, session: str = "") -> Turn:
        """A session's next turn; its earlier one is over."""
        if (before := self._turns.get(session)) is not None:
            before.over = True
        turn = self._turns[session] = Turn()
        return turn

    def stop(self, session: str = "") -> None:
        """End the drawing of a session, or its wait for the pipeline."""
        if (turn := self._turns.get(session)) is not None:
            turn.over = turn.stopped = True

    def draw(self, ask: Ask, turn: Turn) -> Iterator[Shown]:
        """Draw base and guided images in turn, and yield those that there are after each batch.

        The images are those of `invdiff generate` with the same settings. Where the turn ends by `stop`, whole batches
        are kept; where it ends by another request, nothing more is yielded.

        Raises:
            ConfigError: The prompt or the mix cannot be used.
            ModelError: The module was trained for another model.
        """
        start, shown = time.perf_counter(), Shown()
        key = ask.prompt, replace(ask.config, scale=1.0)
        try:
            with self._alone(turn):
                plain = self._drawing(ask, guided=False)
                guided = self._drawing(ask, guided=True) if self.module is not None else None
            known = self._kept.get(key)
            shown.base = list(known or ())
            for places in plain.batches():
                if known is None:
                    shown.base += self._batch(plain, places, turn)
                if guided is not None:
                    shown.guided += self._batch(guided, places, turn)
                shown.seconds = time.perf_counter() - start
                yield shown
            self._kept[key] = shown.base
            self._kept.move_to_end(key)
            while len(self._kept) > 1 and sum(map(len, self._kept.values())) > MOST_KEPT:
                self._kept.popitem(last=False)
        except _OverError:
            if turn.stopped:
                shown.stopped, shown.seconds = True, time.perf_counter() - start
                yield shown

    def _drawing(self, ask: Ask, *, guided: bool) -> Drawing:
        prompts = [ask.prompt] if self.needs_prompts else []
        if not guided:
            return Drawing(self.pipe, prompts, config=ask.config)
        mix: Any = [list(row) for row in ask.mix] if ask.mix else "uniform"
        return Drawing(self.pipe, prompts, module=self.module, config=ask.config, environments=mix)

    def _batch(self, drawing: Drawing, places: Sequence[int], turn: Turn) -> list[Shot]:
        with self._alone(turn), drawing:  # the module is on the pipeline under the lock only
            images, rows = drawing.batch(places)
        classes: list[dict[str, str]] = [{} for _ in images]
        if self.annotator is not None:
            seen = self.annotator.predict(images)
            for attribute in seen.attributes:
                for of, name in zip(classes, seen.labels(attribute), strict=True):
                    of[attribute] = name
        return [Shot(image, row["seed"], of) for image, row, of in zip(images, rows, classes, strict=True)]

    @contextlib.contextmanager
    def _alone(self, turn: Turn) -> Iterator[None]:
        """Have the pipeline alone; `_OverError` comes before the denoiser's next step once the turn is over."""

        def check(*_: Any) -> None:
            if turn.over:
                raise _OverError

        check()
        while not self._lock.acquire(timeout=0.1):
            check()
        try:
            handle = denoiser_of(self.pipe).register_forward_pre_hook(check)
            try:
                check()
                yield
            finally:
                handle.remove()
        finally:
            self._lock.release()


def open_studio(
    workspace: Workspace, *, dtype: str = "fp32", attribute: str = "", classes: Path | None = None
) -> Studio | None:
    """Load the model, the module and the annotator of a workspace; None for a workspace without a model.

    Args:
        workspace: The parts to open.
        dtype: Type of the model's weights: fp32, fp16 or bf16.
        attribute: See `load_annotator`.
        classes: See `load_annotator`.

    Raises:
        ConfigError: The annotator is none that looks at images.
        ModelError: A part cannot be loaded, or the module was trained for another model.
    """
    if not workspace.model:
        return None
    if workspace.annotator == LABELS:
        raise ConfigError(
            "Expected an annotator that looks at images, got 'labels', which are of images drawn before. Give a "
            "trained one, a CLIP model or a classifier."
        )
    pipe = load_pipeline(workspace.model, dtype=dtype_named(dtype))
    module = load_module(workspace.module) if workspace.module else None
    if module is not None:
        check_fit(pipe, module)
    annotator: Any = None
    if workspace.annotator:
        annotator = load_annotator(workspace.annotator, attribute=attribute, classes=classes)
    return Studio(pipe, module, annotator, names=(workspace.model, str(workspace.module or "")))


def read_ask(values: Sequence[Any], num_groups: Sequence[int], *, batch_size: int, resolution: int = 0) -> Ask:
    """The request that the controls state.

    Args:
        values: Prompt, seed, images, guidance scale, steps, scale, then a proportion for each group of each factor.
        num_groups: Groups of each factor.
        batch_size: Images in one call of the pipeline.
        resolution: Side of the images in pixels; 0 for the model's own.

    Raises:
        ConfigError: A value is missing or outside its range.
    """
    prompt, *numbers = values
    if not isinstance(prompt, str) or not all(type(n) in (int, float) and math.isfinite(n) for n in numbers):
        raise ConfigError("Expected a prompt and a finite number in every field, got something else. Fill them in.")
    if len(prompt) > LONGEST_PROMPT or prompt != prompt.encode("utf-8", "replace").decode():
        raise ConfigError(
            f"Expected a prompt of at most {LONGEST_PROMPT} whole characters, got {len(prompt)}. Type another."
        )
    seed, images, guidance_scale, steps, scale, *proportions = numbers
    if not (images <= MOST_IMAGES and steps <= 1000 and scale <= 10 and guidance_scale <= 100 and 0 <= seed < 2**31):
        raise ConfigError(
            f"Expected at most {MOST_IMAGES} images and settings within the sliders' ranges, got others."
        )
    mix = by_factor(proportions, num_groups)
    if any(sum(row) <= 0 or min(row) < 0 for row in mix):
        raise ConfigError("Expected a share above 0 for at least one group, got none. Move one of the mix sliders.")
    config = GenerateConfig(
        images_per_prompt=int(images),
        guidance_scale=float(guidance_scale),
        scale=float(scale),
        num_inference_steps=int(steps),
        resolution=resolution,
        batch_size=batch_size,
        seed=int(seed),
    )
    return Ask(prompt.strip(), config, tuple(tuple(share / sum(row) for share in row) for row in mix))


def by_factor(values: Sequence[float], num_groups: Sequence[int]) -> list[list[float]]:
    """A flat list of proportions as one list for each factor."""
    left = iter(values)
    return [[next(left) for _ in range(groups)] for groups in num_groups]


def command_for(ask: Ask, studio: Studio) -> str:
    """The command that draws these images, guided where there is a module."""
    model, module = studio.names
    words = ["invdiff", "generate", model]
    plain = GenerateConfig()
    flags = {
        "--images-per-prompt": "images_per_prompt",
        "--guidance-scale": "guidance_scale",
        "--steps": "num_inference_steps",
        "--resolution": "resolution",
        "--seed": "seed",
    }
    if studio.module is not None:
        words += ["--module", module]
        flags = {"--scale": "scale", **flags}
        if any(len(set(row)) > 1 for row in ask.mix):
            if len(ask.mix) > 1:
                return NO_COMMAND.format(mix=[list(row) for row in ask.mix])
            words += ["--environments", ",".join(map(str, ask.mix[0]))]
    for flag, name in flags.items():
        if (value := getattr(ask.config, name)) != getattr(plain, name):
            words += [flag, str(value)]
    dtype = {"torch.float16": "fp16", "torch.bfloat16": "bf16"}.get(str(denoiser_of(studio.pipe).dtype))
    words += ["--dtype", dtype] if dtype else []
    words += ["--output", "images"]
    # After "--" a prompt is no option, whatever it begins with.
    return shlex.join([*words, *(["--", ask.prompt] if studio.needs_prompts else [])])
