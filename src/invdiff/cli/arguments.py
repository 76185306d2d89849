"""Arguments that commands share: captioned images and how they are read, models, folders, what is read from text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import typer

from ..errors import ConfigError
from ..options import Option, Range, command_options
from .adapter import DATA, RUN, option

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="The pipeline: a folder that save_pretrained wrote, or a hub id.")
]
Data = Annotated[
    str,
    typer.Argument(
        metavar="DATA",
        help="Captioned images: a folder with metadata.csv or .jsonl (file_name, text), a parquet file or a folder "
        "of them, or a hub dataset id.",
    ),
]
LabelledData = Annotated[
    str,
    typer.Argument(
        metavar="DATA",
        help="Images with columns of classes: a folder with metadata.csv or .jsonl, a parquet file or a folder of "
        "them, or a hub dataset id; or a folder with one sub-folder of images per class, the attribute `label`.",
    ),
]
Classes = Annotated[
    Path | None, option(..., "YAML or JSON for a CLIP annotator: attribute to class to prompts.", metavar="FILE")
]
Output = Annotated[Path, option(..., "Folder to write to.", panel=RUN, metavar="DIR")]
Quiet = Annotated[bool, option(..., "Show no progress.", "--quiet", "-q", panel=RUN)]


@dataclass(frozen=True)
class Options:
    """Base of options that several commands share."""

    def words(self) -> list[str]:
        """The options that differ from the defaults, for a further command with the same settings."""
        return command_options(type(self), vars(self))


@dataclass(frozen=True)
class DataOptions(Options):
    """How images are read."""

    panel: ClassVar[str] = DATA
    caption_column: Annotated[str | None, Option(default="text, caption or prompt")] = None
    """Column of captions."""
    image_column: Annotated[str | None, Option(default="file_name in a folder, image or img elsewhere")] = None
    """Column of images."""
    split: str = "train"
    """Split of a hub dataset or of parquet files."""
    limit: Annotated[int | None, Range(min=1)] = None
    """Take the first rows only."""
    max_unreadable: Annotated[float, Range(min=0, max=1)] = 0.01
    """Share of images that may be unreadable."""

    def load(self, data: str | None, *, flag: str = "", labelled: bool = False) -> Any:
        """Open captioned images, or images for their attributes alone; None where the option `flag` names none."""
        if data is None:
            if self.words():
                raise ConfigError(f"Expected {flag} beside {self.words()[0]}, got none: only {flag} has columns.")
            return None
        named = dict(vars(self))
        if labelled:
            from ..evaluation.annotators.labels import load_labelled_images

            return load_labelled_images(data, **named)
        from ..data.captioned import load_captioned_images

        return load_captioned_images(data, captions=not named.pop("no_captions", False), **named)


@dataclass(frozen=True)
class CaptionOptions(DataOptions):
    """How captioned images are read, where captions may be absent."""

    no_captions: bool = False
    """Read no captions, for an unconditional model: DATA may be a folder of images alone."""


@dataclass(frozen=True)
class WeightsOptions(Options):
    """How a pipeline is loaded."""

    panel: ClassVar[str] = RUN
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Type of the model's weights. Large models need 16 bits; audit and train must agree."""

    def load(self, model: str) -> Any:
        """Load a pipeline."""
        from ..models.load import dtype_named, load_pipeline

        return load_pipeline(model, dtype=dtype_named(self.dtype))


@dataclass(frozen=True)
class CacheOptions(WeightsOptions):
    """How a pipeline is loaded, and where its measurements are kept."""

    cache_dir: Annotated[Path | None, Option(metavar="DIR", default="$INVDIFF_CACHE or ~/.cache/invdiff")] = None
    """Where latents and measurements are kept."""


def labelled_folders(arguments: Sequence[str]) -> dict[str, list[Path]] | Path:
    """Model name to folders, from words such as `out/base` or, several for one model, `base=out/run-3`.

    A single folder without a name is returned as it is: it may hold one sub-folder per model.
    """
    folders: dict[str, list[Path]] = {}
    for argument in arguments:
        name, equals, folder = argument.partition("=")
        if not equals or Path(argument).exists():
            if len(arguments) == 1:
                return Path(argument)
            name, folder = Path(argument).resolve().name, argument
            if name in folders:
                raise ConfigError(
                    f"Expected a name of its own for each model, got {name!r} for {folders[name][0]} and {folder}. "
                    f"Write NAME={folder}."
                )
        folders.setdefault(name, []).append(Path(folder))
    return folders


def lines_in(file: Path | None, what: str = "prompt") -> tuple[str, ...]:
    """The lines of a text file that are not empty, each one `what`; none without a file."""
    try:
        lines = file.read_text("utf-8-sig").splitlines() if file else []
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Expected a UTF-8 text file with one {what} per line at {file}: {error}.") from error
    return tuple(line.strip() for line in lines if line.strip())
