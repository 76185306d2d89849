"""A training run: AdamW, mixed precision, averaged weights, and checkpoints from which it resumes exactly.

Batches, noise and timesteps are derived from (seed, step), so a checkpoint needs no random state.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..config import FinetuneConfig, MixedPrecision, TrainConfig
from ..distributed import is_main
from ..errors import ConfigError, DataError, TrainingError
from ..files import read_json, read_tensors, write_json, write_tensors

CHECK_EVERY = 10
"""Steps between checks that the loss is finite: each check waits for the device."""


def accelerator_for(mixed_precision: MixedPrecision, device: torch.device) -> Accelerator:
    """Accelerate's mixed precision: autocast, and a loss scale where fp16 would round gradients to zero.

    Args:
        mixed_precision: `"auto"` takes bf16 on a GPU that has it and full precision elsewhere.
        device: Where the training runs.

    Raises:
        ConfigError: fp16 on a CPU.
    """
    if mixed_precision == "auto":
        mixed_precision = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "no"
    if mixed_precision == "fp16" and device.type == "cpu":
        raise ConfigError("Expected mixed_precision 'no', 'bf16' or 'auto' on a CPU, got 'fp16'.")
    # accelerate keeps one state per process and refuses a second precision; each training run has its own.
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(mixed_precision=mixed_precision, cpu=device.type == "cpu")


class TrainingRun:
    """The state of a training run, and its update by one step.

    Args:
        model: The network to train.
        config: Steps, learning rate, decay of the average, precision and so on.
        folder: Where checkpoints are kept. The newest one there is restored.
        settings: What the run depends on; a checkpoint with other settings is refused.
        device: Where the training runs.
        running: Buffers that change while training and are no part of the model.

    Attributes:
        start: Steps that are done already.
        accelerator: Mixed precision and the exchange between processes.
        parallel: The network for the forward pass: its gradients are averaged over processes.
        log: Rows of JSON types, kept in checkpoints.

    Raises:
        ConfigError: The newest checkpoint was made with other settings.
        DataError: It is damaged.
    """

    def __init__(
        self,
        model: nn.Module,
        config: FinetuneConfig | TrainConfig,
        folder: Path,
        settings: dict[str, Any],
        *,
        device: torch.device,
        running: nn.Module | None = None,
    ) -> None:
        self.config, self.folder, self.settings = config, folder, settings
        self.model, self.parallel = model, model
        self.accelerator = accelerator_for(config.mixed_precision, device)
        if self.accelerator.num_processes > 1:
            devices = None if device.type == "cpu" else [self.accelerator.device]
            self.parallel = nn.parallel.DistributedDataParallel(model, device_ids=devices)
        self.optimizer = self.accelerator.prepare_optimizer(
            torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
        )
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))
        self.log: list[dict[str, Any]] = []
        self._parts = {"model": model, "average": self.average, "running": running or nn.Module()}
        self.start = self._resume()

    def is_last(self, step: int) -> bool:
        """Whether `step`, counted from 0, ends the run."""
        return step + 1 == self.config.steps

    def _saves(self, step: int) -> bool:
        return self.is_last(step) or (step + 1) % self.config.checkpoint_every == 0

    def descend(self, loss: torch.Tensor, step: int) -> None:
        """Take optimiser step `step`, counted from 0, down the gradient of `loss`, a scalar.

        Raises:
            TrainingError: The loss is not finite.
        """
        if (self._saves(step) or (step + 1) % CHECK_EVERY == 0) and not bool(loss.isfinite()):
            raise TrainingError(
                f"Expected a finite loss, got {loss.item()} at step {step + 1}. Lower learning_rate, or set "
                f"mixed_precision to 'no'. The last good checkpoint is kept in {self.folder}."
            )
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config.learning_rate, step, self.config.steps)
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.max_gradient_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.average.update_parameters(self.model)

    def save_if_due(self, step: int) -> None:
        """Write a checkpoint after step `step`, counted from 0, where one is due; it replaces the one before.

        Raises:
            TrainingError: Weights are not finite; the checkpoint before is kept.
        """
        if not self._saves(step):
            return
        if not all(bool(parameter.isfinite().all()) for parameter in self.model.parameters()):
            raise TrainingError(
                f"Expected finite weights, got others after step {step + 1}. Lower learning_rate, or set "
                f"mixed_precision to 'no'. The last good checkpoint is kept in {self.folder}."
            )
        if not is_main():
            return
        target = self.folder / f"step-{step + 1}"
        write_tensors(target / "state.safetensors", self._tensors())
        scaler = self.accelerator.scaler
        # Written last: a checkpoint without it is incomplete and is not read.
        write_json(
            target / "checkpoint.json",
            {"log": self.log, "loss_scale": scaler and scaler.state_dict(), "settings": self.settings},
        )
        for other in self.folder.glob("step-*"):
            if other != target:
                shutil.rmtree(other)

    def finish(self) -> None:
        """Give the model its averaged weights."""
        self.model.load_state_dict(self.average.module.state_dict())

    def _tensors(self) -> dict[str, torch.Tensor]:
        tensors = {
            f"{part}.{name}": value
            for part, module in self._parts.items()
            for name, value in module.state_dict().items()
        }
        for index, slots in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in slots.items()}
        return tensors

    def _resume(self) -> int:
        """Restore the newest complete checkpoint; the number of steps it has behind it, 0 where there is none."""
        found = {int(path.parent.name[5:]): path.parent for path in self.folder.glob("step-*/checkpoint.json")}
        if not found:
            return 0
        step, newest = max(found.items())
        try:
            saved = read_json(newest / "checkpoint.json")
            check_same_settings(self.folder, saved["settings"], self.settings)
            tensors = read_tensors(newest / "state.safetensors")
            for part, module in self._parts.items():
                prefix = f"{part}."
                module.load_state_dict({n[len(prefix) :]: v for n, v in tensors.items() if n.startswith(prefix)})
            slots: dict[int, dict[str, torch.Tensor]] = {}
            for name, value in tensors.items():
                if name.startswith("optimizer."):
                    _, index, slot = name.split(".", 2)
                    slots.setdefault(int(index), {})[slot] = value
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": slots, "param_groups": groups})
            if self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(saved["loss_scale"])
            self.log = saved["log"]
        except (DataError, RuntimeError, KeyError, ValueError, TypeError) as error:
            raise DataError(
                f"The checkpoint {newest} is damaged ({error}). Delete that folder and run again."
            ) from error
        return step


def learning_rate(peak: float, step: int, steps: int) -> float:
    """The rate at `step` of `steps`: a linear warm-up over the first 2%, then a cosine to zero.

    A function of the step alone, so that a resumed run needs no schedule state.
    """
    warmup = math.ceil(0.02 * steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def check_same_settings(folder: Path, found: dict[str, Any], settings: dict[str, Any]) -> None:
    """Raise `ConfigError` that names each difference, unless work in `folder` was started with these settings."""

    def shown(value: Any) -> str:
        text = repr(value)
        return text if len(text) <= 80 else f"{text[:77]}..."

    changed = [
        f"{name} was {shown(found.get(name))}, now {shown(settings.get(name))}"
        for name in {**found, **settings}
        if found.get(name) != settings.get(name)
    ]
    if changed:
        raise ConfigError(
            f"Expected the settings that {folder} was started with, got others: {'; '.join(changed)}. Use the same "
            "settings, or another output folder, or delete this one to start afresh."
        )
