"""Draw the same seeds with and without guidance, a few images at a time, so that a page can show and stop them."""

import contextlib
import math
import shlex
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

from PIL import Image

from ..config import GenerateConfig
from ..errors import ConfigError
from ..evaluation.annotators.annotations import Annotator
from ..guidance.base import Guidance
from ..models.families import family_of
from ..models.load import denoiser_of
from ..options import command_options, mix_options, with_prompts
from ..sampling import Drawing
from ..text import is_unicode

LONGEST_PROMPT = 2000  # characters; models read far fewer
MOST_KEPT = 256  # images of the base model that are not drawn again
_LARGE = 200_000_000  # parameters from which a denoiser on a CPU draws image by image


class Ask(NamedTuple):
    """One request for images."""

    prompt: str
    config: GenerateConfig
    mix: tuple[tuple[float, ...], ...] = ()  # shares of each factor's groups; empty where the module takes none


class Shot(NamedTuple):
    """One image."""

    image: Image.Image
    seed: int
    classes: dict[str, str]  # attribute to the annotator's class


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
    stopped: bool = False  # over because the visitor pressed Stop, rather than asked for something else
    sent: float = 0.0  # when the visitor's browser asked, by its own clock


class _OverError(Exception):
    """The turn ended while its images were drawn."""


class Studio:
    """A pipeline, its guidance module and an annotator, shared by everyone who has the page open.

    One thread draws at a time. A session's newer request ends its older one within a step of the sampler. `names` are
    the model and the module as the command line calls them, `options` those that the model is loaded with.
    """

    def __init__(
        self,
        pipe: Any,
        module: Guidance | None = None,
        annotator: Annotator | None = None,
        *,
        names: tuple[str, str] = ("MODEL", "MODULE"),
        options: Sequence[str] = (),
    ) -> None:
        self.pipe, self.module, self.annotator = pipe, module, annotator
        self.names, self.options = names, options
        denoiser, family = denoiser_of(pipe), family_of(pipe)
        self.needs_prompts, self.reads_guidance = family.needs_prompts, family.reads_guidance(denoiser)
        slow = denoiser.device.type == "cpu" and sum(p.numel() for p in denoiser.parameters()) > _LARGE
        self.batch_size = 1 if slow else 4
        self._lock = threading.Lock()
        self._turns: WeakValueDictionary[str, Turn] = WeakValueDictionary()
        self._kept: dict[tuple[str, GenerateConfig], list[Shot]] = {}  # the latest last

    @property
    def num_groups(self) -> tuple[int, ...]:
        """Groups of each hidden factor that can be asked for; empty where the module takes none."""
        return self.module.num_groups if self.module is not None and self.module.sees_environment else ()

    def next_turn(self, session: str = "", sent: float = 0.0) -> Turn:
        """A session's next turn; its earlier one is over, or this one where it was `sent` before that."""
        before, turn = self._turns.get(session, Turn()), Turn(sent=sent)
        if before.sent > sent:
            turn.over = True
        else:
            before.over = True
            self._turns[session] = turn
        return turn

    def stop(self, session: str = "") -> None:
        """End the drawing of a session, or its wait for the pipeline."""
        if (turn := self._turns.get(session)) is not None:
            turn.over = turn.stopped = True

    def draw(self, ask: Ask, turn: Turn) -> Iterator[Shown]:
        """Draw base and guided images in turn, and yield those that there are after each batch.

        The images are those of `invdiff generate` with the same settings. Where the turn ends by `stop`, whole batches
        are kept; where it ends by another request, nothing more is yielded.
        """
        start, key = time.perf_counter(), (ask.prompt, replace(ask.config, scale=1.0))
        known = self._kept.get(key)
        mix: Any = ask.mix or "uniform"
        shown = Shown(list(known or ()))
        prompts = [ask.prompt] if self.needs_prompts else []
        try:
            with self.alone(turn):
                plain = guided = Drawing(self.pipe, prompts, config=ask.config)
                if self.module is not None:
                    guided = Drawing(self.pipe, prompts, module=self.module, config=ask.config, environments=mix)
            for places in plain.batches():
                if known is None:
                    shown.base += self._batch(plain, places, turn)
                if self.module is not None:
                    shown.guided += self._batch(guided, places, turn)
                shown.seconds = time.perf_counter() - start
                yield shown
            self._kept = {other: shots for other, shots in self._kept.items() if other != key} | {key: shown.base}
            while len(self._kept) > 1 and sum(map(len, self._kept.values())) > MOST_KEPT:
                del self._kept[next(iter(self._kept))]
        except _OverError:
            if turn.stopped:
                shown.stopped, shown.seconds = True, time.perf_counter() - start
                yield shown

    def _batch(self, drawing: Drawing, places: Sequence[int], turn: Turn) -> list[Shot]:
        with self.alone(turn), drawing:  # the module is on the pipeline under the lock only
            images = drawing.batch(places)
        seen = self.annotator.predict(images) if self.annotator is not None else None
        classes = {attribute: seen.labels(attribute) for attribute in seen.attributes} if seen is not None else {}
        return [
            Shot(image, drawing.rows[place]["seed"], {attribute: of[number] for attribute, of in classes.items()})
            for number, (place, image) in enumerate(zip(places, images, strict=True))
        ]

    @contextlib.contextmanager
    def alone(self, turn: Turn) -> Iterator[None]:
        """Have the pipeline alone; `_OverError` comes before the denoiser's next step once the turn is over."""

        def check(*_: Any) -> None:
            if turn.over:
                raise _OverError

        while not self._lock.acquire(timeout=0.1):
            check()
        try:
            with denoiser_of(self.pipe).register_forward_pre_hook(check):
                yield
        finally:
            self._lock.release()


