"""Find and read the parts of a report: audit, data, results, images and module, each of them optional."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..auditing.result import Audit
from ..errors import ConfigError, EvaluationError
from ..evaluation.images import MANIFESTS, Folders, Row, read_images, resolve_folders
from ..files import read_json
from .audit_reading import Page, pages_of, rows_by_name
from .part_names import Names, shown_path
from .results_reading import Measured, read_results

if TYPE_CHECKING:
    from ..data.captioned import CaptionedImages

GENERATED = MANIFESTS[0]
_SCALE_ENDING = re.compile(r"-cfg-[0-9.]+$")


@dataclass(frozen=True)
class AuditSource:
    """An audit folder, and the images it is of where they are given."""

    audit: Audit
    """With people's edits."""
    pages: Sequence[Page]
    data: CaptionedImages | None
    rows: Sequence[int]
    """Where each audited image stands in the data; empty without data."""

    def may_show(self, position: int) -> bool:
        """Whether an audited image may go into a report: it is given, and no link or path leads out of the data."""
        return self.data is not None and self.data.is_own(self.rows[position])


@dataclass(frozen=True)
class Generated:
    """The images of one model."""

    rows: Sequence[Row]
    folders: Sequence[str]
    """Where they lie, as commands name it."""
    settings: Sequence[Mapping[str, Any]]
    """`generate.json` of each of these folders, empty where there is none."""


@dataclass(frozen=True)
class Sources:
    """Everything a report is made from."""

    audit: AuditSource | None = None
    measured: Measured | None = None
    images: Mapping[str, Generated] = field(default_factory=dict)
    module: Mapping[str, Any] | None = None
    """A module's config, its record included."""
    names: Names = field(default_factory=Names)


@dataclass(frozen=True)
class Parts:
    """Where the parts of a report lie."""

    audit: Path | None = None
    data: Any = None
    """A folder or `CaptionedImages`."""
    results: Path | None = None
    images: Mapping[str, Folders] = field(default_factory=dict)
    module: Path | None = None
    run: Path | None = None
    """The folder they lie in, where they lie in one."""
    data_words: Sequence[str] = ()
    """What the command line called the data, and the options to read it with; empty for where it lies."""


def find_parts(run: Path, *, results: Path | None = None) -> Parts:
    """Return the parts in a folder such as `invdiff demo` writes, or the four commands of the README.

    These are `audit/`, `module/`, `data/`, `results.json`, and folders of generated images in `images/` or beside
    them, each named after its model as in the results: `base` or `base-cfg-3`.

    Args:
        run: The folder.
        results: Results that lie elsewhere, to know the models by.

    Raises:
        ConfigError: There is no such folder.
        EvaluationError: The results are damaged.
    """
    run = Path(run)
    if not run.is_dir():
        raise ConfigError(f"Expected a folder with audit/ or results.json at {run}, found none.")
    audit = next((folder for folder in (run / "audit", run) if (folder / "audit.json").is_file()), None)
    if results is None and (run / "results.json").is_file():
        results = run / "results.json"
    models = list(read_results(results).results.models) if results else []
    images: dict[str, list[Path]] = {}
    for manifest in sorted([*run.glob(f"*/{GENERATED}"), *run.glob(f"images/*/{GENERATED}")], key=_by_number):
        name = _model_of(manifest.parent.name, models)
        if name is not None:
            images.setdefault(name, []).append(manifest.parent)
    has_data = any((run / "data" / name).is_file() for name in ("metadata.csv", "metadata.jsonl"))
    return Parts(
        audit=audit,
        data=run / "data" if has_data else None,
        results=results,
        images=images,
        module=run / "module" if (run / "module" / "config.json").is_file() else None,
        run=run,
    )


def read_parts(parts: Parts) -> Sources:
    """Read the parts of a report.

    Raises:
        ConfigError: There is neither an audit nor results.
        InvDiffError: A part is absent or damaged, or the data is not what was audited.
    """
    if parts.audit is None and parts.results is None:
        raise ConfigError("Expected an audit or results to report on, got neither. Run `invdiff audit` first.")
    return Sources(
        audit=None if parts.audit is None else _read_audit(Path(parts.audit), parts.data),
        measured=None if parts.results is None else read_results(Path(parts.results)),
        images={} if not parts.images else _read_images(parts.images, parts.run),
        module=None if parts.module is None else _read_module(Path(parts.module)),
        names=_names(parts),
    )


def _names(parts: Parts) -> Names:
    """Return what commands call the parts; those that are not given are called by the README's names."""
    given = {name: getattr(parts, name) for name in ("audit", "module", "results")}
    names = {name: shown_path(path, parts.run) for name, path in given.items() if path is not None}
    if parts.data_words:
        return Names(**names, data=[shown_path(parts.data_words[0], parts.run), *parts.data_words[1:]])
    if isinstance(parts.data, str | Path):
        return Names(**names, data=[shown_path(parts.data, parts.run)])
    return Names(**names)


def _read_audit(folder: Path, data: Any) -> AuditSource:
    audit = Audit.load(folder)
    images = data
    if data is not None and not hasattr(data, "names"):
        from ..data.captioned import load_captioned_images

        images = load_captioned_images(data)
    rows = rows_by_name(audit.names, list(images.names)) if images is not None else []
    return AuditSource(audit, pages_of(audit), images, rows)


def _read_images(given: Mapping[str, Folders], run: Path | None) -> dict[str, Generated]:
    images = {}
    for model, folders in resolve_folders(given).items():
        files = [folder / "generate.json" for folder in folders]
        settings = [read_json(file) if file.is_file() else {} for file in files]
        if not all(isinstance(entry, Mapping) for entry in settings):
            raise EvaluationError(f"Expected settings in generate.json of {folders}, found something else.")
        rows = [row for folder in folders for row in read_images(folder)]
        images[model] = Generated(rows, [shown_path(folder, run) for folder in folders], settings)
    return images


def _read_module(folder: Path) -> Mapping[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise ConfigError(f"Expected a module in {folder}, found no config.json. Give what `invdiff train` wrote.")
    config = read_json(path)
    if not isinstance(config, Mapping):
        raise ConfigError(f"Expected a module's settings in {path}, found something else. Train it again.")
    return config


def _model_of(folder: str, models: Sequence[str]) -> str | None:
    """Return which model a folder's images are of; None where the results know none such."""
    if not models:
        return _SCALE_ENDING.sub("", folder)
    fitting = [model for model in models if folder == model or folder.startswith(f"{model}-")]
    return max(fitting, key=len, default=None)


def _by_number(path: Path) -> list[tuple[bool, float, str]]:
    """Sort cfg-10 after cfg-3."""
    parts = re.split(r"([0-9]+(?:\.[0-9]+)?)", str(path))
    return [(place % 2 == 1, float(part) if place % 2 else 0.0, part) for place, part in enumerate(parts)]
