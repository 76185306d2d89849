"""Unconditional diffusion in pixel space (DDPM): a UNet that is told nothing but the noise level."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...errors import ConfigError, ModelError
from .base import Condition, Family, UNetFamily


class Unconditional(UNetFamily):
    """A `UNet2DModel` without class labels: all images are of one prompt, which is empty."""

    title = "unconditional DDPM"
    needs_prompts = False

    def __init__(self, pipe: Any) -> None:
        encoders = [name for name in ("vae", "vqvae") if getattr(pipe, name, None) is not None]
        if encoders:
            raise ModelError(
                f"Expected an unconditional model of pixels, got a {type(pipe).__name__} with a {encoders[0]}. "
                "Unconditional latent diffusion is not supported."
            )
        super().__init__(pipe)

    def predict(
        self, denoiser: Any, noisy_latents: torch.Tensor, timesteps: torch.Tensor, condition: Condition
    ) -> torch.Tensor:
        """Run the UNet."""
        return denoiser(noisy_latents, timesteps, return_dict=False)[0]

    def encode_captions(self, pipe: Any, captions: Sequence[str]) -> Condition:
        """Return no condition."""
        return {}

    def caption_read(self, caption: str) -> str:
        """Return nothing: whatever is written beside an image, the model is not told."""
        return ""

    def encode_images(self, pipe: Any, pixels: torch.Tensor) -> torch.Tensor:
        """Return the pixels themselves, grey for a model of one channel."""
        if pipe.unet.config["out_channels"] == 1:
            pixels = pixels.mean(dim=1, keepdim=True)
        return pixels.float().cpu()

    def encoding_key(self, pipe: Any) -> list[str]:
        """Return the channels of the pixels."""
        return [str(pipe.unet.config["out_channels"])]

    def draw(
        self, pipe: Any, prompts: Sequence[str], *, guidance_scale: float, resolution: int, **options: Any
    ) -> Any:
        """Call the pipeline for as many images."""
        told = [prompt for prompt in prompts if prompt]
        if told:
            raise ConfigError(f"Expected no prompt for an unconditional model, got {told[0]!r}. Leave it out.")
        if guidance_scale != 1:
            raise ConfigError(
                "Expected guidance_scale 1 for an unconditional model, which has no condition to be guided by, got "
                f"{guidance_scale:g}. Set it to 1."
            )
        check_own_resolution(self, pipe, pipe.unet, resolution)
        return pipe(batch_size=len(prompts), **options)


def check_own_resolution(family: Family, pipe: Any, denoiser: Any, resolution: int) -> None:
    """Raise `ConfigError` where a pipeline that draws one size only is asked for another."""
    own = family.resolution(pipe, denoiser)
    if resolution not in (0, own):
        raise ConfigError(f"Expected resolution {own}, the only one that a {family.title} draws, got {resolution}.")
