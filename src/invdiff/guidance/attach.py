"""Put a guidance module on any pipeline's denoiser, and take it off again."""

from __future__ import annotations

import copy
import inspect
import weakref
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from ..diffusion import NoiseSchedule
from ..errors import ConfigError, ModelError
from ..features import FeatureCapture
from ..pipelines import denoiser_of
from .environments import EnvironmentMix, Environments
from .module import GuidanceModule, weight_signature


def attach(
    pipe: Any,
    module: GuidanceModule,
    scale: float = 1.0,
    environments: Environments = "uniform",
    *,
    seed: int = 0,
    strict: bool = True,
) -> Attachment:
    """Guide every image that `pipe` draws from now on: f~ = f + Delta * g_psi.

    Use it as a context manager, or call `detach()` on what is returned::

        with attach(pipe, module, scale=1.0):
            images = pipe("a photo of a waterbird", num_images_per_prompt=8).images

    Several modules may be attached at once: each reads the frozen prediction, so their shifts add.

    Args:
        pipe: A diffusers pipeline; its weights are not touched.
        module: A module made for this pipeline's model. What is attached is a copy of it, in the pipeline's
            precision.
        scale: Delta, the strength; 0 leaves the pipeline bit-identical.
        environments: The target mix: `"uniform"`, proportions, or the group of each image. See
            `EnvironmentMix`. Only `"uniform"` for an invariant module, which never sees the group.
        seed: Another seed draws other groups for the same starting noise.
        strict: Also refuse a model of the right shape with other weights.

    Raises:
        ModelError: The module was trained for another model; the message says what differs. Or the denoiser
            is compiled already, so that it would not notice the module.
        ConfigError: `environments` do not fit the module's groups.
    """
    check_fit(pipe, module, strict=strict)
    denoiser = denoiser_of(pipe)
    if getattr(denoiser, "_compiled_call_impl", None) is not None:
        raise ModelError(
            f"Expected {type(denoiser).__name__} not to be compiled yet, since compiled code passes new "
            "hooks by, found it compiled. Attach first, then compile."
        )
    return Attachment(pipe, module, scale, mix_for(module, environments, seed=seed))


def mix_for(module: GuidanceModule, environments: Environments, *, seed: int = 0) -> EnvironmentMix:
    """Return how groups are drawn for a module.

    Raises:
        ConfigError: `environments` do not fit the module's groups, or the module is invariant, so that any but
            `"uniform"` would silently do nothing.
    """
    if not module.sees_environment and not (isinstance(environments, str) and environments == "uniform"):
        raise ConfigError(
            "Expected environments 'uniform' with an invariant module, which never sees the group, got "
            f"{environments!r}. Leave them out, or train a module in balanced mode."
        )
    return EnvironmentMix(environments, module.num_groups, seed=seed)