def read_ask(values: Sequence[Any], studio: Studio, *, resolution: int = 0) -> Ask:
    """The request that the controls state, else a `ConfigError`; gradio holds the sliders to their ranges.

    `values` are prompt, seed, images, guidance scale, steps, scale, then a proportion for each group of each factor.
    """
    prompt, *numbers = values
    known = isinstance(prompt, str) and all(type(n) in (int, float) and math.isfinite(n) for n in numbers)
    if not known or len(prompt) > LONGEST_PROMPT or not is_unicode(prompt):
        raise ConfigError(
            f"Expected a prompt of at most {LONGEST_PROMPT} characters and a number in every field. Fill them in."
        )
    seed, images, guidance_scale, steps, scale, *proportions = numbers
    if not 0 <= seed < 2**31 or seed != int(seed):
        raise ConfigError(f"Expected a whole seed from 0 to {2**31 - 1}, got {seed}. Choose another.")
    mix = by_factor(proportions, studio.num_groups)
    if any(sum(row) <= 0 for row in mix):
        raise ConfigError("Expected a share above 0 for at least one group, got none. Move one of the mix sliders.")
    config = GenerateConfig(
        images_per_prompt=int(images),
        guidance_scale=guidance_scale,
        scale=scale,
        num_inference_steps=int(steps),
        resolution=resolution,
        batch_size=studio.batch_size,
        seed=int(seed),
    )
    return Ask(prompt.strip(), config, tuple(tuple(share / sum(row) for share in row) for row in mix))


def by_factor(values: Sequence[float], num_groups: Sequence[int]) -> list[list[float]]:
    """A flat list of proportions as one list for each factor."""
    left = iter(values)
    return [[next(left) for _ in range(groups)] for groups in num_groups]


def command_for(ask: Ask, studio: Studio) -> str:
    """The command that draws these images, guided where there is a module."""
    settings, words = vars(ask.config) | {"batch_size": None}, list[str]()
    if studio.module is None:
        settings["scale"] = None
    else:
        words += ["--module", studio.names[1], *mix_options(ask.mix, studio.module.factor_names)]
    words += [*command_options(GenerateConfig, settings), *studio.options, "--output", "images"]
    prompts = [ask.prompt] if studio.needs_prompts else []
    return shlex.join(with_prompts(["invdiff", "generate", studio.names[0]], prompts, words))
