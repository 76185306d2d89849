"""Arguments of commands: what several share, and the options made from the fields of each dataclass.

`def audit(*, model: Model, settings: AuditConfig, images: DataOptions)` has an option for every field of `AuditConfig`
and `DataOptions`, with type, range, default and help from there, and `--config FILE` for the settings.
"""

import ast
import contextlib
import dataclasses
import functools
import inspect
import itertools
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import typer

from ..errors import ConfigError, InvDiffError
from ..files import check_writable, default_cache_dir, owned
from ..launched import is_first_process, one_process
from ..options import Config, Option, Range, Setting, as_text, command_options, settings_of
from ..text import is_unicode

SETTINGS, DATA, ASK, RUN = "Settings", "Data", "What to group by", "Run"  # panels of the help
Command = Callable[..., None]
_METAVARS: dict[Any, str] = {int: "INT", float: "FLOAT", str: "TEXT"}


def option(default: Any, help: str, *flags: str, panel: str = SETTINGS, **details: Any) -> Any:
    """An option that is no field of a dataclass; `...` for a default makes it a necessary one."""
    return typer.Option(default, *flags, help=help, rich_help_panel=panel, **details)


def shown_default(words: object) -> str:
    """A default in words, as the help of an option ends with it."""
    return f" [dim]\\[default: {words}][/dim]"


CONFIG = option(
    ...,
    "JSON or YAML with settings of this step, by their names in `invdiff.config`. Options override it.",
    metavar="FILE",
)


def command(
    app: typer.Typer, example: str, *, panel: str = "", name: str = "", writes_file: bool = False, shared: bool = False
) -> Callable[[Command], Command]:
    """Register a function as a command of `app`, whose help ends with an example.

    Its `output`, a folder unless it `writes_file`, is checked before any work and kept from other runs. Several
    processes may run it together where it is `shared`.
    """

    def register(function: Command) -> Command:
        made = _with_options(function, writes_file, shared)
        app.command(name or None, rich_help_panel=panel or None, epilog=f"Example: {example}")(made)
        return function

    return register


def _with_options(function: Command, writes_file: bool, shared: bool) -> Command:
    """`function` with an option for each field of its dataclass parameters; rare ones come last in the help."""
    parameters: list[inspect.Parameter] = []
    rare: list[inspect.Parameter] = []
    kinds: dict[str, Any] = {}
    for name, own in inspect.signature(function, eval_str=True).parameters.items():
        if not dataclasses.is_dataclass(own.annotation):
            parameters.append(own)
            continue
        kind: Any = own.annotation
        kinds[name], docs = kind, field_docs(kind)
        if issubclass(kind, Config):
            parameters.append(own.replace(name="config", default=None, annotation=Annotated[Path | None, CONFIG]))
        for setting in settings_of(kind).values():
            annotation = _annotation(setting, docs[setting.name], getattr(kind, "panel", SETTINGS))
            parameter = own.replace(name=setting.name, default=None, annotation=annotation)
            (rare if setting.option.panel else parameters).append(parameter)

    def run(config: Path | None = None, **given: Any) -> None:
        command = function.__name__.replace("_", " ")
        if not shared:
            one_process(command)
        texts = [text for value in given.values() for text in (value if isinstance(value, list) else [value])]
        if wrong := next((text for text in texts if isinstance(text, str) and not is_unicode(text)), None):
            raise ConfigError(f"Expected UTF-8, found other bytes in {wrong!a}. Set LC_ALL=C.UTF-8, or use a file.")
        starts = {name: kind.from_file(config) for name, kind in kinds.items() if config and issubclass(kind, Config)}
        with _flags_in_errors(kinds.values()):
            for name, kind in kinds.items():
                words = {field: given.pop(field) for field in settings_of(kind)}
                chosen = {field: settings_of(kind)[field].from_words(w) for field, w in words.items() if w is not None}
                given[name] = dataclasses.replace(starts.get(name, kind()), **chosen)
            output = given.get("output") if is_first_process() else None  # processes of one job are one run
            with owned(output, command, is_file=writes_file) if output else contextlib.nullcontext():
                function(**given)

    run.__name__, run.__doc__, run.__annotations__ = function.__name__, function.__doc__, {}
    run.__signature__ = inspect.Signature(parameters + rare)  # type: ignore[attr-defined]  # what typer reads
    return run


