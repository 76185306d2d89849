"""What the commands of a report call its parts: reports are forwarded, so no path of the machine is told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any


@dataclass(frozen=True)
class Names:
    """The parts of a report, as commands name them."""

    audit: str = "audit"
    module: str = "module"
    results: str = "results.json"
    data: Sequence[str] = ("DATA",)
    """Where the audited images are, and the options that they are read with."""


def shown_path(path: str | Path, run: Path | None = None) -> str:
    """Return a path as it was given where that is relative, else from the run's folder on, else its last part only.

    Args:
        path: What was given; a hub id stays as it is.
        run: The folder of the run that is reported on.
    """
    text = str(path)
    foreign = PureWindowsPath(text)  # which reads both kinds of slashes
    if not (foreign.anchor or text.startswith("~")):
        return text
    if run is not None and (real := Path(text).absolute()).is_relative_to(home := run.absolute()):
        return real.relative_to(home).as_posix()
    return foreign.name or "."


def without_paths(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings in which every path of the machine is its last part; lists, such as prompts, stay."""
    return {name: shown_path(value) if isinstance(value, str) else value for name, value in settings.items()}
