import copy
import gc
import pickle
import weakref

import diffusers
import pytest
import torch

from conftest import make_guidance_lora, make_guidance_module, make_tiny_pipeline
from invdiff import GuidanceModule, attach
from invdiff.errors import ConfigError, ModelError
from invdiff.models.families import family_of
from invdiff.models.frozen import FeatureCapture
from tiny import denoise, draw, inputs

SOLVERS = "DPMSolverMultistep EulerDiscrete HeunDiscrete KDPM2AncestralDiscrete LMSDiscrete PNDM UniPCMultistep"
SCHEDULERS = tuple(f"{name}Scheduler" for name in ("DDIM", "DDPM", *SOLVERS.split()))


def record_environments(pipe, attachment):
    """Let every later denoiser call append the groups of its rows to the list that is returned."""
    seen = []
    pipe.unet.register_forward_hook(lambda *_: seen.append(attachment.environments))
    return seen


def test_the_output_is_the_frozen_prediction_plus_scale_times_the_shift(tiny_pipe):
    module = make_guidance_module(tiny_pipe)
    capture = FeatureCapture(tiny_pipe.unet, family_of(tiny_pipe), "mid_block")
    model_pred, features = denoise(tiny_pipe), capture.take()
    (latents, embeds), groups = inputs(), torch.tensor([[1], [0], [1]])
    with torch.no_grad():
        shift = module(latents, torch.full((3,), 500), {"prompt_embeds": embeds}, model_pred, features, groups)
    attach(tiny_pipe, module, scale=0.7, environments=[1, 0, 1])
    assert torch.equal(denoise(tiny_pipe), model_pred + 0.7 * shift)


@pytest.mark.parametrize("timestep", [500.0, torch.tensor(500), torch.tensor([500]), torch.tensor([500] * 3)])
def test_timesteps_come_as_numbers_or_one_per_row(tiny_pipe, timestep):
    attach(tiny_pipe, make_guidance_module(tiny_pipe))
    assert torch.equal(denoise(tiny_pipe, timestep), denoise(tiny_pipe, 500))
    if getattr(timestep, "ndim", 0) and len(timestep) == 3:
        mixed = denoise(tiny_pipe, torch.tensor([500, 20, 900]))
        for row, each in enumerate((500, 20, 900)):
            torch.testing.assert_close(mixed[row], denoise(tiny_pipe, each)[row])


def test_a_half_precision_pipeline_stays_so_and_the_module_as_it_was(tiny_pipe):
    module = make_guidance_module(tiny_pipe).train()
    plain = draw(tiny_pipe.to(dtype=torch.bfloat16), 0)
    attach(tiny_pipe, module)
    guided = draw(tiny_pipe, 0)
    assert guided.dtype == torch.bfloat16
    assert not torch.equal(guided, plain)
    assert (module.dtype, module.training) == (torch.float32, True)
    assert all(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_an_image_keeps_its_group_in_all_rows_and_steps(tiny_pipe, scheduler):
    options = {"timestep_spacing": "trailing"}  # KDPM2's timesteps then also rise
    tiny_pipe.scheduler = getattr(diffusers, scheduler).from_config(tiny_pipe.scheduler.config, **options)
    attachment = attach(tiny_pipe, make_guidance_module(tiny_pipe, num_groups=(5, 5)), environments="iid")
    noise = [torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1, 2)]
    expected = attachment.mix.rows(torch.stack(noise))
    assert len(expected.unique(dim=0)) == 3
    seen = record_environments(tiny_pipe, attachment)
    draw(tiny_pipe, 0, 1, 2, num_inference_steps=4)
    assert len(seen) >= 4
    assert all(torch.equal(groups, expected.repeat(2, 1)) for groups in seen)
    draw(tiny_pipe, 2, guidance_scale=1.0, num_inference_steps=4)
    assert torch.equal(attachment.environments, expected[2:])


@pytest.mark.parametrize("num_inference_steps", [1, 3])
def test_each_call_draws_anew_and_each_seed_others(tiny_pipe, num_inference_steps):
    module = make_guidance_module(tiny_pipe, num_groups=97)
    attachments, drawn = [attach(tiny_pipe, copy.deepcopy(module), seed=seed) for seed in (0, 1)], []
    for seed in (0, 1, 0):
        draw(tiny_pipe, seed, num_inference_steps=num_inference_steps)
        drawn.append([attachment.environments[0].item() for attachment in attachments])
    assert drawn[0] == drawn[2] != drawn[1]
    assert drawn[0][0] != drawn[0][1]


