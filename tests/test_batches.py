from types import SimpleNamespace

import pytest
import torch

from invdiff.training.batches import GroupBalancedSampler, draw_batch


def hard(labels: torch.Tensor, groups: int = 2) -> torch.Tensor:
    return torch.eye(groups)[labels]


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def one_prompt(images: int) -> torch.Tensor:
    return torch.zeros(images, dtype=torch.long)


def test_groups_of_a_prompt_and_images_of_a_group_come_equally_often():
    labels = (torch.arange(20) >= 16).long()
    rows, environments = GroupBalancedSampler(one_prompt(20), [hard(labels)]).draw(8000, rng())
    assert torch.equal(environments[:, 0], labels[rows])
    assert abs(labels[rows].float().mean().item() - 0.5) < 0.03
    rare = torch.bincount(rows, minlength=20)[16:]
    assert rare.min() > 0.85 * rare.float().mean()


def test_where_nothing_was_found_the_environment_is_independent_of_the_image():
    rows, environments = GroupBalancedSampler(one_prompt(10), [torch.full((10, 2), 0.5)]).draw(8000, rng())
    for row in range(10):
        assert abs(environments[rows == row, 0].float().mean().item() - 0.5) < 0.08


def test_a_rare_prompt_comes_more_often_than_its_share():
    prompts = (torch.arange(500) >= 475).long()
    rows, _ = GroupBalancedSampler(prompts, [torch.full((500, 2), 0.5)]).draw(4000, rng())
    expected = 25**0.5 / (25**0.5 + 475**0.5)
    assert abs(prompts[rows].float().mean().item() - expected) < 0.03


def test_an_empty_group_is_never_drawn():
    assert GroupBalancedSampler(one_prompt(10), [hard(one_prompt(10))]).draw(100, rng())[1].sum() == 0


def test_each_factor_is_balanced_when_there_are_two():
    first, second = (torch.arange(200) >= 180).long(), (torch.arange(200) % 10 == 0).long()
    rows, environments = GroupBalancedSampler(one_prompt(200), [hard(first), hard(second)]).draw(4000, rng())
    assert torch.equal(environments, torch.stack([first[rows], second[rows]], dim=1))
    # Half of the draws balance this factor, the other half follow the images, of which a tenth have it.
    assert all(share > 0.25 for share in environments.float().mean(dim=0).tolist())


def test_an_image_left_out_is_as_if_it_were_not_there():
    """The last image of a prompt and a whole prompt among them, in two factors, one of which says nothing."""
    prompts = torch.arange(60) // 20
    first, second = hard((torch.arange(60) % 7 == 0).long()), torch.full((60, 3), 1 / 3)
    out = torch.zeros(60, dtype=torch.bool)
    out[[0, 3, 19, 21, 39, *range(40, 60)]] = True
    kept = torch.nonzero(~out)[:, 0]
    alone = GroupBalancedSampler(prompts[kept], [first[kept], second[kept]])
    first[out], second[out] = 0.0, 0.0
    rows, environments = GroupBalancedSampler(prompts, [first, second]).draw(10_000, rng())
    assert not out[rows].any()
    expected_rows, expected_environments = alone.draw(10_000, rng())
    assert torch.equal(rows, kept[expected_rows])
    assert torch.equal(environments, expected_environments)


@pytest.fixture
def draw():
    """Draw a batch of 4,000 images whose latents are zeros; the null caption is the last of three."""
    data = SimpleNamespace(
        caption_ids=torch.arange(10) % 2,
        null_id=2,
        latents=torch.zeros(10, 1, 1, 1),
        condition=lambda captions: {"prompt_embeds": captions[:, None, None].double()},
    )
    schedule = SimpleNamespace(
        num_train_timesteps=1000,
        add_noise=lambda latents, noise, timesteps: noise,
        target=lambda latents, noise, timesteps: noise,
    )
    sampler = GroupBalancedSampler(one_prompt(10), [torch.full((10, 2), 0.5)])
    options = {"size": 4000, "caption_dropout": 0.25, "device": torch.device("cpu")}
    return lambda: draw_batch(data, sampler, schedule, rng(), **options)


def test_captions_are_dropped_and_high_noise_is_preferred(draw):
    batch = draw()
    captions = batch.condition["prompt_embeds"]
    assert captions.dtype == torch.float32
    assert (captions == 2).float().mean().item() == pytest.approx(0.25, abs=0.03)
    for bound, share in ((500, 0.25), (900, 0.81)):  # levels have density 2u
        assert (batch.timesteps < bound).float().mean().item() == pytest.approx(share, abs=0.03)


def test_a_batch_depends_on_the_generator_only(draw):
    one, other = draw(), draw()
    assert torch.equal(one.noisy_latents, other.noisy_latents)
    assert torch.equal(one.environments, other.environments)


def test_a_noise_level_that_rounds_up_to_the_end_is_a_timestep_all_the_same(draw, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *shape, dtype=None, **_: torch.full(shape, 1 - 2**-24, dtype=dtype))
    assert draw().timesteps.max() == 999
