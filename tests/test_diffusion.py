import diffusers
import pytest
import torch

from invdiff.config import AuditConfig
from invdiff.errors import ModelError
from invdiff.models.schedule import NoiseSchedule, per_sample_loss
from tiny import BETAS

SAMPLERS = ("DDIM", "DPMSolverMultistep", "EulerDiscrete", "HeunDiscrete", "LMSDiscrete", "PNDM", "UniPCMultistep")


def draw():
    latents, noise = torch.randn(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    return latents, noise, torch.tensor([0, 500, 999])


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_noisy_latents_and_targets_have_their_closed_form_whatever_samples(sampler, prediction_type):
    latents, noise, timesteps = draw()
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alpha_bar = (1 - betas).cumprod(0)[timesteps, None, None, None]
    signal, noise_level = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    scheduler = getattr(diffusers, f"{sampler}Scheduler")(**BETAS, prediction_type=prediction_type)
    scheduler.set_timesteps(7)  # of sampling: they do not matter
    schedule = NoiseSchedule(scheduler)
    expected = {"epsilon": noise, "sample": latents, "v_prediction": signal * noise - noise_level * latents}
    assert schedule.prediction_type == prediction_type
    noisy = schedule.add_noise(latents, noise, timesteps)
    assert torch.allclose(noisy, signal * latents + noise_level * noise, atol=1e-5)
    assert torch.allclose(schedule.target(latents, noise, timesteps), expected[prediction_type], atol=1e-5)


FLOWS = [
    diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    diffusers.FlowMatchHeunDiscreteScheduler(),
    diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
]


@pytest.mark.parametrize("sampler", FLOWS, ids=lambda sampler: type(sampler).__name__)
def test_flow_matching_goes_straight_from_latents_to_noise(sampler):
    latents, noise, timesteps = draw()
    schedule = NoiseSchedule(sampler)
    sigma = (timesteps / 1000)[:, None, None, None]
    assert schedule.prediction_type == "flow_prediction"
    expected = latents + sigma * (noise - latents)
    assert torch.allclose(schedule.add_noise(latents, noise, timesteps), expected, atol=1e-6)
    assert torch.equal(schedule.target(latents, noise, timesteps), noise - latents)


SCHEDULES = {
    "stable diffusion": diffusers.DDIMScheduler(**BETAS),
    "linear": diffusers.DDPMScheduler(),
    "few steps": diffusers.DDPMScheduler(num_train_timesteps=100, beta_start=0.001, beta_end=0.2),
    "zero signal": diffusers.DDIMScheduler(**BETAS, rescale_betas_zero_snr=True),
    "flow": diffusers.FlowMatchEulerDiscreteScheduler(),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("log_snr", [2.98, 0.0, -4.79])
def test_a_noise_level_means_the_same_in_every_schedule(name, log_snr):
    """What is left of the signal after noise is added, measured on the noisy latents themselves."""
    schedule = NoiseSchedule(SCHEDULES[name])
    timesteps = torch.tensor([schedule.timestep_at(log_snr)])
    one, none = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    signal, noise = schedule.add_noise(one, none, timesteps), schedule.add_noise(none, one, timesteps)
    assert 2 * (signal / noise).log().item() == pytest.approx(log_snr, abs=0.08)


def test_the_ends_of_a_schedule_rescaled_to_zero_signal():
    latents, noise, _ = draw()
    schedule = NoiseSchedule(SCHEDULES["zero signal"])
    assert torch.equal(schedule.add_noise(latents, noise, torch.tensor([999] * 3)), noise)
    assert (schedule.timestep_at(1e4), schedule.timestep_at(-1e4)) == (0, 999)
    assert NoiseSchedule(SCHEDULES["flow"]).timestep_at(1e4) == 0


def test_the_default_noise_levels_are_the_timesteps_that_were_measured():
    schedule, config = NoiseSchedule(diffusers.DDIMScheduler(**BETAS)), AuditConfig()
    levels = (*config.contrast_log_snr, *config.feature_log_snr)
    elsewhere = torch.zeros(1, 1, 2, 2, device="meta")  # diffusers moves its betas along
    schedule.add_noise(elsewhere, elsewhere, torch.zeros(1, dtype=torch.long, device="meta"))
    assert [schedule.timestep_at(level) for level in levels] == [950, 50, 150]


def test_what_is_neither_is_refused():
    with pytest.raises(ModelError, match="got EDMEulerScheduler, which is neither"):
        NoiseSchedule(diffusers.EDMEulerScheduler())
    with pytest.raises(ModelError, match="got 'flow_prediction' from DPMSolverMultistepScheduler"):
        NoiseSchedule(diffusers.DPMSolverMultistepScheduler(**BETAS, prediction_type="flow_prediction"))


def test_the_loss_is_a_mean_per_sample_in_32_bits():
    prediction, target = torch.zeros(2, 3, 4, 4, dtype=torch.bfloat16), torch.ones(2, 3, 4, 4)
    target[1] = 3
    loss = per_sample_loss(prediction, target)
    assert (loss.dtype, loss.tolist()) == (torch.float32, [1.0, 9.0])
