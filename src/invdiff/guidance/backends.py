"""The backends of guidance by name, and one of any backend from a folder or the hub."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config import TrainConfig
from ..models.load import load_complete, loading
from .base import Guidance
from .lora import GuidanceLoRA
from .module import GuidanceModule
from .tokens import GuidanceTokens

BACKENDS: dict[str, type[Guidance]] = {each.backend: each for each in (GuidanceModule, GuidanceTokens, GuidanceLoRA)}


def settled(config: TrainConfig) -> TrainConfig:
    """The settings with what is left open: backend, steps and batch size."""
    backend: Any = config.chosen_backend
    steps, batch_size = BACKENDS[backend].recipe
    return replace(config, backend=backend, steps=config.steps or steps, batch_size=config.batch_size or batch_size)


def load_guidance(name_or_folder: str | Path) -> Guidance:
    """Load a guidance of any backend from a folder or a hub id, ready to attach; `ModelError` where none is there."""
    source = str(name_or_folder)
    classes = {each.__name__: each for each in BACKENDS.values()}
    with loading("a guidance module", source, "Give the folder that `invdiff train` wrote."):
        found: Any = Guidance.load_config(source)
        kind = found.get("_class_name")
        if kind not in classes:
            raise ValueError(f"it is a {kind or 'config of something else'}")
        sizes, null = found.get("num_groups", ()), found.get("null_adapter", "on")
        null = [[null] * size for size in sizes] if isinstance(null, str) else null
        if [*map(len, null)] != [*sizes] or not {word for of in null for word in of} <= {"on", "off"}:
            raise ValueError(f"its null_adapter is {found['null_adapter']!r}, for groups {sizes}")
        return load_complete(classes[kind], source).eval()
