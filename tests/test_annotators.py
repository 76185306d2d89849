import copy
import json
import os

import numpy as np
import pytest
import torch
import transformers
from PIL import Image, ImageDraw

from conftest import contents
from invdiff.assets import BIRDS_ANNOTATOR
from invdiff.data.birds import BirdsWorld
from invdiff.data.images import UnreadableImage
from invdiff.errors import ConfigError, DataError, EvaluationError, ModelError
from invdiff.evaluation.annotators import conv
from invdiff.evaluation.annotators.annotations import CANNOT_TELL, Annotations
from invdiff.evaluation.annotators.conv import ConvAnnotator, to_pixels
from invdiff.evaluation.annotators.labels import load_labelled_images
from invdiff.evaluation.annotators.load import load_annotator, save_measured
from invdiff.evaluation.annotators.pretrained import ClassifierAnnotator
from test_cli import run, succeed
from tiny import TOWER, clip_config, make_tokenizer, save_dinov2


class ToyImages(list):
    """A red or blue square on the left or the right, on noise; colour and side agree in `agreement`."""

    def __init__(self, count=240, *, agreement=0.5, seed=0):
        self.max_unreadable, self.broken = 0.0, set()
        generator = np.random.default_rng(seed)
        red = generator.random(count) < 0.5
        left = np.where(generator.random(count) < agreement, red, ~red)
        self.attributes = {"side": np.where(left, "left", "right"), "colour": np.where(red, "red", "blue")}
        self.names, self.others = [f"{index}.png" for index in range(count)], {}
        for index in range(count):
            image = Image.fromarray(generator.integers(60, 200, (32, 32, 3), dtype=np.uint8))
            x, y = generator.integers(0, 4, 2)
            x += 0 if left[index] else 16
            ImageDraw.Draw(image).rectangle((x, y + 8, x + 10, y + 18), fill=self.attributes["colour"][index])
            self.append(image)

    def image(self, index):
        if index in self.broken:
            raise UnreadableImage(f"{index}.png", "cut short")
        return self[index]


LEAST = {"steps": 1, "batch_size": 4, "resolution": 16, "progress": False}


@pytest.fixture(scope="module")
def annotator():
    return ConvAnnotator.fit(ToyImages(480, agreement=0.97), steps=60, batch_size=32, resolution=32, progress=False)


@pytest.fixture(scope="module")
def fresh():
    return ToyImages(80, agreement=0.0, seed=1)


def test_attributes_that_go_together_are_told_apart_by_the_softmax_of_logits_over_the_temperature(annotator, fresh):
    seen = annotator.predict(iter(fresh), batch_size=32)
    pixels = torch.stack([to_pixels(image, 32) for image in fresh]).float() / 127.5 - 1
    with torch.no_grad():
        logits = dict(zip(annotator.attributes, annotator(pixels)[1], strict=True))
    for name in ("colour", "side"):
        assert np.mean(np.array(seen.labels(name)) == fresh.attributes[name]) > 0.9
        expected = (logits[name] / annotator.config["temperatures"][name]).softmax(dim=1)
        np.testing.assert_allclose(seen.probabilities[name], expected, rtol=1e-4, atol=1e-6)
    assert seen.features.shape == (80, 64)
    np.testing.assert_allclose(annotator.predict(fresh[:3], batch_size=1).features, seen.features[:3], atol=1e-5)
    nothing = annotator.predict([])
    assert (nothing.features.shape, nothing.labels("side")) == ((0, 64), [])


def test_fitting_repeats_with_its_seed_and_leaves_the_global_generator_alone():
    data, settings = ToyImages(40), {**LEAST, "steps": 3}
    before = torch.get_rng_state()
    first = ConvAnnotator.fit(data, seed=5, **settings)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(1)
    second = ConvAnnotator.fit(data, seed=5, **settings)
    third = ConvAnnotator.fit(data, seed=6, **settings)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.heads.weight, third.heads.weight)


def test_unreadable_images_are_left_out_up_to_the_share_allowed():
    data = ToyImages(40)
    data.broken, data.max_unreadable = {3}, 0.025
    annotator = ConvAnnotator.fit(data, ["side"], **LEAST)
    assert list(annotator.attributes) == ["side"]
    assert 4 <= annotator.confusion("side").sum() <= 12  # too few to calibrate on: all are measured
    assert annotator.config["temperatures"] is None
    data.broken = {3, 7}
    with pytest.raises(DataError, match=r"to be unreadable.*7.png"):
        ConvAnnotator.fit(data, **LEAST)


