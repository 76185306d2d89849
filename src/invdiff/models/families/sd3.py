"""Stable Diffusion 3: a transformer over latents and prompt tokens, trained by flow matching."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .base import Condition, DenoiserShape, TransformerFamily


class StableDiffusion3(TransformerFamily):
    """Stable Diffusion 3 and 3.5: up to three text encoders."""

    title = "Stable Diffusion 3"

    def shape(self, denoiser: Any) -> DenoiserShape:
        """Read the block in the middle."""
        config = denoiser.config
        return DenoiserShape(
            latent_channels=config["out_channels"],
            feature_path=self.middle_block(denoiser),
            feature_channels=denoiser.inner_dim,
            prompt_dim=config["joint_attention_dim"],
        )

    def predict(
        self, denoiser: Any, noisy_latents: torch.Tensor, timesteps: torch.Tensor, condition: Condition
    ) -> torch.Tensor:
        """Run the transformer."""
        output = denoiser(
            hidden_states=noisy_latents,
            encoder_hidden_states=condition["prompt_embeds"],
            pooled_projections=condition["pooled_prompt_embeds"],
            timestep=timesteps,
            return_dict=False,
        )
        return output[0]

    def encode_captions(self, pipe: Any, captions: Sequence[str]) -> Condition:
        """Run the text encoders that the pipeline has."""
        embeds, _, pooled, _ = pipe.encode_prompt(
            prompt=list(captions),
            prompt_2=None,
            prompt_3=None,
            device=pipe._execution_device,
            do_classifier_free_guidance=False,
        )
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
