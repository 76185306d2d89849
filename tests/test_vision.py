import pytest
import torch
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, Dinov2Config, Dinov2Model

from invdiff.auditing import vision
from invdiff.auditing.run import audit
from invdiff.auditing.vision import encode_vision
from invdiff.config import AuditConfig
from invdiff.data.captioned import load_captioned_images
from invdiff.errors import ModelError

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}


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


def test_each_image_is_seen_as_it_is_and_mirrored(encoder_dir, tiny_folder, tmp_path):
    data = load_captioned_images(tiny_folder)
    features = encode_vision(str(encoder_dir), data, torch.arange(12), tmp_path, progress=False)
    assert features.shape == (12, 2, 16)
    assert not torch.equal(features[:, 0], features[:, 1])


def test_features_are_computed_once(encoder_dir, tiny_folder, tmp_path, monkeypatch):
    data = load_captioned_images(tiny_folder)
    first = encode_vision(str(encoder_dir), data, torch.arange(12), tmp_path, progress=False)
    monkeypatch.setattr(vision, "VisionEncoder", None)
    assert torch.equal(encode_vision(str(encoder_dir), data, torch.arange(12), tmp_path, progress=False), first)


def test_its_components_are_weighed_by_the_audit(encoder_dir, tiny_pipe, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("invdiff.auditing.splits.NUM_COMPONENTS", (3,))
    monkeypatch.setattr("invdiff.auditing.splits.IMAGES_PER_DIMENSION", 2)
    config = AuditConfig(vision_encoder=str(encoder_dir), min_images=6, min_share=0.2, caption_threshold=100.0)
    found = audit(tiny_pipe, load_captioned_images(tiny_folder), config=config, cache_dir=tmp_path, progress=False)
    evidence = [candidate.evidence for candidate in found.prompts[0].candidates]
    assert any(name.startswith(f"features of {encoder_dir.name}, ") for name in evidence)
    assert not any(str(encoder_dir.parent) in name for name in evidence)  # where it lies is nobody's business


def test_a_folder_that_is_no_encoder_is_refused(tiny_folder, tmp_path):
    data = load_captioned_images(tiny_folder)
    with pytest.raises(ModelError, match="Expected a vision encoder"):
        encode_vision(str(tmp_path), data, torch.arange(12), tmp_path, progress=False)
