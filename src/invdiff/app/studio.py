"""Draw the same seeds with and without guidance, a few images at a time, so that a page can show them and stop."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from ..config import GenerateConfig
from ..drawing import Drawing
from ..evaluation.annotations import Annotator
from ..families import family_of
from ..guidance.module import GuidanceModule
from ..pipelines import denoiser_of

MOST_IMAGES = 64
"""Of one prompt at once."""
_LARGE = 200_000_000
"""Parameters from which a denoiser on a CPU draws image by image."""
_KEPT = 8
"""Sets of unguided images that are not drawn again."""


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

    One thread draws at a time; others wait for their turn, and may be stopped while they wait.

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
        self._lock = threading.Lock()
        self._running: dict[str, tuple[Ask, threading.Event]] = {}
        self._kept: OrderedDict[tuple[str, GenerateConfig], list[Shot]] = OrderedDict()

    @property
    def num_groups(self) -> tuple[int, ...]:
        """Groups of each hidden factor that can be asked for; empty where groups have no say."""
        return self.module.num_groups if self.module is not None and self.module.sees_environment else ()

    def draw(self, ask: Ask, session: str = "") -> Iterator[Shown]:
        """Draw what is asked for, base and guided in turn; yield what there is after each batch.

        The images are those of `invdiff generate` with the same settings, up to the last bits. Where `stop` is called
        for the session meanwhile, drawing ends within one step of the sampler and what is whole is kept.

        Raises:
            ConfigError: The prompt or the mix cannot be used.
            ModelError: The module was trained for another model.
        """
        stop = threading.Event()
        self._running[session] = (ask, stop)
        start = time.perf_counter()
        shown = Shown()
        try:
            plain = self._drawing(ask, guided=False)
            guided = self._drawing(ask, guided=True) if self.module is not None else None
            known = self._kept.get(_base_key(ask))
            if known is not None:
                shown.base = list(known)
            for places in plain.batches():
                if known is None:
                    shown.base += self._batch(plain, places, stop)
                if guided is not None:
                    shown.guided += self._batch(guided, places, stop)
                shown.seconds = time.perf_counter() - start
                yield shown
            self._keep(ask, shown.base)
        except _StoppedError:
            shown.stopped, shown.seconds = True, time.perf_counter() - start
            yield shown
        finally:
            if self._running.get(session, (None, None))[1] is stop:
                del self._running[session]

    def stop(self, session: str = "") -> None:
        """End what is being drawn for a session."""
        running = self._running.get(session)
        if running is not None:
            running[1].set()

    def stop_unless(self, ask: Ask, session: str = "") -> None:
        """End what is being drawn for a session where it is something else than `ask`."""
        running = self._running.get(session)
        if running is not None and running[0] != ask:
            running[1].set()

    def _drawing(self, ask: Ask, *, guided: bool) -> Drawing:
        prompts = [ask.prompt] if self.needs_prompts else []
        if not guided:
            return Drawing(self.pipe, prompts, config=ask.config)
        mix: Any = [list(row) for row in ask.mix] if ask.mix else "uniform"
        return Drawing(self.pipe, prompts, module=self.module, config=ask.config, environments=mix)

    def _batch(self, drawing: Drawing, places: Sequence[int], stop: threading.Event) -> list[Shot]:
        # The module is on the pipeline within the lock only: whoever stops between two batches leaves none behind.
        with self._lock, _stopped_by(stop, denoiser_of(self.pipe)), drawing:
            images, rows = drawing.batch(places)
        classes: list[dict[str, str]] = [{} for _ in images]
        if self.annotator is not None:
            seen = self.annotator.predict(images)
            for attribute in seen.attributes:
                for of, name in zip(classes, seen.labels(attribute), strict=True):
                    of[attribute] = name
        return [Shot(image, row["seed"], of) for image, row, of in zip(images, rows, classes, strict=True)]

    def _keep(self, ask: Ask, shots: list[Shot]) -> None:
        self._kept[_base_key(ask)] = list(shots)
        self._kept.move_to_end(_base_key(ask))
        while len(self._kept) > _KEPT:
            self._kept.popitem(last=False)


def _base_key(ask: Ask) -> tuple[str, GenerateConfig]:
    """Return what unguided images depend on."""
    return ask.prompt, GenerateConfig.from_dict({**ask.config.to_dict(), "scale": 1.0})


@contextlib.contextmanager
def _stopped_by(stop: threading.Event, denoiser: Any) -> Iterator[None]:
    """Raise `_StoppedError` out of the block before the denoiser's next step once `stop` is set."""

    def look(*_: Any) -> None:
        if stop.is_set():
            raise _StoppedError

    look()
    handle = denoiser.register_forward_pre_hook(look)
    try:
        yield
    finally:
        handle.remove()
