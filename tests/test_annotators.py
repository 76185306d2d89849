import copy
import json

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from PIL import Image, ImageDraw
from typer.testing import CliRunner

from invdiff import cli
from invdiff.assets import BIRDS_ANNOTATOR
from invdiff.data.birds import BirdsWorld
from invdiff.data.images import UnreadableImage
from invdiff.errors import ConfigError, DataError, EvaluationError, ModelError
from invdiff.evaluation.annotators.annotations import CANNOT_TELL, Annotations
from invdiff.evaluation.annotators.conv import ConvAnnotator
from invdiff.evaluation.annotators.conv_training import stratified_share
from invdiff.evaluation.annotators.heldout import measure_annotator
from invdiff.evaluation.annotators.labelled import load_labelled_images
from invdiff.evaluation.annotators.load import load_annotator, save_measured
from invdiff.evaluation.annotators.pixels import to_pixels


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
    return ConvAnnotator.fit(ToyImages(480), **FAST)


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
    assert 44 <= confusion.sum() <= 52  # a fifth was held out, and half of that calibrated on
    assert config["holdout_accuracy"]["colour"] == pytest.approx(np.trace(confusion) / confusion.sum())
    assert 0 <= config["holdout_worst_group"]["side"] <= config["holdout_accuracy"]["side"]
    assert set(config["holdout_calibration_error"]["side"]) == {"uncalibrated", "calibrated"}


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
    assert 4 <= np.sum(annotator.config["confusion"]["side"]) <= 12  # too few to calibrate on: all are judged
    data.broken = {3, 7}
    with pytest.raises(DataError, match=r"images to be unreadable, found 2.*7.png"):
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


def test_probabilities_are_those_of_the_logits_over_the_temperature(annotator, fresh):
    pixels = torch.stack([to_pixels(image, 32) for image in fresh.images()]).float() / 127.5 - 1
    with torch.no_grad():
        logits = dict(zip(annotator.attributes, annotator(pixels)[1], strict=True))
    seen = annotator.predict(fresh.images())
    for name, values in logits.items():
        weights = np.exp(values.double().numpy() / annotator.config["temperatures"][name])
        np.testing.assert_allclose(
            seen.probabilities[name], weights / weights.sum(axis=1, keepdims=True), rtol=1e-4, atol=1e-6
        )


def test_few_held_out_images_are_not_calibrated_on():
    annotator = ConvAnnotator.fit(ToyImages(40), steps=1, batch_size=4, resolution=16, progress=False)
    errors = annotator.config["holdout_calibration_error"]["side"]
    assert annotator.config["temperatures"] is None
    assert errors["calibrated"] == pytest.approx(errors["uncalibrated"])


def test_calibration_brings_confidence_down_to_accuracy(annotator):
    # Every label is wrong in a third of the images, so a net that knows the squares is far too sure.
    data, judge = ToyImages(800, seed=3), copy.deepcopy(annotator)
    truth = np.stack([np.equal(data.attributes[name], judge.attributes[name][1]) for name in judge.attributes], axis=1)
    wrong = np.random.default_rng(5).random(truth.shape) < 1 / 3
    judge.calibrate(torch.stack([to_pixels(image, 32) for image in data.images()]), (truth ^ wrong).astype(np.int64))
    for errors in judge.config["holdout_calibration_error"].values():
        assert errors["uncalibrated"] > 0.25
        assert errors["calibrated"] < 0.08


def test_held_out_probabilities_come_back_with_a_saved_annotator(annotator, tmp_path):
    annotator.save_pretrained(tmp_path)
    loaded = ConvAnnotator.from_pretrained(tmp_path)
    for confidence in (0.0, 0.7, 0.99, 1.0):
        counts = loaded.confusion("side", confidence)
        assert counts.shape == (2, 3)
        assert np.array_equal(counts, annotator.confusion("side", confidence))
    assert loaded.confusion("side", 1.0)[:, 2].sum() > loaded.confusion("side", 0.5)[:, 2].sum() == 0


def test_confusion_json_agrees_with_the_config(annotator, tmp_path):
    annotator.save_pretrained(tmp_path)
    figures = json.loads((tmp_path / "confusion.json").read_text())["side"]
    assert figures["classes"] == ["left", "right"]
    assert figures["matrix"] == annotator.config["confusion"]["side"]
    assert figures["accuracy"] == annotator.config["holdout_accuracy"]["side"]
    assert figures["calibration_error"] == annotator.config["holdout_calibration_error"]["side"]["calibrated"]


