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
    """One call of the UNet, of `images` images at once."""

    pipe: Any
    arguments: dict[str, Any]
    """By name. Rows of the null caption, where there is classifier-free guidance, come before those of captions."""
    prompts: list[str]
    """Of each image."""
    groups: list[int]
    """A class drawn for each image, uniformly and independently, by the seed and the image's own starting noise."""
    step: int
    """Calls before this one for the same images."""

    @property
    def images(self) -> int:
        """How many."""
        return len(self.groups)

    @property
    def guided(self) -> bool:
        """Whether there are rows of the null caption."""
        return len(self.arguments["sample"]) > self.images

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


@dataclass(eq=False)
class _Calls:
    """Hooks before and after the UNet's forward pass."""

    pipe: Any
    mix: EnvironmentMix
    before: Callable[[Call], torch.Tensor] | None
    after: Callable[[Call, torch.Tensor], torch.Tensor | None] | None
    prompts: list[str] = field(default_factory=list)
    timesteps: Any = None
    call: Any = None

    def begin(self, unet: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        bound = inspect.signature(type(unet).forward).bind(unet, *args, **kwargs)
        images = len(bound.arguments["sample"]) // (2 if self.pipe.do_classifier_free_guidance else 1)
        latents = bound.arguments["sample"][-images:]
        if self.pipe.scheduler.timesteps is not self.timesteps:  # which each call of the pipeline makes anew
            self.timesteps = self.pipe.scheduler.timesteps
            prompts = [self.prompts[image * len(self.prompts) // images] for image in range(images)]
            groups = self.mix.rows(latents)[:, 0].tolist()
            self.call = Call(self.pipe, bound.arguments, prompts, groups, step=-1)
        self.call.arguments = bound.arguments
        self.call.step += 1
        if self.before is not None:
            rows = bound.arguments["encoder_hidden_states"]
            bound.arguments["encoder_hidden_states"] = torch.cat([rows[:-images], self.before(self.call).to(rows)])
        return bound.args[1:], bound.kwargs

    def end(self, unet: Any, args: tuple[Any, ...], output: Any) -> Any:
        shift = self.after(self.call, output[0]) if self.after is not None else None
        if shift is None:
            return None
        shifted = output[0] + shift.to(output[0].dtype).repeat(len(output[0]) // len(shift), 1, 1, 1)
        return (shifted, *output[1:]) if isinstance(output, tuple) else type(output)(sample=shifted)


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
    calls = _Calls(pipe, EnvironmentMix("iid", [num_groups], seed=seed), before, after)
    original = pipe.encode_prompt

    @wraps(original)
    def remember(prompt: Any, *args: Any, **options: Any) -> Any:
        calls.prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        return original(prompt, *args, **options)

    handles = [
        pipe.unet.register_forward_pre_hook(calls.begin, with_kwargs=True),
        pipe.unet.register_forward_hook(calls.end),
    ]
    pipe.encode_prompt = remember
    try:
        yield
    finally:
        del pipe.encode_prompt
        for handle in handles:
            handle.remove()