@pytest.mark.parametrize(
    ("attributes", "asked", "message"),
    [
        *(({"thing": [*map(str, range(n))] * 20}, None, f"2 to 50 classes.*found {n}") for n in (1, 60)),
        ({"thing": [None, float("nan"), *"ab" * 9]}, None, "none for 2 of 20"),
        ({"thing": [CANNOT_TELL, "a"] * 10}, None, "other than 'cannot tell'"),
        ({"side": ["a", "b"] * 10, "colour": ["c", "d"] * 10}, ["age"], "'age' in the data, found side, colour"),
        ({}, None, "columns of classes"),
        ({"thing": ["a", "b"]}, None, "hold one out"),
    ],
)
def test_attributes_that_cannot_be_learnt_are_refused(attributes, asked, message):
    data = ToyImages(max(map(len, attributes.values()), default=20))
    data.attributes = attributes
    with pytest.raises(DataError, match=message):
        ConvAnnotator.fit(data, asked, **LEAST)


def test_an_annotator_of_the_hub_comes_with_its_held_out_images(annotator, tmp_path, monkeypatch):
    annotator.save_pretrained(tmp_path)
    there, load_config = ConvAnnotator.from_pretrained(tmp_path), ConvAnnotator.load_config
    there.held_out, there._measured = None, {}
    monkeypatch.setattr(conv, "load_complete", lambda *_, **__: there)  # what diffusers fetches: no other files
    monkeypatch.setattr(ConvAnnotator, "load_config", lambda path: load_config(tmp_path))
    monkeypatch.setattr(conv, "snapshot_download", lambda name, **options: {"org/judge": tmp_path}[name])
    loaded = ConvAnnotator.from_pretrained("org/judge")
    assert np.array_equal(loaded.confusion("side"), annotator.confusion("side"))


def test_a_saved_annotator_comes_back_bit_for_bit_with_its_held_out_images(annotator, fresh, tmp_path):
    folder = tmp_path / "colours"
    annotator.save_pretrained(folder)
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}
    loaded = ConvAnnotator.from_pretrained(folder)
    assert annotator.name == "annotator"
    assert loaded.name == loaded.feature_name == "colours"
    assert loaded.attributes == annotator.attributes == {"colour": ("blue", "red"), "side": ("left", "right")}
    before, after = annotator.predict(fresh), loaded.predict(fresh)
    assert before.features.tobytes() == after.features.tobytes()
    assert all(np.array_equal(p, after.probabilities[name]) for name, p in before.probabilities.items())
    assert loaded.confusion("side", 1.0)[:, 2].sum() > loaded.confusion("side", 0.5)[:, 2].sum() == 0
    assert 44 <= loaded.confusion("side").sum() <= 52  # a fifth was held out, and half of that calibrated on
    (folder / "annotator.json").write_text("{}")  # of another annotator, as are the held-out images
    ConvAnnotator(attributes={"side": ["left", "right"]}).save_pretrained(folder)
    assert load_annotator(str(folder)).confusion("side") is None


def put(old, new):
    return lambda path: path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("config.json", lambda path: path.unlink(), "no file named config.json"),
        ("config.json", put("ConvAnnotator", "UNet2DModel"), "found UNet2DModel"),
        ("config.json", put('"left"', '"left", "middle"'), "Expected an annotator"),
        ("diffusion_pytorch_model.safetensors", lambda path: os.truncate(path, 100), "Expected an annotator"),
        ("heldout.safetensors", lambda path: os.truncate(path, 100), "of an annotator"),
        ("confusion.json", put('"left"', '"top"'), "again"),
    ],
)
def test_damaged_annotators_are_refused(annotator, tmp_path, file, damage, message):
    annotator.save_pretrained(tmp_path)
    damage(tmp_path / file)
    with pytest.raises(ModelError, match=message):
        ConvAnnotator.from_pretrained(tmp_path)


def test_calibration_brings_confidence_down_to_accuracy(annotator):
    # Every label is wrong in a third of the images, so a net that knows the squares is far too sure.
    data, judge = ToyImages(800, seed=3), copy.deepcopy(annotator)
    truth = np.stack([np.equal(data.attributes[name], judge.attributes[name][1]) for name in judge.attributes], axis=1)
    wrong = np.random.default_rng(5).random(truth.shape) < 1 / 3
    judge.calibrate(torch.stack([to_pixels(image, 32) for image in data]), (truth ^ wrong).astype(np.int64))
    assert min(judge.config["temperatures"].values()) > 1.5
    assert all(figures["calibration_error"] < 0.08 for figures in judge.held_out.summary().values())


