"""UNets: Stable Diffusion 1.x, 2.x and XL, which attend to the prompt's tokens, and unconditional DDPM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...errors import ConfigError, ModelError
from .base import Condition, DenoiserCall, DenoiserShape, Family


class StableDiffusion(Family):
    """Stable Diffusion 1.x and 2.x, and what all UNets share: inputs of these names, and a middle block."""

    title = "Stable Diffusion 1.x/2.x"
    conditions: ClassVar[tuple[str, ...]] = ("prompt_embeds",)

    def shape(self, denoiser: Any) -> DenoiserShape:
        """The middle block."""
        config = denoiser.config
        return DenoiserShape(
            latent_channels=config["out_channels"],
            feature_path="mid_block",
            feature_channels=config["block_out_channels"][-1],
            prompt_dim=config.get("cross_attention_dim") or 0,
        )

    def base_width(self, denoiser: Any) -> int:
        """Half of the UNet's first level."""
        return denoiser.config["block_out_channels"][0] // 2

    def read(self, denoiser: Any, call: dict[str, Any]) -> DenoiserCall:
        """`sample`, `timestep` and, where there is one, `encoder_hidden_states`."""
        return DenoiserCall.of(call["sample"], call["timestep"], prompt_embeds=call.get("encoder_hidden_states"))

    def predict(self, denoiser: Any, noisy_latents: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """Run the UNet."""
        options = self.added(noisy_latents, condition)
        return denoiser(noisy_latents, timesteps, condition["prompt_embeds"], return_dict=False, **options)[0]

    def added(self, noisy_latents: Tensor, condition: Condition) -> dict[str, Any]:
        """Further arguments of the UNet."""
        return {}

    def encode_captions(self, pipe: Any, captions: Sequence[str]) -> Condition:
        """Run the text encoders; each result is followed by its unconditional half, here None."""
        encoded = pipe.encode_prompt(
            prompt=list(captions),
            device=pipe._execution_device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )
        return dict(zip(self.conditions, encoded[::2], strict=False))


class StableDiffusionXL(StableDiffusion):
    """Stable Diffusion XL: two text encoders, and the size of the image among the conditions."""

    title = "Stable Diffusion XL"
    conditions = ("prompt_embeds", "pooled_prompt_embeds")

    def added(self, noisy_latents: Tensor, condition: Condition) -> dict[str, Any]:
        """The pooled prompt, and the size of an image that was neither resized nor cropped."""
        height, width = (side * self.latent_factor for side in noisy_latents.shape[-2:])
        pooled = condition["pooled_prompt_embeds"]
        time_ids = torch.tensor([[height, width, 0, 0, height, width]], dtype=pooled.dtype, device=pooled.device)
        return {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": time_ids.expand(len(pooled), -1)}}

    def encoding_key(self, pipe: Any) -> list[str]:
        """Whether the null condition is zeros."""
        return [str(bool(pipe.config.get("force_zeros_for_empty_prompt", True)))]

    def null_condition(self, pipe: Any) -> Condition:
        """Zeros, as in the pipeline unless its config says otherwise."""
        empty = super().null_condition(pipe)
        if pipe.config.get("force_zeros_for_empty_prompt", True):
            return {name: torch.zeros_like(value) for name, value in empty.items()}
        return empty


class Unconditional(StableDiffusion):
    """A `UNet2DModel` on pixels without class labels: all images are of one prompt, which is empty."""

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

    def predict(self, denoiser: Any, noisy_latents: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """Run the UNet."""
        return denoiser(noisy_latents, timesteps, return_dict=False)[0]

    def encode_captions(self, pipe: Any, captions: Sequence[str]) -> Condition:
        """No condition."""
        return {}

    def caption_read(self, caption: str) -> str:
        """Nothing: the model reads no caption."""
        return ""

    def encode_images(self, pipe: Any, pixels: Tensor) -> Tensor:
        """The pixels themselves, grey for a model of one channel."""
        if pipe.unet.config["out_channels"] == 1:
            pixels = pixels.mean(dim=1, keepdim=True)
        return pixels.float().cpu()

    def encoding_key(self, pipe: Any) -> list[str]:
        """The channels of the pixels."""
        return [str(pipe.unet.config["out_channels"])]

    def draw(self, pipe: Any, prompts: list[str], *, guidance_scale: float, resolution: int, **options: Any) -> Any:
        """Call the pipeline for as many images."""
        prompt = next(filter(None, prompts), None)
        if prompt is not None:
            raise ConfigError(f"Expected no prompt for an unconditional model, got {prompt!r}. Leave it out.")
        if guidance_scale != 1:
            raise ConfigError(
                "Expected guidance_scale 1 for an unconditional model, which has no condition to be guided by, got "
                f"{guidance_scale:g}. Set it to 1."
            )
        self.check_own_resolution(pipe, resolution)
        return pipe(batch_size=len(prompts), **options)
