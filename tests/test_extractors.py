import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor, CLIPModel, Dinov2Config, Dinov2Model, ViTConfig, ViTForImageClassification

from invdiff.errors import DataError, EvaluationError, ModelError
from invdiff.evaluation.quality.diversity import paired_cosines
from invdiff.evaluation.quality.extractors import FeatureExtractor, InceptionFeatures, load_extractor, lpips_network
from invdiff.models.encoders import ClipEncoder
from tiny import CAPTIONS, TOWER, make_tokenizer, save_clip


def images(count, size=(40, 36)):
    numbers = np.random.default_rng(0)
    return [Image.fromarray(numbers.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)) for _ in range(count)]


def save(model, folder):
    model.save_pretrained(folder)
    size = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    CLIPImageProcessor(**size, do_convert_rgb=False).save_pretrained(folder)  # not all processors convert
    return str(folder)


@pytest.fixture(scope="module")
def clip_dir(tmp_path_factory):
    return str(save_clip(tmp_path_factory.mktemp("tiny") / "clip-vit-tiny"))


@pytest.fixture(scope="module")
def dinov2_dir(tmp_path_factory):
    config = {name: value for name, value in TOWER.items() if name != "intermediate_size"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return save(Dinov2Model(Dinov2Config(mlp_ratio=2, **config)), tmp_path_factory.mktemp("tiny") / "dinov2-tiny")


@pytest.fixture(scope="module")
def clip(clip_dir):
    return ClipEncoder.load(clip_dir)


class Means(torch.nn.Module):
    """Stands in for Inception: the mean of each channel and the number of pixels."""

    def forward(self, pixels):
        assert pixels.dtype == torch.uint8
        size = torch.full((len(pixels), 1), pixels[0, 0].numel())
        return torch.cat([pixels.double().mean(dim=(2, 3)), size], dim=1)


@pytest.fixture
def inception():
    return InceptionFeatures(Means(), torch.device("cpu"))


def test_all_extractors_keep_to_the_protocol_under_their_names(clip_dir, dinov2_dir, clip, inception):
    extractors = [load_extractor(clip_dir), load_extractor(dinov2_dir), clip, inception]
    names = [extractor.name for extractor in extractors]
    assert names == ["clip-vit-tiny", "dinov2-tiny", "clip-vit-tiny", "inception"]
    for extractor in extractors:
        assert isinstance(extractor, FeatureExtractor)
        features = extractor.extract(images(3))
        assert (features.dtype, features.ndim, len(features)) == (np.float32, 2, 3)
        with pytest.raises((DataError, EvaluationError), match="at least one image"):
            extractor.extract([])


@torch.no_grad()
def test_features_are_those_of_the_model(clip_dir, dinov2_dir):
    seen = images(5)
    pixels = CLIPImageProcessor.from_pretrained(clip_dir)(seen, return_tensors="pt")["pixel_values"]
    model = CLIPModel.from_pretrained(clip_dir).eval()
    expected = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
    np.testing.assert_allclose(load_extractor(clip_dir).extract(seen), expected.numpy(), rtol=1e-5, atol=1e-6)
    expected = Dinov2Model.from_pretrained(dinov2_dir).eval()(pixel_values=pixels).last_hidden_state[:, 0]
    np.testing.assert_allclose(load_extractor(dinov2_dir).extract(seen), expected.numpy(), rtol=1e-5, atol=1e-6)


def test_features_depend_neither_on_the_batch_nor_on_sizes_and_modes_beside(dinov2_dir, monkeypatch):
    extractor, seen = load_extractor(dinov2_dir), [Image.new("L", (30, 50), 100), *images(4)]
    alone = [extractor.extract([image.convert("RGB")])[0] for image in seen]
    monkeypatch.setattr("invdiff.models.encoders.BATCH_SIZE", 2)
    np.testing.assert_allclose(extractor.extract(seen), alone, rtol=1e-5, atol=1e-6)


def test_what_is_no_whole_encoder_is_refused(clip_dir, dinov2_dir, tmp_path):
    with pytest.raises(ModelError, match="Expected a vision encoder"):
        load_extractor(str(tmp_path))
    folder = save(ViTForImageClassification(ViTConfig(**TOWER)), tmp_path / "classifier")
    with pytest.raises(ModelError, match=r"found none of pooler\.dense\.bias, pooler\.dense\.weight"):
        load_extractor(folder)
    folder = save(Dinov2Model.from_pretrained(dinov2_dir), tmp_path / "damaged")
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ModelError, match="could not load it"):
        load_extractor(folder)
    with pytest.raises(ModelError, match=r"both towers.*got a Dinov2Model"):
        ClipEncoder.load(dinov2_dir)
    with pytest.raises(ModelError, match="Expected a tokenizer"):
        ClipEncoder.load(save(CLIPModel.from_pretrained(clip_dir), tmp_path / "clip"))


