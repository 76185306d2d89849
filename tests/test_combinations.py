"""Guidance together with all else that people do to a diffusers pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import pytest
import torch

from combinations import ADAPTERS, COMBINATIONS, FAMILIES, SCHEDULERS, Combination, draw, embedded, picture, save_lora
from conftest import make_guidance_module
from invdiff.errors import ModelError
from invdiff.guidance.attach import attach
from invdiff.guidance.module import GuidanceModule
from invdiff.models.families import family_of
from invdiff.models.load import denoiser_of
from test_attach import SCHEDULERS as TESTED_SCHEDULERS
from tiny import make_tiny

pytestmark = [
    # Several of diffusers' schedulers pass tensors to numpy in a way that numpy 2 deprecates.
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),
    # diffusers' own ControlNet for Flux imports a class from where it no longer lives.
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),
]


@pytest.fixture(params=COMBINATIONS)
def combination(request: pytest.FixtureRequest, tmp_path: Path) -> Combination:
    return COMBINATIONS[request.param](tmp_path)


@pytest.fixture
def compiler() -> Iterator[None]:
    """Forget what was compiled: torch gives up on code that it has compiled for many models."""
    yield
    torch.compiler.reset()


def test_no_effect_leaves_images_bit_identical_and_a_trained_module_changes_them(combination: Combination):
    pipe, image = combination
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
def test_a_lora_may_be_loaded_after_attaching(family: str, tmp_path: Path):
    before, after = make_tiny(family), make_tiny(family)
    module = make_guidance_module(before)
    before.load_lora_weights(save_lora(after, tmp_path))
    attach(before, module)
    attach(after, module)
    after.load_lora_weights(tmp_path)
    assert torch.equal(draw(after, 0), draw(before, 0))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_lora_may_be_unloaded_while_attached(family: str, tmp_path: Path):
    pipe = make_tiny(family)
    attach(pipe, make_guidance_module(pipe))
    guided = draw(pipe, 0)
    pipe.load_lora_weights(save_lora(pipe, tmp_path))
    draw(pipe, 0)
    pipe.unload_lora_weights()
    assert torch.equal(draw(pipe, 0), guided)


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
        expected = [draw(pipe, seed) for seed in (0, 1, 2)]
    steps = [lambda: attach(pipe, module), lambda: offload(pipe, kind)]
    for step in steps if attach_first else steps[::-1]:
        step()
    assert all(torch.equal(draw(pipe, seed), expected[seed]) for seed in (0, 1, 2))


def compile_denoiser(pipe: Any, how: str, backend: str = "eager"):
    denoiser = denoiser_of(pipe)
    if how == "in place":
        denoiser.compile(backend=backend)
    elif how == "block":
        denoiser.get_submodule(family_of(pipe).shape(denoiser).feature_path).compile(backend=backend)
    else:
        name = "unet" if hasattr(pipe, "unet") else "transformer"
        setattr(pipe, name, torch.compile(denoiser, backend=backend))


COMPILED = (("sd1", "in place", "eager"), ("sd3", "wrapped", "aot_eager"))


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(("family", "how", "backend"), COMPILED)
def test_a_compiled_denoiser_is_guided_as_before(family: str, how: str, backend: str):
    pipe = make_tiny(family)
    module = make_guidance_module(pipe)
    plain = draw(pipe, 0)
    with attach(pipe, module):
        expected = [draw(pipe, seed) for seed in (0, 1)]
    attachment = attach(pipe, module)
    compile_denoiser(pipe, how, backend)
    torch.testing.assert_close([draw(pipe, seed) for seed in (0, 1)], expected, rtol=1e-3, atol=1e-3)
    attachment.scale = 0.0
    torch.testing.assert_close(draw(pipe, 0), plain, rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("compiler")
def test_an_untrained_module_leaves_a_compiled_denoiser_bit_identical():
    plain, guided = make_tiny("sd3"), make_tiny("sd3")
    attach(guided, GuidanceModule.for_pipeline(guided))
    for pipe in (plain, guided):
        compile_denoiser(pipe, "wrapped", "aot_eager")
    assert torch.equal(draw(guided, 0), draw(plain, 0))


@pytest.mark.parametrize("how", ["in place", "wrapped", "block"])
@pytest.mark.parametrize("family", FAMILIES)
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
    assert listed - {*TESTED_SCHEDULERS, *SCHEDULERS["sd1"]} == {"EDMEulerScheduler"}


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
