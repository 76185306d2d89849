import pytest
import torch
from peft import LoraConfig

from conftest import make_guidance_module, make_tiny_pipeline
from invdiff.errors import ModelError
from invdiff.guidance.attach import GuidedDenoiser, attach
from invdiff.models.families import family_of
from invdiff.models.frozen import FeatureCapture, FrozenDenoiser, denoiser_fingerprint
from invdiff.models.load import denoiser_of
from tiny import FAMILIES, denoise, inputs, make_tiny

TIMESTEPS = torch.tensor([10, 500, 990])


def arguments():
    """Of a call of a frozen denoiser."""
    latents, embeds = inputs()
    return latents, TIMESTEPS, {"prompt_embeds": embeds}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_two_blocks_are_read_over_the_image_and_nothing_is_changed(family):
    pipe = make_tiny(family)
    denoiser, adapter = denoiser_of(pipe).train(), family_of(pipe)
    condition = adapter.null_condition(pipe)
    latents = torch.randn(1, adapter.shape(denoiser).latent_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    with FrozenDenoiser(pipe) as plain:
        expected = plain(latents, torch.tensor([500]), condition)
    with FrozenDenoiser(pipe, upper=True) as frozen:
        hooked, training = sum(len(block._forward_hooks) for block in denoiser.modules()), denoiser.training
        found, upper = frozen(latents, torch.tensor([500]), condition), frozen.take_upper(latents)
    assert (hooked, training, denoiser.training) == (3, False, True)
    assert not any(block._forward_hooks for block in denoiser.modules())
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert not torch.equal(*upper)
    for block in upper:
        assert block.shape[0] == 1
        assert block.shape[2] == block.shape[3] > 1


def test_a_guided_denoiser_predicts_the_mean_over_groups_of_what_the_attached_pipeline_predicts(tiny_pipe):
    module = make_guidance_module(tiny_pipe)
    with FrozenDenoiser(tiny_pipe) as frozen:
        guided = GuidedDenoiser(frozen, module, {})(*arguments())[0]
    attached = []
    for group in (0, 1):
        with attach(tiny_pipe, module, environments=[group]):
            attached.append(denoise(tiny_pipe, TIMESTEPS))
    assert torch.allclose(guided, (attached[0] + attached[1]) / 2, atol=1e-6)


def test_fingerprints_name_weights_and_modules(tiny_pipe):
    with FrozenDenoiser(tiny_pipe) as frozen:
        one = GuidedDenoiser(frozen, make_guidance_module(tiny_pipe), {})
        other = GuidedDenoiser(frozen, make_guidance_module(tiny_pipe, mode="invariant"), {})
        assert len({frozen.fingerprint, one.fingerprint, other.fingerprint}) == 3
        assert frozen.fingerprint == denoiser_fingerprint(make_tiny_pipeline())
    with torch.no_grad():
        tiny_pipe.unet.conv_in.bias[0] += 1e-3
    assert denoiser_fingerprint(tiny_pipe) != frozen.fingerprint


def test_adapters_count_with_their_strength_and_whether_they_are_on(tiny_pipe):
    found, unet = [denoiser_fingerprint(tiny_pipe)], tiny_pipe.unet
    for change in (
        lambda: unet.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q"]), "one"),
        lambda: unet.set_adapters("one", 0.5),
        unet.disable_adapters,
        unet.enable_adapters,
        lambda: tiny_pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4),
    ):
        change()
        found.append(denoiser_fingerprint(tiny_pipe))
    assert found[4] == found[2]
    assert len({*found}) == 5


@pytest.mark.parametrize(("path", "shape"), [("mid_block", (3, 32, 4, 4)), ("down_blocks.0", (3, 16, 4, 4))])
def test_a_blocks_output_is_read_once_until_it_is_closed(tiny_pipe, path, shape):
    capture = FeatureCapture(tiny_pipe.unet, family_of(tiny_pipe), path)
    denoise(tiny_pipe)
    assert capture.take().shape == shape
    with pytest.raises(ModelError, match=f"ran without its block '{path}'"):
        capture.take()
    capture.close()
    denoise(tiny_pipe)
    with pytest.raises(ModelError, match="ran without"):
        capture.take()


def test_what_later_blocks_overwrite_is_kept_as_it_was(tiny_pipe):
    capture = FeatureCapture(tiny_pipe.unet, family_of(tiny_pipe), "mid_block")
    denoise(tiny_pipe)
    expected = capture.take()
    tiny_pipe.unet.mid_block.register_forward_hook(lambda block, inputs, output: [output.zero_(), None][1])
    denoise(tiny_pipe)
    assert torch.equal(capture.take(), expected)
