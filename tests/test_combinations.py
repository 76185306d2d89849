"""Guidance together with all else that people do to a diffusers pipeline: adapters, switches, schedulers, calls."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from conftest import make_guidance_module
from invdiff.errors import ModelError
from invdiff.guidance.attach import attach
from invdiff.guidance.module import GuidanceModule
from invdiff.models.families import family_of
from invdiff.models.load import denoiser_of
from test_attach import SCHEDULERS as ALL_STEPS
from tiny import CAPTIONS, RESOLUTION, make_tiny, make_unet, make_vae

pytestmark = [
    # Several of diffusers' schedulers pass tensors to numpy in a way that numpy 2 deprecates.
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),
    # diffusers' own ControlNet for Flux imports a class from where it no longer lives.
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),
]

CLASSES = {"sd1": "StableDiffusion", "sdxl": "StableDiffusionXL", "sd3": "StableDiffusion3", "flux": "Flux"}
FAMILIES = tuple(CLASSES)
OPTIONS = {
    "Flux": {"height": RESOLUTION["flux"], "width": RESOLUTION["flux"]},
    "PixArt": {"clean_caption": False, "use_resolution_binning": False},
    "DiT": {"prompt": None, "class_labels": [0], "output_type": "np"},
    "DDIM": {"prompt": None, "guidance_scale": None, "batch_size": 1, "output_type": "np"},
}
"""What pipelines must be asked, by how their class's name begins."""
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
    other = getattr(diffusers, f"{CLASSES[family]}ControlNetPipeline").from_pipe(pipe, controlnet=random_(network))
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


def switched(family: str, switch: str, folder: Path) -> Combination:
    pipe = make_tiny(family)
    part, _, method = switch.rpartition(".")
    strengths = {"s1": 0.9, "s2": 0.2, "b1": 1.2, "b2": 1.4} if method == "enable_freeu" else {}
    getattr(getattr(pipe, part) if part else pipe, method)(**strengths)
    return pipe, partial(draw, pipe, 0)


def image_pipeline(family: str, name: str, folder: Path) -> Combination:
    """Image-to-image or inpainting that shares the denoiser of the text-to-image pipeline that is guided."""
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
    return pipe, partial(draw, other, 0, **asked)


def inpainting_unet(folder: Path) -> Combination:
    """Nine channels: latents, mask and masked latents."""
    parts = make_tiny("sd1").components
    unet = random_(make_unet(in_channels=9), start="conv_in")
    pipe = diffusers.StableDiffusionInpaintPipeline(**parts | {"unet": unet}, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe, partial(draw, pipe, 0, image=picture(), mask_image=left_half(), height=32, width=32)


def scheduled(family: str, scheduler: str, options: dict[str, Any], folder: Path) -> Combination:
    pipe = make_tiny(family)
    if scheduler == "DPMSolverSDEScheduler":
        pytest.importorskip("torchsde")
    pipe.scheduler = getattr(diffusers, scheduler).from_config(options or pipe.scheduler.config)
    return pipe, partial(draw, pipe, 0, num_inference_steps=4)


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
    | {f"{family}-freeu": partial(switched, family, "enable_freeu") for family in ("sd1", "sdxl")}
)
SWITCHES = {
    "sd1": ("enable_attention_slicing", "vae.enable_tiling", "fuse_qkv_projections"),
    "flux": ("transformer.fuse_qkv_projections",),
}
IMAGE_PIPELINES = {
    family: [f"{name}{kind}Pipeline" for kind in ("Img2Img", "Inpaint")] for family, name in CLASSES.items()
}
SCHEDULERS = {
    "sd1": [
        *ALL_STEPS,
        "DEISMultistepScheduler",
        "DPMSolverSDEScheduler",
        "DPMSolverSinglestepScheduler",
        "EulerAncestralDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "LCMScheduler",
        "TCDScheduler",
    ],
    "sd2-v": ["DPMSolverMultistepScheduler", "EulerAncestralDiscreteScheduler", "UniPCMultistepScheduler"],
    "sdxl": ["DDIMScheduler", "DPMSolverMultistepScheduler", "EulerAncestralDiscreteScheduler", "LCMScheduler"],
    "pixart": ["DDIMScheduler", "DEISMultistepScheduler", "EulerDiscreteScheduler"],
    "dit": ["DDPMScheduler", "DPMSolverMultistepScheduler"],
}
SHIFTED, FLOW = {"shift": 3.0}, {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
FLOW_SCHEDULERS = [
    ("sd3", "FlowMatchHeunDiscreteScheduler", SHIFTED),
    ("sd3", "FlowMatchLCMScheduler", SHIFTED),
    ("sd3", "DPMSolverMultistepScheduler", FLOW),
    ("sd3", "UniPCMultistepScheduler", FLOW),
    ("flux", "FlowMatchLCMScheduler", SHIFTED),
    ("flux", "UniPCMultistepScheduler", FLOW),
]
CALLS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "different_prompts": ((0, 1, 2), {}),
    "several_per_prompt": ((0, 1, 2, 3), {"prompt": list(CAPTIONS), "num_images_per_prompt": 2}),
    "negative_prompt": ((0, 1), {"negative_prompt": ["land", "a photo of water"]}),
    "guidance_scale_1": ((0, 1), {"guidance_scale": 1.0}),
    "callback": ((0, 1), {"callback_on_step_end": darken}),
}
COMBINATIONS = (
    ADAPTERS
    | {f"{family}-{name}": partial(switched, family, name) for family in SWITCHES for name in SWITCHES[family]}
    | {name: partial(image_pipeline, family, name) for family in FAMILIES for name in IMAGE_PIPELINES[family]}
    | {
        f"{family}-{name}": partial(scheduled, family, name, {})
        for family in SCHEDULERS
        for name in SCHEDULERS[family]
    }
    | {f"{family}-{name}": partial(scheduled, family, name, options) for family, name, options in FLOW_SCHEDULERS}
    | {"inpainting_unet": inpainting_unet, "unconditional_ddim": unconditional_ddim}
    | {f"{family}-{name}": partial(asked, family, *CALLS[name]) for family in FAMILIES for name in CALLS}
    | {f"{family}-prompt_embeds": partial(embedded, family) for family in FAMILIES}
)