def test_images_keep_their_groups_when_guidance_is_switched_off_on_the_way(tiny_pipe):
    def switch_off(pipe, step, timestep, values):
        if step == 1:
            pipe._guidance_scale = 1.0
            values["prompt_embeds"] = values["prompt_embeds"].chunk(2)[1]
        return values

    seen = record_environments(tiny_pipe, attach(tiny_pipe, make_guidance_module(tiny_pipe, num_groups=97)))
    callback = {"callback_on_step_end": switch_off, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    draw(tiny_pipe, 0, 1, num_inference_steps=4, **callback)
    assert [len(groups) for groups in seen] == [4, 4, 2, 2]
    assert torch.equal(seen[-1], seen[0][:2])


def test_groups_given_are_counted_by_images_and_those_of_one_noise_are_spread(tiny_pipe):
    module = make_guidance_module(tiny_pipe, num_groups=3)
    with attach(tiny_pipe, module, environments=[0, 0, 1, 1]), pytest.raises(ConfigError, match="batch of 4 image"):
        draw(tiny_pipe, 0, 1)
    seen = record_environments(tiny_pipe, attach(tiny_pipe, module))
    draw(tiny_pipe, 0, 1, 2, latents=inputs()[0][:1].repeat(3, 1, 1, 1))
    assert sorted(seen[0][:3].flatten().tolist()) == [0, 1, 2]
    assert all(torch.equal(groups, seen[0][:3].repeat(2, 1)) for groups in seen)


def test_a_module_attached_twice_is_told(tiny_pipe):
    module = make_guidance_module(tiny_pipe)
    attach(tiny_pipe, module)
    with pytest.warns(UserWarning, match="attached to this model already"):
        attach(tiny_pipe, module)


def test_groups_of_two_modules_on_one_model_do_not_go_together(tiny_pipe):
    modules = [make_guidance_module(tiny_pipe, seed=seed) for seed in (0, 1)]
    attach(tiny_pipe, modules[0]).detach()
    first, second = (attach(tiny_pipe, module) for module in modules)
    cells = []
    for seed in range(10):
        draw(tiny_pipe, *range(4 * seed, 4 * seed + 4), num_inference_steps=1)
        cells += torch.cat([first.environments[:4], second.environments[:4]], dim=1).tolist()
    assert all(cells.count([one, other]) > 3 for one in (0, 1) for other in (0, 1))


def test_a_shallow_copy_of_a_guided_pipeline_is_guided(tiny_pipe):
    plain = draw(tiny_pipe, 0)
    attach(tiny_pipe, make_guidance_module(tiny_pipe))
    guided = draw(copy.copy(tiny_pipe), 0)
    assert not torch.equal(guided, plain)
    assert torch.equal(draw(tiny_pipe, 0), guided)


def test_an_image_keeps_its_group_while_it_is_inverted(tiny_pipe):
    attachment = attach(tiny_pipe, make_guidance_module(tiny_pipe, num_groups=97))
    clean, noise = (torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    groups = []
    for timestep in range(1, 1000, 100):
        latents = (1 - timestep / 1000) * clean + timestep / 1000 * noise
        tiny_pipe.unet(latents, timestep, torch.ones(2, 16, 16))
        groups.append(attachment.environments)
    assert all(torch.equal(groups[0], each) for each in groups)


def test_like_pictures_one_after_another_draw_groups_of_their_own(tiny_pipe):
    attachment = attach(tiny_pipe, make_guidance_module(tiny_pipe, num_groups=2), environments="iid")
    base, seen = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), set()
    for seed in range(12):
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
        for timestep in (200, 100):
            tiny_pipe.unet(base + 0.2 * noise, timestep, torch.ones(1, 16, 16))
        seen.add(attachment.environments.item())
    assert seen == {0, 1}


def test_a_loop_that_sets_timesteps_once_draws_anew_for_each_batch(tiny_pipe):
    attachment = attach(tiny_pipe, make_guidance_module(tiny_pipe, num_groups=97))
    drawn = []
    for seed in (0, 1):
        for timestep in (900, 500, 100):
            denoise(tiny_pipe, timestep, seed=seed)
        drawn.append(attachment.environments)
    assert not torch.equal(*drawn)


def test_an_invariant_module_is_guided_without_groups_and_a_scale_is_finite(tiny_pipe):
    module = make_guidance_module(tiny_pipe, mode="invariant")
    plain = draw(tiny_pipe, 0)
    with attach(tiny_pipe, module):
        assert not torch.equal(draw(tiny_pipe, 0), plain)
    with pytest.raises(ConfigError, match="with an invariant module"):
        attach(tiny_pipe, module, environments=[0.2, 0.8])
    with pytest.raises(ConfigError, match="a finite scale, such as 1, got nan"):
        attach(tiny_pipe, module, float("nan"))


def test_scale_and_mix_are_changed_at_any_time_under_the_checks_of_attach(tiny_pipe):
    attachment = attach(tiny_pipe, make_guidance_module(tiny_pipe))
    wrong = ("scale", float("nan"), "got nan"), ("scale", "0.5", "got '0.5'"), ("mix", [0.5, 0.6], "sum to 1")
    for name, value, message in (*wrong, ("environments", [1.0, 0.0], "Set mix")):
        with pytest.raises(ConfigError, match=message):
            setattr(attachment, name, value)
    for mix, groups in (([0.0, 1.0], [[1]] * 6), (torch.tensor([1, 0, 1]), [[1], [0], [1]] * 2)):
        attachment.mix = mix
        draw(tiny_pipe, 0, 1, 2)
        assert attachment.environments.tolist() == groups


def test_detaching_restores_the_model_after_an_error_too(tiny_pipe):
    plain, attributes = draw(tiny_pipe, 0), set(vars(tiny_pipe))
    attachment = attach(tiny_pipe, make_guidance_module(tiny_pipe))
    assert set(vars(tiny_pipe)) != attributes
    draw(tiny_pipe, 0)
    with pytest.raises(KeyboardInterrupt), attachment:
        raise KeyboardInterrupt
    attachment.detach()  # twice does no harm
    assert set(vars(tiny_pipe)) == attributes
    assert torch.equal(draw(tiny_pipe, 0), plain)
    assert not any(network._forward_hooks for network in tiny_pipe.unet.modules())


@pytest.mark.parametrize("first_off", [0, 1])
def test_shifts_of_two_modules_add_and_come_off_in_any_order(tiny_pipe, first_off):
    frozen = denoise(tiny_pipe)
    modules, alone = [make_guidance_module(tiny_pipe, seed=seed, width=8 * (2 + seed)) for seed in (0, 1)], []
    for module in modules:
        with attach(tiny_pipe, module, environments=[0, 1, 0]):
            alone.append(denoise(tiny_pipe))
    attachments = [attach(tiny_pipe, module, environments=[0, 1, 0]) for module in modules]
    torch.testing.assert_close(denoise(tiny_pipe), alone[0] + alone[1] - frozen)
    attachments[first_off].detach()
    assert torch.equal(denoise(tiny_pipe), alone[1 - first_off])
    attachments[1 - first_off].detach()
    assert torch.equal(denoise(tiny_pipe), frozen)


def test_an_attached_pipeline_can_be_thrown_away():
    pipe = make_tiny_pipeline()
    attach(pipe, make_guidance_module(pipe))
    draw(pipe, 0)
    unet = weakref.ref(pipe.unet)
    del pipe
    gc.collect()
    assert unet() is None


def test_a_module_of_another_shape_is_refused_and_every_difference_named(tiny_pipe):
    fitting = GuidanceModule.for_pipeline(tiny_pipe).config
    other = {"latent_channels": 3, "prompt_dim": 24, "feature_channels": 64, "prediction_type": "v_prediction"}
    with pytest.raises(ModelError) as caught:
        attach(tiny_pipe, GuidanceModule(**other), strict=False)
    for name, value in other.items():
        assert f"{name}: expected {value}, found {fitting[name]}" in str(caught.value)
    with pytest.raises(ModelError, match="denoiser_class: expected UNet3D, found UNet2DConditionModel"):
        attach(tiny_pipe, GuidanceModule(denoiser_class="UNet3D"), strict=False)
    lora = make_guidance_lora(tiny_pipe)
    layers = lora.config["layers"]
    first, *_, last = layers
    lora.register_to_config(layers=layers | {last: [16, 3]})
    with pytest.raises(ModelError, match=rf": shape of {last}: expected \[16, 3\], found \[{layers[last][0]}, "):
        attach(tiny_pipe, lora)
    lora.register_to_config(layers={first: layers[first]})
    with pytest.raises(ModelError, match=r": shape of \S+: expected none, found \["):
        attach(tiny_pipe, lora)


def test_the_prompt_is_encoded_once_for_all_steps_and_anew_where_it_is_changed_in_place(tiny_pipe, monkeypatch):
    encoded = []
    encode = GuidanceModule.encode
    monkeypatch.setattr(GuidanceModule, "encode", lambda self, told: encoded.append(told) or encode(self, told))
    attach(tiny_pipe, make_guidance_module(tiny_pipe))
    for calls in (1, 2):
        draw(tiny_pipe, calls)
        assert len(encoded) == calls
    latents, embeds = inputs()
    with torch.no_grad():
        before = tiny_pipe.unet(latents, 500, embeds).sample
        embeds += torch.randn(3, 16, 16)
        changed = tiny_pipe.unet(latents, 500, embeds).sample
        assert torch.equal(changed, tiny_pipe.unet(latents, 500, embeds.clone()).sample)
    assert not torch.equal(changed, before)


def test_inference_mode_is_fine(tiny_pipe):
    attach(tiny_pipe, make_guidance_module(tiny_pipe))
    expected = draw(tiny_pipe, 0)
    with torch.inference_mode():
        assert torch.equal(draw(tiny_pipe, 0), expected)


def test_copies_and_pickles_of_what_is_guided_are_plain(tiny_pipe):
    plain = draw(tiny_pipe, 0)
    attachment = attach(tiny_pipe, make_guidance_module(tiny_pipe))
    guided = draw(tiny_pipe, 0)
    copied, pickled = copy.deepcopy(tiny_pipe), pickle.loads(pickle.dumps(tiny_pipe.unet))
    assert torch.equal(draw(copied, 0), plain)
    assert torch.equal(draw(tiny_pipe, 0), guided)
    free = pickle.loads(pickle.dumps(tiny_pipe.maybe_free_model_hooks))
    assert free() is None  # nor does the method that looks whether guidance ran
    attachment.detach()
    copied.unet = pickled
    assert torch.equal(draw(copied, 0), plain)
