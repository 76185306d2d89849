"""Checkpoints of a training run: safetensors and JSON, written atomically, resumed exactly.

Batches, noise and timesteps are derived from (seed, step), so a checkpoint needs no random state.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..distributed import is_main
from ..errors import ConfigError, DataError, TrainingError
from ..files import read_json, read_tensors, write_json, write_tensors
from .optimization import Precision

_NAME = re.compile(r"step-(\d+)")


@dataclass
class TrainingState:
    """What changes while training: model, optimizer, averaged weights, loss scale, and small running figures."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    average: nn.Module
    precision: Precision
    running: dict[str, Any] = field(default_factory=dict)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return every tensor of the state under one flat name each."""
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"average.{name}": value for name, value in self.average.state_dict().items()}
        for index, slots in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in slots.items()}
        return tensors

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Put back what `tensors` returned."""

        def part(prefix: str) -> dict[str, torch.Tensor]:
            return {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}

        self.model.load_state_dict(part("model."))
        self.average.load_state_dict(part("average."))
        slots: dict[int, dict[str, torch.Tensor]] = {}
        for name, value in part("optimizer.").items():
            index, slot = name.split(".", 1)
            slots.setdefault(int(index), {})[slot] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": slots, "param_groups": groups})


def save_checkpoint(folder: Path, step: int, state: TrainingState, settings: dict[str, Any]) -> None:
    """Write the state after `step` steps below `folder` and drop the checkpoint before it.

    Raises:
        TrainingError: Weights are no longer finite; the checkpoint before is kept.
    """
    if not all(bool(parameter.isfinite().all()) for parameter in state.model.parameters()):
        raise TrainingError(
            f"Expected finite weights, got others after step {step}. Lower learning_rate, or set mixed_precision to "
            f"'no'. The last good checkpoint is kept in {folder}."
        )
    if not is_main():
        return
    target = folder / f"step-{step}"
    write_tensors(target / "state.safetensors", state.tensors())
    # Written last: a checkpoint without it was cut short and is not read.
    write_json(
        target / "checkpoint.json",
        {"step": step, "running": state.running, "loss_scale": state.precision.state(), "settings": settings},
    )
    for other in folder.glob("step-*"):
        if other != target:
            shutil.rmtree(other)


def load_checkpoint(folder: Path, state: TrainingState, settings: dict[str, Any]) -> int:
    """Restore the newest whole checkpoint below `folder` and return its step, 0 where there is none.

    Raises:
        ConfigError: The checkpoint was made with other settings.
        DataError: The checkpoint is damaged.
    """
    found = [
        (int(match[1]), path)
        for path in folder.glob("step-*")
        if (match := _NAME.fullmatch(path.name)) and (path / "checkpoint.json").is_file()
    ]
    if not found:
        return 0
    step, newest = max(found)
    try:
        saved = read_json(newest / "checkpoint.json")
        check_same_settings(folder, saved["settings"], settings)
        state.load(read_tensors(newest / "state.safetensors"))
        state.precision.load(saved["loss_scale"])
        state.running = saved["running"]
    except (DataError, RuntimeError, KeyError, ValueError, TypeError) as error:
        raise DataError(f"The checkpoint {newest} is damaged ({error}). Delete that folder and run again.") from error
    return step


def check_same_settings(folder: Path, found: dict[str, Any], settings: dict[str, Any]) -> None:
    """Raise `ConfigError` that names what changed, unless a run in `folder` was started with these settings."""
    names = sorted(set(found) | set(settings))
    changed = [name for name in names if found.get(name) != settings.get(name)]
    if changed:
        raise ConfigError(
            f"Expected the settings that {folder} was started with, got others: "
            + "; ".join(f"{name} was {found.get(name)!r}, now {settings.get(name)!r}" for name in changed)
            + ". Use the same settings, or another output folder, or delete this one to start afresh."
        )
