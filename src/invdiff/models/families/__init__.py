"""The families of denoisers that invdiff guides, each with one small adapter."""

from __future__ import annotations

from typing import Any

from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)

from ...errors import ModelError
from ..load import denoiser_of
from .base import Condition, DenoiserCall, DenoiserShape, Family
from .dit import DiT
from .flux import Flux
from .pixart import PixArt
from .sd3 import StableDiffusion3
from .unconditional import Unconditional
from .unet import StableDiffusion, StableDiffusionXL

__all__ = ["Condition", "DenoiserCall", "DenoiserShape", "Family", "family_of"]

_FAMILIES: tuple[tuple[type, type[Family]], ...] = (
    (SD3Transformer2DModel, StableDiffusion3),
    (FluxTransformer2DModel, Flux),
    (PixArtTransformer2DModel, PixArt),
    (DiTTransformer2DModel, DiT),
)


def family_of(pipe: Any) -> Family:
    """Return the adapter of a pipeline's denoiser.

    Raises:
        ModelError: Its family is not supported.
    """
    denoiser: Any = denoiser_of(pipe)
    # torch.compile wraps a module; what it wraps tells the family.
    network: Any = getattr(denoiser, "_orig_mod", denoiser)
    for network_class, family in _FAMILIES:
        if isinstance(network, network_class):
            return family(pipe)
    config = getattr(network, "config", {})
    told_a_class = config.get("class_embed_type") is not None or config.get("num_class_embeds") is not None
    told_the_prompt = config.get("encoder_hid_dim_type") in (None, "ip_image_proj") and not told_a_class
    if isinstance(network, UNet2DConditionModel) and told_the_prompt:
        addition = config.get("addition_embed_type")
        if addition is None:
            return StableDiffusion(pipe)
        if addition == "text_time":
            return StableDiffusionXL(pipe)
    if isinstance(network, UNet2DModel) and not told_a_class:
        return Unconditional(pipe)
    raise ModelError(
        "Expected a denoiser of Stable Diffusion 1.x, 2.x, XL or 3, Flux, PixArt, DiT or unconditional DDPM, got a "
        f"{type(network).__name__}{_kind(config)}, whose inputs invdiff does not know."
    )


def _kind(config: Any) -> str:
    names = ("addition_embed_type", "encoder_hid_dim_type", "class_embed_type", "num_class_embeds")
    told = [f"{name} {config.get(name)!r}" for name in names if config.get(name) is not None]
    return f" with {', '.join(told)}" if told else ""
