"""Options that commands share, and settings taken from a file and the command line together."""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .errors import ConfigError
from .options import Config, ConfigType

if TYPE_CHECKING:
    from .data.captioned import CaptionedImages

DATA_PANEL, SETTINGS_PANEL, RUN_PANEL = "Data", "Settings", "Run"


def setting(config_class: type[Config], name: str, *, flag: str | None = None, **limits: float) -> Any:
    """Return the option for one field of `config_class`; its help is the field's docstring and default."""
    default = getattr(config_class, name)
    shown = "" if default == "" else _default(default)
    return typer.Option(
        flag or _flag(name),
        help=field_docs(config_class)[name] + shown,  # type: ignore[arg-type]  # mypy: dataclasses do not hash
        show_default=False,
        rich_help_panel=SETTINGS_PANEL,
        **limits,  # type: ignore[arg-type]
    )


@functools.cache
def field_docs(config_class: type[Config]) -> dict[str, str]:
    """Return the docstring under each field, on one line, by the field's name."""
    (definition,) = ast.parse(inspect.getsource(config_class)).body
    assert isinstance(definition, ast.ClassDef)
    return {
        field.target.id: " ".join(doc.value.value.split())
        for field, doc in itertools.pairwise(definition.body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant) and isinstance(doc.value.value, str)
    }


def settings(config_class: type[ConfigType], file: Path | None, **options: Any) -> ConfigType:
    """Return the defaults, overridden by `file`, overridden by the options that were given (not None).

    Raises:
        ConfigError: A setting is unknown or out of range.
    """
    base = config_class.from_file(file) if file else config_class()
    return replace(base, **{name: value for name, value in options.items() if value is not None})


def flags(**options: object) -> list[str]:
    """Return options as words of a command line, leaving out those that are None."""
    return [word for name, value in options.items() if value is not None for word in (_flag(name), str(value))]


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def option(help: str, *names: str, panel: str = SETTINGS_PANEL, **details: Any) -> Any:
    """Return an option that is no field of a settings dataclass."""
    return typer.Option(*names, help=help, rich_help_panel=panel, **details)


def _default(text: object) -> str:
    return f" [dim]\\[default: {text}][/dim]"


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
Dtype = Annotated[
    Literal["fp32", "fp16", "bf16"],
    option("Type of the model's weights. Large models need 16 bits; audit and train must agree.", panel=RUN_PANEL),
]
ConfigFile = Annotated[
    Path | None,
    option("JSON or YAML with any settings of this step. Options override it.", "--config", metavar="FILE"),
]
CaptionColumn = Annotated[
    str | None, option("Column of captions." + _default("text, caption or prompt"), panel=DATA_PANEL)
]
ImageColumn = Annotated[
    str | None,
    option("Column of images." + _default("file_name in a folder, image or img elsewhere"), panel=DATA_PANEL),
]
NoCaptions = Annotated[
    bool,
    option(
        "Read no captions, for an unconditional model: DATA may be a mere folder of images.",
        "--no-captions",
        panel=DATA_PANEL,
    ),
]
Split = Annotated[str, option("Split of a hub dataset or of parquet files.", panel=DATA_PANEL)]
Limit = Annotated[int | None, option("Take the first rows only.", panel=DATA_PANEL, min=1)]
MaxUnreadable = Annotated[float, option("Share of images that may be unreadable.", panel=DATA_PANEL, min=0, max=1)]
CacheDir = Annotated[
    Path | None,
    option(
        "Where latents and measurements are kept." + _default("$INVDIFF_CACHE or ~/.cache/invdiff"),
        panel=RUN_PANEL,
        metavar="DIR",
    ),
]
Output = Annotated[Path, option("Folder to write to.", panel=RUN_PANEL, metavar="DIR")]
Quiet = Annotated[bool, option("Show no progress.", "--quiet", "-q", panel=RUN_PANEL)]


def dtype_flag(dtype: str) -> list[str]:
    """Return the option for a further command on the same model, nothing where it is the default."""
    return flags(dtype=None if dtype == "fp32" else dtype)


