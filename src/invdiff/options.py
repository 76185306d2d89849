"""How settings are declared: frozen dataclasses that check themselves, read JSON or YAML, and make options.

A field's type and `Range` are what the check accepts and the command line shows; its docstring is the option's help.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml

from .errors import ConfigError

ConfigType = TypeVar("ConfigType", bound="Config")
Declared = TypeVar("Declared", "Range", "Option")


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
    """The option, where it is not the field's name."""
    metavar: str = ""
    """What stands for the value in the help."""
    default: str = ""
    """Words for the default, where an empty value stands for one."""
    panel: str = ""
    """The part of the help that lists it."""


class _Loader(yaml.SafeLoader):
    """The scalars of YAML 1.2: PyYAML's 1.1 takes 1e-3 for text and `no` for false."""

    yaml_implicit_resolvers = {  # noqa: RUF012  # as in the base class
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":bool")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


@dataclass(frozen=True)
class Config:
    """Base of all settings: checked on construction, read from and written to JSON or YAML."""

    def __post_init__(self) -> None:
        for name, hint in _hints(type(self)).items():  # type: ignore[arg-type]  # mypy: dataclasses do not hash
            value = getattr(self, name)
            expected = _expected(value, hint)
            if expected:
                raise ConfigError(f"{type(self).__name__}.{name}: expected {expected}, got {value!r}.")
            kind = plain_type(hint)
            if isinstance(value, int) and float in (kind, *typing.get_args(kind)):
                # 3 and 3.0 are one setting, to compare and to name work by.
                object.__setattr__(self, name, float(value))
        self.check()

    def check(self) -> None:
        """Raise `ConfigError` where values are in range each, but not together."""

    def require(self, name: str, condition: bool, expected: str) -> None:
        """Raise `ConfigError` for field `name` unless `condition` holds."""
        if not condition:
            raise ConfigError(f"{type(self).__name__}.{name}: expected {expected}, got {getattr(self, name)!r}.")

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON types."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls: type[ConfigType], values: dict[str, Any]) -> ConfigType:
        """Build from a mapping.

        Raises:
            ConfigError: A name is unknown, or a value has the wrong type or range.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(str(name) for name in set(values) - set(names))
        if unknown:
            raise ConfigError(f"{cls.__name__}: unknown setting {', '.join(unknown)}; known are {', '.join(names)}.")
        lists_as_tuples = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
        return cls(**lists_as_tuples)

    @classmethod
    def from_file(cls: type[ConfigType], path: str | Path) -> ConfigType:
        """Read a .json, .yaml or .yml file.

        Raises:
            ConfigError: The file is absent, is not a mapping, or holds unknown or ill-typed settings.
        """
        path = Path(path)
        try:
            # JSON is a subset of YAML.
            values = yaml.load(path.read_text(encoding="utf-8-sig"), Loader=_Loader)  # noqa: S506  # a SafeLoader
        except OSError as error:
            raise ConfigError(f"Could not read the settings in {path}: {error.strerror}.") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"Expected JSON or YAML in {path}, found something else: {error}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"Expected a mapping of settings in {path}, found {type(values).__name__}.")
        try:
            return cls.from_dict(values)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind, include_extras=True)


def plain_type(hint: Any) -> Any:
    """A field's type without what is declared beside it."""
    return hint.__origin__ if typing.get_origin(hint) is Annotated else hint


def declared(kind: type, name: str, what: type[Declared]) -> Declared:
    """The `Range` or the `Option` of a field; where it has none, one that says nothing."""
    found = [item for item in getattr(_hints(kind)[name], "__metadata__", ()) if isinstance(item, what)]
    return found[-1] if found else what()


def _expected(value: Any, hint: Any) -> str:
    """What `hint` accepts, in words, where `value` is something else; "" where it fits."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        ranges = [item for item in hint.__metadata__ if isinstance(item, Range)]
        return _expected(value, arguments[0]) or next((str(item) for item in ranges if value not in item), "")
    if origin in (typing.Union, types.UnionType):
        words = [_expected(value, argument) for argument in arguments]
        return "" if "" in words else " or ".join(words)
    if origin is Literal:
        return "" if value in arguments else "one of " + ", ".join(map(repr, arguments))
    if origin in (tuple, dict):
        fits = isinstance(value, origin)
        items = value.values() if isinstance(value, dict) else value
        words = [_expected(item, arguments[origin is dict]) for item in (items if fits else [None])]
        kind = "a list, each item" if origin is tuple else "a mapping, each value"
        return next((f"{kind} {expected}" for expected in words if expected), "")
    if hint in (int, float):
        numbers = int if hint is int else int | float
        fits = isinstance(value, numbers) and not isinstance(value, bool) and math.isfinite(value)
    else:
        fits = isinstance(value, hint)
    return "" if fits else _WORDS.get(hint) or f"the settings of {hint.__name__}"


_WORDS = {
    float: "a finite number",
    int: "a whole number",
    bool: "true or false",
    dict: "a mapping",
    str: "text",
    type(None): "nothing",
}


def command_options(kind: type, values: Mapping[str, Any]) -> list[str]:
    """The command-line options that give what differs from the defaults, as separate words.

    Args:
        kind: The dataclass whose fields are the options, such as `AuditConfig`.
        values: Field to value, from `vars(config)` or from JSON. Other names and None are left out.
    """
    words: list[str] = []
    for item in dataclasses.fields(kind):
        default = item.default_factory() if item.default_factory is not dataclasses.MISSING else item.default
        value = values.get(item.name)
        value = tuple(value) if isinstance(value, list) else value
        if value is None or value == default:
            continue
        flag = option_name(kind, item.name)
        if isinstance(value, Mapping):
            parts, texts = list(value.values()), [f"{key}={_text(part)}" for key, part in value.items()]
        else:
            parts = list(value) if isinstance(value, tuple) else [value]
            texts = [_text(part) for part in parts]
        if value is True:
            words.append(flag)
        elif all(isinstance(part, int | float) for part in parts):
            words += [flag, ",".join(texts)]
        else:
            words += [word for text in texts for word in (flag, text)]
    return words


def option_name(kind: type, name: str) -> str:
    """The option of a command for one field, such as `--batch-size`."""
    return declared(kind, name, Option).flag or "--" + name.replace("_", "-")


def _text(value: Any) -> str:
    return str(value).removesuffix(".0") if isinstance(value, float) else str(value)
