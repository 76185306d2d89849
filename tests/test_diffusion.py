import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from invdiff.diffusion import NoiseSchedule, per_sample_loss
from invdiff.errors import ModelError

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SAMPLERS = [
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
]


def draw():
    numbers = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 3, 4, 4, 4, generator=numbers)
    return latents, noise, torch.tensor([0, 500, 999])


def coefficients(timesteps):
    """sqrt(alpha-bar) and sqrt(1 - alpha-bar) of the scaled-linear schedule."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    share = (1 - betas).cumprod(0)[timesteps, None, None, None]
    return share.sqrt(), (1 - share).sqrt()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_shares_the_forward_process(sampler):
    latents, noise, timesteps = draw()
    signal, noise_level = coefficients(timesteps)
    noisy = NoiseSchedule(sampler(**BETAS)).add_noise(latents, noise, timesteps)
    assert torch.allclose(noisy, signal * latents + noise_level * noise, atol=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_targets_have_their_closed_form(prediction_type):
    latents, noise, timesteps = draw()
    signal, noise_level = coefficients(timesteps)
    expected = {"epsilon": noise, "sample": latents, "v_prediction": signal * noise - noise_level * latents}
    schedule = NoiseSchedule(EulerDiscreteScheduler(**BETAS, prediction_type=prediction_type))
    assert schedule.prediction_type == prediction_type
    assert torch.allclose(schedule.target(latents, noise, timesteps), expected[prediction_type], atol=1e-5)


def test_the_last_step_of_a_schedule_rescaled_to_zero_signal_is_noise():
    latents, noise, _ = draw()
    schedule = NoiseSchedule(DDIMScheduler(**BETAS, rescale_betas_zero_snr=True))
    assert torch.equal(schedule.add_noise(latents, noise, torch.tensor([999] * 3)), noise)


def test_steps_chosen_for_sampling_do_not_matter():
    sampler = EulerDiscreteScheduler(**BETAS)
    sampler.set_timesteps(7)
    latents, noise, timesteps = draw()
    expected = DDPMScheduler(**BETAS).add_noise(latents, noise, timesteps)
    assert torch.equal(NoiseSchedule(sampler).add_noise(latents, noise, timesteps), expected)


def test_the_number_of_timesteps_is_that_of_the_betas():
    schedule = NoiseSchedule(DDPMScheduler(num_train_timesteps=3, trained_betas=[0.1, 0.2, 0.3]))
    assert schedule.num_train_timesteps == 3
    assert NoiseSchedule(DDIMScheduler(num_train_timesteps=50)).num_train_timesteps == 50


def test_flow_matching_is_refused():
    with pytest.raises(ModelError, match="got FlowMatchEulerDiscreteScheduler, which has none"):
        NoiseSchedule(FlowMatchEulerDiscreteScheduler())


def test_an_unknown_prediction_type_is_refused():
    sampler = DPMSolverMultistepScheduler(**BETAS, prediction_type="flow_prediction", use_flow_sigmas=True)
    with pytest.raises(ModelError, match="got 'flow_prediction' from DPMSolverMultistepScheduler"):
        NoiseSchedule(sampler)


def test_the_loss_is_a_mean_per_sample_in_32_bits():
    prediction, target = torch.zeros(2, 3, 4, 4, dtype=torch.bfloat16), torch.ones(2, 3, 4, 4)
    target[1] = 3
    loss = per_sample_loss(prediction, target)
    assert loss.dtype == torch.float32
    assert loss.tolist() == [1.0, 9.0]
