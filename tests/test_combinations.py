"""Guidance together with all else that people do to a diffusers pipeline: adapters, switches, offload."""

from functools import partial

import accelerate
import diffusers
import pytest
import torch

from conftest import make_guidance_lora, make_guidance_module
from invdiff import GuidanceModule, attach
from invdiff.errors import ModelError
from invdiff.models.families import family_of
from invdiff.models.load import denoiser_of
from tiny import CAPTIONS, TRANSFORMER, draw, make_tiny, make_unet, save_lora

CLASSES = {"sd1": "StableDiffusion", "sdxl": "StableDiffusionXL", "sd3": "StableDiffusion3", "flux": "Flux"}
FAMILIES = tuple(CLASSES)


def picture():
    return torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def masked():
    mask = torch.cat([torch.ones(1, 1, 32, 16), torch.zeros(1, 1, 32, 16)], dim=-1)
    return {"image": picture(), "mask_image": mask, "height": 32, "width": 32}


def shared(pipe, name, **parts):
    """A pipeline of the class `name` that shares the parts of another."""
    return getattr(diffusers, name).from_pipe(pipe, **parts)


def random_(network, start=""):
    """Give parameters random weights: those whose name begins with `start`, or that are zero."""
    numbers = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if (start and name.startswith(start)) or not parameter.any():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=numbers))
    return network.eval()


def load_lora(pipe, folder):
    """Put a LoRA of random weights beside those of the denoiser."""
    part = "unet" if hasattr(pipe, "unet") else "transformer"
    pipe.load_lora_weights(save_lora(pipe, folder, **{part: ["to_q", "to_k", "to_v", "to_out.0"]}))


def changed(family, change):
    """A tiny pipeline after a change, drawing an image."""

    def make(folder):
        pipe = make_tiny(family)
        change(pipe, folder)
        return pipe, partial(draw, pipe, 0)

    return make


def controlnet(family, folder):
    pipe, control = make_tiny(family), "control_image" if family == "flux" else "image"
    if family == "flux":
        sizes = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
        network = diffusers.FluxControlNetModel.from_transformer(pipe.transformer, **sizes)
    else:
        sizes = {"conditioning_embedding_out_channels": (4, 4, 8), "conditioning_channels": 3}
        network = diffusers.ControlNetModel.from_unet(pipe.unet, **sizes)
    other = shared(pipe, f"{CLASSES[family]}ControlNetPipeline", controlnet=random_(network))
    return pipe, partial(draw, other, 0, **{control: picture()})


def ip_adapter(folder):
    """An IP-Adapter of random weights in the layout in which they are published."""
    pipe, embed_dim, tokens = make_tiny("sd1"), 8, 4
    random = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    dim = pipe.unet.config.cross_attention_dim
    blocks = [name.removesuffix(".processor") for name in pipe.unet.attn_processors if "attn2" in name]
    attention = {
        f"{2 * index + 1}.to_{letter}_ip.weight": random(pipe.unet.get_submodule(block).to_k.out_features, dim)
        for index, block in enumerate(blocks)
        for letter in "kv"
    }
    projection = {"proj.weight": random(tokens * dim, embed_dim), "proj.bias": random(tokens * dim)}
    projection |= {"norm.weight": torch.ones(dim), "norm.bias": torch.zeros(dim)}
    weights = {"image_proj": projection, "ip_adapter": attention}
    pipe.load_ip_adapter(weights, subfolder="", weight_name="", image_encoder_folder=None)
    return pipe, partial(draw, pipe, 0, ip_adapter_image_embeds=[random(2, 1, embed_dim)])


def image_pipeline(family, name, folder):
    """Image-to-image or inpainting that shares the denoiser of the text-to-image pipeline that is guided."""
    pipe = make_tiny(family)
    images = masked() if "Inpaint" in name else {"image": picture()}
    return pipe, partial(draw, shared(pipe, name), 0, num_inference_steps=4, strength=0.8, **images)


