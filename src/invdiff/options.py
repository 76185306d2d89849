"""How settings are declared: frozen dataclasses that check themselves, read JSON or YAML, and make options.

A field's type and `Range` are what the check accepts and the command line shows; its docstring is the option's help.
"""

import dataclasses
import functools
import inspect
import json
import math
import numbers
import re
import sys
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from .errors import ConfigError

ConfigType = TypeVar("ConfigType", bound="Config")


@dataclass(frozen=True)
class Range:
    """The numbers that a setting may take; `above` and `below` are excluded themselves."""

    min: float = -math.inf
    max: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def __contains__(self, value: float) -> bool:
        return self.min <= value <= self.max and self.above < value < self.below

    def __str__(self) -> str:
        ends = {"at least": self.min, "more than": self.above, "at most": self.max, "below": self.below}
        return " and ".join(f"{words} {end:g}" for words, end in ends.items() if math.isfinite(end))


@dataclass(frozen=True)
class Option:
    """How a field looks on the command line, where its name, type and default do not say it."""

    flag: str = ""
    metavar: str = ""  # what stands for the value in the help
    default: str = ""  # in words, where an empty value stands for one
    panel: str = ""  # the part of the help that lists it


class _Loader(yaml.SafeLoader):
    """The scalars of YAML 1.2: PyYAML's 1.1 takes 1e-3 for text and `no` for false."""

    yaml_implicit_resolvers = {  # noqa: RUF012  # as in the base class
        first: [(tag, pattern) for tag, pattern in resolvers if first in "tTfF" or not tag.endswith(":bool")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(path: str | Path) -> Any:
    """What a file of YAML or JSON, a subset of it, holds; `ConfigError` where it is absent or holds something else."""
    try:
        return yaml.load(Path(path).read_text("utf-8-sig"), Loader=_Loader)  # noqa: S506  # a SafeLoader
    except OSError as error:
        raise ConfigError(f"Could not read {path}: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"Expected JSON or YAML in {path}, got something else: {error}") from error


@dataclass(frozen=True)
class Config:
    """Base of all settings: checked on construction, read from and written to JSON or YAML."""

    def __post_init__(self) -> None:
        for name, hint in _hints(type(self)).items():  # type: ignore[arg-type]  # mypy: dataclasses do not hash
            try:
                object.__setattr__(self, name, typed(hint, getattr(self, name)))
            except TypeError as error:
                raise ConfigError(f"{type(self).__name__}.{name}: {error}.") from None
        self.check()

    def check(self) -> None:
        """Raise `ConfigError` for what ranges do not say, as where values do not fit together."""

    def require(self, name: str, condition: bool, expected: str) -> None:
        """Raise `ConfigError` for field `name` unless `condition` holds."""
        if not condition:
            raise ConfigError(f"{type(self).__name__}.{name}: expected {expected}, got {getattr(self, name)!r}.")

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON types."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls: type[ConfigType], values: dict[str, Any]) -> ConfigType:
        """Settings from a mapping; `ConfigError` where a name is unknown or absent, or a value not of its type."""
        if not isinstance(values, dict):
            raise ConfigError(f"{cls.__name__}: expected a mapping of settings, got {type(values).__name__}.")
        known = inspect.signature(cls).parameters
        if absent := [name for name, of in known.items() if of.default is of.empty and name not in values]:
            raise ConfigError(f"{cls.__name__}: expected a setting {', '.join(absent)}, found none.")
        if unknown := sorted(str(name) for name in set(values) - set(known)):
            raise ConfigError(f"{cls.__name__}: unknown setting {', '.join(unknown)}; known are {', '.join(known)}.")
        return cls(**values)

    @classmethod
    def from_file(cls: type[ConfigType], path: str | Path) -> ConfigType:
        """Settings from a .json, .yaml or .yml file; `ConfigError` where it is absent or holds something else."""
        values = read_yaml(path)
        try:
            return cls.from_dict(values)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error


_WORDS: dict[Any, str] = {
    **{int: "a whole number", float: "a finite number", bool: "true or false", str: "text"},
    **{tuple: "a list", list: "a list", dict: "a mapping", Mapping: "a mapping"},
}


def typed(hint: Any, value: Any, place: str = "") -> Any:
    """A value as its type hint has it: a list as a tuple, 3 as 3.0, a mapping as a dataclass, without unknown names.

    A `TypeError` says what was expected, and where in the value.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    expected = _WORDS.get(origin or hint) or f"the settings of {getattr(hint, '__name__', hint)}"
    if origin is Annotated:
        value = typed(arguments[0], value, place)
        limits = [limit for limit in hint.__metadata__ if isinstance(limit, Range) and value not in limit]
        if not limits:
            return value
        expected = str(limits[0])
    elif origin in (Union, types.UnionType):
        return None if value is None else typed(arguments[0], value, place)
    elif origin is Literal:
        if value in arguments:
            return value
        expected = "one of " + ", ".join(map(repr, arguments))
    elif hint is Any:
        return value
    elif origin in (dict, Mapping) and isinstance(value, dict):
        return {name: typed(arguments[1], item, f" in {name!r}{place}") for name, item in value.items()}
    elif origin in (tuple, list) and isinstance(value, tuple | list):
        return origin(typed(arguments[0], item, f" in item {k}{place}") for k, item in enumerate(value, start=1))
    elif isinstance(hint, type) and issubclass(hint, Config) and isinstance(value, dict):
        return hint.from_dict(value)
    elif dataclasses.is_dataclass(hint) and isinstance(value, dict):
        hints: Any = {name: of for name, of in _hints(hint).items() if name in value}  # type: ignore[arg-type]
        return hint(**{name: typed(of, value[name], f" in {name!r}{place}") for name, of in hints.items()})  # type: ignore
    elif hint in (int, float):
        kind: Any = numbers.Integral if hint is int else numbers.Real  # numpy's too
        if isinstance(value, kind) and not isinstance(value, bool) and abs(value) <= sys.float_info.max:
            return hint(value)
    elif not origin and isinstance(value, hint):
        return value
    raise TypeError(f"expected {expected}{place}, got {repr(value)[:200]}")


@dataclass(frozen=True)
class Setting:
    """One field of a dataclass, with everything that is declared of it."""

    name: str
    type: Any
    """The type without what is declared beside it."""
    default: Any
    range: Range
    option: Option

    @property
    def flag(self) -> str:
        """The option of a command, such as `--batch-size`."""
        return self.option.flag or "--" + self.name.replace("_", "-")

    @property
    def item(self) -> Any:
        """The type of a list's items or of a mapping's values; None for other settings."""
        where = {tuple: 0, dict: 1}.get(get_origin(self.type))
        return None if where is None else get_args(self.type)[where]

    def to_words(self, value: Any) -> list[str]:
        """The option and its value: numbers of a list in one word, texts with an option each."""
        texts = value if self.item is str else [as_text(value)]
        return [self.flag] if value is True else [word for text in texts for word in (self.flag, text)]

    def from_words(self, given: Any) -> Any:
        """The value of what the option was given, one word of numbers or all texts, else a `ConfigError`."""
        if self.item is None:
            return given
        parts = given.split(",") if isinstance(given, str) else given
        try:
            if get_origin(self.type) is tuple:
                return tuple(self.item(part) for part in parts)
            pairs = [part.rpartition("=")[::2] for part in parts]
            mapping = {name.strip(): self.item(value) for name, value in pairs}
            if len(mapping) == len(parts) and all(mapping):
                return mapping
        except ValueError:
            pass
        shape = self.option.metavar or "NUMBER,..."
        raise ConfigError(f"Expected {shape}, each once, for {self.flag}, got {', '.join(parts)!r}.")


@functools.cache
def settings_of(kind: Any) -> Mapping[str, Setting]:
    """What is declared of each field of a dataclass, by name."""
    found, plain = {}, get_type_hints(kind)
    for name, default in vars(kind()).items():
        beside = {type(extra): extra for extra in getattr(_hints(kind)[name], "__metadata__", ())}
        found[name] = Setting(name, plain[name], default, beside.get(Range, Range()), beside.get(Option, Option()))
    return found


def command_options(kind: type, values: Mapping[str, Any]) -> list[str]:
    """The command-line options that give what differs from the defaults of `kind`, as separate words.

    `values` are from `vars(config)` or from JSON; other names and None are left out.
    """
    words: list[str] = []
    for name, setting in settings_of(kind).items():
        value = values.get(name)
        if value is not None and (tuple(value) if isinstance(value, list) else value) != setting.default:
            words += setting.to_words(value)
    return words


def mix_options(factors: Sequence[Sequence[float]], names: Sequence[str] = ()) -> list[str]:
    """The options of `invdiff generate` for proportions of each factor's groups, "factor 1" and so on unless named."""
    words: list[str] = []
    for place, shares in enumerate(factors):
        if shares and max(shares) - min(shares) >= 1e-6:
            name = f"{names[place] if names else f'factor {place + 1}'}=" if len(factors) > 1 else ""
            words += ["--environments", name + ",".join(map(str, shares))]
    return words


def with_prompts(command: Sequence[Any], prompts: Sequence[str], options: Sequence[Any]) -> list[Any]:
    """The words of a command; after "--" a prompt is no option, whatever it begins with."""
    if any(prompt.startswith("-") for prompt in prompts):
        return [*command, *options, "--", *prompts]
    return [*command, *prompts, *options]


def as_text(value: Any) -> str:
    """A value as a command line takes it and its help shows it."""
    if isinstance(value, Mapping):
        return ",".join(f"{key}={as_text(part)}" for key, part in value.items())
    if isinstance(value, tuple | list):
        return ",".join(map(as_text, value))
    return str(value).removesuffix(".0") if isinstance(value, float) else str(value)


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)
