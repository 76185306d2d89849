"""Draw the same seeds with and without guidance, a few images at a time, so that a page can show them and stop."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from ..config import GenerateConfig
from ..evaluation.annotators.annotations import Annotator
from ..guidance.module import GuidanceModule
from ..models.families import family_of
from ..models.load import denoiser_of
from ..sampling import Drawing

MOST_IMAGES = 64
"""Of one prompt at once."""
_LARGE = 200_000_000
"""Parameters from which a denoiser on a CPU draws image by image."""
_MOST_KEPT = 256
"""Unguided images that are not drawn again."""
_MOST_SESSIONS = 1000


@dataclass(frozen=True)
class Ask:
    """What somebody wants to see."""

    prompt: str
    config: GenerateConfig
    mix: tuple[tuple[float, ...], ...] = ()
    """Proportions of each hidden factor's groups; empty where groups have no say."""


@dataclass(frozen=True)
class Shot:
    """One image."""

    image: Image.Image
    seed: int
    classes: dict[str, str]
    """Attribute to what the annotator sees."""


@dataclass
class Shown:
    """What was drawn so far."""

    base: list[Shot] = field(default_factory=list)
    guided: list[Shot] = field(default_factory=list)
    seconds: float = 0.0
    stopped: bool = False


class _StoppedError(Exception):
    """Somebody pressed Stop, or asked for something else."""


