"""What every training loop here shares: the accelerator, the learning rate, the averaged weights."""

from __future__ import annotations

import math

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..config import MixedPrecision


def make_accelerator(mixed_precision: MixedPrecision) -> Accelerator:
    """Return an accelerator; `auto` takes bf16 on a GPU that has it and full precision elsewhere."""
    if mixed_precision == "auto":
        has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        mixed_precision = "bf16" if has_bf16 else "no"
    return Accelerator(mixed_precision=mixed_precision)


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
