import accelerate
import pytest
import torch

from conftest import make_guidance_module
from invdiff.errors import ConfigError, ModelError
from invdiff.guidance.module import GuidanceModule


def inputs(height=8, width=8):
    """Noisy latents, timesteps, condition, prediction and middle features of three rows."""
    numbers = torch.Generator().manual_seed(0)
    shapes = [(3, 4, height, width), (3, 16, 16), (3, 4, height, width), (3, 32, 4, 4)]
    latents, embeds, model_pred, features = (torch.randn(shape, generator=numbers) for shape in shapes)
    return latents, torch.tensor([10, 500, 900]), {"prompt_embeds": embeds}, model_pred, features


def environments(*groups):
    return torch.tensor(groups)[:, None]


@pytest.mark.parametrize("side", [(7, 5), (1, 1), (9, 16)])
def test_the_shift_has_the_shape_of_any_latents(tiny_pipe, side):
    assert make_guidance_module(tiny_pipe)(*inputs(*side), environments(0, 1, 1)).shape == (3, 4, *side)


def test_each_factor_has_its_own_groups(tiny_pipe):
    module = make_guidance_module(tiny_pipe, num_groups=(2, 3))
    with torch.no_grad():
        shifts = [module(*inputs(), torch.tensor([pair] * 3)) for pair in ((0, 0), (1, 0), (0, 1), (0, 2), (1, 2))]
    assert all(not torch.equal(a, b) for i, a in enumerate(shifts) for b in shifts[:i])


def test_a_balanced_module_asks_for_groups_and_an_invariant_one_never_sees_them(tiny_pipe):
    with pytest.raises(ModelError, match="environments of each image"):
        make_guidance_module(tiny_pipe)(*inputs())
    module = make_guidance_module(tiny_pipe, mode="invariant")
    assert not module.sees_environment
    assert not [name for name, _ in module.named_parameters() if name.startswith("environments")]
    assert torch.equal(module(*inputs()), module(*inputs(), environments(1, 1, 0)))


def test_tokens_that_are_masked_do_not_matter(tiny_pipe):
    latents, timesteps, condition, *others = inputs()
    mask = torch.ones(3, 16)
    mask[:, 9:] = 0
    module, groups = make_guidance_module(tiny_pipe), environments(0, 1, 1)
    masked = condition | {"prompt_attention_mask": mask}
    changed = masked | {"prompt_embeds": torch.where(mask[..., None] > 0, condition["prompt_embeds"], 7.0)}
    first, second = (module(latents, timesteps, each, *others, groups) for each in (masked, changed))
    assert torch.equal(first, second)
    assert not torch.equal(first, module(latents, timesteps, condition, *others, groups))


def test_initial_weights_follow_from_the_seed_alone(tiny_pipe):
    state = torch.get_rng_state()
    first, again, other = (GuidanceModule.for_pipeline(tiny_pipe, seed=seed).conv_in.weight for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "options", [{"num_groups": 1}, {"num_groups": ()}, {"mode": "balancd"}, {"width": 20}, {"width": -8}]
)
def test_settings_out_of_range_are_refused(tiny_pipe, options):
    with pytest.raises(ConfigError, match=r"xpected .* got"):
        GuidanceModule.for_pipeline(tiny_pipe, **options)


def test_a_denoiser_whose_weights_are_offloaded_is_refused(tiny_pipe):
    accelerate.cpu_offload(tiny_pipe.unet, execution_device=torch.device("cpu"))
    with pytest.raises(ModelError, match="found them offloaded"):
        GuidanceModule.for_pipeline(tiny_pipe)
