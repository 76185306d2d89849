"""The backends of guidance by name, and one of any backend from a folder or the hub."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config import TrainConfig
from ..models.load import denoiser_of
from ..models.loading import load_complete, loading
from ..progress import note
from .base import Guidance
from .lora import GuidanceLoRA
from .module import GuidanceModule
from .tokens import GuidanceTokens

BACKENDS: dict[str, type[Guidance]] = {each.backend: each for each in (GuidanceModule, GuidanceTokens, GuidanceLoRA)}


LARGE = 5_000_000  # weights of a denoiser from which on `auto` takes `lora`: see docs/backends.md


def settled(config: TrainConfig, pipe: Any) -> TrainConfig:
    """The settings with what is left open, backend, steps and batch size, as suits a pipeline; says what it took."""
    weights = sum(each.numel() for each in denoiser_of(pipe).parameters())
    backend = config.backend if config.backend != "auto" else "lora" if weights >= LARGE else "module"
    steps, batch_size = BACKENDS[backend].recipe
    found = replace(config, backend=backend, steps=config.steps or steps, batch_size=config.batch_size or batch_size)
    if config.backend == "auto":
        size = f"{weights / 1e6:.1f} million weights ({LARGE // 10**6} or more: lora, else module)"
        note(f"backend {backend}: the denoiser has {size}; {found.steps} steps of {found.batch_size} images")
    return found


def load_guidance(name_or_folder: str | Path) -> Any:
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
