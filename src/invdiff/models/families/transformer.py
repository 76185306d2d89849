"""Transformers over patches: Stable Diffusion 3, Flux, PixArt and DiT."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ...errors import DataError, ModelError
from ...text import label_of
from .base import Condition, DenoiserCall, DenoiserShape, Family


class TransformerFamily(Family):
    """What transformers share: features are the tokens of the block in the middle."""

    upper_blocks = "transformer_blocks"
    adapted = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
    prompt_width: ClassVar[str]  # the denoiser's setting with the width of prompt embeddings; "" where it reads none

    def shape(self, denoiser: Any) -> DenoiserShape:
        return DenoiserShape(  # output channels beyond the latents' are a learnt variance
            latent_channels=min(denoiser.config["in_channels"], denoiser.out_channels),
            feature_path=f"transformer_blocks.{len(denoiser.transformer_blocks) // 2}",
            feature_channels=denoiser.inner_dim,
            width=min(256, denoiser.inner_dim // 8),
            prompt_dim=denoiser.config[self.prompt_width] if self.prompt_width else 0,
        )

    def hidden_states(self, block_output: Any) -> Tensor:
        # Text comes first where a block returns both.
        tokens = block_output[-1] if isinstance(block_output, tuple) else block_output
        return tokens.transpose(1, 2)[..., None]

    def on_grid(self, features: Tensor, noisy_latents: Tensor) -> Tensor:
        rows, channels, tokens, _ = features.shape
        height, width = noisy_latents.shape[-2:]
        patch = round((height * width / tokens) ** 0.5)
        if patch < 1 or (height // patch) * (width // patch) != tokens:
            raise ModelError(
                f"Expected one token for each patch of {height}x{width} latents, found {tokens} tokens. A wrapper "
                "that drops or adds tokens cannot be guided: disable it while the module is attached."
            )
        return features.reshape(rows, channels, height // patch, width // patch)


class StableDiffusion3(TransformerFamily):
    """Stable Diffusion 3 and 3.5: up to three text encoders."""

    title = "Stable Diffusion 3"
    conditions = ("prompt_embeds", "", "pooled_prompt_embeds")
    prompt_width = "joint_attention_dim"

    def predict(self, denoiser: Any, noisy_latents: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        embeds, pooled = condition["prompt_embeds"], condition["pooled_prompt_embeds"]
        return denoiser(noisy_latents, embeds, pooled, timesteps, return_dict=False)[0]


class Flux(TransformerFamily):
    """Flux.1: 2x2 latents are one token, and timesteps run from 0 to 1."""

    title = "Flux"
    doubles_rows = False
    packing = 2
    conditions = ("prompt_embeds", "pooled_prompt_embeds")
    prompt_width = "joint_attention_dim"

    def shape(self, denoiser: Any) -> DenoiserShape:
        # The last block that keeps image and text apart.
        last = f"transformer_blocks.{len(denoiser.transformer_blocks) - 1}"
        return replace(super().shape(denoiser), latent_channels=denoiser.out_channels // 4, feature_path=last)

    def predict(self, denoiser: Any, noisy_latents: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        rows, _, height, width = noisy_latents.shape
        embeds = condition["prompt_embeds"]
        guidance = torch.full((rows,), self.distilled_guidance, dtype=embeds.dtype, device=embeds.device)
        # Of each token of the image: 0, row, column.
        places = torch.cartesian_prod(torch.arange(1), torch.arange(height // 2), torch.arange(width // 2))
        output = denoiser(
            hidden_states=packed(noisy_latents),
            timestep=timesteps.to(embeds.dtype) / 1000,
            guidance=guidance if denoiser.config["guidance_embeds"] else None,
            encoder_hidden_states=embeds,
            pooled_projections=condition["pooled_prompt_embeds"],
            txt_ids=torch.zeros(embeds.shape[1], 3, dtype=embeds.dtype, device=embeds.device),
            img_ids=places.to(embeds.device, embeds.dtype),
            return_dict=False,
        )
        return unpacked(output[0], height // 2, width // 2)

    def read(self, denoiser: Any, call: dict[str, Any]) -> DenoiserCall:
        tokens, ids = call["hidden_states"], call["img_ids"]
        height, width = (int(side) + 1 for side in ids.reshape(-1, 3)[:, 1:].amax(dim=0))
        if height * width != tokens.shape[1]:
            raise ModelError(f"Expected {height}x{width} tokens, found {tokens.shape[1]}: Kontext is not supported.")
        noisy_latents = unpacked(tokens[..., : denoiser.out_channels], height, width)
        return super().read(denoiser, call | {"hidden_states": noisy_latents, "timestep": call["timestep"] * 1000})

    def prediction(self, output: Tensor, call: DenoiserCall, channels: int) -> Tensor:
        height, width = call.noisy_latents.shape[-2:]
        return unpacked(output, height // 2, width // 2)

    def shifted(self, output: Tensor, shift: Tensor) -> Tensor:
        return output + packed(shift)

    def reads_guidance(self, denoiser: Any) -> bool:
        return bool(denoiser.config["guidance_embeds"])


def packed(latents: Tensor) -> Tensor:
    """Make each 2x2 of latents (B, C, H, W) one token: (B, H/2 * W/2, 4 C)."""
    return F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2).contiguous()


def unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    """Undo `packed` for a grid of height x width tokens: (B, C, 2 height, 2 width)."""
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height, width)), 2)


class PixArt(TransformerFamily):
    """PixArt: padding tokens are masked, and a learnt variance follows the noise."""

    title = "PixArt"
    conditions = ("prompt_embeds", "prompt_attention_mask")
    prompt_width = "caption_channels"

    def predict(self, denoiser: Any, noisy_latents: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        sizes: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
        if getattr(denoiser, "use_additional_conditions", False):
            height, width = (float(side * self.latent_factor) for side in noisy_latents.shape[-2:])
            values = {"resolution": [height, width], "aspect_ratio": [height / width]}
            sizes = {name: noisy_latents.new_tensor([v]).expand(len(noisy_latents), -1) for name, v in values.items()}
        output = denoiser(
            noisy_latents,
            encoder_hidden_states=condition["prompt_embeds"],
            encoder_attention_mask=condition["prompt_attention_mask"],
            timestep=timesteps,
            added_cond_kwargs=sizes,
            return_dict=False,
        )
        return output[0][:, : denoiser.config["in_channels"]]

    def draw(self, pipe: Any, prompts: list[str], *, guidance_scale: float, resolution: int, **options: Any) -> Any:
        # As captions are encoded here; squares need no binning.
        options |= {"clean_caption": False, "use_resolution_binning": False}
        return super().draw(pipe, prompts, guidance_scale=guidance_scale, resolution=resolution, **options)


class DiT(TransformerFamily):
    """DiT-XL/2 and its kin: a caption is a class's name, as `pipe.labels` has it, or its number.

    A last class stands for no caption. A learnt variance follows the noise.
    """

    title = "class-conditional DiT"
    prompt_width = ""
    draws_sizes = False

    def shape(self, denoiser: Any) -> DenoiserShape:
        return replace(super().shape(denoiser), num_classes=denoiser.config["num_embeds_ada_norm"] + 1)

    def predict(self, denoiser: Any, noisy_latents: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        output = denoiser(noisy_latents, timestep=timesteps, class_labels=condition["class_labels"], return_dict=False)
        return output[0][:, : denoiser.config["in_channels"]]

    def encode_captions(self, pipe: Any, captions: Sequence[str]) -> Condition:
        return {"class_labels": torch.tensor([class_label(pipe, caption) for caption in captions])}

    def null_condition(self, pipe: Any) -> Condition:
        return {"class_labels": torch.tensor([pipe.transformer.config["num_embeds_ada_norm"]])}

    def encoding_key(self, pipe: Any) -> list[str]:
        labels = json.dumps(getattr(pipe, "labels", {}), sort_keys=True)
        return [labels, str(pipe.transformer.config["num_embeds_ada_norm"])]

    def check_drawn(self, pipe: Any, prompts: Sequence[str], resolution: int) -> None:
        super().check_drawn(pipe, prompts, resolution)
        self.encode_captions(pipe, prompts)

    def draw(self, pipe: Any, prompts: list[str], *, guidance_scale: float, resolution: int, **options: Any) -> Any:
        labels = [class_label(pipe, prompt) for prompt in prompts]
        return pipe(class_labels=labels, guidance_scale=guidance_scale, **options)


def class_label(pipe: Any, name: str) -> int:
    """The number of a class given by its name or by the number itself, else a `DataError`."""
    known: dict[str, int] = getattr(pipe, "labels", {})
    count = int(pipe.transformer.config["num_embeds_ada_norm"])
    text = name.strip()
    if text in known:
        return known[text]
    number = label_of(text)  # pandas writes 0 as 0.0 beside a missing value
    if number.isdecimal() and int(number) < count:
        return int(number)
    examples = f" such as {', '.join(list(known)[:3])}" if known else ""
    raise DataError(f"Expected the name of a class{examples}, or a number from 0 to {count - 1}, got {name!r}.")
