"""Methods that act while images are drawn, on a tiny Stable Diffusion: what they change, and that they leave."""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from methods import Fitted
from rivals.calls import encode
from rivals.fair_diffusion import FairDiffusion
from rivals.prompts import DIVERSE, Prompted
from rivals.self_debias import SelfDebias
from rivals.uce import UCE

from invdiff import FinetuneConfig
from tiny import CAPTIONS, make_tiny

CLUSTERS = SelfDebias(images=4, inference_steps=3)
EDITED = UCE(images=2, inference_steps=2, iterations=1, tolerance=0.0)
WORDS = {"land": "on land", "water": "on water"}


def name(method):
    return type(method).__name__


@pytest.fixture
def world(request):
    prompts = dict(zip(CAPTIONS, WORDS, strict=True))
    parts = {"data": SimpleNamespace(fingerprint="birds"), "finetuning": FinetuneConfig(), "seed": 0}
    biased = partial(make_tiny, getattr(request, "param", "sd1"))
    return SimpleNamespace(biased=biased, words=WORDS, prompts=prompts, **parts)


def draw(fitted, seed=None, guidance_scale=3.0, prompts=CAPTIONS):
    """Latents, plain without a seed."""
    generators = [torch.Generator().manual_seed(image) for image in range(len(prompts))]
    options = {"guidance_scale": guidance_scale, "num_inference_steps": 3, "output_type": "latent"}
    with nullcontext() if seed is None else fitted.hooked(seed):
        return fitted.pipe(list(prompts), generator=generators, **options).images


@pytest.mark.parametrize(("world", "guidance_scale"), [("sd1", 1.0), ("sd2-v", 3.0)], indirect=["world"])
@pytest.mark.parametrize("method", [Prompted(), Prompted(DIVERSE), FairDiffusion(warmup_steps=1), CLUSTERS], ids=name)
def test_images_follow_from_the_seed_and_the_pipeline_is_left_as_it_was(method, world, guidance_scale, tmp_path):
    drawn = partial(draw, method.fit(world, tmp_path), guidance_scale=guidance_scale)
    plain, first = drawn(), drawn(0)
    assert not torch.equal(first, plain)
    assert torch.equal(first, drawn(0))
    assert torch.equal(drawn(), plain)
    if method != Prompted(DIVERSE):
        assert not all(torch.equal(first, drawn(seed)) for seed in (1, 2))


@pytest.mark.parametrize(
    "method",
    [FairDiffusion(edit_guidance_scale=0.0), replace(CLUSTERS, strength=0.0), replace(EDITED, iterations=0)],
    ids=name,
)
def test_at_zero_strength_images_are_the_plain_ones_to_the_bit(method, world, tmp_path):
    assert torch.equal(draw(method.fit(world, tmp_path), 0), draw(Fitted(world.biased())))


def test_an_image_is_drawn_from_the_prompt_with_the_words_of_its_class(world, tmp_path):
    fitted = Prompted().fit(world, tmp_path)
    worded = [draw(fitted, prompts=[f"{caption} {words}" for caption in CAPTIONS]) for words in WORDS.values()]
    drawn = [draw(fitted, seed) for seed in (1, 2, 3)]
    gaps = [[(each - other).flatten(1).abs().amax(dim=1) for each in drawn] for other in worded]
    near = torch.stack([torch.cat(of_words) for of_words in gaps])
    assert (near.amin(dim=0) < 1e-4).all()
    assert near.argmin(dim=0).unique().numel() == 2


@pytest.mark.parametrize("method", [FairDiffusion(warmup_steps=0), CLUSTERS], ids=name)
def test_an_edit_is_added_to_both_rows_of_an_image_so_that_guidance_adds_it_once(method, world, tmp_path):
    fitted, plain, edited = method.fit(world, tmp_path), [], []
    fitted.pipe.unet.register_forward_hook(lambda unet, args, output: plain.append(output[0]))
    with fitted.hooked(0):
        fitted.pipe.unet.register_forward_hook(lambda unet, args, output: edited.append(output[0]))
        draw(fitted)
    null, caption = (torch.stack(edited) - torch.stack(plain)).chunk(2, dim=1)
    assert null.any()
    torch.testing.assert_close(null, caption, atol=1e-6, rtol=1e-4)


def test_concept_editing_solves_its_least_squares_once_and_reads_it_back(world, tmp_path):
    """Weights minimise ridge |W' - W|^2 + |W' c - v|^2 over edited tokens and preserved ones."""
    method = replace(EDITED, preserve_scale=0.0)
    fitted, plain = method.fit(world, tmp_path), world.biased()
    layer = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    new, old = (pipe.unet.get_submodule(layer).weight for pipe in (fitted.pipe, plain))

    def tokens(caption):
        return encode(plain, [caption])[0, len(plain.tokenizer(caption).input_ids) - 2 :]

    inputs, outputs = [method.ridge**0.5 * torch.eye(old.shape[1])], [method.ridge**0.5 * old.T]
    for caption, alphas in zip(CAPTIONS, fitted.about["alpha"], strict=True):
        inputs.append(tokens(caption))
        outputs.append(tokens(caption) @ old.T)
        for words, alpha in zip(WORDS.values(), alphas, strict=True):
            shift = tokens(words)[: len(inputs[-1])]
            outputs[-1][: len(shift)] += alpha * shift @ old.T
    solved = torch.linalg.lstsq(torch.cat(inputs), torch.cat(outputs)).solution.T
    assert not torch.equal(new, old)
    torch.testing.assert_close(new, solved, atol=1e-5, rtol=1e-3)
    assert torch.equal(draw(fitted), draw(method.fit(world, tmp_path)))
