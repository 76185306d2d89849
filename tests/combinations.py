"""Tiny pipelines with all else that people do to them: adapters, switches, schedulers, ways of asking."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from invdiff.models.families import family_of
from invdiff.models.load import denoiser_of
from tiny import CAPTIONS, RESOLUTION, make_tiny, make_unet, make_vae

FAMILIES = ("sd1", "sdxl", "sd3", "flux")
OPTIONS = {
    "Flux": {"height": RESOLUTION["flux"], "width": RESOLUTION["flux"]},
    "PixArt": {"clean_caption": False, "use_resolution_binning": False},
    "DiT": {"prompt": None, "class_labels": [0], "output_type": "np"},
    "DDIM": {"prompt": None, "guidance_scale": None, "batch_size": 1, "output_type": "np"},
}
"""What pipelines must be asked, by how their class's name begins."""
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}

Combination = tuple[Any, Callable[[], torch.Tensor]]
"""The pipeline that a module is attached through, and how an image is drawn."""


def draw(pipe: Any, *seeds: int, **options: Any) -> torch.Tensor:
    """Latents of one image per seed; an option that is None is left out."""
    asked = {
        "prompt": [CAPTIONS[seed % 2] for seed in seeds],
        "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
        "num_inference_steps": 2,
        "guidance_scale": 5.0,
        "output_type": "latent",
    }
    for start, more in OPTIONS.items():
        if type(pipe).__name__.startswith(start):
            asked |= more
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # pipelines hand some schedulers no generator
        images = pipe(**{name: value for name, value in (asked | options).items() if value is not None}).images
    return torch.as_tensor(images)


def picture() -> torch.Tensor:
    return torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def left_half() -> torch.Tensor:
    return torch.cat([torch.ones(1, 1, 32, 16), torch.zeros(1, 1, 32, 16)], dim=-1)


def random_(network: torch.nn.Module, start: str = "") -> torch.nn.Module:
    """Give parameters random weights: those whose name begins with `start`, or that are zero."""
    numbers = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if (start and name.startswith(start)) or not parameter.any():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=numbers))
    return network.eval()


# What goes together with guidance.


