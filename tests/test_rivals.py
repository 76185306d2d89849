"""Methods that act while images are drawn, on a tiny Stable Diffusion: what they change, and that they leave."""

from types import SimpleNamespace

import pytest
import torch
from rivals.fair_diffusion import FairDiffusion
from rivals.prompts import DIVERSE, Prompted

from tiny import CAPTIONS, make_tiny

WORDS = {"land": "on land", "water": "on water"}


@pytest.fixture(params=["sd1", "sd2-v"])
def pipe(request):
    return make_tiny(request.param)


@pytest.fixture
def world(pipe):
    return SimpleNamespace(biased=lambda: pipe, words=WORDS, prompts=dict(zip(CAPTIONS, WORDS, strict=True)), seed=0)


def draw(pipe, guidance_scale=3.0, prompts=CAPTIONS):
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    options = {"guidance_scale": guidance_scale, "num_inference_steps": 3, "output_type": "latent"}
    return pipe(list(prompts), generator=generators, **options).images


def drawn_by(method, world, folder, seed=0, **options):
    fitted = method.fit(world, folder)
    with fitted.hooked(seed):
        return draw(fitted.pipe, **options)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("method", [Prompted(), Prompted(DIVERSE), FairDiffusion(warmup_steps=1)], ids=repr)
def test_images_change_by_the_seed_and_the_pipeline_is_as_it_was_afterwards(method, guidance_scale, world, tmp_path):
    options = {"guidance_scale": guidance_scale}
    plain = draw(world.biased(), **options)
    first = drawn_by(method, world, tmp_path, **options)
    assert not torch.equal(first, plain)
    assert torch.equal(first, drawn_by(method, world, tmp_path, **options))
    if method.supervision == "words":
        others = [drawn_by(method, world, tmp_path, seed, **options) for seed in (1, 2)]
        assert not all(torch.equal(first, other) for other in others)
    assert torch.equal(draw(world.biased(), **options), plain)


@pytest.mark.parametrize("method", [FairDiffusion(edit_guidance_scale=0.0)], ids=repr)
def test_at_zero_strength_images_are_the_plain_ones_to_the_bit(method, world, tmp_path):
    assert torch.equal(drawn_by(method, world, tmp_path), draw(world.biased()))


def test_an_image_is_drawn_from_the_prompt_with_the_words_of_its_class(world, tmp_path):
    found = drawn_by(Prompted(), world, tmp_path, seed=1)
    worded = [draw(world.biased(), prompts=[f"{caption} {words}" for caption in CAPTIONS]) for words in WORDS.values()]
    near = torch.stack([(found - other).flatten(1).abs().amax(dim=1) for other in worded])
    assert (near.amin(dim=0) < 1e-4).all()
    assert len(set(near.argmin(dim=0).tolist())) == 2


@pytest.mark.parametrize("method", [FairDiffusion(warmup_steps=0)], ids=repr)
def test_an_edit_is_added_to_both_rows_of_an_image_so_that_guidance_adds_it_once(method, world, tmp_path):
    pipe, predicted = world.biased(), ([], [])
    fitted = method.fit(world, tmp_path)
    pipe.unet.register_forward_hook(lambda unet, args, output: predicted[0].append(output[0]))
    with fitted.hooked(0):
        pipe.unet.register_forward_hook(lambda unet, args, output: predicted[1].append(output[0]))
        draw(pipe)
    for plain, edited in zip(*predicted, strict=True):
        null, caption = (edited - plain).chunk(2)
        assert null.any()
        torch.testing.assert_close(null, caption, atol=1e-6, rtol=1e-4)
