"""Read a denoiser's inner activations while it runs, without changing it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..errors import ModelError


def feature_block(denoiser: nn.Module, path: str) -> nn.Module:
    """The sub-module of `denoiser` at a dotted path such as `"mid_block"` or `"down_blocks.1"`.

    Raises:
        ModelError: There is none.
    """
    try:
        block = denoiser.get_submodule(path)
    except AttributeError as error:
        raise ModelError(
            f"Expected {type(denoiser).__name__} to have a block named {path!r}, found none; "
            f"its blocks are {', '.join(name for name, _ in denoiser.named_children())}."
        ) from error
    return block


class Hook:
    """A forward hook that stays with the module it was registered on: copies and pickles of the module have none."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """Call what was hooked."""
        return self._call(*arguments, **keywords)

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        return Hook(do_nothing)

    def __reduce__(self) -> tuple[Any, ...]:
        return Hook, (do_nothing,)


def do_nothing(*arguments: Any, **keywords: Any) -> None:
    """Stand in for a hook in copies of its module."""


class FeatureCapture:
    """Record the output of one block of a denoiser at each forward pass.

    Args:
        denoiser: The network.
        path: Dotted path of the block.
        read: From the block's output, a tensor or a tuple, to the tensor that is kept. It is called inside the hook,
            and must copy: later parts of the forward pass (FreeU, adapters) may overwrite the output in place.
    """

    def __init__(self, denoiser: nn.Module, path: str, read: Callable[[Any], torch.Tensor] = torch.clone) -> None:
        self._value: torch.Tensor | None = None
        self._read = read
        self._path = path
        self._handle = feature_block(denoiser, path).register_forward_hook(Hook(self._record))

    def _record(self, block: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self._value = self._read(output)

    def take(self) -> torch.Tensor:
        """The activations of the last forward pass, once.

        Raises:
            ModelError: The block did not run since the last call.
        """
        if self._value is None:
            raise ModelError(
                f"The denoiser ran without its block {self._path!r}, so there are no features to guide with. "
                "A caching or layer-skipping wrapper may bypass it: disable it while the module is attached."
            )
        value, self._value = self._value, None
        return value

    def close(self) -> None:
        """Stop recording."""
        self._handle.remove()
        self._value = None
