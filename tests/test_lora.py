"""Adapters act on rows of their groups, add over factors, stay out of the null row and notice what skips them."""

import pytest
import torch

from conftest import CAPTIONS, make_guidance_lora, make_guidance_module, make_tiny_pipeline
from invdiff.errors import ConfigError, ModelError
from invdiff.guidance.attach import attach


def denoise(pipe, embeds=None):
    """One call of the denoiser on three rows."""
    numbers = torch.Generator().manual_seed(0)
    latents, made_up = (torch.randn(3, *shape, generator=numbers) for shape in ((4, 8, 8), (16, 16)))
    with torch.no_grad():
        return pipe.unet(latents, 500, made_up if embeds is None else embeds).sample


def guided(pipe, guidance, *arguments, embeds=None, **options):
    with attach(pipe, guidance, *arguments, **options):
        return denoise(pipe, embeds)


def same_rows(first, second):
    return [torch.allclose(a, b, atol=1e-6) for a, b in zip(first, second, strict=True)]


def test_a_row_depends_on_its_own_group_only(tiny_pipe):
    guidance = make_guidance_lora(tiny_pipe)
    one, other = (guided(tiny_pipe, guidance, environments=[0, group, 1]) for group in (0, 1))
    assert same_rows(one, other) == [True, False, True]
    assert same_rows(one, denoise(tiny_pipe)) == [False] * 3


def test_an_adapter_is_low_rank_weights_added_to_the_layer(tiny_pipe):
    """Group 1 of factor 2, at half strength, beside what merging B A of its ranks into the weights gives."""
    guidance = make_guidance_lora(tiny_pipe, num_groups=(2, 3))
    expected = make_tiny_pipeline()
    with torch.no_grad():
        for path, adapter in zip(guidance.config["layers"], guidance.adapters.values(), strict=True):
            layer, delta = expected.unet.get_submodule(path), 0.0
            for ranks in (slice(0, 2), slice(6, 8)):  # of group 0 of factor 1 and group 1 of factor 2
                delta = delta + torch.einsum("or,r...->o...", adapter.up[:, ranks], adapter.down[ranks])
            layer.weight.add_(0.5 * delta)
    output = guided(tiny_pipe, guidance, 0.5, [[0, 1]] * 3)
    assert torch.allclose(output, denoise(expected), atol=1e-5)


def test_an_invariant_adapter_never_sees_the_group(tiny_pipe):
    guidance = make_guidance_lora(tiny_pipe, mode="invariant")
    assert len({len(adapter.down) for adapter in guidance.adapters.values()} - {2}) == 0
    with pytest.raises(ConfigError, match="invariant module"):
        attach(tiny_pipe, guidance, environments=[0, 1, 0])


def test_the_null_row_runs_without_the_adapter_unless_it_is_on(tiny_pipe):
    embeds, negative = tiny_pipe.encode_prompt(CAPTIONS[0], "cpu", 1, True)
    rows = torch.cat([negative, embeds, embeds])
    plain = denoise(tiny_pipe, rows)
    for null_adapter, untouched in (("off", [True, False, False]), ("on", [False] * 3)):
        output = guided(tiny_pipe, make_guidance_lora(tiny_pipe, null_adapter=null_adapter), embeds=rows)
        assert same_rows(output, plain) == untouched


def test_a_negative_prompt_takes_the_place_of_the_null_caption(tiny_pipe):
    seen, options = [], {"num_inference_steps": 1, "output_type": "latent", "guidance_scale": 3.0}
    with attach(tiny_pipe, make_guidance_lora(tiny_pipe, null_adapter="off")) as attachment:
        original = attachment.begin
        attachment.begin = lambda call: seen.append(original(call)) or seen[-1]
        for negative in (None, "a bird"):
            tiny_pipe(list(CAPTIONS), negative_prompt=[negative] * 2 if negative else None, **options)
    assert [rows.null.tolist() for rows in seen] == [[True, True, False, False]] * 2


def test_layers_that_do_not_run_are_noticed(tiny_pipe):
    with attach(tiny_pipe, make_guidance_lora(tiny_pipe)) as attachment:
        tiny_pipe.unet.fuse_qkv_projections()
        with pytest.raises(ModelError, match="adapted layers to run"):
            denoise(tiny_pipe)
        tiny_pipe.unet.unfuse_qkv_projections()
        denoise(tiny_pipe)
        assert attachment.calls == 2


def test_guidance_of_another_backend_or_model_is_refused(tiny_pipe):
    with attach(tiny_pipe, make_guidance_module(tiny_pipe)):
        with pytest.raises(ModelError, match="one backend on a model, found 'module'"):
            attach(tiny_pipe, make_guidance_lora(tiny_pipe))
        denoise(tiny_pipe)
    with pytest.raises(ModelError, match="weights: expected those it was trained beside"):
        attach(make_tiny_pipeline(seed=1), make_guidance_lora(tiny_pipe))