def test_inception_features_keep_the_order_of_images_of_several_sizes(inception, monkeypatch):
    monkeypatch.setattr("invdiff.evaluation.quality.extractors.BATCH_SIZE", 2)
    seen = [*images(3), *images(2, (8, 9)), *images(1), Image.new("L", (5, 4), 7)]
    expected = [[*np.array(image.convert("RGB")).mean(axis=(0, 1)), image.width * image.height] for image in seen]
    np.testing.assert_allclose(inception.extract(seen), expected, rtol=1e-6)


def stand_in_for_torchmetrics(monkeypatch, network):
    """Let torchmetrics' networks be `network`; without one, let torchmetrics be absent."""
    for module, name in (("fid", "NoTrainInceptionV3"), ("lpip", "LearnedPerceptualImagePatchSimilarity")):
        stand_in = ModuleType(f"torchmetrics.image.{module}")
        setattr(stand_in, name, network)
        monkeypatch.setitem(sys.modules, f"torchmetrics.image.{module}", stand_in)
        if network is None:
            monkeypatch.delitem(sys.modules, f"torchmetrics.image.{module}")
    monkeypatch.setitem(sys.modules, "torchmetrics", network and ModuleType("torchmetrics"))
    monkeypatch.setitem(sys.modules, "torchmetrics.image", network and ModuleType("torchmetrics.image"))


def test_inception_is_torch_fidelitys_as_the_original_fid_uses_it(monkeypatch):
    def network(name, *, features_list, antialias):
        assert (name, features_list, antialias) == ("inception-v3-compat", ["2048"], False)
        return Means()

    stand_in_for_torchmetrics(monkeypatch, network)
    assert isinstance(load_extractor("inception"), InceptionFeatures)


@pytest.mark.parametrize(
    ("load", "part", "weights"),
    [
        (lambda: load_extractor("inception"), "torch-fidelity", "Inception's"),
        (lpips_network, "torchvision", "AlexNet's"),
    ],
    ids=["inception", "lpips"],
)
def test_without_the_extra_or_its_weights_one_is_told_what_to_do(monkeypatch, load, part, weights):
    for error, message in (
        (None, r"found no torchmetrics.*pip install 'invdiff\[metrics\]'"),
        (ModuleNotFoundError("required"), rf"found no {part}.*pip install 'invdiff\[metrics\]'"),
        (OSError("no route to host"), f"{weights} weights.*no route to host"),
    ):

        def network(*_, error=error, **__):
            raise error

        with monkeypatch.context() as patch:
            stand_in_for_torchmetrics(patch, network if error else None)
            with pytest.raises(EvaluationError, match=message):
                load()


@torch.no_grad()
def test_cosines_of_both_towers_are_the_models_logits(clip, clip_dir):
    seen, model = images(2), CLIPModel.from_pretrained(clip_dir).eval()
    pixels = CLIPImageProcessor.from_pretrained(clip_dir)(seen, return_tensors="pt")["pixel_values"]
    tokens = make_tokenizer()(list(CAPTIONS), padding=True, return_tensors="pt")
    logits = model(pixel_values=pixels, **tokens).logits_per_image / model.logit_scale.exp()
    found = paired_cosines(clip.extract(seen), clip.text_features(CAPTIONS))
    np.testing.assert_allclose(found, logits.diagonal().numpy(), atol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 32])
def test_features_of_texts_are_in_their_order_and_do_not_depend_on_those_beside(clip, monkeypatch, batch_size):
    texts = ["a photo of a landbird", "a", "a photo of a waterbird on water", "a"]
    alone = [clip.text_features([text])[0] for text in texts]
    monkeypatch.setattr("invdiff.models.encoders.BATCH_SIZE", batch_size)
    np.testing.assert_allclose(clip.text_features(texts), alone, rtol=1e-5, atol=1e-6)


def test_texts_are_a_list_and_cut_where_longer_than_the_model_reads(clip):
    assert np.isfinite(clip.text_features(["water " * 100])).all()
    for texts in ([], "a photo of a landbird"):
        with pytest.raises(DataError, match="list of at least one prompt"):
            clip.text_features(texts)
