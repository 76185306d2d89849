"""The errors a user can meet. Each message says what was expected, what was found and what to do."""

from types import NoneType
from typing import Any, get_args

_MADE_BY = {
    "Audit": "Load it with Audit.load.",
    "CaptionedImages": "Open them with load_captioned_images.",
    "GivenLabels": "Load one with load_annotator.",
    "Guidance": "Load it with load_guidance.",
    "str": "Save it, and give its place.",
}


class InvDiffError(Exception):
    """Base of every error that invdiff raises on purpose."""


class DataError(InvDiffError):
    """The captioned images cannot be used as given."""


class ModelError(InvDiffError):
    """A pipeline, module or annotator cannot be loaded, or two of them do not fit together."""


class AuditError(InvDiffError):
    """Groups cannot be inferred, or an audit does not belong to the data it is used with."""


class TrainingError(InvDiffError):
    """Training diverged."""


class ConfigError(InvDiffError):
    """A setting is outside its range, or a configuration file cannot be read."""


class EvaluationError(InvDiffError):
    """A metric is not defined on what was given, or generated images and manifest disagree."""


def check_kinds(**given: tuple[Any, Any]) -> None:
    """Raise `ConfigError` where a value is not of the kind beside it, such as a path in place of what lies there."""
    for name, (value, kind) in given.items():
        if not isinstance(value, kind):
            kinds = [of.__name__ for of in get_args(kind) or (kind,) if of is not NoneType]
            how = _MADE_BY.get(kinds[0], f"Write {kinds[0]}(...).")
            raise ConfigError(f"Expected {name} as {' or '.join(kinds)}, got {type(value).__name__}. {how}")


def first_line(error: Exception) -> str:
    """The first line of another library's error, or the two of which the second says what; the rest is its advice."""
    text = f"there is no {error}" if isinstance(error, KeyError) else str(error).strip()
    first, *rest = text.split("\n")
    return " ".join([first, *map(str.strip, rest[: first.endswith(":")])]) or type(error).__name__


def found_else(expected: str, error: Exception, remedy: str) -> str:
    """The message for a file that holds something else, as `error` says; one of ours says itself what it expected."""
    if isinstance(error, InvDiffError):
        return f"{error} {remedy}"
    return f"Expected {expected}, found something else ({first_line(error)}). {remedy}"
