"""Read results of any age: what `invdiff evaluate` wrote, what `invdiff demo` wrote, and less than either."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import EvaluationError
from ..evaluation.results import Results
from ..files import fingerprint, read_json

ATTRIBUTE = "the attribute measured"
"""What stands for an attribute whose name an older file does not tell."""


@dataclass(frozen=True)
class Measured:
    """Results, and what their file tells beside them."""

    results: Results
    file_name: str
    fingerprint: str
    """A digest of the file."""
    settings: Mapping[str, Any]
    """Those of `invdiff demo`; empty for other results."""
    absent: tuple[str, ...]
    """What the file is too old, or was made too plain, to tell, in words."""


def read_results(path: Path) -> Measured:
    """Read a results.json.

    Raises:
        EvaluationError: The file holds other things than results, or results of no image.
        DataError: The file is absent or is not JSON.
    """
    document = read_json(path)
    try:
        models = document["models"] if "models" in document else _models_beside(document)
        stated = {**_plain_results(), **(document if "models" in document else document.get("evaluation", {}))}
        results = Results.from_dict(stated | {"models": models})
        settings = document.get("settings")
    except (AttributeError, KeyError, TypeError, ValueError, IndexError, StopIteration) as error:
        raise EvaluationError(
            f"Expected the results of an evaluation in {path}, found something else ({error!r}). Give a file that "
            "`invdiff evaluate` or `invdiff demo` wrote, or evaluate again."
        ) from error
    if not any(results.models.values()):
        raise EvaluationError(f"Expected measures of at least one model in {path}, found none. Evaluate again.")
    return Measured(
        results=results,
        file_name=path.name,
        fingerprint=fingerprint(path.read_bytes()),
        settings=settings if isinstance(settings, Mapping) else {},
        absent=_absent(document, results),
    )


def _models_beside(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return the models of the demo's file, which stand beside its other parts."""
    models = {
        name: entry
        for name, entry in document.items()
        if isinstance(entry, Mapping)
        and entry
        and all(isinstance(measures, Mapping) and "bias" in measures for measures in entry.values())
    }
    if not models:
        raise KeyError("models")
    return models


def _plain_results() -> dict[str, Any]:
    return Results(models={}, attribute=ATTRIBUTE).to_dict()


def _absent(document: Mapping[str, Any], results: Results) -> tuple[str, ...]:
    words = []
    if results.attribute == ATTRIBUTE:
        words.append("the name of the attribute and who judged it")
    measured = [measures for by_scale in results.models.values() for measures in by_scale.values()]
    if not any(measures.quality for measures in measured):
        words.append("quality beyond the subject: it was evaluated without reference images")
    if not any(measures.by_group for measures in measured):
        words.append("figures group by group")
    return tuple(words)
