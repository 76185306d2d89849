import numpy as np
import pytest
import torch
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, Dinov2Config, Dinov2Model

from invdiff.auditing import evidence
from invdiff.auditing.evidence import component_scores, encode_vision
from invdiff.auditing.run import audit
from invdiff.auditing.splits import split
from invdiff.config import AuditConfig
from invdiff.data.captioned import load_captioned_images
from tiny import SMALL

CONFIG = AuditConfig()


@pytest.fixture(scope="module", params=["dinov2", "clip"])
def encoder_dir(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if request.param == "dinov2":
            model = Dinov2Model(Dinov2Config(mlp_ratio=2, **SMALL))
        else:
            model = CLIPVisionModel(CLIPVisionConfig(intermediate_size=32, **SMALL))
    model.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
    return folder


def test_images_are_seen_as_they_are_and_mirrored_once_and_components_weighed_by_the_audit(
    encoder_dir, tiny_pipe, tiny_folder, tmp_path, monkeypatch
):
    data, rows = load_captioned_images(tiny_folder), np.arange(12)
    features = encode_vision(str(encoder_dir), data, rows, tmp_path / "vision", progress=False)
    assert features.shape == (12, 2, 16)
    assert not np.array_equal(features[:, 0], features[:, 1])
    monkeypatch.setattr(evidence, "VisionEncoder", None)  # from now on features are read back
    monkeypatch.setattr(evidence, "NUM_COMPONENTS", (3,))
    monkeypatch.setattr(evidence, "IMAGES_PER_DIMENSION", 2)
    config = AuditConfig(vision_encoder=str(encoder_dir), min_images=6, min_share=0.2, caption_threshold=100.0)
    found = audit(tiny_pipe, data, config=config, cache_dir=tmp_path, progress=False)
    names = [candidate.evidence for candidate in found.prompts[0].candidates]
    assert any(name.startswith(f"features of {encoder_dir.name}, ") for name in names)
    assert not any(str(encoder_dir.parent) in name for name in names)  # the path is private


def two_views(content: np.ndarray, noise: float, rng: np.random.Generator) -> np.ndarray:
    return np.stack([content + rng.normal(0, noise, content.shape) for _ in range(2)], axis=1)


@pytest.mark.parametrize(("count", "times"), [(60, 5), (131, 5), (200, 5), (800, 1)])
def test_nothing_is_found_in_features_that_hide_nothing(count, times):
    accepted = []
    for seed in range(times):
        rng = np.random.default_rng(seed)
        style = rng.normal(size=(count, 14)) @ rng.normal(size=(14, 60))
        scores = component_scores(two_views(style, 0.5, rng), "features", seed=0)
        assert bool(scores) == (count >= 160)
        splits = [split(score, size, CONFIG) for score in scores for size in (2, 3)]
        accepted += [one.candidate for one in splits if one.candidate.accepted]
    assert accepted == []


def test_a_hidden_direction_of_the_features_is_found_though_it_is_not_the_largest():
    rng = np.random.default_rng(0)
    rare = np.arange(800) < 80
    style = rng.normal(size=(800, 6)) @ rng.normal(size=(6, 40)) * 3
    content = style + np.outer(rare * 4.0, rng.normal(size=40))
    scores = component_scores(two_views(content, 0.2, rng), "features", seed=0)
    best = max((split(score, 2, CONFIG) for score in scores), key=lambda one: (one.candidate.accepted, one.merit))
    assert best.candidate.accepted
    assert np.array_equal(best.weights.argmax(axis=1) == 1, rare)


def test_a_shape_of_which_no_direction_is_left_is_passed_over(monkeypatch):
    """Without any skewness FastICA's update is 0 / 0, and it raises a ValueError."""

    class Failing(evidence.FastICA):
        def fit(self, values):
            if callable(self.fun):
                raise ValueError("A has a NaN entry")
            return super().fit(values)

    monkeypatch.setattr(evidence, "FastICA", Failing)
    content = np.random.default_rng(0).normal(size=(800, 20))
    scores = component_scores(np.stack([content, content], axis=1), "features", seed=0)
    assert {score.evidence.split(", ")[1].split()[0] for score in scores} == {"peaked"}
