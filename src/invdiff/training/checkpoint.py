"""A training run: AdamW, mixed precision, averaged weights, and checkpoints from which it resumes exactly.

Batches, noise and timesteps are derived from (seed, step), so a checkpoint needs no random state.
"""

import json
import math
from collections.abc import Callable, Iterable
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
from ..files import check_same_settings, read_tensors, write_tensors
from ..progress import progress_bar

CHECK_EVERY = 10  # steps between checks that the loss is finite: each check waits for the device


def accelerator_for(mixed_precision: MixedPrecision, device: torch.device) -> Accelerator:
    """Accelerate's mixed precision: autocast, and a loss scale where fp16 would round gradients to zero."""
    if mixed_precision == "auto":
        mixed_precision = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "no"
    if mixed_precision == "fp16" and device.type == "cpu":
        raise ConfigError("Expected mixed_precision 'no', 'bf16' or 'auto' on a CPU, got 'fp16'.")
    # accelerate keeps one state per process and refuses a second precision; each training run has its own.
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(mixed_precision=mixed_precision, cpu=device.type == "cpu")


class TrainingRun:
    """The state of a training run; the checkpoint in `folder` is restored, and refused under other `settings`."""

    def __init__(
        self,
        model: nn.Module,
        config: FinetuneConfig | TrainConfig,
        folder: Path,
        settings: dict[str, Any],
        *,
        whole: nn.Module | None = None,  # what the forward pass is of, where that is more than the model
        running: nn.Module | None = None,  # holds buffers that change while training and are no part of the model
    ) -> None:
        self.config, self.file, self.settings = config, folder / "checkpoint.safetensors", settings
        device = next(model.parameters()).device
        self.model, self.parallel = model, whole or model  # `parallel` is called: processes average its gradients
        self.accelerator = accelerator_for(config.mixed_precision, device)
        if self.accelerator.num_processes > 1:
            devices = None if device.type == "cpu" else [self.accelerator.device]
            self.parallel = nn.parallel.DistributedDataParallel(self.parallel, device_ids=devices)
        adamw = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
        self.optimizer = self.accelerator.prepare_optimizer(adamw)
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))
        self.log: list[dict[str, Any]] = []  # rows that checkpoints keep
        self._kept = nn.ModuleDict({"model": model, "average": self.average, "running": running or nn.Module()})
        self.start = self._resume()

    def minimise(self, loss_at: Callable[[int], torch.Tensor], label: str, *, progress: bool = True) -> None:
        """Descend `loss_at(step)`, a scalar, for the steps that are left; the model ends with its averaged weights."""
        steps = self.config.steps
        with progress_bar(label, steps, start=self.start, enabled=progress) as bar:
            for step in range(self.start, steps):
                due = step + 1 == steps or (step + 1) % self.config.checkpoint_every == 0
                loss = loss_at(step)
                if due or (step + 1) % CHECK_EVERY == 0:
                    self._check_finite("a finite loss", [loss], step)
                for group in self.optimizer.param_groups:
                    group["lr"] = learning_rate(self.config.learning_rate, step, steps)
                self.accelerator.backward(loss)
                self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.max_gradient_norm)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
                self.average.update_parameters(self.model)
                if due:
                    self._check_finite("finite weights", self.model.parameters(), step)
                    if is_main():
                        self._save(step + 1)
                bar.advance(loss=loss)
        self.model.load_state_dict(self.average.module.state_dict())

    def _check_finite(self, expected: str, values: Iterable[torch.Tensor], step: int) -> None:
        if not all(bool(value.isfinite().all()) for value in values):
            raise TrainingError(
                f"Expected {expected} at step {step + 1}, got NaN or infinity. Lower learning_rate, or set "
                f"mixed_precision to 'no'. The last good checkpoint is kept: {self.file}."
            )

    def _save(self, done: int) -> None:
        """Write the state after `done` steps over the one before; a killed run leaves that one whole."""
        tensors = self._kept.state_dict()
        for index, slots in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in slots.items()}
        scaler = self.accelerator.scaler
        rest = {"done": done, "log": self.log, "scale": scaler and scaler.state_dict(), "settings": self.settings}
        tensors["rest"] = torch.frombuffer(bytearray(json.dumps(rest).encode()), dtype=torch.uint8)
        write_tensors(self.file, tensors)

    def _resume(self) -> int:
        """Restore the checkpoint; the number of steps it has behind it, 0 where there is none."""
        if not self.file.is_file():
            return 0
        try:
            tensors = read_tensors(self.file)
            rest = json.loads(tensors.pop("rest").numpy().tobytes())
            check_same_settings(self.file.parent, rest["settings"], self.settings)
            state: dict[int, dict[str, torch.Tensor]] = {}
            for name in [name for name in tensors if name.startswith("optimizer.")]:
                _, index, slot = name.split(".")
                state.setdefault(int(index), {})[slot] = tensors.pop(name)
            self._kept.load_state_dict(tensors)
            self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state})
            if self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(rest["scale"])
            self.log = rest["log"]
            return int(rest["done"])
        except (DataError, RuntimeError, KeyError, ValueError, TypeError) as error:
            raise DataError(f"The checkpoint {self.file} is damaged ({error}). Delete it and run again.") from error


def learning_rate(peak: float, step: int, steps: int) -> float:
    """The rate at `step` of `steps`, of the step alone: a linear warm-up over the first 2%, then a cosine to zero."""
    warmup = math.ceil(0.02 * steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
