"""Watch the parts of a pipeline: noise comes from the images' own generators, and what is not finite is named."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch

from ..errors import ModelError

_REMEDIES = {
    "scheduler": "Choose other settings of the scheduler: rescale_betas_zero_snr suits v_prediction only.",
    "autoencoder": "16 bits may overflow: load the model in fp32 or bf16 (--dtype), or give it an autoencoder that "
    "was fixed for fp16.",
    "vision": "Its weights may be damaged: download it again, or choose another.",
}


def check_finite(values: torch.Tensor, part: str, names: Sequence[str]) -> None:
    """Raise `ModelError` where a row of `values`, (rows, ...), that `part` returned has a NaN or an infinity.

    `names` say for people what the rows are of; where there are more rows than names, they are of these in turn.
    """
    _check_rows(_finite_rows(values), part, names)


def _check_rows(finite: torch.Tensor, part: str, names: Sequence[str]) -> None:
    """Raise the `ModelError` of `check_finite` unless all rows are `finite`, booleans (rows,)."""
    if not finite.all():
        remedy = "16 bits may overflow: load the model in fp32 or bf16 (--dtype)."
        raise ModelError(
            f"Expected finite numbers from the {part}, found NaN or infinity for "
            f"{names[int(finite.int().argmin()) % len(names)]}. {_REMEDIES.get(part.split()[0], remedy)}"
        )


@contextmanager
def watched(pipe: Any, generators: Sequence[torch.Generator], names: Sequence[str]) -> Iterator[None]:
    """Let a call of `pipe` inside the block take all noise from `generators`, one of each image, or fail.

    Pipelines such as Stable Diffusion 3's pass their scheduler no generator. It is a `ModelError` where it still draws
    from the global one, or a part returns what is not finite: the first, with the first such image by `names`.
    """
    scheduler, returned = pipe.scheduler, []
    title = f"scheduler {type(scheduler).__name__}"

    def keep(part: str, values: torch.Tensor) -> None:
        returned.append((part, _finite_rows(values)))  # not looked at: that would wait for a GPU

    def step(original: Callable[..., Any], model_output: torch.Tensor, *args: Any, **options: Any) -> Any:
        own = [generators[row % len(generators)] for row in range(len(model_output))]
        if "generator" in inspect.signature(original).parameters:
            options["generator"] = own
        else:
            options.pop("generator", None)
        if hasattr(scheduler, "noise_sampler_seed"):  # of DPMSolverSDE: one Brownian tree an image
            scheduler.noise_sampler_seed = [generator.initial_seed() for generator in own]
        before = _global_states(model_output.device)
        output = original(model_output, *args, **options)
        if not all(map(torch.equal, before, _global_states(model_output.device))):
            raise ModelError(
                "Expected a scheduler that draws noise from the images' own generators, got "
                f"{type(scheduler).__name__}, which draws it from the global one: the same seed would give other "
                "images. Choose another scheduler, such as DPMSolverMultistepScheduler."
            )
        keep("denoiser", model_output)
        keep(title, output[0] if isinstance(output, tuple) else output.prev_sample)
        return output

    def decode(original: Callable[..., Any], *args: Any, **options: Any) -> Any:
        output = original(*args, **options)
        keep("autoencoder", output[0])
        return output

    def encode_prompt(original: Callable[..., Any], *args: Any, **options: Any) -> Any:
        output = original(*args, **options)
        for embeds in output:
            if embeds is not None:
                keep("text encoder", embeds)
        return output

    with ExitStack() as stack:
        for owner, watch in ((scheduler, step), (getattr(pipe, "vae", None), decode), (pipe, encode_prompt)):
            if hasattr(owner, watch.__name__):
                stack.enter_context(_replaced(owner, watch))
        yield
    for part, finite in returned:
        _check_rows(finite, part, names)


def _finite_rows(values: torch.Tensor) -> torch.Tensor:
    return values.reshape(len(values), -1).isfinite().all(dim=1)


@contextmanager
def _replaced(owner: Any, watch: Callable[..., Any]) -> Iterator[None]:
    """Let `watch`, given the original first, stand for the method of its name, and restore that afterwards."""
    name, kept = watch.__name__, dict(vars(owner))
    original = getattr(owner, name)
    vars(owner)[name] = wraps(original)(lambda *args, **options: watch(original, *args, **options))
    try:
        yield
    finally:
        for changed in (name, "noise_sampler_seed"):
            vars(owner).pop(changed, None)
            if changed in kept:
                vars(owner)[changed] = kept[changed]


def _global_states(device: torch.device) -> list[torch.Tensor]:
    """The states of the global generators that noise on `device` could come from."""
    own = [] if device.type == "cpu" else [torch.get_device_module(device).get_rng_state()]
    return [torch.get_rng_state(), *own]
