"""Stable Diffusion 1.x, 2.x and XL: a UNet that attends to the prompt's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .base import Condition, UNetFamily


class StableDiffusion(UNetFamily):
    """Stable Diffusion 1.x and 2.x."""

    title = "Stable Diffusion 1.x/2.x"

    def predict(
        self, denoiser: Any, noisy_latents: torch.Tensor, timesteps: torch.Tensor, condition: Condition
    ) -> torch.Tensor:
        """Run the UNet."""
        output = denoiser(
            noisy_latents,
            timesteps,
            encoder_hidden_states=condition["prompt_embeds"],
            return_dict=False,
            **self.added(noisy_latents, condition),
        )
        return output[0]

    def added(self, noisy_latents: torch.Tensor, condition: Condition) -> dict[str, Any]:
        """Return further arguments of the UNet."""
        return {}

    def encode_captions(self, pipe: Any, captions: Sequence[str]) -> Condition:
        """Run the text encoder."""
        embeds = pipe.encode_prompt(
            prompt=list(captions),
            device=pipe._execution_device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )[0]
        return {"prompt_embeds": embeds}


class StableDiffusionXL(StableDiffusion):
    """Stable Diffusion XL: two text encoders, and the size of the image among the conditions."""

    title = "Stable Diffusion XL"

    def added(self, noisy_latents: torch.Tensor, condition: Condition) -> dict[str, Any]:
        """Return the pooled prompt, and an image that was neither resized nor cropped."""
        height, width = (side * self.latent_factor for side in noisy_latents.shape[-2:])
        pooled = condition["pooled_prompt_embeds"]
        time_ids = torch.tensor([[height, width, 0, 0, height, width]], dtype=pooled.dtype, device=pooled.device)
        return {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": time_ids.expand(len(pooled), -1)}}

    def encode_captions(self, pipe: Any, captions: Sequence[str]) -> Condition:
        """Run both text encoders."""
        embeds, _, pooled, _ = pipe.encode_prompt(
            prompt=list(captions),
            device=pipe._execution_device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def encoding_key(self, pipe: Any) -> list[str]:
        """Return whether the null condition is zeros."""
        return [str(bool(pipe.config.get("force_zeros_for_empty_prompt", True)))]

    def null_condition(self, pipe: Any) -> Condition:
        """Return zeros, as the pipeline does unless its config says otherwise."""
        empty = super().null_condition(pipe)
        if pipe.config.get("force_zeros_for_empty_prompt", True):
            return {name: torch.zeros_like(value) for name, value in empty.items()}
        return empty