def test_an_annotator_saved_without_held_out_images_still_loads(annotator, tmp_path):
    annotator.save_pretrained(tmp_path)
    (tmp_path / "heldout.safetensors").unlink()
    (tmp_path / "confusion.json").unlink()
    loaded = ConvAnnotator.from_pretrained(tmp_path)
    assert np.array_equal(loaded.confusion("side"), annotator.confusion("side"))
    assert loaded.confusion("side", 0.5) is None


def test_an_annotator_that_was_never_measured_has_no_confusion():
    assert ConvAnnotator(attributes={"side": ["left", "right"]}).confusion("side") is None


def test_saving_over_a_measured_annotator_removes_what_is_not_its_own(annotator, tmp_path):
    annotator.save_pretrained(tmp_path)
    ConvAnnotator(attributes={"side": ["left", "right"]}).save_pretrained(tmp_path)
    assert ConvAnnotator.from_pretrained(tmp_path).confusion("side") is None


def test_held_out_images_of_other_classes_are_refused(annotator, tmp_path):
    annotator.save_pretrained(tmp_path)
    ConvAnnotator(attributes={"side": ["left", "right", "top"]}).save_pretrained(tmp_path / "other")
    for name in ("heldout.safetensors", "confusion.json"):
        (tmp_path / "other" / name).write_bytes((tmp_path / name).read_bytes())
    with pytest.raises(ModelError, match="Measure this annotator again"):
        ConvAnnotator.from_pretrained(tmp_path / "other")