@contextlib.contextmanager
def _flags_in_errors(kinds: Iterable[Any]) -> Iterator[None]:
    """Let an error that names a field of one of `kinds`, or an argument of this name, name the option instead."""
    try:
        yield
    except InvDiffError as error:
        fields = [(kind.__name__, name, of.flag) for kind in kinds for name, of in settings_of(kind).items()]
        flags = {f"{kind}.{name}": flag for kind, name, flag in fields}
        flags |= {name: flag for _, name, flag in fields if "_" in name}  # others are words
        names = rf"(?<![\w./'\"-])({'|'.join(map(re.escape, flags)) or '(?!)'})(?![\w/'\"-])(=\.\.\. ?)?"
        error.args = (re.sub(names, lambda found: flags[found[1]], str(error)),)
        raise


def _annotation(setting: Setting, doc: str, panel: str) -> Any:
    """A setting's type as typer reads it, with its option."""
    hint, metavar = setting.type, setting.option.metavar or _METAVARS.get(setting.type)
    limits = {end: limit for end in ("min", "max") if math.isfinite(limit := getattr(setting.range, end))}
    if setting.item in (int, float):
        hint, metavar, limits = str, metavar or "NUMBER,...", {}
    elif setting.item:
        hint, metavar, limits = list[str], metavar or "TEXT", {}
    elif math.isfinite(setting.range.above) or math.isfinite(setting.range.below):  # typer knows no open ends
        of = setting.range
        low = f"{of.above:g}<x" if math.isfinite(of.above) else f"{of.min:g}<=x" if math.isfinite(of.min) else "x"
        metavar, limits = f"{metavar} [{low}{f'<{of.below:g}' if math.isfinite(of.below) else ''}]", {}
    silent = setting.default is None or setting.default is False or setting.default in ("", (), {})
    default = setting.option.default or ("" if silent else as_text(setting.default))
    look: Any = {"panel": setting.option.panel or panel, "metavar": metavar, "show_default": False, **limits}
    return Annotated[hint | None, option(..., doc + (shown_default(default) if default else ""), setting.flag, **look)]


def field_docs(kind: Any) -> dict[str, str]:
    """The docstring under each field of a dataclass and its bases, on one line, by the field's name."""
    docs: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        docs |= {
            ast.unparse(field.target): " ".join(ast.literal_eval(doc.value).split())
            for field, doc in itertools.pairwise(_classes(base.__module__)[base.__name__].body)
            if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr)
        }
    return docs


@functools.cache
def _classes(module: str) -> dict[str, ast.ClassDef]:
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="The pipeline: a folder of save_pretrained, a hub id or one .safetensors file.",
    ),
]
IMAGES = (
    "Captioned images: a folder with metadata.csv or .jsonl (file_name, text), a parquet file or a folder of them, or "
    "a hub dataset id."
)
Data = Annotated[str, typer.Argument(metavar="DATA", help=IMAGES)]
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
    """Split of a hub dataset or of parquet files, or the folder that holds it."""
    limit: Annotated[int | None, Range(min=1)] = None
    """Take the first rows only."""
    max_unreadable: Annotated[float, Range(min=0, max=1)] = 0.01
    """Share of images that may be unreadable."""

    def load(self, data: str | None, *, flag: str = "", labelled: bool = False, output: Path | None = None) -> Any:
        """Open captioned images, or images for their attributes alone; None where the option `flag` names none.

        `output`, the folder that the command writes to, must not lie among them.
        """
        if data is None:
            if self.words():
                raise ConfigError(f"Expected {flag} beside {self.words()[0]}, got none: only {flag} has columns.")
            return None
        from ..data.captioned import load_captioned_images, refuse_output
        from ..evaluation.annotators.labels import load_labelled_images

        named = dict(vars(self))
        if labelled:
            images = load_labelled_images(data, **named)
        else:
            images = load_captioned_images(data, captions=not named.pop("no_captions", False), **named)
        if output is not None:
            refuse_output(images, output)
        return images