@pytest.fixture
def compiler() -> Iterator[None]:
    """Forget what was compiled: torch gives up on code that it has compiled for many models."""
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("name", COMBINATIONS)
def test_no_effect_leaves_images_bit_identical_and_a_trained_module_changes_them(name: str, tmp_path: Path):
    pipe, image = COMBINATIONS[name](tmp_path)
    plain = image()
    with attach(pipe, GuidanceModule.for_pipeline(pipe)):
        assert torch.equal(image(), plain)
    with attach(pipe, make_guidance_module(pipe), scale=0.0) as attachment:
        assert torch.equal(image(), plain)
        attachment.scale = 1.0
        guided = image()
    assert guided.isfinite().all()
    assert not torch.allclose(guided, plain, rtol=0.01)


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_matter_in_guided_images(name: str, tmp_path: Path):
    pipe, image = ADAPTERS[name](tmp_path)
    without = make_tiny(name.split("-")[0])
    module = make_guidance_module(without)
    with attach(pipe, module), attach(without, module):  # made for the model without, it fits the model with
        assert not torch.allclose(image(), draw(without, 0), rtol=0.01)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_lora_may_be_loaded_and_unloaded_while_attached(family: str, tmp_path: Path):
    before, after = make_tiny(family), make_tiny(family)
    module = make_guidance_module(before)
    before.load_lora_weights(save_lora(after, tmp_path))
    attach(before, module)
    attach(after, module)
    guided = draw(after, 0)
    after.load_lora_weights(tmp_path)
    assert torch.equal(draw(after, 0), draw(before, 0))
    after.unload_lora_weights()
    assert torch.equal(draw(after, 0), guided)


def offload(pipe: Any, kind: str):
    """Offload as for a GPU, which here is the CPU."""
    cpu = torch.device("cpu")
    if kind == "model":
        pipe.enable_model_cpu_offload(device=cpu)
    elif kind == "sequential":  # of the denoiser alone: accelerate cannot yet take transformers' text encoders apart
        accelerate.cpu_offload(denoiser_of(pipe), execution_device=cpu)
    else:
        pipe.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")


@pytest.mark.parametrize("attach_first", [True, False])
@pytest.mark.parametrize("kind", ["model", "sequential", "group"])
@pytest.mark.parametrize("family", ["sd1", "flux"])
def test_image_after_image_is_guided_whatever_is_offloaded(family: str, kind: str, attach_first: bool):
    pipe = make_tiny(family)
    module = make_guidance_module(pipe)
    with attach(pipe, module):
        expected = [draw(pipe, seed) for seed in (0, 1)]
    steps = [lambda: attach(pipe, module), lambda: offload(pipe, kind)]
    for step in steps if attach_first else steps[::-1]:
        step()
    assert all(torch.equal(draw(pipe, seed), expected[seed]) for seed in (0, 1))


