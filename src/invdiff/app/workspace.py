"""The folders that the page may open: those given at start, and nothing else."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..assets import BIRDS_ANNOTATOR, BIRDS_DEMO, BIRDS_MODEL
from ..config import DemoConfig
from ..data.birds import BirdsWorld
from ..data.captioned import CaptionedImages
from ..errors import ConfigError
from ..files import atomic_folder, default_cache_dir, fingerprint
from ..report.read import Parts, find_parts
from ..text import one_line

BUNDLED = "bundled demo"


@dataclass(frozen=True)
class Workspace:
    """The parts that a page shows."""

    model: str
    """Folder or hub id of the pipeline; "" for a page that draws nothing."""
    module: Path | str | None
    """Folder or hub id of the guidance module."""
    annotator: str
    """Folder or hub id of the annotator; "" for none."""
    runs: Mapping[str, Parts]
    """Name to the parts of a folder, as a report would read it; names differ."""

    @property
    def audits(self) -> dict[str, Parts]:
        """The runs with an audit."""
        return {name: parts for name, parts in self.runs.items() if parts.audit is not None}

    @property
    def results(self) -> dict[str, Parts]:
        """The runs with results."""
        return {name: parts for name, parts in self.runs.items() if parts.results is not None}


def open_workspace(
    runs: Sequence[Path] = (),
    *,
    model: str | None = None,
    module: str | None = None,
    annotator: str | None = None,
    data: CaptionedImages | str | Path | None = None,
) -> Workspace:
    """Find the parts that a page is to show.

    Args:
        runs: Folders such as `invdiff demo` writes. With none, and no model, the bundled demo is opened.
        model: The pipeline; the one that the module was trained for unless given.
        module: The guidance module; the first run's unless given.
        annotator: Names the classes in images; for the bundled model, the bundled one unless given.
        data: The images that were audited, where a run does not hold them.

    Raises:
        ConfigError: A run is no folder or holds nothing to show, two are the same, or it is unknown which model
            a run's module was trained for.
    """
    found: dict[str, Parts] = {}
    if not runs and model is None:
        if module is not None or data is not None:
            given = "a module" if module is not None else "data"
            raise ConfigError(f"Expected a model or a run beside {given}, got none. Name the model with --model.")
        found[BUNDLED] = bundled_run()
    resolved = [folder.resolve() for folder in runs]
    if len(set(resolved)) < len(resolved):
        raise ConfigError(f"Expected different folders, got one of {', '.join(map(str, runs))} twice. Name it once.")
    for place, folder in enumerate(resolved):
        parts = find_parts(runs[place])
        if parts.audit is None and parts.results is None and parts.module is None:
            raise ConfigError(
                f"Expected audit/, module/ or results.json in {runs[place]}, found none of them. Give a folder that "
                "`invdiff demo` wrote, or one with the folders that audit, train and evaluate wrote."
            )
        alike = [other.name for other in resolved].count(folder.name) > 1
        name = f"{place + 1}: {one_line(str(runs[place]), 120)}" if alike else one_line(folder.name, 60) or "/"
        found[name] = parts if data is None or parts.data is not None else replace(parts, data=data)
    chosen: Path | str | None = module or next((parts.module for parts in found.values() if parts.module), None)
    if model is None and chosen is not None:
        model = _model_of(chosen)
    if annotator is None and model == str(BIRDS_MODEL):
        annotator = str(BIRDS_ANNOTATOR)
    return Workspace(model or "", chosen, annotator or "", found)


def bundled_run() -> Parts:
    """The bundled demo, copied to the cache, where edits to its audit can be saved. Its images are drawn on demand."""
    digest = fingerprint(*((BIRDS_DEMO / name).read_bytes() for name in ("audit/audit.json", "results.json")))
    folder = default_cache_dir() / f"birds-demo-{digest}"
    if not folder.is_dir():
        with atomic_folder(folder) as temporary:
            shutil.copytree(BIRDS_DEMO, temporary, dirs_exist_ok=True)
    defaults = DemoConfig()
    world = BirdsWorld(defaults.num_images, severity=defaults.severity, seed=defaults.seed)
    return replace(find_parts(folder), data=world.captioned())


def _model_of(module: Path | str) -> str:
    """The pipeline that a module was trained beside.

    Raises:
        ConfigError: Its folder is unknown.
    """
    from ..guidance.module import load_module  # imports torch

    config = load_module(module).config
    hub_id = ((config.get("record") or {}).get("base") or {}).get("hub_id")
    if hub_id:
        return str(hub_id)
    if config["base_model"] == BIRDS_MODEL.name:
        return str(BIRDS_MODEL)
    raise ConfigError(
        f"Expected the model that the module in {module} was trained for, which was called "
        f"{config['base_model'] or 'nothing'!r}, got none. Name its folder with --model."
    )
