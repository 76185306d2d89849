"""PixArt-alpha and PixArt-Sigma: a transformer that attends to T5 tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .base import Condition, DenoiserCall, DenoiserShape, TransformerFamily


class PixArt(TransformerFamily):
    """PixArt: padding tokens are masked, and a learnt variance follows the noise."""

    title = "PixArt"

    def shape(self, denoiser: Any) -> DenoiserShape:
        """Read the block in the middle."""
        config = denoiser.config
        return DenoiserShape(
            latent_channels=config["in_channels"],
            feature_path=self.middle_block(denoiser),
            feature_channels=denoiser.inner_dim,
            prompt_dim=config["caption_channels"],
        )

    def predict(
        self, denoiser: Any, noisy_latents: torch.Tensor, timesteps: torch.Tensor, condition: Condition
    ) -> torch.Tensor:
        """Run the transformer and leave out the variance."""
        output = denoiser(
            noisy_latents,
            encoder_hidden_states=condition["prompt_embeds"],
            encoder_attention_mask=condition["prompt_attention_mask"],
            timestep=timesteps,
            added_cond_kwargs=self.added(denoiser, noisy_latents),
            return_dict=False,
        )
        return output[0][:, : denoiser.config["in_channels"]]

    def added(self, denoiser: Any, noisy_latents: torch.Tensor) -> dict[str, Any]:
        """Return size and aspect ratio, for the models that are told them."""
        if not getattr(denoiser, "use_additional_conditions", False):
            return {"resolution": None, "aspect_ratio": None}
        rows, _, *sides = noisy_latents.shape
        height, width = (float(side * self.latent_factor) for side in sides)
        options: dict[str, Any] = {"dtype": noisy_latents.dtype, "device": noisy_latents.device}
        return {
            "resolution": torch.tensor([[height, width]], **options).expand(rows, -1),
            "aspect_ratio": torch.tensor([[height / width]], **options).expand(rows, -1),
        }

    def read(self, denoiser: Any, call: dict[str, Any]) -> DenoiserCall:
        """Read the mask as well."""
        plain = super().read(denoiser, call)
        mask = call.get("encoder_attention_mask")
        if mask is None:
            return plain
        return DenoiserCall(plain.noisy_latents, plain.timesteps, plain.condition | {"prompt_attention_mask": mask})

    def encode_captions(self, pipe: Any, captions: Sequence[str]) -> Condition:
        """Run T5."""
        embeds, mask, _, _ = pipe.encode_prompt(
            list(captions), do_classifier_free_guidance=False, device=pipe._execution_device
        )
        return {"prompt_embeds": embeds, "prompt_attention_mask": mask}

    def draw(
        self, pipe: Any, prompts: Sequence[str], *, guidance_scale: float, resolution: int, **options: Any
    ) -> Any:
        """Call the pipeline; captions are encoded as they are, and squares need no binning."""
        return super().draw(
            pipe,
            prompts,
            guidance_scale=guidance_scale,
            resolution=resolution,
            clean_caption=False,
            use_resolution_binning=False,
            **options,
        )