def compile_denoiser(pipe: Any, how: str, backend: str = "eager"):
    denoiser = denoiser_of(pipe)
    if how == "in place":
        denoiser.compile(backend=backend)
    elif how == "block":
        denoiser.get_submodule(family_of(pipe).shape(denoiser).feature_path).compile(backend=backend)
    else:
        name = "unet" if hasattr(pipe, "unet") else "transformer"
        setattr(pipe, name, torch.compile(denoiser, backend=backend))


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(("family", "how", "backend"), [("sd1", "in place", "eager"), ("sd3", "wrapped", "aot_eager")])
def test_a_compiled_denoiser_is_guided_as_before_and_at_scale_0_bit_identical(family: str, how: str, backend: str):
    pipe = make_tiny(family)
    module = make_guidance_module(pipe)
    plain = draw(pipe, 0)
    with attach(pipe, module):
        expected = draw(pipe, 0)
    attachment = attach(pipe, module)
    compile_denoiser(pipe, how, backend)
    torch.testing.assert_close(draw(pipe, 0), expected, rtol=1e-3, atol=1e-3)
    attachment.scale = 0.0
    assert torch.equal(draw(pipe, 0), plain)


@pytest.mark.parametrize(
    ("family", "how"), [("sd1", "in place"), ("sd1", "block"), ("sd3", "wrapped"), ("flux", "block")]
)
def test_a_module_is_not_attached_to_what_is_compiled_already(family: str, how: str):
    pipe = make_tiny(family)
    module = GuidanceModule.for_pipeline(pipe)
    compile_denoiser(pipe, how)
    with pytest.raises(ModelError, match="Attach first, then compile"):
        attach(pipe, module)


@pytest.mark.parametrize("family", FAMILIES)
def test_images_of_a_batch_are_guided_as_when_drawn_alone(family: str):
    pipe = make_tiny(family)
    attach(pipe, make_guidance_module(pipe, num_groups=5))
    alone = [draw(pipe, seed)[0] for seed in (0, 1, 2)]
    torch.testing.assert_close([*draw(pipe, 0, 1, 2)], alone, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_embeddings_are_guided_as_their_prompts(family: str, tmp_path: Path):
    pipe, image = embedded(family, tmp_path)
    attach(pipe, make_guidance_module(pipe))
    assert torch.equal(image(), draw(pipe, 0, 1))


def test_both_passes_of_classic_guidance_draw_one_group():
    pipe = make_tiny("flux")  # it sends the two conditions one after the other
    attachment = attach(pipe, make_guidance_module(pipe, num_groups=97))
    seen: list[torch.Tensor] = []
    pipe.transformer.register_forward_hook(lambda *_: seen.append(attachment.environments))
    draw(pipe, 0, 1, negative_prompt=["land", "water"], true_cfg_scale=3.0)
    assert len(seen) == 4
    assert all(torch.equal(groups, seen[0]) for groups in seen)


@pytest.mark.parametrize("strength", [1.0, 0.8])
def test_a_pipeline_with_a_scheduler_of_its_own_draws_groups_from_its_own_noise(strength: float):
    pipe = make_tiny("sd1")
    other = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    other.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    other.set_progress_bar_config(disable=True)
    attachment = attach(pipe, make_guidance_module(pipe, num_groups=97))
    drawn = []
    for seed, first in ((1, None), (0, None), (0, strength), (1, None)):
        draw(other, seed, image=picture(), strength=first or 0.5, num_inference_steps=4)
        drawn.append(attachment.environments[0].item())
    assert drawn[0] == drawn[3] != drawn[2]


def test_every_scheduler_that_stable_diffusion_lists_is_tried():
    listed = {scheduler.__name__ for scheduler in make_tiny("sd1").scheduler.compatibles}
    assert listed - {*SCHEDULERS["sd1"]} == {"EDMEulerScheduler"}


def test_a_scheduler_that_no_listed_family_is_trained_with_is_refused():
    pipe = make_tiny("sd1")
    module = GuidanceModule.for_pipeline(pipe)
    pipe.scheduler = diffusers.EDMEulerScheduler()
    with pytest.raises(ModelError, match="got EDMEulerScheduler"):
        attach(pipe, module)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_denoiser_replaced_after_attaching_is_noticed(family: str):
    pipe, other = make_tiny(family), make_tiny(family)
    attach(pipe, make_guidance_module(pipe))
    draw(pipe, 0)
    name = "unet" if hasattr(pipe, "unet") else "transformer"
    setattr(pipe, name, denoiser_of(other))
    with pytest.raises(ModelError, match="drawn without guidance"):
        draw(pipe, 0)


def test_a_block_in_which_nothing_is_drawn_warns():
    pipe = make_tiny("sd1")
    with pytest.warns(UserWarning, match="nothing was guided"), attach(pipe, make_guidance_module(pipe)):
        pass
