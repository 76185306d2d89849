"""UNets: Stable Diffusion 1.x, 2.x and XL, which attend to the prompt's tokens, and unconditional DDPM."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...errors import ConfigError
from .base import Condition, DenoiserShape, Family


class StableDiffusion(Family):
    """Stable Diffusion 1.x and 2.x, and what all UNets share: features of the middle block, or the last down block."""

    title = "Stable Diffusion 1.x/2.x"
    conditions: ClassVar[tuple[str, ...]] = ("prompt_embeds",)

    def shape(self, denoiser: Any) -> DenoiserShape:
        config = denoiser.config
        return DenoiserShape(
            latent_channels=config["out_channels"],
            feature_path="mid_block" if denoiser.mid_block else f"down_blocks.{len(denoiser.down_blocks) - 1}",
            feature_channels=config["block_out_channels"][-1],
            width=config["block_out_channels"][0] // 2,
            prompt_dim=config.get("cross_attention_dim") or 0,
        )

    def hidden_states(self, block_output: Any) -> Tensor:
        return block_output[0] if isinstance(block_output, tuple) else block_output  # what a down block skips follows

    def predict(self, denoiser: Any, noisy_latents: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        options: dict[str, Any] = {}
        if "pooled_prompt_embeds" in condition:  # with the size of an image that was neither resized nor cropped
            height, width = (side * self.latent_factor for side in noisy_latents.shape[-2:])
            pooled = condition["pooled_prompt_embeds"]
            time_ids = pooled.new_tensor([[height, width, 0, 0, height, width]]).expand(len(pooled), -1)
            options = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": time_ids}}
        return denoiser(noisy_latents, timesteps, condition.get("prompt_embeds"), return_dict=False, **options)[0]


class StableDiffusionXL(StableDiffusion):
    """Stable Diffusion XL: two text encoders, and zeros for no caption unless the pipeline says otherwise."""

    title = "Stable Diffusion XL"
    conditions = ("prompt_embeds", "", "pooled_prompt_embeds")

    def encoding_key(self, pipe: Any) -> list[str]:
        return [str(bool(pipe.config.get("force_zeros_for_empty_prompt", True)))]

    def null_condition(self, pipe: Any) -> Condition:
        empty = super().null_condition(pipe)
        if pipe.config.get("force_zeros_for_empty_prompt", True):
            return {name: torch.zeros_like(value) for name, value in empty.items()}
        return empty


class Unconditional(StableDiffusion):
    """A `UNet2DModel` on pixels, coloured or grey, without class labels: all images are of one empty prompt."""

    title = "unconditional DDPM"
    needs_prompts = draws_sizes = doubles_rows = False

    def encode_captions(self, pipe: Any, captions: Sequence[str]) -> Condition:
        return {}

    def encode_images(self, pipe: Any, pixels: Tensor) -> Tensor:
        if pipe.unet.config["out_channels"] == 1:
            pixels = pixels.mean(dim=1, keepdim=True)
        return pixels.float().cpu()

    def encoding_key(self, pipe: Any) -> list[str]:
        return [str(pipe.unet.config["out_channels"])]

    def check_drawn(self, pipe: Any, prompts: Sequence[str], resolution: int) -> None:
        if (prompt := next(filter(None, prompts), None)) is not None:
            raise ConfigError(f"Expected no prompt for an unconditional model, got {prompt!r}. Leave it out.")
        super().check_drawn(pipe, prompts, resolution)

    def draw(self, pipe: Any, prompts: list[str], *, guidance_scale: float, resolution: int, **options: Any) -> Any:
        return pipe(batch_size=len(prompts), **options)