def test_damaged_held_out_images_are_refused(annotator, tmp_path):
    annotator.save_pretrained(tmp_path)
    (tmp_path / "heldout.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ModelError, match="Could not load the annotator"):
        ConvAnnotator.from_pretrained(tmp_path)


def test_an_annotator_and_its_features_are_called_as_its_folder_is(annotator, tmp_path):
    annotator.save_pretrained(tmp_path / "colours")
    loaded = ConvAnnotator.from_pretrained(tmp_path / "colours")
    assert annotator.name == "annotator"
    assert loaded.name == loaded.feature_name == "colours"


def test_confusion_of_an_unknown_attribute_is_refused(annotator):
    with pytest.raises(EvaluationError, match="one of the attributes colour, side, got 'age'"):
        annotator.confusion("age")


def test_the_bundled_annotator_is_right_on_birds_it_has_not_seen():
    annotator = ConvAnnotator.from_pretrained(BIRDS_ANNOTATOR)
    world = BirdsWorld(60, severity=0.5, seed=123)
    rows = [world.row(index) for index in range(60)]
    seen = annotator.predict(row["image"] for row in rows)
    assert annotator.name == "birds-annotator"
    for name in ("background", "subject"):
        assert seen.labels(name) == [row[name] for row in rows]


def test_the_bundled_annotator_knows_its_held_out_images():
    annotator = ConvAnnotator.from_pretrained(BIRDS_ANNOTATOR)
    counts = annotator.confusion("background", 0.9)
    assert counts.shape == (2, 3)
    assert counts.sum() == 400
    assert counts[0, 1] == counts[1, 0] == 0
    assert (BIRDS_ANNOTATOR / "heldout.safetensors").stat().st_size < 100_000


def test_stratified_shares_hold_each_cell_s_share():
    cells = np.repeat([0, 1, 2, 3], [100, 10, 2, 1])
    rows = stratified_share(cells, 0.2, torch.Generator().manual_seed(0))
    assert np.bincount(cells[rows], minlength=4).tolist() == [20, 2, 1, 0]
    assert np.array_equal(rows, np.unique(rows))


def test_sub_folders_are_classes(tmp_path):
    for index, image in enumerate(ToyImages(40)._images):
        folder = tmp_path / ("cat", "dog")[index % 2]
        folder.mkdir(exist_ok=True)
        image.save(folder / f"{index}.png")
    data = load_labelled_images(tmp_path)
    annotator = ConvAnnotator.fit(data, steps=1, batch_size=4, resolution=16, progress=False)
    assert annotator.attributes == {"label": ("cat", "dog")}
    assert data.attributes["label"] == ["cat"] * 20 + ["dog"] * 20


def test_columns_are_learnt_without_captions_and_captions_are_never_classes(tmp_path):
    images = ToyImages(4)._images
    for index, image in enumerate(images):
        image.save(tmp_path / f"{index}.png")
    for header, wanted in (("text", None), ("title", "title"), ("", None)):
        first = f",{header}" if header else ""
        rows = [f"{index}.png,{'ab'[index % 2]}{',a photo' if header else ''}" for index in range(4)]
        (tmp_path / "metadata.csv").write_text("\n".join([f"file_name,side{first}", *rows]) + "\n")
        data = load_labelled_images(tmp_path, caption_column=wanted)
        assert data.attributes == {"side": ["a", "b", "a", "b"]}


def test_a_folder_of_images_alone_has_nothing_to_learn(tmp_path):
    ToyImages(1)._images[0].save(tmp_path / "0.png")
    with pytest.raises(DataError, match="one sub-folder of images per class"):
        ConvAnnotator.fit(load_labelled_images(tmp_path), progress=False)


def test_data_that_cannot_be_read_at_all_is_refused():
    data = ToyImages(8)
    data.broken, data.max_unreadable = set(range(8)), 1.0
    with pytest.raises(DataError, match="images to be unreadable"):
        ConvAnnotator.fit(data, progress=False)


PROBABILITIES = np.array([[0.9, 0.1], [0.4, 0.6], [0.5, 0.5], [0.0, 0.0]], dtype=np.float32)


@pytest.mark.parametrize(
    ("confidence", "classes"),
    [
        (0.0, [0, 1, 0, 2]),
        (0.5, [0, 1, 0, 2]),
        (0.6, [0, 1, 2, 2]),
        (np.float64(0.9), [0, 2, 2, 2]),
        (1, [2, 2, 2, 2]),
    ],
)
def test_unsure_images_have_the_class_after_the_last(confidence, classes):
    seen = Annotations({"side": ("left", "right")}, {"side": PROBABILITIES}, None)
    assert seen.classes("side", confidence).tolist() == classes
    assert seen.labels("side", confidence) == [("left", "right", CANNOT_TELL)[index] for index in classes]


@pytest.mark.parametrize("confidence", [-0.1, 1.1, float("nan")])
def test_confidences_outside_0_to_1_are_refused(confidence):
    seen = Annotations({"side": ("left", "right")}, {"side": PROBABILITIES}, None)
    with pytest.raises(EvaluationError, match="confidence from 0 to 1"):
        seen.classes("side", confidence)


@pytest.mark.parametrize(
    ("values", "features", "message"),
    [
        (np.full((2, 2), np.nan), None, "in \\[0, 1\\]"),
        (np.full((2, 2), 1.5), None, "values from 1.5"),
        (np.full((2, 3), 0.3), None, "2 classes"),
        (np.full((2, 2), 0.5), np.zeros((3, 4)), "as many rows"),
    ],
)
def test_annotations_that_make_no_sense_are_refused(values, features, message):
    with pytest.raises(EvaluationError, match=message):
        Annotations({"side": ("left", "right")}, {"side": values}, features)


def test_an_unsure_image_s_label_is_no_class():
    with pytest.raises(EvaluationError, match="other than 'cannot tell'"):
        Annotations({"side": ("left", CANNOT_TELL)}, {"side": PROBABILITIES}, None)
    with pytest.raises(ModelError, match="other than 'cannot tell'"):
        ConvAnnotator(attributes={"side": ("left", CANNOT_TELL)})


def test_labels_of_unsure_images_are_not_learnt():
    data = ToyImages(8)
    data.attributes["side"][0] = CANNOT_TELL
    with pytest.raises(DataError, match="other than 'cannot tell'"):
        ConvAnnotator.fit(data, progress=False)


@pytest.fixture
def net(annotator, fresh, tmp_path):
    """A folder with a net, and one with a measurement of its sides on 80 images."""
    annotator.save_pretrained(tmp_path / "net")
    held_out = measure_annotator(annotator, fresh, ["side"], progress=False)
    save_measured(tmp_path / "measured", annotator, held_out, spec=str(tmp_path / "net"))
    return tmp_path / "net"


def all_bytes(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("spec", ["net", "measured"])
@pytest.mark.parametrize("output", ["net", "measured/../net", "link"])
def test_a_measurement_is_never_written_into_the_annotator_s_own_folder(annotator, net, spec, output):
    (net.parent / "link").symlink_to(net)
    before = all_bytes(net.parent)
    with pytest.raises(ConfigError, match="Expected another folder"):
        save_measured(net.parent / output, annotator, annotator.held_out, spec=str(net.parent / spec))
    assert all_bytes(net.parent) == before


def test_the_command_refuses_the_annotator_s_own_folder_before_it_measures(net):
    words = ["--debug", "annotator", "measure", str(net), "no/such/images", "--output", str(net), "--quiet"]
    with pytest.raises(ConfigError, match="Expected another folder"):
        CliRunner().invoke(cli.app, words, catch_exceptions=False)


def test_measurements_that_name_one_another_are_refused(net):
    (net / "annotator.json").write_bytes((net.parent / "measured/annotator.json").read_bytes())  # it names itself
    for folder in (net, net.parent / "measured"):
        with pytest.raises(ModelError, match="Expected the annotator itself"):
            load_annotator(str(folder))


def test_a_net_saved_over_a_measurement_takes_its_place(net):
    other = ConvAnnotator(attributes={"side": ["left", "right"]})
    other.save_pretrained(net.parent / "measured")
    loaded = load_annotator(str(net.parent / "measured"))
    assert loaded.weights_digest() == other.weights_digest()
    assert loaded.confusion("side") is None


def test_a_measurement_of_a_net_that_was_replaced_is_refused(net):
    ConvAnnotator(attributes={"side": ["left", "right"], "colour": ["blue", "red"]}, resolution=32).save_pretrained(
        net
    )
    with pytest.raises(ModelError, match="found one of other weights"):
        load_annotator(str(net.parent / "measured"))


def test_a_measurement_that_names_no_weights_still_loads(net):
    recipe = json.loads((net.parent / "measured/annotator.json").read_text())
    del recipe["weights"]
    (net.parent / "measured/annotator.json").write_text(json.dumps(recipe))
    assert load_annotator(str(net.parent / "measured")).confusion("side").sum() == 80


def test_attributes_that_are_not_measured_anew_keep_their_confusion(annotator, net):
    loaded = load_annotator(str(net.parent / "measured"))
    assert loaded.confusion("side").sum() == 80
    assert np.array_equal(loaded.confusion("colour", 0.7), annotator.confusion("colour", 0.7))
    assert "colour" in json.loads((net.parent / "measured/confusion.json").read_text())


def test_a_measurement_of_one_attribute_alone_leaves_the_net_its_own_of_others(annotator, fresh, net):
    measure_annotator(annotator, fresh, ["side"], progress=False).save(net.parent / "measured")
    loaded = load_annotator(str(net.parent / "measured"))
    assert loaded.confusion("side").sum() == 80
    assert np.array_equal(loaded.confusion("colour", 0.7), annotator.confusion("colour", 0.7))


def test_counts_in_the_config_stay_those_of_attributes_that_are_not_measured_anew(annotator, fresh, net):
    for name in ("heldout.safetensors", "confusion.json"):
        (net / name).unlink()
    loaded = ConvAnnotator.from_pretrained(net)
    loaded.use_held_out(measure_annotator(loaded, fresh, ["side"], progress=False))
    assert loaded.confusion("side").sum() == 80
    assert np.array_equal(loaded.confusion("colour"), annotator.confusion("colour"))
    assert loaded.confusion("colour", 0.5) is None


def test_the_commands_train_on_sub_folders_and_measure(tmp_path):
    for index, image in enumerate(ToyImages(40)._images):
        folder = tmp_path / "photos" / ("cat", "dog")[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{index}.png")
    small = ["--steps", "1", "--batch-size", "4", "--resolution", "16"]
    trained, measured, photos = (str(tmp_path / name) for name in ("trained", "measured", "photos"))
    for words in (
        ["annotator", "train", photos, *small, "--output", trained, "--quiet"],
        ["annotator", "measure", trained, photos, "--output", measured, "--quiet"],
    ):
        done = CliRunner().invoke(cli.app, words, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        assert f"--annotator {words[-2]} --attribute label" in " ".join(done.output.split())
    assert load_annotator(measured).confusion("label").sum(axis=1).tolist() == [20, 20]