def save_lora(pipe: Any, folder: Path) -> Path:
    """Write a LoRA of random weights for the denoiser, as the pipeline itself does."""
    part = "unet" if hasattr(pipe, "unet") else "transformer"
    network = copy.deepcopy(denoiser_of(pipe))
    network.add_adapter(LoraConfig(r=2, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    pipe.save_lora_weights(folder, **{f"{part}_lora_layers": get_peft_model_state_dict(random_(network))})
    return folder


def lora(family: str, folder: Path) -> Combination:
    pipe = make_tiny(family)
    pipe.load_lora_weights(save_lora(pipe, folder))
    return pipe, partial(draw, pipe, 0)


def controlnet(family: str, folder: Path) -> Combination:
    pipe = make_tiny(family)
    if family in ("sd1", "sdxl"):
        network = diffusers.ControlNetModel.from_unet(
            pipe.unet, conditioning_embedding_out_channels=(4, 4, 8), conditioning_channels=3
        )
    elif family == "sd3":
        network = diffusers.SD3ControlNetModel.from_transformer(
            pipe.transformer, num_layers=2, num_extra_conditioning_channels=0
        )
    else:
        heads = {"attention_head_dim": 16, "num_attention_heads": 2}
        network = diffusers.FluxControlNetModel.from_transformer(
            pipe.transformer, num_layers=1, num_single_layers=1, **heads
        )
    name = {"sd1": "StableDiffusion", "sdxl": "StableDiffusionXL", "sd3": "StableDiffusion3", "flux": "Flux"}[family]
    other = getattr(diffusers, f"{name}ControlNetPipeline").from_pipe(pipe, controlnet=random_(network))
    other.set_progress_bar_config(disable=True)
    control = "image" if family in ("sd1", "sdxl") else "control_image"
    return pipe, partial(draw, other, 0, **{control: picture()})


def ip_adapter_weights(denoiser: Any, embed_dim: int = 8, tokens: int = 4) -> dict[str, dict[str, torch.Tensor]]:
    """An IP-Adapter of random weights in the layout in which they are published."""
    numbers = torch.Generator().manual_seed(0)
    random = partial(torch.randn, generator=numbers)
    if hasattr(denoiser, "inner_dim"):
        dim, biased = denoiser.config["joint_attention_dim"], True
        widths = [denoiser.inner_dim] * len(denoiser.transformer_blocks)
    else:
        dim, biased = denoiser.config["cross_attention_dim"], False
        blocks = [name.removesuffix(".processor") for name in denoiser.attn_processors if "attn2" in name]
        widths = [denoiser.get_submodule(block).to_k.out_features for block in blocks]
    attention = {}
    for index, width in enumerate(widths):
        for letter in "kv":
            name = f"{index if biased else 2 * index + 1}.to_{letter}_ip"
            attention[f"{name}.weight"] = random(width, dim)
            if biased:
                attention[f"{name}.bias"] = random(width)
    projection = {"proj.weight": random(tokens * dim, embed_dim), "proj.bias": random(tokens * dim)}
    norm = {"norm.weight": torch.ones(dim), "norm.bias": torch.zeros(dim)}
    return {"image_proj": projection | norm, "ip_adapter": attention}


def ip_adapter(family: str, folder: Path) -> Combination:
    pipe = make_tiny(family)
    encoder = "image_encoder_pretrained_model_name_or_path" if family == "flux" else "image_encoder_folder"
    pipe.load_ip_adapter(ip_adapter_weights(denoiser_of(pipe)), subfolder="", weight_name="", **{encoder: None})
    embeds = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(0))
    if family == "flux":
        asked = {"ip_adapter_image_embeds": [embeds[:1]], "negative_ip_adapter_image_embeds": [embeds[1:]]}
    else:
        asked = {"ip_adapter_image_embeds": [embeds]}
    return pipe, partial(draw, pipe, 0, **asked)


def freeu(family: str, folder: Path) -> Combination:
    pipe = make_tiny(family)
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    return pipe, partial(draw, pipe, 0)


def switched(family: str, switch: str, folder: Path) -> Combination:
    pipe = make_tiny(family)
    part, _, method = switch.rpartition(".")
    getattr(getattr(pipe, part) if part else pipe, method)()
    return pipe, partial(draw, pipe, 0, 1, output_type="pt")


def image_pipeline(family: str, name: str, through_itself: bool, folder: Path) -> Combination:
    """Image-to-image or inpainting that shares the denoiser of a text-to-image pipeline."""
    pipe = make_tiny(family)
    if name == "StableDiffusion3InpaintPipeline":  # it takes latents of 16 channels only
        pipe.transformer = type(pipe.transformer).from_config(pipe.transformer.config, in_channels=16, out_channels=16)
        random_(pipe.transformer)
        pipe.vae = make_vae(16, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False)
    other = getattr(diffusers, name).from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    asked = {"image": picture(), "num_inference_steps": 4, "strength": 0.8}
    if "Inpaint" in name:
        asked |= {"mask_image": left_half(), "height": 32, "width": 32}
    return other if through_itself else pipe, partial(draw, other, 0, **asked)


def inpainting_unet(folder: Path) -> Combination:
    """Nine channels: latents, mask and masked latents."""
    parts = make_tiny("sd1").components
    unet = random_(make_unet(in_channels=9), start="conv_in")
    pipe = diffusers.StableDiffusionInpaintPipeline(**parts | {"unet": unet}, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe, partial(draw, pipe, 0, image=picture(), mask_image=left_half(), height=32, width=32)


def scheduled(family: str, scheduler: str, options: dict[str, Any], folder: Path) -> Combination:
    pipe = make_tiny(family)
    scheduler_class = getattr(diffusers, scheduler)
    if options:
        pipe.scheduler = scheduler_class(**options)
    else:
        if scheduler == "DPMSolverSDEScheduler":
            pytest.importorskip("torchsde")
        pipe.scheduler = scheduler_class.from_config(pipe.scheduler.config)
    return pipe, partial(draw, pipe, 0, num_inference_steps=3)


def unconditional_ddim(folder: Path) -> Combination:
    pipe = diffusers.DDIMPipeline(unet=make_tiny("ddpm").unet, scheduler=diffusers.DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe, partial(draw, pipe, 0)


def darken(pipe: Any, step: int, timestep: int, values: dict[str, Any]) -> dict[str, Any]:
    return {"latents": 0.9 * values["latents"]}


def asked(family: str, seeds: tuple[int, ...], options: dict[str, Any], folder: Path) -> Combination:
    pipe = make_tiny(family)
    if family == "flux" and "negative_prompt" in options:
        options = options | {"true_cfg_scale": 3.0}
    return pipe, partial(draw, pipe, *seeds, **options)


def embedded(family: str, folder: Path) -> Combination:
    """Prompt embeddings in place of prompts."""
    pipe = make_tiny(family)
    with torch.no_grad():
        condition = family_of(pipe).encode_captions(pipe, CAPTIONS)
    return pipe, partial(draw, pipe, 0, 1, prompt=None, **condition)


ADAPTERS: dict[str, Callable[[Path], Combination]] = (
    {f"{family}-lora": partial(lora, family) for family in FAMILIES}
    | {f"{family}-controlnet": partial(controlnet, family) for family in FAMILIES}
    | {f"{family}-ip_adapter": partial(ip_adapter, family) for family in ("sd1", "sdxl", "flux")}
    | {f"{family}-freeu": partial(freeu, family) for family in ("sd1", "sdxl")}
)
SWITCHES = {
    "sd1": ("enable_attention_slicing", "vae.enable_tiling", "vae.enable_slicing", "fuse_qkv_projections"),
    "sd3": ("enable_attention_slicing", "vae.enable_tiling"),
    "flux": ("vae.enable_slicing", "transformer.fuse_qkv_projections"),
}
IMAGE_PIPELINES = {
    "sd1": ("StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"),
    "sdxl": ("StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"),
    "sd3": ("StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline"),
    "flux": ("FluxImg2ImgPipeline", "FluxInpaintPipeline"),
}
SCHEDULERS = {
    "sd1": (
        "DEISMultistepScheduler",
        "DPMSolverSDEScheduler",
        "DPMSolverSinglestepScheduler",
        "EulerAncestralDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "LCMScheduler",
        "TCDScheduler",
    ),
    "sd2-v": ("DPMSolverMultistepScheduler", "EulerAncestralDiscreteScheduler", "UniPCMultistepScheduler"),
    "sdxl": ("DDIMScheduler", "DPMSolverMultistepScheduler", "EulerAncestralDiscreteScheduler", "LCMScheduler"),
    "pixart": ("DDIMScheduler", "DEISMultistepScheduler", "EulerDiscreteScheduler"),
    "dit": ("DDPMScheduler", "DPMSolverMultistepScheduler"),
}
FLOW_SCHEDULERS = {
    "sd3": {
        "FlowMatchHeunDiscreteScheduler": {"shift": 3.0},
        "FlowMatchLCMScheduler": {"shift": 3.0},
        "DPMSolverMultistepScheduler": FLOW,
        "UniPCMultistepScheduler": FLOW,
    },
    "flux": {"FlowMatchLCMScheduler": {"shift": 3.0}, "UniPCMultistepScheduler": FLOW},
}
CALLS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "different_prompts": ((0, 1, 2), {}),
    "several_per_prompt": ((0, 1, 2, 3), {"prompt": list(CAPTIONS), "num_images_per_prompt": 2}),
    "negative_prompt": ((0, 1), {"negative_prompt": ["land", "a photo of water"]}),
    "guidance_scale_1": ((0, 1), {"guidance_scale": 1.0}),
    "callback": ((0, 1), {"callback_on_step_end": darken}),
}
COMBINATIONS = (
    ADAPTERS
    | {f"{family}-{name}": partial(switched, family, name) for family, names in SWITCHES.items() for name in names}
    | {
        f"{name}-through-{'itself' if itself else 'another'}": partial(image_pipeline, family, name, itself)
        for family, names in IMAGE_PIPELINES.items()
        for name in names
        for itself in (True, False)
    }
    | {"inpainting_unet": inpainting_unet}
    | {
        f"{family}-{name}": partial(scheduled, family, name, {})
        for family in SCHEDULERS
        for name in SCHEDULERS[family]
    }
    | {
        f"{family}-{name}": partial(scheduled, family, name, options)
        for family, schedulers in FLOW_SCHEDULERS.items()
        for name, options in schedulers.items()
    }
    | {"unconditional_ddim": unconditional_ddim}
    | {f"{family}-{name}": partial(asked, family, *CALLS[name]) for family in FAMILIES for name in CALLS}
    | {f"{family}-prompt_embeds": partial(embedded, family) for family in FAMILIES}
)
