from types import SimpleNamespace

import pytest
import torch

from invdiff.config import TrainConfig
from invdiff.training.batches import GroupBalancedSampler, draw_batch, purified


def test_where_nothing_was_found_the_environment_is_independent_of_the_image():
    sampler = GroupBalancedSampler(torch.zeros(10, dtype=torch.long), [torch.full((10, 2), 0.5)])
    rows, _, environments = sampler.draw(8000, torch.Generator().manual_seed(0))
    for row in range(10):
        assert abs(environments[rows == row, 0].float().mean().item() - 0.5) < 0.08


def test_a_prompt_then_a_factor_that_splits_it_then_a_group_then_an_image_are_drawn_as_chances_say():
    """Soft and hard groups, one empty, a factor that says nothing of one prompt, a rarer prompt, images left out.

    They are two images and the whole of a third prompt.
    """
    prompts = torch.tensor([0] * 28 + [1] * 12 + [2] * 5)
    first = torch.rand(45, 2, generator=torch.Generator().manual_seed(1)).softmax(dim=1)
    labels = (torch.arange(45) % 7 == 0).long()
    second = torch.where((prompts == 0)[:, None], torch.eye(3)[labels], torch.tensor(1 / 3))
    for weights in (first, second):
        weights[[3, 30, *range(40, 45)]] = 0.0
    sampler, expected = GroupBalancedSampler(prompts, [first, second], 0.6), torch.zeros(45, dtype=torch.double)
    soft = purified(first, prompts, 0.6)
    for rows, kept, splitting in ((slice(28), 27, (soft, second)), (slice(28, 40), 11, (soft,))):
        for weights in splitting:
            present = weights[rows, weights[rows].any(dim=0)]
            images = (present / present.sum(dim=0)).mean(dim=1)
            expected[rows] += kept**0.5 / (27**0.5 + 11**0.5) / len(splitting) * images
    assert torch.allclose(sampler.chances(), expected)
    rows, factors, environments = sampler.draw(20_000, torch.Generator().manual_seed(0))
    assert torch.allclose(torch.bincount(rows, minlength=45) / len(rows), expected.float(), atol=0.006)
    common = prompts[rows] == 0
    assert factors[~common].max() == 0
    assert torch.equal(environments[common, 1], labels[rows[common]])


