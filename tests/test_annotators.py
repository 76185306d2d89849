import json

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from PIL import Image, ImageDraw

from invdiff.data.captioned import UnreadableImage
from invdiff.errors import DataError, ModelError
from invdiff.evaluation.annotators import ConvAnnotator, to_pixels


class ToyImages:
    """A red or blue square on the left or the right, on noise; colour and side agree in `agreement`."""

    def __init__(self, count=240, *, agreement=0.5, seed=0, size=32):
        self.max_unreadable = 0.0
        self.broken = set()
        generator = np.random.default_rng(seed)
        red = generator.random(count) < 0.5
        left = np.where(generator.random(count) < agreement, red, ~red)
        self.attributes = {
            "side": ["left" if value else "right" for value in left],
            "colour": ["red" if value else "blue" for value in red],
        }
        self._images = []
        for index in range(count):
            noise = generator.integers(60, 200, (size, size, 3), dtype=np.uint8)
            image = Image.fromarray(noise)
            x, y = generator.integers(0, size // 8, 2)
            x += 0 if left[index] else size // 2
            box = (x, y + size // 4, x + size // 3, y + size // 4 + size // 3)
            ImageDraw.Draw(image).rectangle(box, fill="red" if red[index] else "blue")
            self._images.append(image)

    def __len__(self):
        return len(self._images)

    def image(self, index):
        if index in self.broken:
            raise UnreadableImage(f"{index}.png", "cut short")
        return self._images[index]

    def images(self):
        return iter(self._images)


FAST = {"steps": 60, "batch_size": 32, "resolution": 32, "progress": False}


@pytest.fixture(scope="module")
def annotator():
    return ConvAnnotator.fit(ToyImages(), **FAST)


@pytest.fixture(scope="module")
def fresh():
    return ToyImages(80, seed=1)


@pytest.mark.parametrize("attribute", ["colour", "side"])
def test_a_separable_attribute_is_learnt(annotator, fresh, attribute):
    labels = annotator.predict(fresh.images()).labels(attribute)
    assert np.mean(np.array(labels) == fresh.attributes[attribute]) > 0.95


def test_annotations_have_the_promised_shapes(annotator, fresh):
    annotations = annotator.predict(fresh.images(), batch_size=32)
    assert annotations.features.shape == (80, 64)
    assert {name: p.shape for name, p in annotations.probabilities.items()} == {
        "colour": (80, 2),
        "side": (80, 2),
    }
    np.testing.assert_allclose(annotations.probabilities["side"].sum(axis=1), 1, atol=1e-6)


def test_no_image_gives_empty_annotations(annotator):
    annotations = annotator.predict([])
    assert annotations.features.shape == (0, 64)
    assert annotations.labels("side") == []


def test_annotations_do_not_depend_on_the_batch(annotator, fresh):
    whole, single = annotator.predict(fresh.images()), annotator.predict(fresh.images(), batch_size=1)
    np.testing.assert_allclose(whole.features, single.features, atol=1e-5)


def test_a_saved_annotator_comes_back_bit_for_bit(annotator, fresh, tmp_path):
    annotator.save_pretrained(tmp_path)
    loaded = ConvAnnotator.from_pretrained(tmp_path)
    before, after = annotator.predict(fresh.images()), loaded.predict(fresh.images())
    assert loaded.attributes == annotator.attributes == {"colour": ("blue", "red"), "side": ("left", "right")}
    assert before.features.tobytes() == after.features.tobytes()
    assert all(np.array_equal(p, after.probabilities[name]) for name, p in before.probabilities.items())


def test_only_safetensors_and_json_are_written(annotator, tmp_path):
    annotator.save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors", ".json"}


def test_the_config_keeps_what_was_measured_on_held_out_images(annotator, tmp_path):
    annotator.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    confusion = np.array(config["confusion"]["colour"])
    assert 40 <= confusion.sum() <= 56
    assert config["holdout_accuracy"]["colour"] == pytest.approx(np.trace(confusion) / confusion.sum())
    assert 0 <= config["holdout_worst_group"]["side"] <= config["holdout_accuracy"]["side"]


def test_groups_too_small_to_judge_have_no_worst():
    annotator = ConvAnnotator.fit(ToyImages(40), steps=1, batch_size=4, resolution=16, progress=False)
    assert annotator.config["holdout_worst_group"] == {"colour": None, "side": None}


def test_attributes_that_go_together_are_still_told_apart():
    annotator = ConvAnnotator.fit(ToyImages(600, agreement=0.95), **{**FAST, "steps": 100})
    data = ToyImages(200, agreement=0.0, seed=2)
    labels = annotator.predict(data.images()).labels("side")
    assert np.mean(np.array(labels) == data.attributes["side"]) > 0.9


def test_fitting_repeats_with_its_seed_and_leaves_the_global_generator_alone():
    data, settings = ToyImages(40), {"steps": 3, "batch_size": 8, "resolution": 16, "progress": False}
    before = torch.get_rng_state()
    first = ConvAnnotator.fit(data, seed=5, **settings)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(1)
    second = ConvAnnotator.fit(data, seed=5, **settings)
    third = ConvAnnotator.fit(data, seed=6, **settings)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.heads.weight, third.heads.weight)


def test_unreadable_images_are_left_out_up_to_the_share_allowed():
    data, settings = ToyImages(40), {"steps": 1, "batch_size": 4, "resolution": 16, "progress": False}
    data.broken = {3}
    data.max_unreadable = 0.025
    annotator = ConvAnnotator.fit(data, **settings)
    assert 4 <= np.sum(annotator.config["confusion"]["side"]) <= 12
    data.broken = {3, 7}
    with pytest.raises(DataError, match=r"Too many images are unreadable.*7.png"):
        ConvAnnotator.fit(data, **settings)


def test_only_the_attributes_asked_for_are_learnt():
    annotator = ConvAnnotator.fit(ToyImages(20), ["side"], steps=1, batch_size=4, resolution=16, progress=False)
    assert list(annotator.attributes) == ["side"]


def test_ten_attributes_fit_in_a_hundred_thousand_parameters():
    annotator = ConvAnnotator(attributes={str(index): ["a", "b", "c"] for index in range(10)})
    assert sum(parameter.numel() for parameter in annotator.parameters()) <= 100_000


def test_pixels_are_the_centre_square():
    image = Image.new("RGB", (30, 10), "black")
    image.paste("white", (10, 0, 20, 10))
    assert torch.equal(to_pixels(image, 8), torch.full((3, 8, 8), 255, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["one"] * 20, "2 to 50 classes, found 1"),
        (list(range(20)) * 3, None),
        ([None, *"ab" * 10][:20], "none for 1 of 20"),
        ([float("nan"), *"ab" * 10][:20], "none for 1 of 20"),
    ],
)
def test_attributes_that_cannot_be_learnt_are_refused(values, message):
    data = ToyImages(20)
    if message is None:
        data, values, message = ToyImages(60), [str(index) for index in range(60)], "found 60"
    data.attributes = {"thing": values}
    with pytest.raises(DataError, match=message):
        ConvAnnotator.fit(data, steps=1, progress=False)