def inpainting_unet(folder):
    """Nine channels: latents, mask and masked latents."""
    parts = make_tiny("sd1").components | {"unet": random_(make_unet(in_channels=9), start="conv_in")}
    pipe = diffusers.StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)
    return pipe, partial(draw, pipe, 0, **masked())


def unconditional_ddim(folder):
    pipe = diffusers.DDIMPipeline(unet=make_tiny("ddpm").unet, scheduler=diffusers.DDIMScheduler())
    return pipe, partial(draw, pipe, 0)


ADAPTERS = (
    {f"{family}-lora": changed(family, load_lora) for family in FAMILIES}
    | {f"{family}-controlnet": partial(controlnet, family) for family in ("sd1", "flux")}
    | {"sd1-freeu": changed("sd1", lambda pipe, _: pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4))}
    | {"sd1-ip_adapter": ip_adapter}
)
PIPELINES = {
    f"{name}{kind}": partial(image_pipeline, family, f"{name}{kind}Pipeline")
    for family, name in CLASSES.items()
    for kind in ("Img2Img", "Inpaint")
    if (family, kind) != ("sd3", "Inpaint")  # which takes latents of 16 channels only
} | {"inpainting_unet": inpainting_unet, "unconditional_ddim": unconditional_ddim}
SWITCHES = {
    "sd1-slicing": changed("sd1", lambda pipe, _: pipe.enable_attention_slicing()),
    **{f"{of}-fused": changed(of, lambda pipe, _: denoiser_of(pipe).fuse_qkv_projections()) for of in ("sd1", "flux")},
}
COMBINATIONS = ADAPTERS | PIPELINES | SWITCHES


@pytest.mark.parametrize("name", COMBINATIONS)
def test_no_effect_leaves_images_bit_identical_and_a_trained_module_changes_them(name, tmp_path):
    pipe, image = COMBINATIONS[name](tmp_path)
    plain, without = image(), make_tiny(name.split("-")[0]) if name in ADAPTERS else pipe
    with attach(pipe, GuidanceModule.for_pipeline(pipe)):
        assert torch.equal(image(), plain)
    module = make_guidance_module(without)  # made for the model without an adapter, it fits the model with
    with attach(pipe, module, scale=0.0) as attachment:
        assert torch.equal(image(), plain)
        attachment.scale = 1.0
        guided = image()
    assert guided.isfinite().all()
    assert not torch.allclose(guided, plain, rtol=0.01)
    if name in ADAPTERS:
        with attach(without, module):
            assert not torch.allclose(guided, draw(without, 0), rtol=0.01)


@pytest.mark.parametrize("family", ["sd1", "flux"])
def test_a_lora_may_be_loaded_and_unloaded_while_attached(family, tmp_path):
    before, after = make_tiny(family), make_tiny(family)
    module = make_guidance_module(before)
    load_lora(before, tmp_path)
    attach(before, module)
    attach(after, module)
    guided = draw(after, 0)
    load_lora(after, tmp_path)
    assert torch.equal(draw(after, 0), draw(before, 0))
    after.unload_lora_weights()
    assert torch.equal(draw(after, 0), guided)


def offload(pipe, kind):
    cpu = torch.device("cpu")  # in place of a GPU
    if kind == "model":
        pipe.enable_model_cpu_offload(device=cpu)
    elif kind == "sequential":  # of the denoiser alone: accelerate cannot yet take transformers' text encoders apart
        accelerate.cpu_offload(denoiser_of(pipe), execution_device=cpu)
    else:
        pipe.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")


@pytest.mark.parametrize("attach_first", [True, False])
@pytest.mark.parametrize("kind", ["model", "sequential", "group"])
@pytest.mark.parametrize(("family", "make"), [("sd1", make_guidance_lora), ("flux", make_guidance_module)])
def test_image_after_image_is_guided_whatever_is_offloaded(family, make, kind, attach_first):
    pipe = make_tiny(family)
    module = make(pipe)
    with attach(pipe, module):
        expected = [draw(pipe, seed) for seed in (0, 1)]
    steps = [lambda: attach(pipe, module), lambda: offload(pipe, kind)]
    for step in steps if attach_first else steps[::-1]:
        step()
    assert all(torch.equal(draw(pipe, seed), expected[seed]) for seed in (0, 1))