@dataclass(frozen=True)
class DataSource:
    """Captioned images as named on the command line."""

    source: str
    caption_column: str | None = None
    image_column: str | None = None
    split: str = "train"
    limit: int | None = None
    max_unreadable: float = 0.01
    no_captions: bool = False

    def load(self) -> CaptionedImages:
        """Open the images.

        Raises:
            DataError: They cannot be used as given.
        """
        from .data.captioned import load_captioned_images

        return load_captioned_images(
            self.source,
            image_column=self.image_column,
            caption_column=self.caption_column,
            captions=not self.no_captions,
            split=self.split,
            max_unreadable=self.max_unreadable,
            limit=self.limit,
        )

    def load_labelled(self) -> CaptionedImages:
        """Open the images for their attributes; captions are not needed.

        Raises:
            DataError: They cannot be used as given.
        """
        from .evaluation.annotators.labelled import load_labelled_images

        return load_labelled_images(
            self.source,
            image_column=self.image_column,
            caption_column=self.caption_column,
            split=self.split,
            max_unreadable=self.max_unreadable,
            limit=self.limit,
        )

    def flags(self) -> list[str]:
        """Return the options that differ from the defaults, for a further command on the same images."""
        switches = ["--no-captions"] if self.no_captions else []
        return switches + flags(
            caption_column=self.caption_column,
            image_column=self.image_column,
            split=None if self.split == "train" else self.split,
            limit=self.limit,
            max_unreadable=None if self.max_unreadable == 0.01 else self.max_unreadable,
        )


def labelled_folders(arguments: Sequence[str]) -> dict[str, list[Path]] | Path:
    """Return model name to folders from words such as `out/base` or, several for one model, `base=out/run-3`.

    A single folder without a name is returned as it is: it may hold one sub-folder per model.

    Raises:
        ConfigError: Two folders that were given no name end alike.
    """
    folders: dict[str, list[Path]] = {}
    for argument in arguments:
        name, equals, folder = argument.partition("=")
        named = bool(equals) and not Path(argument).exists()
        if not named:
            name, folder = Path(argument).resolve().name, argument
        if len(arguments) == 1 and not named:
            return Path(argument)
        if name in folders and not named:
            raise ConfigError(
                f"Expected a name of its own for each model, got {name!r} for {folders[name][0]} and {folder}. "
                f"Write NAME={folder}."
            )
        folders.setdefault(name, []).append(Path(folder))
    return folders


def environments_from(text: str) -> Any:
    """Return `"uniform"`, or the proportions in text such as `0.7,0.3`.

    Raises:
        ConfigError: The text is neither.
    """
    if text == "uniform":
        return text
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(
            f"Expected environments 'uniform' or one proportion per group such as 0.7,0.3, got {text!r}."
        ) from error


def target_from(text: str) -> dict[str, float]:
    """Return class to share from text such as `land=0.3,water=0.7`.

    Raises:
        ConfigError: The text is something else.
    """
    shares: dict[str, float] = {}
    for part in text.split(","):
        name, equals, share = part.rpartition("=")
        try:
            number = float(share)
        except ValueError:
            equals = ""
        if not equals or not name.strip() or name.strip() in shares:
            raise ConfigError(f"Expected each class once with its share, such as land=0.3,water=0.7, got {text!r}.")
        shares[name.strip()] = number
    return shares


def subjects_from(arguments: Sequence[str]) -> dict[str, str]:
    """Return prompt to class from words such as `a photo of my dog=dog`.

    Raises:
        ConfigError: A word is something else, or a prompt is given twice.
    """
    subjects: dict[str, str] = {}
    for argument in arguments:
        prompt, equals, name = argument.rpartition("=")
        if not equals or not name or prompt in subjects:
            raise ConfigError(f"Expected each prompt once with its class, such as 'my dog=dog', got {argument!r}.")
        subjects[prompt] = name
    return subjects


def lines_in(file: Path, what: str = "prompt") -> list[str]:
    """Return the lines of a text file that are not empty, each one `what`.

    Raises:
        ConfigError: It cannot be read.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Expected a UTF-8 text file with one {what} per line at {file}: {error}.") from error
    return [line.strip() for line in lines if line.strip()]
