from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from conftest import make_guidance_module
from invdiff.guidance.base import Guided, Rows
from invdiff.models.frozen import FrozenDenoiser
from invdiff.models.schedule import per_sample_loss
from invdiff.training import objective
from invdiff.training.batches import Batch
from invdiff.training.checkpoint import accelerator_for

CPU = torch.device("cpu")


@pytest.mark.parametrize("num_factors", [1, 2])
def test_the_gradient_of_a_step_is_that_of_the_objective_at_the_means_before_it(tiny_pipe, encoded, num_factors):
    """Two groups of two prompts, or of two factors, equally often; one caption is null. The batch comes twice."""
    numbers = torch.Generator().manual_seed(0)
    cells, groups = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]), torch.tensor([0, 0, 1, 1] * 2)
    prompts, factors = (cells, 0 * cells) if num_factors == 1 else (0 * cells, cells)
    drawn = factors[:, None] == torch.arange(num_factors)
    environments = torch.where(drawn, groups[:, None], 1 - groups[:, None])
    latents, target = torch.randn(2, 8, 4, 8, 8, generator=numbers)
    timesteps = torch.arange(100, 900, 100)
    captions, null = encoded.caption_ids[:8].clone(), torch.full((8,), encoded.null_id)
    captions[0] = encoded.null_id
    condition, null_condition = encoded.condition(captions), encoded.condition(null)
    captioned, rows = captions != encoded.null_id, Rows(environments)
    conditions = condition, captioned, torch.zeros(8, dtype=torch.bool), null_condition
    batch = Batch(prompts, factors, environments, slice(0, 8), rows, *conditions, latents, timesteps, target)
    module, penalty = make_guidance_module(tiny_pipe, num_groups=[2] * num_factors), 2.5
    with torch.no_grad():
        module.conv_out.weight.normal_(std=0.02, generator=numbers)
    typical = 1 + torch.rand(1000, generator=numbers)
    moving, accelerator = objective.MovingGroupLosses((2, 2), 0.0), accelerator_for("no", CPU)

    def relative(condition):
        model_pred, features = frozen(latents, timesteps, condition)
        guided = model_pred + module(latents, timesteps, condition, model_pred, features, environments)
        return per_sample_loss(guided, target) / typical[timesteps]

    with FrozenDenoiser(tiny_pipe) as frozen:
        first, losses = objective.step_loss(Guided(frozen, module), batch, typical, moving, penalty, accelerator)
        loss, _ = objective.step_loss(Guided(frozen, module), batch, typical, moving, penalty, accelerator)
        own, excess = relative(condition), relative(condition) - relative(null_condition).detach()
    of_groups = [
        torch.stack([of[(cells == c) & (groups == e)].mean() for c in (0, 1) for e in (0, 1)]).view(2, 2)
        for of in (own, excess * captioned)
    ]
    group_losses, excess_losses = of_groups
    expected = (group_losses.mean(dim=1) + penalty * excess_losses.var(dim=1, unbiased=False)).mean()  # J
    assert objective.invariant_objective(group_losses, excess_losses, penalty) == expected
    assert excess[0] == 0
    assert torch.allclose(losses, own)
    assert first.item() == pytest.approx(own.mean().item())  # no means yet, so no penalty
    assert torch.allclose(moving.means(), torch.stack(of_groups, dim=2))
    parameters = list(module.parameters())
    pairs = zip(*(torch.autograd.grad(of, parameters, materialize_grads=True) for of in (loss, expected)), strict=True)
    assert all(torch.allclose(found, gradient, rtol=1e-4, atol=1e-6) for found, gradient in pairs)


def test_weights_never_turn_negative():
    assert objective.objective_weights(torch.tensor([0.0, 10.0]), penalty=5.0).min() == 0


def test_moving_means_are_kept_per_prompt_and_group():
    moving = objective.MovingGroupLosses((2, 2), momentum=0.5)
    twice = torch.tensor([[2.0, 1.0], [4.0, 2.0], [7.0, 3.0], [9.0, 0.0]])
    moving.update(torch.tensor([0, 0, 1]), torch.tensor([1, 1, 0]), twice[:3])
    moving.update(torch.tensor([0]), torch.tensor([1]), twice[3:])
    means = moving.means()
    assert means[0, 1].tolist() == pytest.approx([(0.5 * 6 + 9) / (0.5 * 2 + 1), 0.5 * 3 / (0.5 * 2 + 1)])
    assert means[1].tolist() == [[7.0, 3.0]] * 2  # a group not seen yet takes its prompt's mean


def test_typical_losses_are_interpolated_in_the_logarithm(encoded):
    """Of a denoiser that predicts nothing, on a schedule whose target grows with the timestep."""
    schedule = SimpleNamespace(
        num_train_timesteps=1000,
        add_noise=lambda latents, noise, timesteps: latents,
        target=lambda latents, noise, timesteps: torch.exp(timesteps / 400)[:, None, None, None].expand_as(latents),
    )
    flat = Mock(side_effect=lambda latents, *_: (torch.zeros_like(latents), latents), schedule=schedule, device=CPU)
    typical = objective.typical_losses(flat, encoded, torch.arange(12), batch_size=64, seed=0)
    assert torch.allclose(typical, torch.exp(torch.arange(1000) / 200), rtol=1e-3)
