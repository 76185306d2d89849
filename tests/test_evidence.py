import diffusers
import numpy as np
import pytest
import torch

from invdiff import AuditConfig, audit
from invdiff.auditing import evidence, scores
from invdiff.auditing.evidence import collect_evidence, encode_vision
from invdiff.data.encode import as_encoded
from invdiff.errors import AuditError
from invdiff.models import features
from invdiff.models.frozen import FrozenDenoiser
from invdiff.models.schedule import NoiseSchedule
from runs import made_up_data, sharded
from tiny import save_clip, save_dinov2


@pytest.mark.parametrize("save", [save_dinov2, save_clip])
def test_images_are_seen_as_they_are_and_mirrored_once(save, tiny_pipe, data, tmp_path, monkeypatch):
    encoder_dir = save(tmp_path / "encoder")
    features = encode_vision(str(encoder_dir), data, np.arange(12), tmp_path / "vision", progress=False)[:]
    assert features.shape[:2] == (12, 2)
    assert not np.array_equal(features[:, 0], features[:, 1])
    monkeypatch.setattr(evidence.VisionEncoder, "extract", None)  # from now on features are read back
    monkeypatch.setattr(scores, "NUM_COMPONENTS", (3,))
    monkeypatch.setattr(scores, "IMAGES_PER_DIMENSION", 2)
    config = AuditConfig(vision_encoder=str(encoder_dir), min_images=6, min_share=0.2, caption_threshold=100.0)
    found = audit(tiny_pipe, data, config=config, cache_dir=tmp_path, progress=False)
    names = [candidate.evidence for candidate in found.prompts[0].candidates]
    assert any(name.startswith(f"features of {encoder_dir.name}, ") for name in names)
    assert not any(str(encoder_dir.parent) in name for name in names)  # the path is private


def test_features_of_an_encoder_that_was_replaced_in_its_folder_are_made_again(data, tmp_path):
    def features():
        return encode_vision(str(tmp_path / "encoder"), data, np.arange(3), tmp_path / "vision", progress=False)[:]

    save_dinov2(tmp_path / "encoder")
    before = features()
    save_clip(tmp_path / "encoder")
    assert not np.array_equal(features(), before)


def test_evidence_without_upper_blocks_is_not_taken_for_that_with_them(tiny_pipe, data, tmp_path):
    encoded, found = as_encoded(tiny_pipe, data, tmp_path, progress=False), []
    for upper in (False, True):
        with FrozenDenoiser(tiny_pipe, upper=upper) as denoiser:
            found.append(collect_evidence(denoiser, encoded, AuditConfig(), work_dir=tmp_path, progress=False))
    assert [evidence.upper is None for evidence in found] == [True, False]


def test_features_are_whitened_alike_in_whatever_order_captions_come(monkeypatch):
    monkeypatch.setattr(evidence, "FITTED", 100)
    caption = np.arange(200) % 2
    values = np.stack([4.0 * caption, np.random.default_rng(0).normal(size=200)], axis=1)
    mixed = evidence.whitened(sharded(values), ..., seed=0).values
    assert mixed.shape == (200, 2)  # of one caption alone the first would not vary
    assert np.allclose(mixed.std(axis=0), 1, atol=0.2)


class Wide(FrozenDenoiser):
    """A denoiser of wide blocks, with one number everywhere."""

    schedule, device, fingerprint = NoiseSchedule(diffusers.DDPMScheduler()), torch.device("cpu"), "wide"

    def __init__(self, number):
        self.number, self.upper = number, True

    def __call__(self, noisy_latents, timesteps, condition):
        return noisy_latents, torch.full((len(noisy_latents), 1280, 8, 8), self.number)

    def take_upper(self, noisy_latents):
        return [torch.full((len(noisy_latents), channels, 16, 16), self.number) for channels in (640, 320)]


def measured(folder, number):
    latents = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    data = made_up_data(["a bird"], np.zeros(6, dtype=int), latents)
    return collect_evidence(Wide(number), data, AuditConfig(), work_dir=folder, progress=False)


@pytest.mark.parametrize("number", [1e30, -1e30])
def test_an_image_of_a_wide_model_takes_at_most_16_kilobytes_of_the_largest_that_16_bits_hold(tmp_path, number):
    found = measured(tmp_path, number)
    assert found.features.shape == (6, 2, features.MOST_MIDDLE)
    assert found.upper.shape == (6, 2, 2, features.MOST_UPPER)
    assert sum(file.stat().st_size for file in tmp_path.rglob("*.safetensors")) < 6 * 16_384
    for values in (found.features, found.upper):
        assert np.allclose(np.abs(values.numpy(np.arange(6))), features.LARGEST, rtol=1e-3)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_images_of_which_no_number_was_measured_are_named(tmp_path, number):
    with pytest.raises(AuditError, match=r"others for 6 images \(0\.png, .* load the pipeline in float32"):
        measured(tmp_path, number)
    assert not list(tmp_path.rglob("*.safetensors"))
