"""The families of denoisers that invdiff guides, each with one small adapter, in `unet` or `transformer`."""

from typing import Any, cast

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
from .base import Condition, DenoiserCall, Family
from .transformer import DiT, Flux, PixArt, StableDiffusion3
from .unet import StableDiffusion, StableDiffusionXL, Unconditional

__all__ = ["Condition", "DenoiserCall", "Family", "family_of", "family_that_draws"]

_TRANSFORMERS: dict[type, type[Family]] = {
    SD3Transformer2DModel: StableDiffusion3,
    FluxTransformer2DModel: Flux,
    PixArtTransformer2DModel: PixArt,
    DiTTransformer2DModel: DiT,
}
_INPUTS = ("addition_embed_type", "encoder_hid_dim_type", "class_embed_type", "num_class_embeds", "time_cond_proj_dim")
"""Settings of a UNet that stand for further inputs."""


def family_that_draws(pipe: Any) -> Family:
    """The adapter as `family_of` has it; `ModelError` where the denoiser expects more than noise and a condition."""
    family, denoiser = family_of(pipe), cast(Any, denoiser_of(pipe))
    given, wanted = family.shape(denoiser).latent_channels * family.packing**2, denoiser.config.in_channels
    if wanted != given:
        raise ModelError(
            f"Expected a denoiser of noisy latents alone ({given} channels), got one of {wanted} channels, which "
            "expects masks or images beside them. Audit, train and draw with the text-to-image model."
        )
    if any(getattr(denoiser, name, None) is not None for name in ("encoder_hid_proj", "image_proj")):
        raise ModelError(
            "Expected a denoiser of prompts alone, found one with an IP-Adapter, which expects images beside them. "
            "Call pipe.unload_ip_adapter() first; load it again beside attached guidance."
        )
    return family


def family_of(pipe: Any) -> Family:
    """The adapter of a pipeline's denoiser; `ModelError` where its family is not supported."""
    denoiser: Any = denoiser_of(pipe)
    network: Any = getattr(denoiser, "_orig_mod", denoiser)  # what torch.compile wraps tells the family
    for network_class, family in _TRANSFORMERS.items():
        if isinstance(network, network_class):
            return family(pipe)
    config = getattr(network, "config", {})
    further = {name: config[name] for name in _INPUTS if config.get(name) is not None}
    if isinstance(network, UNet2DModel):  # of pixels only
        parts = {name: getattr(pipe, name, None) for name in ("vae", "vqvae")}
        further |= {name: type(part).__name__ for name, part in parts.items() if part is not None}
        if not further:
            return Unconditional(pipe)
    if isinstance(network, UNet2DConditionModel):
        added = {name: value for name, value in further.items() if value != "ip_image_proj"}
        if not added:
            return StableDiffusion(pipe)
        if added == {"addition_embed_type": "text_time"}:
            encoder = getattr(pipe, "text_encoder_2", None)
            pooled = 0 if encoder is None else encoder.config.projection_dim
            numbers = (config["projection_class_embeddings_input_dim"] - pooled) / config["addition_time_embed_dim"]
            if encoder is None or numbers == 6:  # the image's size, where it was cut, and the size wanted
                return StableDiffusionXL(pipe)
            further["time_ids"] = f"{numbers:g} numbers, an aesthetic score among them (a refiner)"
    inputs = "".join(f" with {name} {value!r}" for name, value in further.items())
    raise ModelError(
        "Expected a denoiser of Stable Diffusion 1.x, 2.x, XL or 3, Flux, PixArt, DiT or unconditional DDPM, got a "
        f"{type(network).__name__}{inputs}, whose inputs invdiff does not know."
    )