def test_an_absent_attribute_is_refused_with_those_there_are():
    with pytest.raises(DataError, match="'age' in the data, found side, colour"):
        ConvAnnotator.fit(ToyImages(20), ["age"])


def test_data_without_attributes_is_refused():
    data = ToyImages(20)
    data.attributes = {}
    with pytest.raises(DataError, match="at least one attribute"):
        ConvAnnotator.fit(data)


def test_images_that_are_all_different_cannot_be_held_out():
    data = ToyImages(2)
    data.attributes = {"thing": ["a", "b"]}
    with pytest.raises(DataError, match="held out"):
        ConvAnnotator.fit(data, steps=1, progress=False)


@pytest.mark.parametrize("setting", [{"steps": 0}, {"batch_size": 0}, {"holdout": 0.0}, {"holdout": 1.0}])
def test_settings_out_of_range_are_refused(setting):
    with pytest.raises(DataError, match="Expected steps"):
        ConvAnnotator.fit(ToyImages(20), **setting)


def test_an_empty_folder_is_not_an_annotator(tmp_path):
    with pytest.raises(ModelError, match="found none"):
        ConvAnnotator.from_pretrained(tmp_path)


def test_another_model_is_not_an_annotator(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": UNet2DModel.__name__}))
    with pytest.raises(ModelError, match="found UNet2DModel"):
        ConvAnnotator.from_pretrained(tmp_path)


def test_damaged_weights_are_refused(annotator, tmp_path):
    annotator.save_pretrained(tmp_path)
    weights = next(tmp_path.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ModelError, match="Could not load the annotator"):
        ConvAnnotator.from_pretrained(tmp_path)


def test_weights_that_do_not_fit_the_config_are_refused(annotator, tmp_path):
    annotator.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["attributes"]["side"].append("middle")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="Could not load the annotator"):
        ConvAnnotator.from_pretrained(tmp_path)
