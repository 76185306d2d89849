"""Tokens are appended as in training where any are learned, each row its own groups', and never in part."""

import pytest
import torch

from invdiff import GenerateConfig, GuidanceTokens, attach, generate
from invdiff.errors import ConfigError
from invdiff.guidance.base import Rows
from invdiff.models.families import DenoiserCall, family_of
from invdiff.models.frozen import FrozenDenoiser
from invdiff.models.load import denoiser_of
from tiny import CAPTIONS, make_tiny


def make_guidance_tokens(pipe, **options):
    """Tokens for `pipe` that look trained."""
    guidance = GuidanceTokens.for_pipeline(pipe, **options)
    guidance.vectors.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    return guidance


def call(pipe):
    """Two rows of latents, timesteps and condition."""
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return latents, torch.tensor([500, 500]), family_of(pipe).encode_captions(pipe, CAPTIONS)


@torch.no_grad()
def predicted(pipe):
    return family_of(pipe).predict(denoiser_of(pipe), *call(pipe))


@pytest.mark.parametrize("family", ["sd1", "sd3", "flux", "pixart"])
def test_sampling_appends_what_training_appends_and_tokens_learn_apart(family):
    pipe = make_tiny(family)
    guidance, plain = make_guidance_tokens(pipe), predicted(pipe)
    with attach(pipe, guidance, environments=torch.tensor([0, 1])):
        sampled = predicted(pipe)
    with FrozenDenoiser(pipe) as frozen:
        trained, _ = guidance.guided(frozen, DenoiserCall(*call(pipe)), Rows(torch.tensor([[0], [1]])))
    assert torch.allclose(trained, sampled, atol=1e-5)
    assert not torch.allclose(sampled, plain, atol=1e-4)
    trained.square().sum().backward()
    first, *others = guidance.vectors.grad[0]
    assert first.any()
    assert not any(torch.allclose(first, other) for other in others)
    assert torch.equal(predicted(pipe), plain)


def test_the_tokens_of_each_rows_own_groups_follow_its_prompt_factor_by_factor(tiny_pipe):
    prompts = torch.randn(2, 5, 16)

    def parts(guidance, *groups):
        """Prompt, two tokens and two more; the second row is of groups 0 and 0."""
        rows = Rows(torch.tensor([groups, [0, 0]]))
        return guidance.before({"encoder_hidden_states": prompts}, rows)["encoder_hidden_states"].split([5, 2, 2], 1)

    guidance = make_guidance_tokens(tiny_pipe, num_groups=(2, 3), tokens=2)
    first, second, third = (parts(guidance, *groups) for groups in ([0, 2], [1, 2], [1, 0]))
    assert torch.equal(first[0], prompts)
    assert [torch.equal(*pair) for pair in zip(first, second, strict=True)] == [True, False, True]
    assert [torch.equal(*pair) for pair in zip(second, third, strict=True)] == [True, True, False]
    _, *shared = parts(make_guidance_tokens(tiny_pipe, num_groups=(2, 3), mode="invariant"), 1, 2)
    assert all(torch.equal(*rows) for rows in (third[2], *shared))


def test_what_tokens_cannot_do_is_refused(tiny_pipe, tmp_path):
    guidance, expected = make_guidance_tokens(tiny_pipe), r"scale 0 or 1 with tokens, got .*: a token is there or not"
    with pytest.raises(ConfigError, match=expected):
        attach(tiny_pipe, guidance, scale=0.5)
    attachment = attach(tiny_pipe, guidance)
    with pytest.raises(ConfigError, match=expected):
        attachment.scale = 0.5
    attachment.detach()
    options = {"module": guidance, "config": GenerateConfig(scale=2), "progress": False}
    with pytest.raises(ConfigError, match=expected):
        generate(tiny_pipe, CAPTIONS, tmp_path / "out", **options)
    assert not any(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="tokens: expected at least 1"):
        GuidanceTokens.for_pipeline(tiny_pipe, tokens=0)
