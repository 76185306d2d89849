import pytest
import torch

from invdiff.training.objective import MovingGroupLosses, invariant_objective, objective_weights


def test_objective_is_mean_plus_penalty_times_variance():
    losses = torch.tensor([1.0, 3.0])
    assert invariant_objective(losses, penalty=0.5).item() == pytest.approx(2.0 + 0.5 * 1.0)


def test_weights_are_the_gradient_of_the_objective():
    losses = torch.tensor([0.9, 1.0, 1.3], requires_grad=True)
    (gradient,) = torch.autograd.grad(invariant_objective(losses, penalty=0.7), losses)
    assert torch.allclose(objective_weights(losses.detach(), penalty=0.7), 3 * gradient)


def test_weights_never_turn_negative():
    assert objective_weights(torch.tensor([0.0, 10.0]), penalty=5.0).min() == 0


def test_moving_means_are_kept_per_prompt_and_group():
    moving = MovingGroupLosses((2, 2), momentum=0.5)
    moving.update(torch.tensor([0, 0, 1]), torch.tensor([1, 1, 0]), torch.tensor([2.0, 4.0, 7.0]))
    moving.update(torch.tensor([0]), torch.tensor([1]), torch.tensor([9.0]))
    means = moving.means()
    assert means[0, 1].item() == pytest.approx((0.5 * 6 + 9) / (0.5 * 2 + 1))
    assert means[1, 0].item() == 7


def test_a_group_not_seen_yet_takes_its_prompts_mean():
    moving = MovingGroupLosses((1, 2), momentum=0.9)
    moving.update(torch.tensor([0]), torch.tensor([0]), torch.tensor([3.0]))
    assert moving.means().tolist() == [[3.0, 3.0]]


def test_moving_means_survive_a_checkpoint():
    moving, restored = MovingGroupLosses((2, 2), 0.9), MovingGroupLosses((2, 2), 0.9)
    moving.update(torch.tensor([0, 1]), torch.tensor([1, 0]), torch.tensor([1.5, 2.5]))
    restored.load(moving.state())
    assert torch.equal(restored.means(), moving.means())