def draw(preserve=0.0):
    """A batch of 4,000 images, all zeros, of captions 0 and 1, each its own prompt, of which one is audited.

    The null caption is 2, unrelated ones are 3 and 4. A frozen denoiser predicts noisy latents, caption and timestep.
    """

    def frozen(noisy_latents, timesteps, condition):
        return noisy_latents + condition["prompt_embeds"][..., None] + timesteps[:, None, None, None], None

    data = SimpleNamespace(
        caption_ids=torch.arange(10) % 2,
        null_id=2,
        latents=torch.zeros(10, 1, 1, 1),
        condition=lambda captions: {"prompt_embeds": captions[:, None, None].double()},
        unrelated={"prompt_embeds": torch.tensor([3.0, 4.0]).double()[:, None, None]},
    )
    noise_only = {name: lambda latents, noise, timesteps: noise for name in ("add_noise", "target")}
    frozen.schedule, frozen.device = SimpleNamespace(num_train_timesteps=1000, **noise_only), torch.device("cpu")
    weights = torch.where((data.caption_ids == 0)[:, None], torch.eye(2)[torch.arange(10) // 5], torch.tensor(0.5))
    sampler = GroupBalancedSampler(data.caption_ids, [weights])
    config = TrainConfig(batch_size=4000, caption_dropout=0.25, preserve=preserve)
    return draw_batch(data, sampler, frozen, torch.Generator().manual_seed(0), config)


def test_captions_are_dropped_and_high_noise_is_preferred_by_the_generator_alone():
    batch, other = draw(), draw()
    captions = batch.condition["prompt_embeds"]
    assert captions.dtype == torch.float32
    assert (captions == 2).float().mean().item() == pytest.approx(0.25, abs=0.03)
    for bound, share in ((500, 0.25), (900, 0.81)):  # levels have density 2u
        assert (batch.timesteps < bound).float().mean().item() == pytest.approx(share, abs=0.03)
    assert torch.equal(batch.noisy_latents, other.noisy_latents)
    assert torch.equal(batch.environments, other.environments)


def test_unrelated_captions_and_prompts_that_nobody_audited_are_held_to_the_frozen_prediction():
    batch, without = draw(preserve=0.3), draw()
    captions = batch.condition["prompt_embeds"][:, 0, 0]
    assert (captions == 3).float().mean().item() == pytest.approx(0.15, abs=0.02)
    assert (captions == 4).float().mean().item() == pytest.approx(0.15, abs=0.02)
    assert torch.equal(captions[captions < 3], without.condition["prompt_embeds"][captions < 3, 0, 0])
    assert torch.equal(batch.preserved, (captions > 2) | (batch.prompts == 1))
    predicted = batch.noisy_latents[:, 0, 0, 0] + captions + batch.timesteps
    expected = torch.where(batch.preserved, predicted, batch.noisy_latents[:, 0, 0, 0])  # else the noise
    assert torch.allclose(batch.target[:, 0, 0, 0], expected)
    assert not (batch.captioned & batch.preserved).any()


def test_a_noise_level_that_rounds_up_to_the_end_is_a_timestep_all_the_same(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *shape, dtype=None, **_: torch.full(shape, 1 - 2**-24, dtype=dtype))
    assert draw().timesteps.max() == 999


def posteriors(*counts, groups=2):
    """Rows of W of two or more groups: (how many, probability of each group but the last)."""
    rows = [[*first, 1 - sum(first)] for number, *first in counts for _ in range(number)]
    return torch.tensor(rows, dtype=torch.double)


def shares(drawn, weights, rows):
    """Estimated shares of every group in each cell of the prompt that has these rows, (E, E)."""
    return drawn[rows].T @ weights[rows] / drawn[rows].sum(dim=0)[:, None]


def test_hard_labels_uniform_rows_and_images_left_out_pass_unchanged():
    weights = torch.cat([posteriors((90, 1), (10, 0)), torch.full((49, 2), 0.5), posteriors((4, 0), (46, 1))])
    weights[[3, 60, 150]] = 0
    prompts = torch.tensor([0] * 100 + [1] * 49 + [2] * 50)
    assert torch.equal(purified(weights, prompts, 0.99), weights)


@pytest.mark.parametrize(
    ("sure", "unsure", "kept"),
    [(30, 9, 30), (15, 30, 20), (15, 3, 18), (0, 0, 0)],  # all sure ones; the surest twenty; those over one half
)
def test_a_rare_cell_keeps_its_surest_images_and_the_common_one_all(sure, unsure, kept):
    falling = [(1, 0.1 + 0.01 * number) for number in range(unsure)]
    weights = posteriors((50, 0.9), (50, 0.8), (sure, 0.0), *falling)
    drawn = purified(weights, torch.zeros(len(weights), dtype=torch.long), 0.99)
    assert torch.equal(drawn[:, 0], weights[:, 0])
    assert torch.equal(drawn[:, 1].nonzero()[:, 0], weights[:, 1].topk(kept).indices.sort().values)


def test_what_is_wrong_in_one_prompts_cell_is_matched_in_the_others():
    """Prompt 0: 900 sure of group 0, 20 of .8 for group 1. Prompt 1: 500 sure of either. Group 1 is a fifth wrong."""
    weights = posteriors((900, 1), (20, 0.2), (500, 1), (500, 0))
    prompts = (torch.arange(1920) >= 920).long()
    drawn = purified(weights, prompts, 0.99)
    common = (20 * 0.2 * 0.8) / (900 + 20 * 0.2)  # what is wrong in the common cell of prompt 0
    expected = torch.tensor([[1 - common, common], [0.2, 0.8]], dtype=torch.double)
    for prompt in (0, 1):
        assert torch.allclose(shares(drawn, weights, prompts == prompt), expected)
    assert torch.equal(drawn[:920, 1], weights[:920, 1])  # the cell that is worst already stays as it is
    assert torch.allclose(drawn[1420:, 1] * 0.25, drawn[920:1420, 1])


def test_images_of_which_nothing_is_known_are_neither_drawn_nor_wrong_where_a_prompt_is_split():
    known = torch.cat([posteriors((72, 1), (8, 0)), posteriors((100, 1), (100, 0)), torch.full((9, 2), 0.5)])
    weights = torch.cat([known, torch.full((120, 2), 0.5)])
    prompts = torch.tensor([0] * 80 + [1] * 200 + [2] * 9 + [0] * 120)
    drawn = purified(weights, prompts, 0.99)
    assert torch.equal(drawn[:289], known)
    assert not drawn[289:].any()
    chances = GroupBalancedSampler(prompts, [weights], 0.99).chances()
    assert chances[prompts == 0].sum() > 2 * chances[:72].sum() * 0.99
    assert not chances[289:].any()
    assert chances[280:289].min() > 0


def test_three_groups_are_matched_and_one_that_a_prompt_lacks_stays_empty():
    pure, mixed = torch.eye(3, dtype=torch.double), posteriors((60, 0.9, 0.06), (30, 0.02, 0.9), (30, 0.05, 0.05))
    weights = torch.cat([mixed, pure.repeat_interleave(50, dim=0), pure[:2].repeat_interleave(50, dim=0)])
    prompts = torch.tensor([0] * 120 + [1] * 150 + [2] * 100)
    drawn = purified(weights, prompts, 0.0)
    first, second = (shares(drawn, weights, prompts == prompt) for prompt in (0, 1))
    assert torch.allclose(first, second)
    assert first.diagonal().max() < 0.95
    assert drawn[prompts == 2][:, 2].sum() == 0