def test_the_bundled_annotator_is_right_on_birds_it_has_not_seen():
    annotator, world = ConvAnnotator.from_pretrained(BIRDS_ANNOTATOR), BirdsWorld(60, severity=0.5, seed=123)
    data = world.captioned()
    seen = annotator.predict(map(data.image, range(60)))
    for name in ("background", "subject"):
        assert seen.labels(name) == data.attributes[name]
    counts = annotator.confusion("background", 0.9)
    assert (annotator.name, counts.sum(), counts[0, 1], counts[1, 0]) == ("birds-annotator", 400, 0, 0)
    assert annotator.num_parameters() <= 100_000
    assert (BIRDS_ANNOTATOR / "heldout.safetensors").stat().st_size < 100_000


def seen_by(probabilities, classes=("left", "right"), features=None):
    return Annotations({"side": classes}, {"side": probabilities}, features)


UNSURE = np.array([[0.9, 0.1], [0.4, 0.6], [0.5, 0.5], [0.0, 0.0]], dtype=np.float32)


def test_unsure_images_have_the_class_after_the_last():
    seen = seen_by(UNSURE)
    for confidence, classes in ((0.0, [0, 1, 0, 2]), (np.float64(0.9), [0, 2, 2, 2]), (1, [2] * 4)):
        assert seen.classes("side", confidence).tolist() == classes
        assert seen.labels("side", confidence) == [("left", "right", CANNOT_TELL)[index] for index in classes]


@pytest.mark.parametrize(
    ("use", "message"),
    [
        *((lambda p=p: seen_by(np.full((2, 2), p)), "in \\[0, 1\\]") for p in (np.nan, 1.5)),
        (lambda: seen_by(np.full((2, 3), 0.3)), "2 classes"),
        (lambda: seen_by(UNSURE, features=np.zeros((3, 4))), "as many rows"),
        (lambda: seen_by(UNSURE, ("left", CANNOT_TELL)), "other than 'cannot tell'"),
    ],
)
def test_annotations_that_make_no_sense_are_refused(use, message):
    with pytest.raises(EvaluationError, match=message):
        use()


@pytest.fixture
def net(annotator, tmp_path):
    annotator.save_pretrained(tmp_path / "net")
    save_measured(tmp_path / "measured", annotator, annotator.held_out, spec=str(tmp_path / "net"))
    return tmp_path / "net"


@pytest.mark.parametrize("spec", ["net", "measured"])
@pytest.mark.parametrize("output", ["net", "measured/../net", "link"])
def test_a_measurement_is_never_written_into_the_annotator_s_own_folder(annotator, net, spec, output):
    (net.parent / "link").symlink_to(net)
    before = contents(net.parent)
    with pytest.raises(ConfigError, match="another folder to write"):
        save_measured(net.parent / output, annotator, annotator.held_out, spec=str(net.parent / spec))
    words = ("annotator", "measure", net.parent / spec, "no/such/images", "--output", net.parent / output)
    with pytest.raises(ConfigError, match="another folder to write"):  # the command, before it measures
        run("--debug", *words, "--quiet")
    assert contents(net.parent) == before


def test_measurements_that_name_one_another_are_refused(net):
    (net / "annotator.json").write_bytes((net.parent / "measured/annotator.json").read_bytes())  # it names itself
    for folder in (net, net.parent / "measured"):
        with pytest.raises(ModelError, match="Expected the annotator itself"):
            load_annotator(str(folder))


@pytest.mark.parametrize("annotator", [{}, {"annotator": "labels"}, {"annotator": 1}], ids=str)
def test_a_damaged_measurement_is_refused(tmp_path, annotator):
    recipe = annotator and {"attribute": "a", "classes": None, "weights": ""} | annotator
    (tmp_path / "annotator.json").write_text(json.dumps(recipe))
    with pytest.raises(ModelError, match=r"Expected (a measured|the) annotator"):
        load_annotator(str(tmp_path))


def test_labels_and_classifiers_have_the_attributes_asked_for_and_take_no_classes(classifier_dir):
    labels = load_annotator("labels", attribute=["background", "age"])
    labels.discover([{"background": "land", "age": "1"}, {"background": "water", "age": "2"}])
    assert list(labels.attributes) == ["background", "age"]
    classifier = load_annotator(str(classifier_dir), attribute=["background", "age"])
    assert classifier.attributes == {"background": ("land", "water", "air")}  # of several, the first
    with pytest.raises(ConfigError, match="Expected an attribute beside 'labels'"):
        load_annotator("labels")
    for spec in ("labels", str(BIRDS_ANNOTATOR)):
        with pytest.raises(ConfigError, match="Expected no classes"):
            load_annotator(spec, attribute="background", classes={"background": {"land": "a", "water": "b"}})


