"""Drawn land birds and water birds, on land or on water: the background is a known spurious attribute.

The background agrees with the subject in a `severity` share of the images. Everything else (colour, facing
side, light, place, size) is independent of both. Row i depends on the seed and on i alone.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import ConfigError, DataError
from ...files import read_json, save_image, write_json, write_text
from .drawing import BACKGROUNDS, SUBJECTS, Scene, render, sample_scene

if TYPE_CHECKING:
    from ..captioned import CaptionedImages

WORLDS = ("two-prompts", "one-prompt")
ATTRIBUTES = ("subject", "background", "colour", "side", "light")
NATURAL_BACKGROUND = dict(zip(SUBJECTS, BACKGROUNDS, strict=True))
IMAGE_FORMATS = ("png", "jpg")

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
HELD_OUT_TEMPLATES = (
    "a nice picture of a {}",
    "an image of one {}",
    "a drawing of one nice {}",
    "a photo of a {} outdoors",
    "one {} outdoors",
)
"""Never used in a caption; each recombines words of the captions."""

PARAPHRASED_SHARE = 0.25
EXPLICIT_SHARE = 0.10
"""Share of captions that state the background, whichever it is: the same for every kind of image."""
EXPLICIT_PARAPHRASED_SHARE = 0.30
"""Share of those that use a training template instead of the canonical one."""


def canonical_prompts() -> tuple[str, ...]:
    """The prompts whose hidden imbalance is studied, one per subject."""
    return tuple(CANONICAL_TEMPLATE.format(subject) for subject in SUBJECTS)


def explicit_prompts() -> tuple[str, ...]:
    """The canonical prompts that state a background; subjects vary slowest."""
    return tuple(f"{prompt} on {background}" for prompt in canonical_prompts() for background in BACKGROUNDS)


def held_out_prompts() -> tuple[str, ...]:
    """Paraphrases that no caption uses; subjects vary slowest."""
    return tuple(template.format(subject) for subject in SUBJECTS for template in HELD_OUT_TEMPLATES)


class BirdsWorld:
    """A biased, captioned set of drawn birds; pictures are drawn when they are asked for.

    Args:
        num_images: How many images there are. Row i is the same whatever their number.
        severity: Probability that the background agrees with the subject, in [0, 1].
        seed: Another seed, another set.
        resolution: Pixels a side.
        world: "two-prompts": land birds and water birds in equal shares, captioned as such. "one-prompt":
            land birds only, all captioned "a photo of a bird".

    Raises:
        ConfigError: A setting is outside its range.
    """

    def __init__(
        self,
        num_images: int,
        *,
        severity: float = 0.95,
        seed: int = 0,
        resolution: int = 64,
        world: str = "two-prompts",
    ) -> None:
        if num_images < 1:
            raise ConfigError(f"Expected num_images of at least 1, got {num_images}.")
        if not 0 <= severity <= 1:
            raise ConfigError(f"Expected a severity in [0, 1], got {severity}.")
        if seed < 0:
            raise ConfigError(f"Expected a seed of at least 0, got {seed}.")
        if resolution < 16:
            raise ConfigError(f"Expected a resolution of at least 16, got {resolution}.")
        if world not in WORLDS:
            raise ConfigError(f"Expected a world of {WORLDS}, got {world!r}.")
        self.num_images, self.severity, self.seed = num_images, severity, seed
        self.resolution, self.world = resolution, world

    def __len__(self) -> int:
        return self.num_images

    def metadata(self, index: int) -> dict[str, Any]:
        """Text, attributes and states_background of row `index`, without drawing it."""
        return self._row(index)[0]

    def row(self, index: int) -> dict[str, Any]:
        """`metadata(index)`, with the picture under "image"."""
        metadata, scene = self._row(index)
        return {"image": render(scene, resolution=self.resolution), **metadata}

    def captioned(self) -> CaptionedImages:
        """The set as `load_captioned_images` reads it from what `write` writes; pictures are drawn when read."""
        from ..captioned import CaptionedImages  # imports `datasets`, which drawing does without

        rows = [self.metadata(index) for index in range(len(self))]
        return CaptionedImages(
            captions=[row["text"] for row in rows],
            names=[_file_name(index, "png") for index in range(len(self))],
            attributes={name: [row[name] for row in rows] for name in ATTRIBUTES},
            max_unreadable=0.0,
            _cells=_Pictures(self),
        )

    def write(self, folder: str | Path, *, progress: bool = False, format: str = "png") -> Path:
        """Write an imagefolder: `images/00000.png` and so on, then `metadata.csv`.

        A killed run is taken up where it stopped: images that exist are kept, and `metadata.csv` comes last.

        Args:
            folder: An empty or new folder, or one that the same set was being written to.
            progress: Whether to show a progress bar.
            format: "png", or "jpg" for smaller files.

        Returns:
            The folder.

        Raises:
            ConfigError: The format is unknown.
            DataError: The folder holds something else, or cannot be written.
        """
        from ...progress import progress_bar  # imports torch, which drawing does without

        if format not in IMAGE_FORMATS:
            raise ConfigError(f"Expected a format of {IMAGE_FORMATS}, got {format!r}.")
        folder = Path(folder)
        self._claim(folder, format)
        table = io.StringIO()
        columns = ["file_name", "text", *ATTRIBUTES]
        writer = csv.DictWriter(table, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        with progress_bar("drawing birds", len(self), enabled=progress) as bar:
            for index in range(len(self)):
                name = _file_name(index, format)
                metadata, scene = self._row(index)
                writer.writerow({"file_name": name, **metadata})
                if not (folder / name).exists():
                    picture = render(scene, resolution=self.resolution)
                    save_image(folder / name, partial(picture.save, quality=95))
                bar.advance()
        write_text(folder / "metadata.csv", table.getvalue())
        return folder

    def _row(self, index: int) -> tuple[dict[str, Any], Scene]:
        if not 0 <= index < self.num_images:
            raise IndexError(f"Expected an index from 0 to {self.num_images - 1}, got {index}.")
        rng = np.random.default_rng([self.seed, index])
        subject_draw, agreement, *words = rng.random(5)
        subject = SUBJECTS[int(self.world == "two-prompts" and subject_draw < 0.5)]
        natural = NATURAL_BACKGROUND[subject]
        background = natural if agreement < self.severity else next(each for each in BACKGROUNDS if each != natural)
        scene = sample_scene(subject, background, rng)
        text, explicit = ONE_PROMPT, False
        if self.world == "two-prompts":
            text, explicit = _caption(subject, background, *words)
        return {"text": text, **scene.attributes, "states_background": explicit}, scene

    def _claim(self, folder: Path, format: str) -> None:
        """Record in `folder` which set it holds, so that two sets never mix."""
        settings = {**vars(self), "format": format}
        record = folder / ".birds.json"
        if record.exists():
            found = read_json(record)
            if found != settings:
                raise DataError(f"Expected {folder} to hold {settings}, found {found}. Choose another folder.")
        elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise DataError(f"Expected a new or empty folder at {folder}, found files. Choose another folder.")
        else:
            write_json(record, settings)


class _Pictures(Sequence[bytes]):
    """The PNG of every row, drawn when it is asked for."""

    def __init__(self, world: BirdsWorld) -> None:
        self.world = world

    def __len__(self) -> int:
        return len(self.world)

    def __getitem__(self, index: Any) -> Any:
        stream = io.BytesIO()
        self.world.row(index)["image"].save(stream, "PNG")
        return stream.getvalue()


def _file_name(index: int, format: str) -> str:
    return f"images/{index:05d}.{format}"


def _caption(subject: str, background: str, kind: float, wording: float, template: float) -> tuple[str, bool]:
    """A caption from three uniform numbers, and whether it states the background."""
    explicit = kind < EXPLICIT_SHARE
    if explicit:
        paraphrased = wording < EXPLICIT_PARAPHRASED_SHARE
    else:
        paraphrased = kind < EXPLICIT_SHARE + PARAPHRASED_SHARE
    chosen = TRAINING_TEMPLATES[int(template * len(TRAINING_TEMPLATES))] if paraphrased else CANONICAL_TEMPLATE
    return chosen.format(subject) + (f" on {background}" if explicit else ""), explicit
