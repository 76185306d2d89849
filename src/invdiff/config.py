"""Every setting of every step, as frozen dataclasses that read and write JSON or YAML."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from .errors import ConfigError

ConfigType = TypeVar("ConfigType", bound="Config")


@dataclass(frozen=True)
class Config:
    """Base of all settings: checked on construction, read from and written to JSON or YAML."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not _fits(value, hints[field.name]):
                raise ConfigError(
                    f"{type(self).__name__}.{field.name}: expected {_describe(hints[field.name])}, got {value!r}."
                )
        self.check()

    def check(self) -> None:
        """Raise `ConfigError` where a value is of the right type but out of range."""

    def require(self, name: str, condition: bool, expected: str) -> None:
        """Raise `ConfigError` for field `name` unless `condition` holds."""
        if not condition:
            raise ConfigError(f"{type(self).__name__}.{name}: expected {expected}, got {getattr(self, name)!r}.")

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain JSON types."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls: type[ConfigType], values: dict[str, Any]) -> ConfigType:
        """Build from a mapping.

        Raises:
            ConfigError: A name is unknown, or a value has the wrong type or range.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(names))
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
            values = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is a subset of YAML
        except OSError as error:
            raise ConfigError(f"Could not read the settings in {path}: {error.strerror}.") from error
        except yaml.YAMLError as error:
            raise ConfigError(f"Expected JSON or YAML in {path}, found something else: {error}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"Expected a mapping of settings in {path}, found {type(values).__name__}.")
        return cls.from_dict(values)


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is Literal:
        return value in arguments
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(item, arguments[0]) for item in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _describe(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(repr(argument) for argument in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(argument) for argument in arguments)
    if origin is tuple:
        return f"a list of {_describe(arguments[0])}"
    return "nothing" if hint is type(None) else hint.__name__


MixedPrecision = Literal["auto", "no", "fp16", "bf16"]