class Attachment:
    """A guidance module on a pipeline's denoiser.

    Change `scale` or `mix` at any time; `detach()` restores the model.

    Attributes:
        scale: Delta, the strength of guidance.
        mix: How the groups of images are drawn.
        environments: Groups of the rows of the newest batch, (rows, factors), or None before the first.
    """

    def __init__(self, pipe: Any, module: GuidanceModule, scale: float, mix: EnvironmentMix) -> None:
        self.scale = float(scale)
        self.mix = mix
        self.environments: torch.Tensor | None = None
        self._module = copy.deepcopy(module).eval().requires_grad_(False)
        self._pipe = weakref.ref(pipe)
        self._timesteps: torch.Tensor | None = None
        self._start = np.inf
        denoiser = denoiser_of(pipe)
        self._features = FeatureCapture(denoiser, module.config["feature_path"])
        self._guided_output = _GuidedOutput.of(denoiser)
        self._guided_output.add(denoiser, self)

    def shift(self, call: dict[str, Any], model_pred: torch.Tensor) -> torch.Tensor | None:
        """Return Delta * g_psi for one denoiser call, (rows, channels, height, width), or None at scale 0.

        Args:
            call: The arguments of the denoiser's forward, by name.
            model_pred: The frozen prediction, (rows, channels, height, width).
        """
        features = self._features.take()
        noisy_latents = call["sample"]
        timestep = torch.as_tensor(call["timestep"], device=noisy_latents.device)
        environments = self._follow(noisy_latents, float(timestep.flatten()[0]))
        if self.scale == 0:
            return None
        device, dtype = model_pred.device, model_pred.dtype
        if self._module.device != device or self._module.dtype != dtype:
            self._module.to(device, dtype)
        with torch.no_grad():
            return self.scale * self._module(
                noisy_latents.to(dtype),
                timestep.expand(len(noisy_latents)),
                call["encoder_hidden_states"].to(dtype),
                model_pred,
                features.to(dtype),
                environments.to(device),
            )

    def _follow(self, noisy_latents: torch.Tensor, timestep: float) -> torch.Tensor:
        """Return the groups of each row; notice when new images begin, and draw theirs from their noise.

        Each pipeline call sets the scheduler's timesteps anew. A loop that sets them once for many batches is
        noticed by the timestep, which comes back to the highest. (That it rises is no sign: KDPM2 ancestral
        rises a little in the midst of an image.) A pipeline that sends each condition apart does so with the
        same latents, hence the same groups.
        """
        timesteps = getattr(getattr(self._pipe(), "scheduler", None), "timesteps", None)
        rows = len(noisy_latents)
        current = self.environments
        if current is None or timesteps is not self._timesteps or timestep >= self._start:
            self._timesteps, self._start = timesteps, timestep
            current = self.mix.rows(noisy_latents)
        elif rows < len(current) and len(current) % rows == 0:
            current = current[:rows]  # classifier-free guidance was switched off on the way: images stay
        elif rows > len(current) and rows % len(current) == 0:
            current = current.repeat(rows // len(current), 1)  # or on
        elif rows != len(current):
            current = self.mix.rows(noisy_latents)
        self.environments = current
        return current

    def detach(self) -> None:
        """Restore the plain model. Calling it twice does no harm."""
        self._guided_output.remove(self)
        self._features.close()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()


class _GuidedOutput:
    """The one forward hook of a guided denoiser: f~ = f + the sum of Delta * g_psi over its attachments.

    One for all of them, since a hook of its own would hand each module what the ones before it made of f.
    So shifts add, and the order of attaching and detaching does not matter.
    """

    _by_denoiser: ClassVar[weakref.WeakKeyDictionary[nn.Module, _GuidedOutput]] = weakref.WeakKeyDictionary()

    def __init__(self) -> None:
        self._attachments: list[Attachment] = []
        self._handle: Any = None

    @classmethod
    def of(cls, denoiser: nn.Module) -> _GuidedOutput:
        """Return the one hook of `denoiser`."""
        return cls._by_denoiser.setdefault(denoiser, cls())

    def add(self, denoiser: nn.Module, attachment: Attachment) -> None:
        """Put one more attachment on, and with the first the hook."""
        if not self._attachments:
            # A plain forward hook survives CPU offload, where diffusers' own hook registry loses it.
            self._handle = denoiser.register_forward_hook(self._guide, with_kwargs=True)
        self._attachments.append(attachment)

    def remove(self, attachment: Attachment) -> None:
        """Take one attachment off, and with the last the hook."""
        if attachment in self._attachments:
            self._attachments.remove(attachment)
            if not self._attachments:
                self._handle.remove()

    def _guide(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        call = inspect.signature(type(denoiser).forward).bind(denoiser, *args, **kwargs).arguments
        model_pred = output[0]
        shifts = [attachment.shift(call, model_pred) for attachment in self._attachments]
        applied = [shift for shift in shifts if shift is not None]
        if not applied:
            return None
        guided = model_pred + sum(applied[1:], start=applied[0])
        if isinstance(output, tuple):
            return (guided, *output[1:])
        return type(output)(sample=guided)


def check_fit(pipe: Any, module: GuidanceModule, *, strict: bool = True) -> None:
    """Raise `ModelError` unless `module` was made for `pipe`'s denoiser, saying every difference."""
    denoiser: Any = denoiser_of(pipe)
    config, wanted = denoiser.config, module.config
    found = {
        "denoiser_class": type(denoiser).__name__,
        "prediction_type": NoiseSchedule(pipe.scheduler).prediction_type,
        "latent_channels": config.get("out_channels"),
        "prompt_dim": config.get("cross_attention_dim"),
        "feature_channels": (tuple(config.get("block_out_channels", ())) or (None,))[-1],
    }
    wrong = [
        f"{name}: expected {wanted[name]}, found {value}" for name, value in found.items() if wanted[name] != value
    ]
    if not wrong and strict:
        expected, actual = np.asarray(wanted["weight_signature"]), np.asarray(weight_signature(denoiser))
        in_memory = ~np.isnan(actual)
        if expected.shape != actual.shape or not np.allclose(
            expected[in_memory], actual[in_memory], rtol=0.02, atol=1e-3
        ):
            wrong = ["weights: expected those it was trained beside, found others of the same shape"]
    if wrong:
        raise ModelError(
            f"The guidance module was trained for another model ({wanted['base_model'] or 'unnamed'}): "
            + "; ".join(wrong)
            + ". Load the pipeline it was trained for, or train a module for this one"
            + (" (strict=False attaches it all the same)." if wrong[0].startswith("weights") else ".")
        )
