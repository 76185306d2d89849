"""Drawn land birds and water birds, on land or on water: the background is a known spurious attribute.

Everything else (colour, facing side, light, place, size) is independent of both.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np

from ...config import Count, Share, Size
from ...options import Config, Range
from ..imagefolder import Row, image_file_name, write_imagefolder
from .drawing import BACKGROUNDS, SUBJECTS, Scene, render

if TYPE_CHECKING:
    from ..captioned import CaptionedImages

ATTRIBUTES = ("subject", "background", "colour", "side", "light")
NATURAL_BACKGROUND = dict(zip(SUBJECTS, BACKGROUNDS, strict=True))

ONE_PROMPT = "a photo of a bird"
CANONICAL_TEMPLATE = "a photo of a {}"
TRAINING_TEMPLATES = (
    "a picture of a {}",
    "an image of a {}",
    "a drawing of a {}",
    "a photo of one {}",
    "a nice {}",
    "a {} outdoors",
    "one {}",
    "one nice {}",
)
PARAPHRASED_SHARE = 0.25
EXPLICIT_SHARE = 0.10  # share of captions that state the background, whichever it is: the same for every kind of image
EXPLICIT_PARAPHRASED_SHARE = 0.30  # share of those that use a training template instead of the canonical one


def canonical_prompts() -> tuple[str, ...]:
    """The prompts whose hidden imbalance is studied, one per subject."""
    return tuple(CANONICAL_TEMPLATE.format(subject) for subject in SUBJECTS)


@dataclass(frozen=True)
class BirdsWorld(Config):
    """A biased, captioned set of drawn birds; pictures are drawn when they are asked for.

    Row i is the same whatever `num_images`. The background agrees with the subject with probability `severity`. World
    "two-prompts" has land birds and water birds in equal shares, captioned as such; "one-prompt" land birds only, all
    captioned "a photo of a bird". `resolution` is in pixels. `ConfigError` where a setting is outside its range.
    """

    num_images: Count
    severity: Share = 0.95
    seed: Size = 0
    resolution: Annotated[int, Range(min=16)] = 64
    world: Literal["two-prompts", "one-prompt"] = "two-prompts"

    def metadata(self) -> list[dict[str, Any]]:
        """Text, attributes and states_background of each row, without drawing it."""
        return [self._row(index)[0] for index in range(self.num_images)]

    def captioned(self) -> CaptionedImages:
        """The set as `load_captioned_images` reads it from what `write` writes; pictures are drawn when read."""
        from ..captioned import CaptionedImages  # imports `datasets`, which drawing does without

        rows = self.metadata()
        return CaptionedImages(
            captions=[row["text"] for row in rows],
            names=[image_file_name(index) for index in range(self.num_images)],
            attributes={name: [row[name] for row in rows] for name in ATTRIBUTES},
            max_unreadable=0.0,
            _cell=self._png,
        )

    def write(self, folder: str | Path, *, progress: bool = False) -> Path:
        """Write an imagefolder and return it, as `write_imagefolder` does; a killed run is taken up again."""
        rows = (self._row(index) for index in range(self.num_images))
        settings, names = {**vars(self), "format": "png"}, {"record": ".birds.json", "label": "drawing birds"}
        return write_imagefolder(folder, rows, self.num_images, ATTRIBUTES, settings, **names, progress=progress)

    def _row(self, index: int) -> Row:
        rng = np.random.default_rng([self.seed, index])
        subject_draw, agreement, kind, wording, which = rng.random(5)
        subject = SUBJECTS[int(self.world == "two-prompts" and subject_draw < 0.5)]
        natural = NATURAL_BACKGROUND[subject]
        background = natural if agreement < self.severity else next(each for each in BACKGROUNDS if each != natural)
        scene = Scene(subject, background, rng)
        text, explicit = ONE_PROMPT, False
        if self.world == "two-prompts":
            explicit = kind < EXPLICIT_SHARE
            paraphrased = (
                wording < EXPLICIT_PARAPHRASED_SHARE if explicit else kind < EXPLICIT_SHARE + PARAPHRASED_SHARE
            )
            chosen = TRAINING_TEMPLATES[int(which * len(TRAINING_TEMPLATES))] if paraphrased else CANONICAL_TEMPLATE
            text = chosen.format(subject) + (f" on {background}" if explicit else "")
        metadata = {"text": text, **scene.attributes, "states_background": explicit}
        return metadata, partial(render, scene, resolution=self.resolution)

    def _png(self, index: int) -> bytes:
        stream = io.BytesIO()
        self._row(index)[1]().save(stream, "PNG")
        return stream.getvalue()