def compile_denoiser(pipe, how, backend="eager"):
    denoiser = denoiser_of(pipe)
    if how == "wrapped":
        pipe.transformer = torch.compile(denoiser, backend=backend)
        return
    part = denoiser if how == "in place" else denoiser.get_submodule(family_of(pipe).shape(denoiser).feature_path)
    part.compile(backend=backend)


@pytest.mark.parametrize(
    ("make", "family", "how", "backend"),
    [(make_guidance_module, "sd1", "in place", "eager"), (make_guidance_lora, "sd3", "wrapped", "aot_eager")],
)
def test_a_compiled_denoiser_is_guided_as_before_and_at_scale_0_bit_identical(make, family, how, backend, monkeypatch):
    # To compile takes seconds a layer.
    monkeypatch.setitem(TRANSFORMER, "num_layers", 1)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    monkeypatch.setattr("tiny.make_unet", partial(make_unet, **blocks, block_out_channels=(16,)))
    pipe = make_tiny(family)
    plain, attachment = draw(pipe, 0), attach(pipe, make(pipe))
    expected = draw(pipe, 0)
    compile_denoiser(pipe, how, backend)
    torch.testing.assert_close(draw(pipe, 0), expected, rtol=1e-3, atol=1e-3)
    attachment.scale = 0.0
    assert torch.equal(draw(pipe, 0), plain)
    torch.compiler.reset()  # torch gives up on code that it has compiled for many models


@pytest.mark.parametrize(("family", "how"), [("sd1", "in place"), ("sd3", "wrapped"), ("flux", "block")])
def test_a_module_is_not_attached_to_what_is_compiled_already(family, how):
    pipe = make_tiny(family)
    module = GuidanceModule.for_pipeline(pipe)
    compile_denoiser(pipe, how)
    with pytest.raises(ModelError, match="Attach first, then compile"):
        attach(pipe, module)


@pytest.mark.parametrize("family", FAMILIES)
def test_images_of_a_batch_are_guided_as_when_drawn_alone_and_prompt_embeddings_as_their_prompts(family):
    pipe = make_tiny(family)
    with torch.no_grad():
        condition = family_of(pipe).encode_captions(pipe, CAPTIONS)
    attach(pipe, make_guidance_module(pipe, num_groups=5), environments="iid")
    together = draw(pipe, 0, 1)
    torch.testing.assert_close([*together], [draw(pipe, seed)[0] for seed in (0, 1)], rtol=1e-3, atol=1e-3)
    assert torch.equal(draw(pipe, 0, 1, prompt=None, **condition), together)


@pytest.mark.parametrize("strength", [1.0, 0.8])
def test_a_pipeline_with_a_scheduler_of_its_own_draws_groups_from_its_own_noise(strength):
    pipe = make_tiny("sd1")
    other = shared(pipe, "StableDiffusionImg2ImgPipeline")
    other.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    attachment = attach(pipe, make_guidance_module(pipe, num_groups=97))
    drawn = []
    for seed, first in ((1, None), (0, None), (0, strength), (1, None)):
        draw(other, seed, image=picture(), strength=first or 0.5, num_inference_steps=4)
        drawn.append(attachment.environments[0].item())
    assert drawn[0] == drawn[3] != drawn[2]


def test_a_denoiser_replaced_after_attaching_is_noticed():
    pipe = make_tiny("sd1")
    attach(pipe, make_guidance_module(pipe))
    draw(pipe, 0)
    draw(shared(pipe, "StableDiffusionImg2ImgPipeline"), 0, image=picture())  # is guided still, unlike the next
    pipe.unet = make_tiny("sd1").unet
    with pytest.raises(ModelError, match="drawn without guidance"):
        draw(pipe, 0)


def test_a_block_in_which_nothing_is_drawn_warns():
    pipe = make_tiny("sd1")
    with pytest.warns(UserWarning, match="nothing was guided"), attach(pipe, make_guidance_module(pipe)):
        pass
