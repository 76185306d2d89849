"""What a rival's fit keeps in its folder, so that a second call reads it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
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


def fitted_once(folder: Path, settings: dict[str, Any], fit: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """The figures that `fit` returns, which is called where no fit is finished, and may keep checkpoints in `WORK`.

    Raises:
        ConfigError: The finished fit had other settings.
    """
    path = folder / "fitted.json"
    if not path.is_file():
        write_json(path, {"settings": settings, "figures": dict(fit())})
        shutil.rmtree(folder / WORK, ignore_errors=True)
    found = read_json(path)
    check_same_settings(folder, found["settings"], settings)
    return found["figures"]
