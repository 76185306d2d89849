import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor, CLIPModel, Dinov2Model, ViTConfig, ViTForImageClassification

from invdiff.errors import DataError, EvaluationError, ModelError
from invdiff.evaluation.quality.extractors import FeatureExtractor, InceptionFeatures, load_extractor, lpips_network
from invdiff.models.encoders import ClipEncoder
from tiny import CROP, TOWER, save_dinov2


def images(count, size=(40, 36)):
    numbers = np.random.default_rng(0)
    return [Image.fromarray(numbers.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)) for _ in range(count)]


def save(model, folder):
    model.save_pretrained(folder)
    CLIPImageProcessor(**CROP).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def dinov2_dir(tmp_path_factory):
    return str(save_dinov2(tmp_path_factory.mktemp("tiny") / "dinov2-tiny"))  # not all processors convert colours


def test_features_are_of_the_weights_and_of_how_images_are_made_ready(clip_dir):
    first, other = ClipEncoder.load(clip_dir), ClipEncoder.load(clip_dir)
    assert first.features_digest() == other.features_digest()
    other.processor.image_mean = [0.0, 0.0, 0.0]
    assert first.features_digest() != other.features_digest()


class Means(torch.nn.Module):
    """Stands in for Inception: the mean of each channel and the number of pixels."""

    def forward(self, pixels):
        assert pixels.dtype == torch.uint8
        size = torch.full((len(pixels), 1), pixels[0, 0].numel())
        return torch.cat([pixels.double().mean(dim=(2, 3)), size], dim=1)


@pytest.fixture
def inception(monkeypatch):
    monkeypatch.setattr("invdiff.evaluation.quality.extractors.BATCH_SIZE", 2)
    return InceptionFeatures(Means(), torch.device("cpu"))


def test_all_extractors_keep_to_the_protocol_under_their_names(clip_dir, dinov2_dir, inception):
    extractors = [load_extractor(str(clip_dir)), load_extractor(dinov2_dir), inception]
    assert [extractor.name for extractor in extractors] == ["tiny-clip", "dinov2-tiny", "inception"]
    for extractor in extractors:
        assert isinstance(extractor, FeatureExtractor)
        features = extractor.extract(images(3))
        assert (features.dtype, features.ndim, len(features)) == (np.float32, 2, 3)
        with pytest.raises((DataError, EvaluationError), match="at least one image"):
            extractor.extract([])


@torch.no_grad()
def test_features_are_those_of_the_model_whatever_the_batch_and_the_sizes_and_modes_beside(dinov2_dir, monkeypatch):
    seen, model = [Image.new("L", (30, 50), 100), *images(4)], Dinov2Model.from_pretrained(dinov2_dir).eval()
    processor = CLIPImageProcessor.from_pretrained(dinov2_dir)
    pixels = [processor(image.convert("RGB"), return_tensors="pt")["pixel_values"] for image in seen]
    expected = [model(pixel_values=of_one).last_hidden_state[0, 0].numpy() for of_one in pixels]
    monkeypatch.setattr("invdiff.models.encoders.BATCH_SIZE", 2)
    np.testing.assert_allclose(load_extractor(dinov2_dir).extract(seen), expected, rtol=1e-5, atol=1e-6)


def test_what_is_no_whole_encoder_is_refused(clip_dir, dinov2_dir, tmp_path):
    classifier = save(ViTForImageClassification(ViTConfig(**TOWER)), tmp_path / "classifier")
    damaged = save(Dinov2Model.from_pretrained(dinov2_dir), tmp_path / "damaged")
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"nonsense")
    mute = save(CLIPModel.from_pretrained(clip_dir), tmp_path / "clip")
    for load, folder, message in (
        (load_extractor, str(tmp_path), "Expected a vision encoder"),
        (load_extractor, classifier, r"found none of pooler\.dense\.bias, pooler\.dense\.weight"),
        (load_extractor, damaged, "could not load it"),
        (ClipEncoder.load, dinov2_dir, r"both towers.*got a Dinov2Model"),
        (ClipEncoder.load, mute, "Expected a tokenizer"),
    ):
        with pytest.raises(ModelError, match=message):
            load(folder)


def test_inception_features_keep_the_order_of_images_of_several_sizes(inception):
    seen = [*images(3), *images(2, (8, 9)), *images(1), Image.new("L", (5, 4), 7)]
    expected = [[*np.array(image.convert("RGB")).mean(axis=(0, 1)), image.width * image.height] for image in seen]
    np.testing.assert_allclose(inception.extract(seen), expected, rtol=1e-6)


def stand_in_for_torchmetrics(monkeypatch, network):
    """Let torchmetrics' networks be `network`; without one, let torchmetrics be absent."""
    names = {"fid": "NoTrainInceptionV3", "lpip": "LearnedPerceptualImagePatchSimilarity"}
    for module in ("torchmetrics", "torchmetrics.image", *(f"torchmetrics.image.{part}" for part in names)):
        stand_in = network and ModuleType(module)
        if name := network and names.get(module.rpartition(".")[2]):
            setattr(stand_in, name, network)
        monkeypatch.setitem(sys.modules, module, stand_in)


def test_inception_is_torch_fidelitys_as_the_original_fid_uses_it(monkeypatch):
    asked = []
    network = lambda *arguments, **options: asked.append((arguments, options)) or Means()  # noqa: E731
    stand_in_for_torchmetrics(monkeypatch, network)
    assert isinstance(load_extractor("inception"), InceptionFeatures)
    assert asked == [(("inception-v3-compat",), {"features_list": ["2048"], "antialias": False})]


@pytest.mark.parametrize(
    ("load", "part", "weights"),
    [(lambda: load_extractor("inception"), "torch-fidelity", "Inception"), (lpips_network, "torchvision", "AlexNet")],
)
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (None, r"found no torchmetrics.*pip install 'invdiff\[metrics\]'"),
        (ModuleNotFoundError("required"), r"found no {part}.*pip install 'invdiff\[metrics\]'"),
        (OSError("no route to host"), "{weights}'s weights.*no route to host"),
    ],
)
def test_without_the_extra_or_its_weights_one_is_told_what_to_do(monkeypatch, load, part, weights, error, message):
    def network(*_, **__):
        raise error

    stand_in_for_torchmetrics(monkeypatch, network if error else None)
    with pytest.raises(EvaluationError, match=message.format(part=part, weights=weights)):
        load()


def test_features_of_texts_are_in_their_order_and_do_not_depend_on_those_beside(clip_dir, monkeypatch):
    clip = ClipEncoder.load(clip_dir)
    texts = ["a photo of a landbird", "a", "a photo of a waterbird on water", "a", "water " * 100]  # the last is cut
    alone = [clip.text_features([text])[0] for text in texts]
    monkeypatch.setattr("invdiff.models.encoders.BATCH_SIZE", 3)
    np.testing.assert_allclose(clip.text_features(texts), alone, rtol=1e-5, atol=1e-6)
    for none in ([], "a photo of a landbird"):
        with pytest.raises(DataError, match="list of at least one prompt"):
            clip.text_features(none)
