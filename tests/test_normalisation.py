import pytest
import torch

from invdiff.data.captioned import load_captioned_images
from invdiff.data.encode import as_encoded
from invdiff.models.frozen import FrozenDenoiser
from invdiff.training.normalisation import typical_losses


class Flat:
    """A denoiser that predicts nothing, on a schedule whose target grows with the timestep."""

    device = torch.device("cpu")
    fingerprint = "flat"

    class schedule:  # noqa: N801
        num_train_timesteps = 1000

        @staticmethod
        def add_noise(latents, noise, timesteps):
            return latents

        @staticmethod
        def target(latents, noise, timesteps):
            return torch.exp(timesteps / 200.0)[:, None, None, None].expand_as(latents).sqrt()

    def __call__(self, noisy_latents, timesteps, condition):
        return torch.zeros_like(noisy_latents), noisy_latents


@pytest.fixture
def data(tiny_pipe, tiny_folder, tmp_path):
    return as_encoded(tiny_pipe, load_captioned_images(tiny_folder), tmp_path, progress=False)


def test_typical_losses_are_interpolated_in_the_logarithm(data):
    typical = typical_losses(Flat(), data, batch_size=64, seed=0)
    assert torch.allclose(typical, torch.exp(torch.arange(1000) / 200.0), rtol=1e-3)


def test_typical_losses_are_of_the_images_given(tiny_pipe, data, monkeypatch):
    asked = []
    read = type(data.latents).__getitem__
    monkeypatch.setattr(type(data.latents), "__getitem__", lambda self, rows: asked.append(rows) or read(self, rows))
    with FrozenDenoiser(tiny_pipe) as frozen:
        typical_losses(frozen, data, images=torch.tensor([2, 5, 11]), batch_size=64, seed=0)
    assert set(torch.cat(asked).tolist()) == {2, 5, 11}


def test_typical_losses_repeat(tiny_pipe, data):
    with FrozenDenoiser(tiny_pipe) as frozen:
        first, second, other = (typical_losses(frozen, data, batch_size=64, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_typical_losses_do_not_depend_on_how_they_are_batched(tiny_pipe, data):
    with FrozenDenoiser(tiny_pipe) as frozen:
        whole, parts = (typical_losses(frozen, data, batch_size=size, seed=0) for size in (64, 7))
    assert torch.allclose(whole, parts, rtol=1e-5)
