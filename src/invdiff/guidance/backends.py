"""The backends of guidance by name, and one of any backend from a folder or the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..models.loading import load_complete, loading
from .base import Guidance
from .lora import GuidanceLoRA
from .module import GuidanceModule
from .tokens import GuidanceTokens

BACKENDS: dict[str, type[Guidance]] = {each.backend: each for each in (GuidanceModule, GuidanceTokens, GuidanceLoRA)}


def load_guidance(name_or_folder: str | Path) -> Any:
    """Load a guidance of any backend from a folder or a hub id, ready to attach; `ModelError` where none is there."""
    source = str(name_or_folder)
    classes = {each.__name__: each for each in BACKENDS.values()}
    with loading("a guidance module", source, "Give the folder that `invdiff train` wrote."):
        found: Any = Guidance.load_config(source)
        kind = found.get("_class_name")
        if kind not in classes:
            raise ValueError(f"it is a {kind or 'config of something else'}")
        return load_complete(classes[kind], source).eval()