@dataclass(frozen=True)
class CaptionOptions(DataOptions):
    """How captioned images are read, where captions may be absent."""

    no_captions: bool = False
    """Read no captions, for an unconditional model: DATA may be a folder of images alone."""


@dataclass(frozen=True)
class AskOptions(Options):
    """Groups that are asked for, in the place of hidden ones."""

    panel: ClassVar[str] = ASK
    attribute: Annotated[tuple[str, ...], Option(metavar="COLUMN")] = ()
    """A column of DATA whose values are the groups: no other is looked for. Repeat for more."""
    labels: Annotated[Path | None, Option(metavar="FILE")] = None
    """A CSV or JSONL file with file_name and the values of an attribute for some images of DATA, five or more of each:
    the groups of the others are inferred."""
    ask: Annotated[tuple[str, ...], Option(metavar="QUESTION")] = ()
    """An attribute and its values in words, such as 'place: forest, sea': groups are what --words-model, or MODEL
    itself, sees of them. Repeat for more; common asks for a bundled list."""


@dataclass(frozen=True)
class WeightsOptions(Options):
    """How a pipeline is loaded."""

    panel: ClassVar[str] = RUN
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Type of the model's weights. Large models need 16 bits; audit and train must agree."""
    loras: Annotated[tuple[str, ...], Option(flag="--lora", metavar="LORA[:WEIGHT]")] = ()
    """A LoRA to fuse into the model, a file or hub id, such as ink.safetensors:0.8; repeat for more."""
    model_config: Annotated[str, Option(metavar="MODEL")] = ""
    """A pipeline whose settings and tokenizer a MODEL in a single file has, instead of those that diffusers knows."""

    def load(self, model: str) -> Any:
        """Load a pipeline."""
        from ..models.load import DTYPES, load_pipeline

        return load_pipeline(model, loras=self.loras, config=self.model_config, dtype=DTYPES[self.dtype])


@dataclass(frozen=True)
class CacheOptions(WeightsOptions):
    """How a pipeline is loaded, and where its measurements are kept."""

    cache_dir: Annotated[Path | None, Option(metavar="DIR", default="$INVDIFF_CACHE or ~/.cache/invdiff")] = None
    """Where latents and measurements are kept."""

    def check_cache(self) -> None:
        """Raise `ConfigError` where nothing can be kept."""
        check_writable(self.cache_dir or default_cache_dir(), "--cache-dir or INVDIFF_CACHE")


def labelled_folders(arguments: Sequence[str]) -> dict[str, list[Path]]:
    """Model name to folders, from words such as `out/base` or, several for one model, `base=out/run-3`."""
    folders: dict[str, list[Path]] = {}
    unnamed = set()
    for argument in arguments:
        name, equals, folder = argument.partition("=")
        if not equals or Path(argument).exists():
            name, folder = Path(argument).resolve().name, argument
            unnamed.add(name)
        if name in folders and name in unnamed:
            both = f"{folders[name][0]} and {folder}"
            raise ConfigError(f"Expected a name for each model, got {name!r} for {both}. Write NAME={folder}.")
        folders.setdefault(name, []).append(Path(folder))
    return folders


def lines_in(file: Path | None, what: str = "prompt") -> tuple[str, ...]:
    """The lines of a text file that are not empty, each one `what`; none without a file."""
    try:
        lines = file.read_text("utf-8-sig").splitlines() if file else []
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Expected a UTF-8 text file with one {what} per line at {file}: {error}.") from error
    return tuple(line.strip() for line in lines if line.strip())
