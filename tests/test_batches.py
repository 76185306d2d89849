import torch

from invdiff.training.batches import GroupBalancedSampler


def hard(labels: torch.Tensor, groups: int) -> torch.Tensor:
    return torch.eye(groups)[labels]


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_groups_of_a_prompt_come_equally_often():
    labels = (torch.arange(100) >= 95).long()
    sampler = GroupBalancedSampler(torch.zeros(100, dtype=torch.long), [hard(labels, 2)])
    rows, environments = sampler.draw(4000, rng())
    assert torch.equal(environments[:, 0], labels[rows])
    assert abs(labels[rows].float().mean().item() - 0.5) < 0.03


def test_images_of_a_group_come_equally_often():
    labels = (torch.arange(20) >= 16).long()
    sampler = GroupBalancedSampler(torch.zeros(20, dtype=torch.long), [hard(labels, 2)])
    rows, _ = sampler.draw(8000, rng())
    rare = torch.bincount(rows, minlength=20)[16:]
    assert rare.min() > 0.85 * rare.float().mean()


def test_where_nothing_was_found_the_environment_is_independent_of_the_image():
    sampler = GroupBalancedSampler(torch.zeros(10, dtype=torch.long), [torch.full((10, 2), 0.5)])
    rows, environments = sampler.draw(8000, rng())
    for row in range(10):
        assert abs(environments[rows == row, 0].float().mean().item() - 0.5) < 0.08


def test_a_rare_prompt_comes_more_often_than_its_share():
    prompts = (torch.arange(500) >= 475).long()
    sampler = GroupBalancedSampler(prompts, [torch.full((500, 2), 0.5)])
    rows, _ = sampler.draw(4000, rng())
    expected = 25**0.5 / (25**0.5 + 475**0.5)
    assert abs(prompts[rows].float().mean().item() - expected) < 0.03


def test_an_empty_group_is_never_drawn():
    sampler = GroupBalancedSampler(torch.zeros(10, dtype=torch.long), [hard(torch.zeros(10, dtype=torch.long), 2)])
    assert sampler.draw(100, rng())[1].sum() == 0


def test_each_factor_is_balanced_when_there_are_two():
    first, second = (torch.arange(200) >= 180).long(), (torch.arange(200) % 10 == 0).long()
    sampler = GroupBalancedSampler(torch.zeros(200, dtype=torch.long), [hard(first, 2), hard(second, 2)])
    rows, environments = sampler.draw(4000, rng())
    assert torch.equal(environments, torch.stack([first[rows], second[rows]], dim=1))
    # Half of the draws balance this factor, the other half follow the images.
    for share, natural in zip(environments.float().mean(dim=0).tolist(), (0.1, 0.1), strict=True):
        assert share > 0.25 > natural


def test_an_image_left_out_is_as_if_it_were_not_there():
    """The last image of a prompt and a whole prompt among them, in two factors, one of which says nothing."""
    prompts = torch.arange(60) // 20
    first, second = hard((torch.arange(60) % 7 == 0).long(), 2), torch.full((60, 3), 1 / 3)
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


def test_draws_depend_on_the_generator_only():
    sampler = GroupBalancedSampler(torch.zeros(50, dtype=torch.long), [torch.full((50, 2), 0.5)])
    assert all(torch.equal(a, b) for a, b in zip(sampler.draw(32, rng()), sampler.draw(32, rng()), strict=True))
