"""What every training loop here shares: the arithmetic, the learning rate, the averaged weights."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..config import MixedPrecision
from ..errors import ConfigError, TrainingError

CHECK_EVERY = 10
"""Steps between looks at whether the loss is finite: a look waits for the device."""


class Precision:
    """Mixed precision by accelerate: autocast, and scaled losses where fp16 would round gradients to zero.

    Args:
        mixed_precision: `auto` takes bf16 on a GPU that has it and full precision elsewhere.
        device: Where the loop runs.

    Raises:
        ConfigError: fp16 is asked for on a CPU.
    """

    def __init__(self, mixed_precision: MixedPrecision, device: torch.device) -> None:
        if mixed_precision == "auto":
            has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
            mixed_precision = "bf16" if has_bf16 else "no"
        if mixed_precision == "fp16" and device.type == "cpu":
            raise ConfigError("Expected mixed_precision 'no', 'bf16' or 'auto' on a CPU, got 'fp16'.")
        # accelerate keeps one state per process and refuses a second precision; each loop here has its own.
        AcceleratorState._reset_state(reset_partial_state=True)
        self.accelerator = Accelerator(mixed_precision=mixed_precision, cpu=device.type == "cpu")

    def prepare(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Return the optimizer to use with `step`: it skips steps whose scaled gradient overflowed."""
        return self.accelerator.prepare_optimizer(optimizer)

    def shared(self, model: nn.Module) -> nn.Module:
        """Return the model to run forward: the same, or one whose gradients are averaged over all processes."""
        if self.accelerator.num_processes == 1:
            return model
        device = self.accelerator.device
        devices = None if device.type == "cpu" else [device]
        return nn.parallel.DistributedDataParallel(model, device_ids=devices)

    def part(self, size: int) -> slice:
        """Return the part of a batch of `size` that this process computes."""
        each = size // self.accelerator.num_processes
        return slice(self.accelerator.process_index * each, (self.accelerator.process_index + 1) * each)

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """Return the values (rows, ...) of the parts of all processes, in the order of the batch."""
        return self.accelerator.gather(values)

    def autocast(self) -> AbstractContextManager[None]:
        """Return a context in which forwards run in 16 bits, or as they are in full precision."""
        return self.accelerator.autocast()

    def step(self, loss: torch.Tensor, model: nn.Module, optimizer: torch.optim.Optimizer, max_norm: float) -> None:
        """Take one optimiser step down the gradient of `loss`, clipped to `max_norm`."""
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Any]:
        """Return the scale of the loss as JSON types, nothing where there is none."""
        return self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else {}

    def load(self, state: dict[str, Any]) -> None:
        """Put back what `state` returned."""
        if state and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state)


def check_finite(loss: torch.Tensor, step: int, work_dir: Path) -> None:
    """Raise `TrainingError` where the loss of a step, counted from 0, is not a finite number."""
    if not bool(loss.isfinite()):
        raise TrainingError(
            f"Expected a finite loss, got {loss.item()} at step {step + 1}. Lower learning_rate, or set "
            f"mixed_precision to 'no'. The last good checkpoint is kept in {work_dir}."
        )


def set_learning_rate(optimizer: torch.optim.Optimizer, peak: float, step: int, steps: int) -> None:
    """Set the rate for `step` of `steps`: a linear warm-up over the first 2%, then a cosine to zero.

    A function of the step alone, so that a resumed run needs no schedule state.
    """
    warmup = math.ceil(0.02 * steps)
    if step < warmup:
        rate = peak * (step + 1) / warmup
    else:
        rate = peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
    for group in optimizer.param_groups:
        group["lr"] = rate


def moving_average(model: nn.Module, decay: float) -> AveragedModel:
    """Return an exponential moving average of `model`; call `update_parameters(model)` after each step."""
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
