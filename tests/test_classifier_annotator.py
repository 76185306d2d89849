import numpy as np
import pytest
import torch
from PIL import Image
from scipy.special import softmax
from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTForImageClassification, ViTImageProcessor

from invdiff.errors import ModelError
from invdiff.evaluation.annotators.classifier import ClassifierAnnotator
from invdiff.evaluation.annotators.load import load_annotator
from tiny import TOWER

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


def test_probabilities_are_the_softmax_of_the_classifier_s_logits(classifier_dir):
    numbers = np.random.default_rng(0)
    images = [Image.fromarray(numbers.integers(0, 256, (36, 40, 3), dtype=np.uint8)) for _ in range(5)]
    model = ViTForImageClassification.from_pretrained(classifier_dir).eval()
    processor = ViTImageProcessor.from_pretrained(classifier_dir)
    images[0] = images[0].convert("L")
    with torch.no_grad():
        logits = [model(**processor(image.convert("RGB"), return_tensors="pt")).logits[0].numpy() for image in images]
    annotator = ClassifierAnnotator(classifier_dir)
    assert annotator.attributes == {"label": ("land", "water", "air")}
    assert (annotator.name, annotator.feature_name) == ("tiny-vit", "")
    assert annotator.confusion("label") is None
    seen = annotator.predict(images)
    np.testing.assert_allclose(seen.probabilities["label"], softmax(logits, axis=1), atol=1e-5)
    assert seen.features is None
    assert annotator.predict([]).probabilities["label"].shape == (0, 3)


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


def test_a_model_without_a_head_or_an_image_processor_is_refused(classifier_dir, tmp_path):
    config = {name: value for name, value in TOWER.items() if name != "intermediate_size"}
    Dinov2Model(Dinov2Config(mlp_ratio=2, **config)).save_pretrained(tmp_path / "headless")
    ViTForImageClassification.from_pretrained(classifier_dir).save_pretrained(tmp_path / "blind")
    for name, message in (("headless", "found none of classifier"), ("blind", "an image processor")):
        with pytest.raises(ModelError, match=message):
            ClassifierAnnotator(tmp_path / name)


def test_it_is_loaded_with_the_first_of_several_attributes(classifier_dir):
    classifier = load_annotator(str(classifier_dir), attribute=["background", "age"])
    assert classifier.attributes == {"background": ("land", "water", "air")}
