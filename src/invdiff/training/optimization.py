"""What every training loop here shares: the arithmetic, the learning rate, the averaged weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..config import MixedPrecision

_DTYPES = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}


class Precision:
    """Mixed precision on one device: autocast, and scaled losses where fp16 would round gradients to zero.

    Args:
        mixed_precision: `auto` takes bf16 on a GPU that has it and full precision elsewhere.
        device: Where the loop runs.
    """

    def __init__(self, mixed_precision: MixedPrecision, device: torch.device) -> None:
        if mixed_precision == "auto":
            has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
            mixed_precision = "bf16" if has_bf16 else "no"
        self.device = device
        self.dtype = _DTYPES[mixed_precision]
        self._scaler = torch.amp.GradScaler(device.type, enabled=mixed_precision == "fp16")

    def autocast(self) -> torch.autocast:
        """Return a context in which forwards run in 16 bits, or as they are in full precision."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None)

    def step(self, loss: torch.Tensor, model: nn.Module, optimizer: torch.optim.Optimizer, max_norm: float) -> None:
        """Take one optimiser step down the gradient of `loss`, clipped to `max_norm`."""
        self._scaler.scale(loss).backward()
        self._scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        self._scaler.step(optimizer)  # left out where a scaled gradient overflowed
        self._scaler.update()
        optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Any]:
        """Return the scale of the loss as JSON types, nothing where there is none."""
        return self._scaler.state_dict()

    def load(self, state: dict[str, Any]) -> None:
        """Put back what `state` returned."""
        if state:
            self._scaler.load_state_dict(state)


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
