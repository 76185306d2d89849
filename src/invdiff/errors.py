"""The errors a user can meet. Each message says what was expected, what was found and what to do."""


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
