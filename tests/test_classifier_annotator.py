import json

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from PIL import Image
from scipy.special import softmax
from transformers import (
    CLIPTextModel,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from invdiff.assets import BIRDS_ANNOTATOR
from invdiff.errors import ConfigError, ModelError
from invdiff.evaluation.annotators.classifier import ClassifierAnnotator
from invdiff.evaluation.annotators.conv import ConvAnnotator
from invdiff.evaluation.annotators.given_labels import GivenLabels
from invdiff.evaluation.annotators.heldout import HeldOut
from invdiff.evaluation.annotators.load import load_annotator, save_measured
from tiny import TOWER, clip_config, make_tokenizer

NAMES = {0: "land", 1: "water", 2: "air"}


def save_classifier(folder, id2label=NAMES, **settings):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ViTForImageClassification(ViTConfig(id2label=id2label, **TOWER, **settings))
        torch.nn.init.normal_(model.classifier.weight)  # apart enough for classes to differ between images
        model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 28, "width": 28}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def classifier_dir(tmp_path_factory):
    return save_classifier(tmp_path_factory.mktemp("models") / "tiny-vit")


@pytest.fixture(scope="module")
def images():
    numbers = np.random.default_rng(0)
    return [Image.fromarray(numbers.integers(0, 256, (36, 40, 3), dtype=np.uint8)) for _ in range(5)]


def test_probabilities_are_the_softmax_of_the_classifier_s_logits(classifier_dir, images):
    model = ViTForImageClassification.from_pretrained(classifier_dir).eval()
    processor = ViTImageProcessor.from_pretrained(classifier_dir)
    with torch.no_grad():
        logits = [model(**processor(image, return_tensors="pt")).logits[0].numpy() for image in images]
    seen = ClassifierAnnotator(classifier_dir, attribute="background").predict(images)
    np.testing.assert_allclose(seen.probabilities["background"], softmax(logits, axis=1), atol=1e-5)
    assert seen.features is None


def test_classes_are_named_by_id2label(classifier_dir):
    annotator = ClassifierAnnotator(classifier_dir)
    assert annotator.attributes == {"label": ("land", "water", "air")}
    assert (annotator.name, annotator.feature_name) == ("tiny-vit", "")
    assert annotator.confusion("label") is None


def test_grey_images_are_annotated_too(classifier_dir, images):
    seen = ClassifierAnnotator(classifier_dir).predict([images[0].convert("L")])
    assert seen.probabilities["label"].shape == (1, 3)


def test_no_image_gives_empty_annotations(classifier_dir):
    assert ClassifierAnnotator(classifier_dir).predict([]).probabilities["label"].shape == (0, 3)


@pytest.mark.parametrize(
    ("id2label", "settings", "message"),
    [
        ({0: "score"}, {}, "two classes or more"),
        ({0: "land", 1: "land"}, {}, "named apart"),
        ({0: "land", 1: "cannot tell"}, {}, "other than 'cannot tell'"),
        (NAMES, {"problem_type": "multi_label_classification"}, "one class for an image"),
    ],
)
def test_models_that_choose_no_class_are_refused(tmp_path, id2label, settings, message):
    with pytest.raises(ModelError, match=message):
        ClassifierAnnotator(save_classifier(tmp_path, id2label, **settings))


def test_a_head_is_never_drawn_at_random(tmp_path):
    Dinov2Model(
        Dinov2Config(mlp_ratio=2, **{k: v for k, v in TOWER.items() if k != "intermediate_size"})
    ).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="found none of classifier"):
        ClassifierAnnotator(tmp_path)


def test_a_model_without_image_processor_is_refused(classifier_dir, tmp_path):
    ViTForImageClassification.from_pretrained(classifier_dir).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="an image processor"):
        ClassifierAnnotator(tmp_path)


def test_each_kind_of_annotator_is_told_by_its_files(classifier_dir):
    assert isinstance(load_annotator(str(BIRDS_ANNOTATOR)), ConvAnnotator)
    assert isinstance(load_annotator("labels", attribute="gender"), GivenLabels)
    classifier = load_annotator(str(classifier_dir), attribute="background")
    assert isinstance(classifier, ClassifierAnnotator)
    assert classifier.attributes == {"background": ("land", "water", "air")}


def test_of_several_attributes_a_classifier_has_the_first_and_labels_have_all(classifier_dir):
    assert list(load_annotator(str(classifier_dir), attribute=["background", "age"]).attributes) == ["background"]
    labels = load_annotator("labels", attribute=["background", "age"])
    labels.discover([{"background": "land", "age": "1"}, {"background": "water", "age": "2"}])
    assert list(labels.attributes) == ["background", "age"]


def test_a_measurement_of_a_classifier_that_was_replaced_is_refused(tmp_path):
    annotator = ClassifierAnnotator(save_classifier(tmp_path / "vit"))
    seen = np.full((3, 3), 1 / 3, np.float32)
    held_out = HeldOut(annotator.attributes, {"label": seen}, {"label": np.arange(3)})
    save_measured(tmp_path / "measured", annotator, held_out, spec=str(tmp_path / "vit"))
    assert load_annotator(str(tmp_path / "measured")).confusion("label").sum() == 3
    save_classifier(tmp_path / "vit", initializer_range=0.5)
    with pytest.raises(ModelError, match="found one of other weights"):
        load_annotator(str(tmp_path / "measured"))


def test_labels_need_an_attribute():
    with pytest.raises(ConfigError, match="Expected an attribute beside 'labels'"):
        load_annotator("labels")


@pytest.mark.parametrize("spec", ["labels", str(BIRDS_ANNOTATOR)])
def test_classes_beside_an_annotator_that_has_its_own_are_refused(spec):
    with pytest.raises(ConfigError, match="Expected no classes"):
        load_annotator(spec, attribute="background", classes={"background": {"land": "a", "water": "b"}})


def test_a_classifier_refuses_classes(classifier_dir):
    with pytest.raises(ConfigError, match="Expected no classes"):
        load_annotator(str(classifier_dir), classes={"background": {"land": "a", "water": "b"}})


def test_what_is_no_annotator_is_refused(tmp_path):
    CLIPTextModel(clip_config(make_tokenizer())).save_pretrained(tmp_path / "text")
    UNet2DModel(sample_size=8, block_out_channels=(32, 32), down_block_types=("DownBlock2D",) * 2,
                up_block_types=("UpBlock2D",) * 2).save_pretrained(tmp_path / "unet")  # fmt: skip
    (tmp_path / "list").mkdir()
    (tmp_path / "list/config.json").write_text("[1]")
    for name, found in (("text", "CLIPTextModel"), ("unet", "UNet2DModel"), ("list", "something else")):
        with pytest.raises(ModelError, match=found):
            load_annotator(str(tmp_path / name))


@pytest.mark.parametrize("spec", ["absent/model", "no/such/place", "./absent"])
def test_an_absent_annotator_is_refused(spec):
    with pytest.raises(ModelError, match="found none"):
        load_annotator(spec)


@pytest.mark.parametrize(
    "recipe",
    [{}, [1], *({"annotator": spec, "attribute": "a", "classes": None} for spec in (1, "labels"))],
)
def test_a_damaged_measurement_is_refused(tmp_path, recipe):
    (tmp_path / "annotator.json").write_text(json.dumps(recipe))
    with pytest.raises(ModelError, match="Expected a"):
        load_annotator(str(tmp_path))
