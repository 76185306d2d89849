"""The calls of a Stable Diffusion pipeline's UNet, image by image, for methods that act while images are drawn."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch

from invdiff.guidance.environments import EnvironmentMix


@dataclass(eq=False)
class Call:
    """The newest call of the UNet, of `images` images at once."""

    pipe: Any
    prompts: list[str] = field(default_factory=list)
    """Of each image."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """By name. Rows of the null caption, where there is classifier-free guidance, come before those of captions."""
    groups: list[int] = field(default_factory=list)
    """A class drawn for each image, uniformly and independently, by the seed and the image's own starting noise."""
    step: int = 0
    """Calls before this one for the same images."""

    @property
    def images(self) -> int:
        """How many."""
        return len(self.groups)

    @property
    def latents(self) -> torch.Tensor:
        """(images, channels, height, width)."""
        return self.arguments["sample"][-self.images :]

    def predict(self, embeddings: torch.Tensor, latents: torch.Tensor | None = None) -> torch.Tensor:
        """The plain prediction for the images (or other latents) with other embeddings, (images, C, H, W)."""
        unet, latents = self.pipe.unet, self.latents if latents is None else latents
        given = self.arguments | {"sample": latents, "encoder_hidden_states": embeddings, "return_dict": False}
        return unet.forward(**{name: value for name, value in given.items() if name != "self"})[0]  # past all hooks


def encode(pipe: Any, captions: list[str]) -> torch.Tensor:
    """Embeddings of captions (captions, tokens, width), past what watches the pipeline's own prompts."""
    with torch.no_grad():
        return type(pipe).encode_prompt(pipe, captions, pipe._execution_device, 1, False)[0]


@contextmanager
def hooked(
    pipe: Any,
    num_groups: int,
    seed: int,
    *,
    before: Callable[[Call], torch.Tensor] | None = None,
    after: Callable[[Call, torch.Tensor], torch.Tensor | None] | None = None,
) -> Iterator[None]:
    """Act on each call of the UNet inside the block.

    `before` returns the embeddings (images, tokens, width) that captions' rows get. `after` is given the prediction of
    all rows and returns a shift (images, C, H, W) that is added to all rows of an image, or None: classifier-free
    guidance u + w (c - u) then adds it once, whatever w is.
    """
    call, mix = Call(pipe), EnvironmentMix("iid", [num_groups], seed=seed)
    timesteps, original = None, pipe.encode_prompt

    @wraps(original)
    def remember(prompt: Any, *args: Any, **options: Any) -> Any:
        call.prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        return original(prompt, *args, **options)

    def begin(unet: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal timesteps
        bound = inspect.signature(type(unet).forward).bind(unet, *args, **kwargs)
        call.arguments, call.step = bound.arguments, call.step + 1
        if pipe.scheduler.timesteps is not timesteps:  # which each call of the pipeline makes anew
            timesteps, call.step = pipe.scheduler.timesteps, 0
            images = len(call.arguments["sample"]) // (2 if pipe.do_classifier_free_guidance else 1)
            call.groups = mix.rows(call.arguments["sample"][-images:])[:, 0].tolist()
            call.prompts = [call.prompts[image * len(call.prompts) // images] for image in range(images)]
        if before is not None:
            rows = call.arguments["encoder_hidden_states"]
            call.arguments["encoder_hidden_states"] = torch.cat([rows[: -call.images], before(call).to(rows)])
        return bound.args[1:], bound.kwargs

    def end(unet: Any, args: tuple[Any, ...], output: Any) -> Any:
        shift = after(call, output[0]) if after is not None else None
        if shift is None:
            return None
        shifted = output[0] + shift.to(output[0].dtype).repeat(len(output[0]) // len(shift), 1, 1, 1)
        return (shifted, *output[1:]) if isinstance(output, tuple) else type(output)(sample=shifted)

    handles = [pipe.unet.register_forward_pre_hook(begin, with_kwargs=True), pipe.unet.register_forward_hook(end)]
    pipe.encode_prompt = remember
    try:
        yield
    finally:
        del pipe.encode_prompt
        for handle in handles:
            handle.remove()
