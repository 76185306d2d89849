"""What attachments put on a denoiser and a pipeline: one hook that adds shifts, one watch that it ran."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from ..errors import ModelError
from ..models.families import Family
from ..models.features import Hook, do_nothing
from ..models.load import GUIDED

if TYPE_CHECKING:
    from .attach import Attachment


class GuidedOutput:
    """The one forward hook of a guided denoiser: f~ = f + the sum of Delta * g_psi over its attachments.

    One for all of them, since a hook of its own would hand each module what the ones before it made of f.
    So shifts add, and the order of attaching and detaching does not matter.
    """

    _by_denoiser: ClassVar[weakref.WeakKeyDictionary[nn.Module, GuidedOutput]] = weakref.WeakKeyDictionary()

    def __init__(self) -> None:
        self._attachments: list[Attachment] = []
        self._handle: Any = None

    @classmethod
    def of(cls, denoiser: nn.Module) -> GuidedOutput:
        """Return the one hook of `denoiser`."""
        return cls._by_denoiser.setdefault(denoiser, cls())

    def add(self, denoiser: nn.Module, attachment: Attachment, family: Family) -> None:
        """Put one more attachment on, and with the first the hook."""
        if not self._attachments:
            self._family = family
            # Of the class, since offloading replaces the forward of the instance.
            self._signature = inspect.signature(type(denoiser).forward)
            # A plain forward hook survives CPU offload, where diffusers' own hook registry loses it.
            self._handle = denoiser.register_forward_hook(Hook(self._guide), with_kwargs=True)
            GUIDED.add(denoiser)
        self._attachments.append(attachment)

    def remove(self, denoiser: nn.Module, attachment: Attachment) -> None:
        """Take one attachment off, and with the last the hook."""
        if attachment in self._attachments:
            self._attachments.remove(attachment)
            if not self._attachments:
                self._handle.remove()
                GUIDED.discard(denoiser)

    @torch.compiler.disable
    def _guide(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        call = self._family.read(denoiser, self._signature.bind(denoiser, *args, **kwargs).arguments)
        model_pred = self._family.prediction(output[0], call, self._attachments[0].latent_channels)
        shifts = [attachment.shift(call, model_pred) for attachment in self._attachments]
        applied = [shift for shift in shifts if shift is not None]
        if not applied:
            return None
        guided = self._family.shifted(output[0], sum(applied[1:], start=applied[0]))
        if isinstance(output, tuple):
            return (guided, *output[1:])
        return type(output)(sample=guided)


class CallWatch:
    """Raises at the end of a pipeline call during which the denoiser did not run with its guidance.

    Every diffusers pipeline ends a call with `maybe_free_model_hooks()`; while a module is attached, the pipeline
    has one of its own that looks whether guidance took part.
    """

    _by_pipe: ClassVar[weakref.WeakKeyDictionary[Any, CallWatch]] = weakref.WeakKeyDictionary()
    _METHOD = "maybe_free_model_hooks"

    def __init__(self) -> None:
        self._attachments: dict[Attachment, int] = {}

    @classmethod
    def of(cls, pipe: Any) -> CallWatch:
        """Return the one watch of `pipe`."""
        return cls._by_pipe.setdefault(pipe, cls())

    def add(self, pipe: Any, attachment: Attachment) -> None:
        """Watch one more attachment."""
        if not self._attachments and hasattr(pipe, self._METHOD):
            setattr(pipe, self._METHOD, _FreeAndLook(pipe, self._METHOD, self._look))
        self._attachments[attachment] = attachment.calls

    def remove(self, pipe: Any, attachment: Attachment) -> None:
        """Watch one attachment less."""
        self._attachments.pop(attachment, None)
        if not self._attachments:
            vars(pipe).pop(self._METHOD, None)

    def _look(self) -> None:
        for attachment, before in self._attachments.items():
            self._attachments[attachment] = attachment.calls
            if attachment.calls == before:
                raise ModelError(
                    "Expected the guided denoiser to run during this call, but its hook did not fire: the images were "
                    "drawn without guidance. The pipeline's denoiser was replaced, or compiled or wrapped after "
                    "the module was attached. Detach, and attach to the denoiser in use (before compiling it)."
                )


class _FreeAndLook:
    """A pipeline's own method, and a look afterwards. A copy of the pipeline has its own method alone."""

    def __init__(self, pipe: Any, method: str, look: Callable[[], None]) -> None:
        self._pipe = weakref.ref(pipe)
        self._method = method
        self._look = look

    def __call__(self) -> None:
        pipe = self._pipe()
        if pipe is not None:  # else a shallow copy has outlived it
            getattr(type(pipe), self._method)(pipe)
        self._look()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo.get(id(self._pipe()))
        return getattr(type(copied), self._method).__get__(copied) if copied is not None else do_nothing

    def __reduce__(self) -> tuple[Any, ...]:
        return Hook, (do_nothing,)


def check_not_compiled(denoiser: nn.Module, feature_path: str) -> None:
    """Raise `ModelError` where the denoiser, or a part on the way to its feature block, is compiled already."""
    parts = feature_path.split(".")
    paths = ["", *(".".join(parts[: end + 1]) for end in range(len(parts)))]
    for path in paths:
        try:
            part = denoiser.get_submodule(path)
        except AttributeError:
            return  # a module for another model: what does not fit is said elsewhere
        if getattr(part, "_compiled_call_impl", None) is not None or hasattr(part, "_orig_mod"):
            name = f"{type(denoiser).__name__}.{path}" if path else type(denoiser).__name__
            raise ModelError(
                f"Expected {name} not to be compiled yet, since compiled code passes new hooks by, found it "
                "compiled. Attach first, then compile."
            )