def test_what_is_no_annotator_is_refused(tmp_path):
    transformers.CLIPTextModel(clip_config(make_tokenizer())).save_pretrained(tmp_path / "text")
    kinds = {tmp_path / "text": "found CLIPTextModel"}
    for config, found in (({"_class_name": "UNet2DModel"}, "found UNet2DModel"), ([1], "found something else")):
        (tmp_path / found).mkdir()
        (tmp_path / found / "config.json").write_text(json.dumps(config))
        kinds[tmp_path / found] = found
    kinds |= {"absent/model": "unset HF_HUB_OFFLINE", "no/such/place": "there is no such folder"}
    for spec, found in kinds.items():
        with pytest.raises(ModelError, match=found):
            load_annotator(str(spec))


def test_the_commands_train_on_sub_folders_and_measure(clip_dir, tmp_path):
    photos = tmp_path / "photos"
    for index, image in enumerate(ToyImages(40)):
        folder = photos / ("cat", "dog")[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{index}.png")
    trained, measured, clip = (str(tmp_path / name) for name in ("trained", "measured", "clip"))
    (tmp_path / "classes.yaml").write_text("label:\n  cat: a photo on land\n  dog: a photo of water\n")
    for output, *words in (
        (trained, "train", photos, "--steps", 1, "--batch-size", 4, "--resolution", 16),
        (measured, "measure", trained, photos),
        (clip, "measure", clip_dir, photos, "--classes", tmp_path / "classes.yaml"),
    ):
        shown = succeed("annotator", *words, "--output", output, "--quiet")
        assert f"--annotator {output} --attribute label" in " ".join(shown.split())
    for folder in (measured, clip):
        assert load_annotator(folder).confusion("label").sum(axis=1).tolist() == [20, 20]
    with pytest.raises(DataError, match="one sub-folder of images per class"):
        ConvAnnotator.fit(load_labelled_images(photos / "cat"), progress=False)


CLASS_NAMES = {0: "land", 1: "water", 2: "air"}


def save_classifier(folder, id2label=CLASS_NAMES, **settings):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.ViTForImageClassification(transformers.ViTConfig(id2label=id2label, **TOWER, **settings))
        torch.nn.init.normal_(model.classifier.weight)  # apart enough for classes to differ between images
        model.save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 28, "width": 28}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def classifier_dir(tmp_path_factory):
    return save_classifier(tmp_path_factory.mktemp("models") / "tiny-vit")


def test_probabilities_are_the_softmax_of_the_classifier_s_logits(classifier_dir):
    numbers = np.random.default_rng(0)
    images = [Image.fromarray(numbers.integers(0, 256, (36, 40, 3), dtype=np.uint8)) for _ in range(5)]
    model = transformers.ViTForImageClassification.from_pretrained(classifier_dir).eval()
    processor = transformers.ViTImageProcessor.from_pretrained(classifier_dir)
    images[0] = images[0].convert("L")
    shown = processor([image.convert("RGB") for image in images], return_tensors="pt")
    annotator = ClassifierAnnotator(classifier_dir)
    assert annotator.attributes == {"label": ("land", "water", "air")}
    assert (annotator.name, annotator.feature_name) == ("tiny-vit", "")
    assert annotator.confusion("label") is None
    seen = annotator.predict(images)
    np.testing.assert_allclose(seen.probabilities["label"], model(**shown).logits.detach().softmax(dim=1), atol=1e-5)
    assert seen.features is None
    assert annotator.predict([]).probabilities["label"].shape == (0, 3)


def test_models_that_choose_no_class_or_lack_a_head_or_an_image_processor_are_refused(classifier_dir, tmp_path):
    transformers.ViTForImageClassification.from_pretrained(classifier_dir).save_pretrained(tmp_path / "blind")
    for model, message in (
        (save_dinov2(tmp_path / "headless"), "found none of classifier"),
        (tmp_path / "blind", "an image processor"),
        (save_classifier(tmp_path / "one", {0: "score"}), "two classes or more"),
        (save_classifier(tmp_path / "twice", {0: "land", 1: "land"}), "named apart"),
        (save_classifier(tmp_path / "unsure", {0: "land", 1: "cannot tell"}), "other than 'cannot tell'"),
        (save_classifier(tmp_path / "several", problem_type="multi_label_classification"), "one class for an image"),
    ):
        with pytest.raises(ModelError, match=message):
            ClassifierAnnotator(model)
