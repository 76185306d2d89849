"""Flux: a transformer over packed latents, trained by flow matching, often with its guidance distilled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...errors import ModelError
from .base import Condition, DenoiserCall, DenoiserShape, TransformerFamily, rows_of

NO_GUIDANCE = 1.0
"""What a guidance-distilled model is told in audit and training: its plain conditional prediction."""


class Flux(TransformerFamily):
    """Flux.1: 2x2 latents are one token, and timesteps run from 0 to 1."""

    title = "Flux"

    def shape(self, denoiser: Any) -> DenoiserShape:
        """Read the last block that keeps image and text apart."""
        config = denoiser.config
        return DenoiserShape(
            latent_channels=denoiser.out_channels // 4,
            feature_path=f"transformer_blocks.{len(denoiser.transformer_blocks) - 1}",
            feature_channels=denoiser.inner_dim,
            prompt_dim=config["joint_attention_dim"],
        )

    def predict(
        self, denoiser: Any, noisy_latents: torch.Tensor, timesteps: torch.Tensor, condition: Condition
    ) -> torch.Tensor:
        """Pack, run the transformer, unpack."""
        rows, _, height, width = noisy_latents.shape
        embeds = condition["prompt_embeds"]
        guidance = torch.full((rows,), NO_GUIDANCE, dtype=embeds.dtype, device=embeds.device)
        output = denoiser(
            hidden_states=packed(noisy_latents),
            timestep=timesteps.to(embeds.dtype) / 1000,
            guidance=guidance if denoiser.config["guidance_embeds"] else None,
            encoder_hidden_states=embeds,
            pooled_projections=condition["pooled_prompt_embeds"],
            txt_ids=torch.zeros(embeds.shape[1], 3, dtype=embeds.dtype, device=embeds.device),
            img_ids=image_ids(height // 2, width // 2).to(embeds.device, embeds.dtype),
            return_dict=False,
        )
        return unpacked(output[0], height // 2, width // 2)

    def check_plain_input(self, denoiser: Any) -> None:
        """See `Family`; here the channels are packed."""
        if denoiser.config["in_channels"] != denoiser.out_channels:
            raise ModelError(
                f"Expected a Flux of noisy latents alone ({denoiser.out_channels} packed channels), got one of "
                f"{denoiser.config['in_channels']}, which wants masks or images beside them."
            )

    def read(self, denoiser: Any, call: dict[str, Any]) -> DenoiserCall:
        """Unpack `hidden_states` by the places in `img_ids`; `timestep` is put on the scale of the schedule."""
        tokens, ids = call["hidden_states"], call["img_ids"]
        height, width = (int(side) + 1 for side in ids.reshape(-1, 3)[:, 1:].amax(dim=0))
        if height * width != tokens.shape[1]:
            raise ModelError(
                f"Expected one token for each of {height}x{width} places, found {tokens.shape[1]} tokens. Pipelines "
                "that send further images along (Kontext) are not supported."
            )
        noisy_latents = unpacked(tokens[..., : denoiser.out_channels], height, width)
        return DenoiserCall(
            noisy_latents,
            rows_of(call["timestep"], tokens) * 1000,
            {"prompt_embeds": call["encoder_hidden_states"]},
        )

    def prediction(self, output: torch.Tensor, call: DenoiserCall, channels: int) -> torch.Tensor:
        """Unpack."""
        height, width = call.noisy_latents.shape[-2:]
        return unpacked(output, height // 2, width // 2)

    def shifted(self, output: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        """Pack the shift and add it."""
        return output + packed(shift)

    def granularity(self, denoiser: Any) -> int:
        """Return the side of a packed token."""
        return 2 * self.latent_factor

    def encode_captions(self, pipe: Any, captions: Sequence[str]) -> Condition:
        """Run CLIP (pooled) and T5."""
        embeds, pooled, _ = pipe.encode_prompt(prompt=list(captions), prompt_2=None, device=pipe._execution_device)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}


def packed(latents: torch.Tensor) -> torch.Tensor:
    """Make each 2x2 of latents (B, C, H, W) one token: (B, H/2 * W/2, 4 C)."""
    rows, channels, height, width = latents.shape
    blocks = latents.reshape(rows, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return blocks.reshape(rows, (height // 2) * (width // 2), channels * 4)


def unpacked(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Undo `packed` for a grid of height x width tokens: (B, C, 2 height, 2 width)."""
    rows, _, size = tokens.shape
    blocks = tokens.reshape(rows, height, width, size // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return blocks.reshape(rows, size // 4, 2 * height, 2 * width)


def image_ids(height: int, width: int) -> torch.Tensor:
    """Return the places of height x width tokens, (tokens, 3): 0, row, column."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3)
