import pytest
import torch

from invdiff.training.batches import GroupBalancedSampler
from invdiff.training.purity import purified


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

    rows, _, environments = GroupBalancedSampler(prompts, [weights], 0.99).draw(
        40_000, torch.Generator().manual_seed(0)
    )
    wrong = [weights[rows[(environments[:, 0] == 1) & (prompts[rows] == p)], 0].mean().item() for p in (0, 1)]
    assert wrong == pytest.approx([0.2, 0.2], abs=0.01)


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
