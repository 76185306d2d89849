"""What a rival's fit keeps in its folder, so that a second call reads it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from methods import World

from invdiff.files import check_same_settings, fingerprint, read_json, write_json
from invdiff.models.frozen import denoiser_fingerprint

WORK = ".work"
"""Folder of checkpoints while a fit is under way."""


def settings_of(method: Any, world: World, pipe: Any) -> dict[str, Any]:
    """All that a fit depends on: the method's fields, the world's images and budget, and the model it starts from."""
    budget = world.finetuning and world.finetuning.to_dict()
    of_world = {"data": world.data.fingerprint, "seed": world.seed, "finetuning": budget}
    return asdict(method) | of_world | {"model": fingerprint(denoiser_fingerprint(pipe))}


def finished(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The figures of a finished fit, None where there is none; `ConfigError` where it had other settings."""
    if not (folder / "fitted.json").is_file():
        return None
    found = read_json(folder / "fitted.json")
    check_same_settings(folder, found["settings"], dict(settings))
    return found["figures"]


def finish(folder: Path, settings: Mapping[str, Any], figures: Mapping[str, Any]) -> dict[str, Any]:
    """Mark a fit as finished and remove its checkpoints; the figures."""
    write_json(folder / "fitted.json", {"settings": dict(settings), "figures": dict(figures)})
    shutil.rmtree(folder / WORK, ignore_errors=True)
    return dict(figures)
