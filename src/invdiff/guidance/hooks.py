"""The hooks of guidance: one on a denoiser that adds shifts, one on a pipeline that notices calls without guidance."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn

from ..errors import ModelError
from ..models.families import DenoiserCall, Family
from ..models.frozen import Hook, do_nothing
from ..models.load import GUIDED

Shift = Callable[[DenoiserCall, torch.Tensor], torch.Tensor | None]
"""From a denoiser call and the frozen prediction (rows, channels, height, width) to Delta * g_psi, or None."""


class GuidedOutput:
    """The one forward hook of a guided denoiser: f~ = f + the sum of Delta * g_psi over all attached modules.

    One for all of them, since with a hook of its own each module would read the output of the ones before it. So
    shifts add, and the order of attaching and detaching does not matter.
    """

    _of: ClassVar[weakref.WeakKeyDictionary[nn.Module, GuidedOutput]] = weakref.WeakKeyDictionary()

    def __init__(self, denoiser: nn.Module, family: Family) -> None:
        self._shifts: list[Shift] = []
        self._family, self._channels = family, family.shape(denoiser).latent_channels
        # The signature of the class, since offloading replaces the forward of the instance.
        self._signature = inspect.signature(type(denoiser).forward)
        # A plain forward hook survives CPU offload; one of diffusers' own hook registry does not.
        self._handle = denoiser.register_forward_hook(Hook(self._guide), with_kwargs=True)

    @classmethod
    def add(cls, denoiser: nn.Module, family: Family, shift: Shift) -> None:
        """Add `shift` to every prediction of `denoiser` from now on."""
        if denoiser not in cls._of:
            cls._of[denoiser] = cls(denoiser, family)
            GUIDED.add(denoiser)
        cls._of[denoiser]._shifts.append(shift)

    @classmethod
    def remove(cls, denoiser: nn.Module, shift: Shift) -> None:
        """Undo `add`; without effect where it is undone already."""
        hook = cls._of.get(denoiser)
        if hook is not None and shift in hook._shifts:
            hook._shifts.remove(shift)
            if not hook._shifts:
                hook._handle.remove()
                del cls._of[denoiser]
                GUIDED.discard(denoiser)

    @torch.compiler.disable
    def _guide(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        call = self._family.read(denoiser, self._signature.bind(denoiser, *args, **kwargs).arguments)
        model_pred = self._family.prediction(output[0], call, self._channels)
        shifts = [found for shift in self._shifts if (found := shift(call, model_pred)) is not None]
        if not shifts:
            return None
        guided = self._family.shifted(output[0], sum(shifts[1:], start=shifts[0]))
        return (guided, *output[1:]) if isinstance(output, tuple) else type(output)(sample=guided)


class CallWatch:
    """Raises at the end of a pipeline call during which the denoiser did not run with its guidance.

    Every diffusers pipeline ends a call with `maybe_free_model_hooks()`; while a module is attached, this object takes
    the place of that method. A copy of the pipeline has the plain method.
    """

    METHOD = "maybe_free_model_hooks"

    def __init__(self, pipe: Any) -> None:
        self._pipe = weakref.ref(pipe)
        self._counters: dict[Callable[[], int], int] = {}

    @classmethod
    def add(cls, pipe: Any, calls: Callable[[], int]) -> None:
        """Watch that `calls()`, how often guidance took part, rises in every pipeline call from now on."""
        if hasattr(type(pipe), cls.METHOD):
            watch = vars(pipe).get(cls.METHOD)
            if not isinstance(watch, cls):
                watch = cls(pipe)
                setattr(pipe, cls.METHOD, watch)
            watch._counters[calls] = calls()

    @classmethod
    def remove(cls, pipe: Any, calls: Callable[[], int]) -> None:
        """Undo `add`; without effect where it is undone already."""
        watch = vars(pipe).get(cls.METHOD)
        if isinstance(watch, cls):
            watch._counters.pop(calls, None)
            if not watch._counters:
                del vars(pipe)[cls.METHOD]

    def __call__(self) -> None:
        """Free the hooks as the pipeline does, then compare the counters."""
        pipe = self._pipe()
        if pipe is not None:  # else a shallow copy has outlived it
            getattr(type(pipe), self.METHOD)(pipe)
        for calls, before in self._counters.items():
            self._counters[calls] = calls()
            if calls() == before:
                raise ModelError(
                    "Expected the guided denoiser to run during this call, but its hook did not fire: the images were "
                    "drawn without guidance. The pipeline's denoiser was replaced, or compiled or wrapped after "
                    "the module was attached. Detach, and attach to the denoiser in use (before compiling it)."
                )

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo.get(id(self._pipe()))
        return getattr(type(copied), self.METHOD).__get__(copied) if copied is not None else do_nothing

    def __reduce__(self) -> tuple[Any, ...]:
        return Hook, (do_nothing,)


def check_not_compiled(denoiser: nn.Module, feature_path: str) -> None:
    """Raise `ModelError` where the denoiser, or a part on the way to its feature block, is compiled already."""
    parts = feature_path.split(".")
    for path in (".".join(parts[:end]) for end in range(len(parts) + 1)):
        try:
            part = denoiser.get_submodule(path)
        except AttributeError:
            return  # a module for another model: `check_fit` names the differences
        if getattr(part, "_compiled_call_impl", None) is not None or hasattr(part, "_orig_mod"):
            name = f"{type(denoiser).__name__}.{path}" if path else type(denoiser).__name__
            raise ModelError(
                f"Expected {name} not to be compiled yet, since compiled code ignores new hooks, found it compiled. "
                "Attach first, then compile."
            )
