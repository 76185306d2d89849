import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTForImageClassification,
)

from invdiff.errors import DataError, EvaluationError, ModelError
from invdiff.evaluation.quality.distances import clip_t
from invdiff.evaluation.quality.extractors import (
    FeatureExtractor,
    InceptionFeatures,
    load_extractor,
)
from invdiff.models.encoders import ClipEncoder, VisionEncoder
from tiny import CAPTIONS, clip_config, make_tokenizer

TOWER = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}


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
    """A whole CLIP model whose joint space has 8 dimensions."""
    tokenizer = make_tokenizer()
    config = CLIPConfig(
        text_config=clip_config(tokenizer).to_dict(),
        vision_config={**TOWER, "intermediate_size": 32},
        projection_dim=8,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        folder = save(CLIPModel(config), tmp_path_factory.mktemp("tiny") / "clip-vit-tiny")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dinov2_dir(tmp_path_factory):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return save(Dinov2Model(Dinov2Config(mlp_ratio=2, **TOWER)), tmp_path_factory.mktemp("tiny") / "dinov2-tiny")


@pytest.fixture(scope="module")
def scorer(clip_dir):
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


def test_a_folder_gives_the_vision_model_in_it_under_its_name(clip_dir, dinov2_dir):
    found = [load_extractor(folder) for folder in (clip_dir, dinov2_dir)]
    assert [extractor.name for extractor in found] == ["clip-vit-tiny", "dinov2-tiny"]
    assert all(isinstance(extractor, VisionEncoder) for extractor in found)


def test_all_extractors_keep_to_the_protocol(dinov2_dir, scorer, inception):
    for extractor in (load_extractor(dinov2_dir), scorer, inception):
        assert isinstance(extractor, FeatureExtractor)
        features = extractor.extract(images(3))
        assert features.dtype == np.float32
        assert features.ndim == 2
        assert len(features) == 3


def test_clip_features_are_the_models_projected_image_embeddings(clip_dir):
    seen = images(5)
    pixels = CLIPImageProcessor.from_pretrained(clip_dir)(seen, return_tensors="pt")["pixel_values"]
    model = CLIPModel.from_pretrained(clip_dir).eval()
    with torch.no_grad():
        expected = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
    np.testing.assert_allclose(load_extractor(clip_dir).extract(seen), expected.numpy(), rtol=1e-5, atol=1e-6)


def test_dinov2_features_are_the_normalised_class_token(dinov2_dir):
    seen = images(5)
    pixels = CLIPImageProcessor.from_pretrained(dinov2_dir)(seen, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = Dinov2Model.from_pretrained(dinov2_dir).eval()(pixel_values=pixels).last_hidden_state[:, 0]
    np.testing.assert_allclose(load_extractor(dinov2_dir).extract(seen), expected.numpy(), rtol=1e-5, atol=1e-6)


def test_vision_features_do_not_depend_on_the_batch(dinov2_dir, monkeypatch):
    extractor, seen = load_extractor(dinov2_dir), images(5)
    together = extractor.extract(seen)
    monkeypatch.setattr("invdiff.models.encoders.BATCH_SIZE", 2)
    np.testing.assert_allclose(extractor.extract(seen), together, rtol=1e-5, atol=1e-6)


def test_vision_features_take_images_of_any_size_and_mode(dinov2_dir):
    extractor = load_extractor(dinov2_dir)
    grey = Image.new("L", (30, 50), 100)
    np.testing.assert_array_equal(
        extractor.extract([grey, *images(1)])[0], extractor.extract([grey.convert("RGB"), *images(1)])[0]
    )


def test_what_is_no_vision_encoder_is_refused(tmp_path):
    with pytest.raises(ModelError, match="Expected a vision encoder"):
        load_extractor(str(tmp_path))


def test_a_damaged_vision_encoder_is_refused(dinov2_dir, tmp_path):
    model = Dinov2Model.from_pretrained(dinov2_dir)
    folder = save(model, tmp_path / "damaged")
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ModelError, match="could not load it"):
        load_extractor(folder)


def test_a_vision_encoder_without_some_of_its_weights_is_refused(tmp_path):
    folder = save(ViTForImageClassification(ViTConfig(intermediate_size=32, **TOWER)), tmp_path / "classifier")
    with pytest.raises(ModelError, match=r"found none of pooler\.dense\.bias, pooler\.dense\.weight"):
        load_extractor(folder)


def test_no_image_has_no_features(dinov2_dir, inception):
    with pytest.raises(DataError, match="at least one image"):
        load_extractor(dinov2_dir).extract([])
    with pytest.raises(EvaluationError, match="at least one image"):
        inception.extract([])


def test_inception_features_keep_the_order_of_images_of_several_sizes(inception, monkeypatch):
    monkeypatch.setattr("invdiff.evaluation.quality.extractors.BATCH_SIZE", 2)
    seen = [*images(3), *images(2, (8, 9)), *images(1), Image.new("L", (5, 4), 7)]
    expected = [[*np.array(image.convert("RGB")).mean(axis=(0, 1)), image.width * image.height] for image in seen]
    np.testing.assert_allclose(inception.extract(seen), expected, rtol=1e-6)


def stand_in_for_torchmetrics(monkeypatch, network):
    module = ModuleType("torchmetrics.image.fid")
    module.NoTrainInceptionV3 = network
    for name in ("torchmetrics", "torchmetrics.image"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", module)


def test_inception_is_torch_fidelitys_as_the_original_fid_uses_it(monkeypatch):
    def network(name, *, features_list, antialias):
        assert (name, features_list, antialias) == ("inception-v3-compat", ["2048"], False)
        return Means()

    stand_in_for_torchmetrics(monkeypatch, network)
    found = load_extractor("inception")
    assert found.name == "inception"
    assert isinstance(found, InceptionFeatures)


def test_inception_without_the_extra_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    with pytest.raises(EvaluationError, match=r"found no torchmetrics.*pip install 'invdiff\[metrics\]'"):
        load_extractor("inception")


def test_inception_without_torch_fidelity_says_what_to_install(monkeypatch):
    def network(*_, **__):
        raise ModuleNotFoundError("NoTrainInceptionV3 module requires that `Torch-fidelity` is installed.")

    stand_in_for_torchmetrics(monkeypatch, network)
    with pytest.raises(EvaluationError, match=r"found no torch-fidelity.*pip install 'invdiff\[metrics\]'"):
        load_extractor("inception")


def test_inception_without_its_weights_says_so(monkeypatch):
    def network(*_, **__):
        raise OSError("no route to host")

    stand_in_for_torchmetrics(monkeypatch, network)
    with pytest.raises(EvaluationError, match=r"Inception's weights.*no route to host"):
        load_extractor("inception")


def test_text_features_are_the_models_projected_text_embeddings(scorer, clip_dir):
    model = CLIPModel.from_pretrained(clip_dir).eval()
    tokens = make_tokenizer()(list(CAPTIONS), padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model.text_projection(model.text_model(**tokens).pooler_output)
    np.testing.assert_allclose(scorer.text_features(CAPTIONS), expected.numpy(), rtol=1e-5, atol=1e-6)


def test_cosines_of_both_towers_are_the_models_logits(scorer, clip_dir):
    seen, model = images(2), CLIPModel.from_pretrained(clip_dir).eval()
    pixels = CLIPImageProcessor.from_pretrained(clip_dir)(seen, return_tensors="pt")["pixel_values"]
    tokens = make_tokenizer()(list(CAPTIONS), padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(pixel_values=pixels, **tokens).logits_per_image / model.logit_scale.exp()
    found = clip_t(scorer.extract(seen), scorer.text_features(CAPTIONS))
    assert found == pytest.approx(float(logits.diagonal().mean()), abs=1e-6)


def test_text_features_do_not_depend_on_the_prompts_beside(scorer, monkeypatch):
    prompts = ["a photo of a landbird", "a", "a photo of a waterbird on water"]
    together = scorer.text_features(prompts)
    monkeypatch.setattr("invdiff.models.encoders.BATCH_SIZE", 1)
    np.testing.assert_allclose(scorer.text_features(prompts), together, rtol=1e-5, atol=1e-6)


def test_text_features_stand_in_the_order_of_prompts_that_repeat(scorer):
    first, second = scorer.text_features(CAPTIONS)
    found = scorer.text_features([CAPTIONS[1], CAPTIONS[0], CAPTIONS[1]])
    np.testing.assert_allclose(found, [second, first, second], rtol=1e-5, atol=1e-6)


def test_prompts_longer_than_the_model_reads_are_cut(scorer):
    assert np.isfinite(scorer.text_features(["water " * 100])).all()


@pytest.mark.parametrize("prompts", [[], "a photo of a landbird"], ids=["none", "one string"])
def test_prompts_are_a_list(scorer, prompts):
    with pytest.raises(DataError, match="list of at least one prompt"):
        scorer.text_features(prompts)


def test_a_model_without_texts_is_no_scorer(dinov2_dir):
    with pytest.raises(ModelError, match=r"both towers.*got a Dinov2Model"):
        ClipEncoder.load(dinov2_dir)


def test_a_clip_model_without_a_tokenizer_is_no_scorer(clip_dir, tmp_path):
    folder = save(CLIPModel.from_pretrained(clip_dir), tmp_path / "clip")
    with pytest.raises(ModelError, match="Expected a tokenizer"):
        ClipEncoder.load(folder)