class Studio:
    """A pipeline, its guidance module and an annotator, shared by everybody who has the page open.

    One thread draws at a time. Each session has tickets, which rise: only the newest is drawn, and none after `stop`
    until the next is taken.

    Args:
        pipe: The pipeline.
        module: A guidance module made for it, or None to draw without.
        annotator: What reads images, or None.
    """

    def __init__(self, pipe: Any, module: GuidanceModule | None = None, annotator: Annotator | None = None) -> None:
        self.pipe, self.module, self.annotator = pipe, module, annotator
        family = family_of(pipe)
        self.needs_prompts = family.needs_prompts
        denoiser = denoiser_of(pipe)
        on_cpu = denoiser.device.type == "cpu"
        self.batch_size = 1 if on_cpu and sum(p.numel() for p in denoiser.parameters()) > _LARGE else 4
        self._drawing_lock, self._ticket_lock = threading.Lock(), threading.Lock()
        self._tickets: OrderedDict[str, int] = OrderedDict()
        self._stopped: dict[str, int] = {}
        self._begun: dict[str, int] = {}
        self._kept: OrderedDict[tuple[str, GenerateConfig], list[Shot]] = OrderedDict()

    @property
    def dtype(self) -> str:
        """The type of the model's weights, as on a command line."""
        names: dict[Any, str] = {torch.float16: "fp16", torch.bfloat16: "bf16"}
        return names.get(denoiser_of(self.pipe).dtype, "fp32")

    @property
    def num_groups(self) -> tuple[int, ...]:
        """Groups of each hidden factor that can be asked for; empty where groups have no say."""
        return self.module.num_groups if self.module is not None and self.module.sees_environment else ()

    def take_ticket(self, session: str = "") -> int:
        """Return a session's next ticket; what is drawn for its earlier ones ends."""
        with self._ticket_lock:
            ticket = self._tickets.get(session, 0) + 1
            self._tickets[session] = ticket
            self._tickets.move_to_end(session)
            while len(self._tickets) > _MOST_SESSIONS:
                gone, _ = self._tickets.popitem(last=False)
                self._stopped.pop(gone, None)
                self._begun.pop(gone, None)
            return ticket

    def stop(self, session: str = "") -> None:
        """End what is drawn for a session, and what waits to be drawn."""
        with self._ticket_lock:
            self._stopped[session] = self._tickets.get(session, 0)

    def begin(self, session: str, ticket: int) -> bool:
        """Return whether a ticket is to be drawn: it is not over, and nobody has begun with it."""
        with self._ticket_lock:
            fresh = not self.is_over(session, ticket) and self._begun.get(session) != ticket
            if fresh:
                self._begun[session] = ticket
            return fresh

    def was_stopped(self, session: str, ticket: int) -> bool:
        """Whether `stop` was called for a ticket, rather than another taken after it."""
        return ticket <= self._stopped.get(session, 0)

    def is_over(self, session: str, ticket: int) -> bool:
        """Whether a ticket was stopped or another was taken after it."""
        return ticket != self._tickets.get(session) or self.was_stopped(session, ticket)

    def draw(self, ask: Ask, session: str = "", ticket: int | None = None) -> Iterator[Shown]:
        """Draw what is asked for, base and guided in turn; yield what there is after each batch.

        The images are those of `invdiff generate` with the same settings, up to the last bits. Where the ticket is
        over, drawing ends within one step of the sampler and what is whole is kept.

        Args:
            ask: What to draw.
            session: Whose ticket it is.
            ticket: From `take_ticket`; a new one unless given.

        Raises:
            ConfigError: The prompt or the mix cannot be used.
            ModelError: The module was trained for another model.
        """
        mine = self.take_ticket(session) if ticket is None else ticket
        start = time.perf_counter()
        shown = Shown()
        try:
            with self._alone(session, mine):
                plain = self._drawing(ask, guided=False)
                guided = self._drawing(ask, guided=True) if self.module is not None else None
            known = self._kept.get(_base_key(ask))
            if known is not None:
                shown.base = list(known)
            for places in plain.batches():
                if known is None:
                    shown.base += self._batch(plain, places, session, mine)
                if guided is not None:
                    shown.guided += self._batch(guided, places, session, mine)
                shown.seconds = time.perf_counter() - start
                yield shown
            self._keep(ask, shown.base)
        except _StoppedError:
            shown.stopped, shown.seconds = True, time.perf_counter() - start
            yield shown

    def _drawing(self, ask: Ask, *, guided: bool) -> Drawing:
        prompts = [ask.prompt] if self.needs_prompts else []
        if not guided:
            return Drawing(self.pipe, prompts, config=ask.config)
        mix: Any = [list(row) for row in ask.mix] if ask.mix else "uniform"
        return Drawing(self.pipe, prompts, module=self.module, config=ask.config, environments=mix)

    def _batch(self, drawing: Drawing, places: Sequence[int], session: str, ticket: int) -> list[Shot]:
        # The module is on the pipeline within the lock only: whoever stops between two batches leaves none behind.
        with self._alone(session, ticket), drawing:
            images, rows = drawing.batch(places)
        classes: list[dict[str, str]] = [{} for _ in images]
        if self.annotator is not None:
            seen = self.annotator.predict(images)
            for attribute in seen.attributes:
                for of, name in zip(classes, seen.labels(attribute), strict=True):
                    of[attribute] = name
        return [Shot(image, row["seed"], of) for image, row, of in zip(images, rows, classes, strict=True)]

    @contextlib.contextmanager
    def _alone(self, session: str, ticket: int) -> Iterator[None]:
        """Have the pipeline to oneself; `_StoppedError` comes before its next step once the ticket is over."""

        def look(*_: Any) -> None:
            if self.is_over(session, ticket):
                raise _StoppedError

        with self._drawing_lock:
            look()
            handle = denoiser_of(self.pipe).register_forward_pre_hook(look)
            try:
                yield
            finally:
                handle.remove()

    def _keep(self, ask: Ask, shots: list[Shot]) -> None:
        self._kept[_base_key(ask)] = list(shots)
        self._kept.move_to_end(_base_key(ask))
        while len(self._kept) > 1 and sum(map(len, self._kept.values())) > _MOST_KEPT:
            self._kept.popitem(last=False)


def _base_key(ask: Ask) -> tuple[str, GenerateConfig]:
    """Return what unguided images depend on."""
    return ask.prompt, GenerateConfig.from_dict({**ask.config.to_dict(), "scale": 1.0})
