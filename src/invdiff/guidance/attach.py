"""Put a guidance module on any pipeline's denoiser, and take it off again."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch
from torch import nn

from ..diffusion import NoiseSchedule
from ..errors import ModelError
from ..pipelines import denoiser_of
from .environments import EnvironmentMix, Environments
from .features import FeatureCapture
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

    Args:
        pipe: A diffusers pipeline; its weights are not touched.
        module: A module made for this pipeline's model.
        scale: Delta, the strength; 0 leaves the pipeline bit-identical.
        environments: The target mix: `"uniform"`, proportions, or the group of each image. See
            `EnvironmentMix`.
        seed: Another seed draws other groups for the same starting noise.
        strict: Also refuse a model of the right shape with other weights.

    Raises:
        ModelError: The module was trained for another model; the message says what differs.
        ConfigError: `environments` do not fit the module's groups.
    """
    check_fit(pipe, module, strict=strict)
    return Attachment(denoiser_of(pipe), module, scale, EnvironmentMix(environments, module.num_groups, seed=seed))


class Attachment:
    """A guidance module on a denoiser. Change `scale` or `mix` at any time; `detach()` restores the model.

    Attributes:
        scale: Delta, the strength of guidance.
        mix: How the groups of images are drawn.
        environments: Groups of the rows of the newest batch, (rows, factors), or None before the first.
    """

    def __init__(
        self, denoiser: nn.Module, module: GuidanceModule, scale: float, mix: EnvironmentMix
    ) -> None:
        self.scale = float(scale)
        self.mix = mix
        self.environments: torch.Tensor | None = None
        self._module = module.eval().requires_grad_(False)
        self._signature = inspect.signature(type(denoiser).forward)
        self._start = self._last = -np.inf
        self._features = FeatureCapture(denoiser, module.config["feature_path"])
        # A plain forward hook survives CPU offload, where diffusers' own hook registry loses it.
        self._handle = denoiser.register_forward_hook(self._guide, with_kwargs=True)

    def _guide(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        features = self._features.take()
        call = self._signature.bind(denoiser, *args, **kwargs).arguments
        noisy_latents = call["sample"]
        timestep = torch.as_tensor(call["timestep"], device=noisy_latents.device)
        self._follow(noisy_latents, float(timestep.flatten()[0]))
        if self.scale == 0:
            return None
        model_pred = output[0]
        if self._module.device != noisy_latents.device or self._module.dtype != model_pred.dtype:
            self._module.to(noisy_latents.device, model_pred.dtype)
        assert self.environments is not None
        with torch.no_grad():
            shift = self._module(
                noisy_latents,
                timestep.expand(len(noisy_latents)),
                call["encoder_hidden_states"],
                model_pred,
                features,
                self.environments.to(noisy_latents.device),
            )
        guided = model_pred + self.scale * shift
        if isinstance(output, tuple):
            return (guided, *output[1:])
        return type(output)(sample=guided)

    def _follow(self, noisy_latents: torch.Tensor, timestep: float) -> None:
        """Notice when a new batch of images begins, and draw its groups from its starting noise.

        Within one batch timesteps never rise above the last, and only the first step runs at the highest. A
        pipeline that sends each condition apart does so with the same latents, hence the same groups.
        """
        begins = timestep > self._last or timestep >= self._start
        if begins or self.environments is None or len(self.environments) != len(noisy_latents):
            self._start = timestep
            self.environments = self.mix.rows(noisy_latents)
        self._last = timestep

    def detach(self) -> None:
        """Restore the plain model. Calling it twice does no harm."""
        self._handle.remove()
        self._features.close()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()


def check_fit(pipe: Any, module: GuidanceModule, *, strict: bool = True) -> None:
    """Raise `ModelError` unless `module` was made for `pipe`'s denoiser, saying every difference."""
    denoiser = denoiser_of(pipe)
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
        if expected.shape != actual.shape or not np.allclose(expected, actual, rtol=0.02, atol=1e-3):
            wrong = ["weights: expected those it was trained beside, found others of the same shape"]
    if wrong:
        raise ModelError(
            f"The guidance module was trained for another model ({wanted['base_model'] or 'unnamed'}): "
            + "; ".join(wrong)
            + ". Load the pipeline it was trained for, or train a module for this one"
            + (" (strict=False attaches it all the same)." if wrong[0].startswith("weights") else ".")
        )
