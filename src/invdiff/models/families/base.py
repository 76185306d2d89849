"""The interface of a family of denoisers: its inputs, latents, features and conditions."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from ...errors import ConfigError
from ..load import denoiser_of

Condition: TypeAlias = dict[str, Tensor]
"""The inputs that condition a denoiser, one row each, under diffusers' names: `prompt_embeds` (rows, tokens, dim) with
`prompt_attention_mask` and `pooled_prompt_embeds` where the model reads them, or `class_labels` (rows,), or none."""


@dataclass(frozen=True)
class DenoiserShape:
    """The sizes that a guidance module must fit."""

    latent_channels: int  # channels of latents and prediction, unpacked
    feature_path: str  # dotted path of the block whose output is read
    feature_channels: int  # channels of that output
    width: int  # channels of a gradient estimator of fitting size, before rounding
    prompt_dim: int = 0  # width of the prompt embeddings; 0 where the denoiser reads none
    num_classes: int = 0  # class labels, the null class included; 0 where the denoiser reads none


@dataclass(frozen=True)
class DenoiserCall:
    """One call of a denoiser, in the layout that is the same for all families."""

    noisy_latents: Tensor  # z_t, (rows, channels, height, width), unpacked; more channels (inpainting) may follow
    timesteps: Tensor  # (rows,) on the scale of the training schedule, 0 to `num_train_timesteps`; also fractional
    condition: Condition  # phi's input


class Family(ABC):
    """The adapter of one family of denoisers, used by audit, training, attach and generate; it keeps no pipeline.

    Shapes: latents and predictions (rows, channels, height, width), timesteps (rows,), one row of a condition each.
    """

    title: ClassVar[str]  # for people, such as "Stable Diffusion XL"
    needs_prompts: ClassVar[bool] = True  # whether images are drawn from prompts (or class names)
    draws_sizes: ClassVar[bool] = True  # whether pipelines draw other sizes than the model's own
    doubles_rows: ClassVar[bool] = True  # whether pipelines send the rows of classifier-free guidance in one call
    packing: ClassVar[int] = 1  # side of the square of latents that is one input of the denoiser
    upper_blocks: ClassVar[str] = "up_blocks"  # the denoiser's list of blocks that ends nearest to the image
    adapted: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2")
    """Last names of the layers that take low-rank adapters."""
    distilled_guidance: float = 1.0  # what `predict` tells a guidance-distilled model; at 1 as if there were none
    conditions: ClassVar[tuple[str, ...]] = ()
    """The conditions that the pipeline's `encode_prompt` returns first, in its order; "" where one is not read."""

    def __init__(self, pipe: Any) -> None:
        vae = getattr(pipe, "vae", None)
        known = vae and getattr(pipe, "vae_scale_factor", None)
        self.latent_factor = int(known or (2 ** (len(vae.config["block_out_channels"]) - 1) if vae else 1))
        """Pixels per latent, along each side; 1 where there is no autoencoder."""

    # The network.

    @abstractmethod
    def shape(self, denoiser: Any) -> DenoiserShape:
        """Sizes and feature block that a guidance module for `denoiser` must fit."""

    @abstractmethod
    def predict(self, denoiser: Any, noisy_latents: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """The denoiser's prediction for noisy latents."""

    def read(self, denoiser: Any, call: dict[str, Any]) -> DenoiserCall:
        """The arguments, by name, of a call that a pipeline makes, in the common layout."""
        noisy_latents = call["sample"] if "sample" in call else call["hidden_states"]
        timesteps = torch.as_tensor(call["timestep"], device=noisy_latents.device).reshape(-1)
        condition = {
            "prompt_embeds": call.get("encoder_hidden_states"),
            "prompt_attention_mask": call.get("encoder_attention_mask"),
            "class_labels": call.get("class_labels"),
        }
        given = {name: value for name, value in condition.items() if value is not None}
        return DenoiserCall(noisy_latents, timesteps.expand(len(noisy_latents)), given)

    def prediction(self, output: Tensor, call: DenoiserCall, channels: int) -> Tensor:
        """The prediction in a denoiser's raw output."""
        return output[:, :channels]

    def shifted(self, output: Tensor, shift: Tensor) -> Tensor:
        """The raw output with `shift` added to its prediction; a learned variance behind it stays as it is."""
        channels = shift.shape[1]
        if output.shape[1] == channels:
            return output + shift
        return torch.cat([output[:, :channels] + shift, output[:, channels:]], dim=1)

    def hidden_states(self, block_output: Any) -> Tensor:
        """The image's part of a block's output, (rows, channels, height, width) or (rows, channels, tokens, 1)."""
        return block_output

    def on_grid(self, features: Tensor, noisy_latents: Tensor) -> Tensor:
        """Features of `hidden_states` laid out over the image: (rows, channels, height', width')."""
        return features

    # The pipeline.

    def encode_captions(self, pipe: Any, captions: Sequence[str]) -> Condition:
        """The condition of captions, one row each."""
        every = {"prompt_2": None, "prompt_3": None, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        options = {name: every[name] for name in inspect.signature(pipe.encode_prompt).parameters if name in every}
        encoded = pipe.encode_prompt(prompt=list(captions), device=pipe._execution_device, **options)
        return {name: value for name, value in zip(self.conditions, encoded, strict=False) if name}

    def null_condition(self, pipe: Any) -> Condition:
        """The condition of the unconditional half of classifier-free guidance, one row."""
        return self.encode_captions(pipe, [""])

    def encode_images(self, pipe: Any, pixels: Tensor) -> Tensor:
        """Encode (batch, 3, height, width) in -1 to 1 to scaled latents, the mode, in float32 on the CPU."""
        vae = pipe.vae
        # Some autoencoders (SDXL's) overflow in fp16; diffusers runs them in 32 bits as well.
        stored = {weight.dtype for weight in vae.parameters()}  # not of 8 bits, which this would undo
        overflows = stored == {vae.dtype} == {torch.float16} and vae.config.get("force_upcast")
        try:
            if overflows:
                vae.float()
            output = vae.encode(pixels.to(pipe._execution_device, vae.dtype))
        finally:
            if overflows:
                vae.half()
        latents = output.latent_dist.mode() if hasattr(output, "latent_dist") else output.latents
        # Numbers, or one for each channel (Playground's).
        shift, std = (
            torch.tensor(vae.config.get(name) or other, device=latents.device).reshape(1, -1, 1, 1)
            for name, other in (("latents_mean", vae.config.get("shift_factor") or 0.0), ("latents_std", 1.0))
        )
        return ((latents.float() - shift) / std * vae.config["scaling_factor"]).cpu()

    def encoding_key(self, pipe: Any) -> list[str]:
        """What latents and conditions depend on beside the weights of autoencoder and text encoders."""
        return []

    def resolution(self, pipe: Any, denoiser: Any) -> int:
        """Side of the model's own square images, in pixels."""
        sample_size = denoiser.config.get("sample_size") or getattr(pipe, "default_sample_size", None)
        if not isinstance(sample_size, int):
            raise ConfigError(f"Expected a square model, got sample_size {sample_size!r}. Pass resolution=... .")
        return sample_size * self.latent_factor

    def draw(self, pipe: Any, prompts: list[str], *, guidance_scale: float, resolution: int, **options: Any) -> Any:
        """Call the pipeline for one image of each prompt, with `options` such as generators and steps.

        A resolution of 0 is the model's own.
        """
        size = {"height": resolution, "width": resolution} if resolution else {}
        return pipe(prompt=prompts, guidance_scale=guidance_scale, **size, **options)

    def reads_guidance(self, denoiser: Any) -> bool:
        """Whether a guidance scale other than 1 changes what is drawn."""
        return self.needs_prompts

    def check_resolution(self, denoiser: Any, resolution: int) -> None:
        """Raise `ConfigError` where the denoiser cannot take squares of this side; 0 is the model's own."""
        multiple = self.latent_factor * self.packing * int(denoiser.config.get("patch_size") or 1)
        if resolution < 0 or resolution % multiple:
            raise ConfigError(f"Expected a resolution that is a multiple of {multiple}, got {resolution}.")

    def check_drawn(self, pipe: Any, prompts: Sequence[str], resolution: int) -> None:
        """Raise `ConfigError` or `DataError` where `draw` cannot be asked for these prompts or this resolution."""
        own = 0 if self.draws_sizes or not resolution else self.resolution(pipe, denoiser_of(pipe))
        if own not in (0, resolution):
            raise ConfigError(f"Expected resolution {own}, the only one that a {self.title} draws, got {resolution}.")
        self.check_resolution(denoiser_of(pipe), resolution)


def joined(parts: Sequence[Condition]) -> Condition:
    """Concatenate the rows of conditions."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if parts else {}


def to(condition: Condition, device: torch.device, dtype: torch.dtype | None = None) -> Condition:
    """Move a condition; floating-point tensors take `dtype`, masks and labels keep theirs."""
    return {name: value.to(device, dtype if value.is_floating_point() else None) for name, value in condition.items()}
