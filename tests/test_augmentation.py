"""The augmentation test: classifiers trained on generated images, measured group by group on real ones."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from augmentation import AugmentationConfig, augmentation_test, group_accuracy
from PIL import Image
from scipy.stats import binomtest
from sklearn.metrics import recall_score

from invdiff.errors import ConfigError, DataError, EvaluationError, TrainingError
from invdiff.evaluation.annotators.labels import load_labelled_images

CLASSES, COLOURS = ("cat", "dog"), {"red": (230, 40, 40), "blue": (40, 40, 230)}
FAST = AugmentationConfig(steps=60, batch_size=32, resolution=16, seeds=(0,))
INSTANT = AugmentationConfig(steps=1, batch_size=4, resolution=8, seeds=(0,))


def picture(subject, colour, numbers):
    """The left half is dark or bright, faintly; the right half has a colour, plainly."""
    level = numbers.normal(110 if subject == "cat" else 150, 10)
    pixels = numbers.normal(level, 25, (16, 16, 3))
    pixels[:, 8:] = np.array(COLOURS[colour]) + numbers.normal(0, 25, (16, 8, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write_model(folder, *, per_subject=100, agreement=1.0, seed=0, prompt="a photo of a {}", **columns):
    """Write generated images; subject and colour agree in `agreement`. `per_subject` may differ by subject."""
    folder.mkdir(parents=True)
    numbers, lines = np.random.default_rng(seed), []
    for side, (subject, count) in enumerate(zip(CLASSES, np.broadcast_to(per_subject, 2), strict=True)):
        for index in range(count):
            name, colour = f"{subject}-{index}.png", list(COLOURS)[side ^ (index >= agreement * count)]
            picture(subject, colour, numbers).save(folder / name)
            lines.append(json.dumps({"file_name": name, "prompt": prompt.format(subject)} | columns))
    (folder / "manifest.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def write_test(folder, sizes):
    """Write labelled images from (subject, colour) to number."""
    folder.mkdir(parents=True)
    numbers, lines = np.random.default_rng(9), []
    for (subject, colour), count in sizes.items():
        for index in range(count):
            name = f"{subject}-{colour}-{index}.png"
            picture(subject, colour, numbers).save(folder / name)
            lines.append(json.dumps({"file_name": name, "subject": subject, "colour": colour}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return load_labelled_images(folder)


def grid(count):
    return {(subject, colour): count for subject in CLASSES for colour in COLOURS}


def run(folders, data, **settings):
    settings = {"config": FAST, "progress": False} | settings
    return augmentation_test(folders, data, subject_attribute="subject", attribute="colour", **settings)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder, shares = tmp_path_factory.mktemp("models"), {"base": 0.97, "guided": 0.5}
    return {name: write_model(folder / name, agreement=share, seed=1) for name, share in shares.items()}


@pytest.fixture(scope="module")
def balanced(tmp_path_factory):
    return write_test(tmp_path_factory.mktemp("test") / "balanced", grid(30))


@pytest.fixture(scope="module")
def results(models, balanced):
    return run(models, balanced, config=replace(FAST, seeds=(0, 1)))["models"]


def test_the_worst_group_contradicts_the_spurious_attribute_of_the_images(results):
    base, guided = results["base"], results["guided"]
    assert base["worst_accuracy"]["mean"] < guided["worst_accuracy"]["mean"] - 0.3
    assert guided["worst_accuracy"]["mean"] > 0.8
    assert base["worst_group"] in ("cat x blue", "dog x red")


def test_every_model_trains_on_the_smallest_number_that_any_model_has_of_any_subject(tmp_path, balanced):
    sizes = {"base": (20, 14), "guided": (12, 30)}
    folders = {name: write_model(tmp_path / name, per_subject=size) for name, size in sizes.items()}
    found = run(folders, balanced, config=INSTANT)
    assert [model["train_images"] for model in found["models"].values()] == [{"cat": 12, "dog": 12}] * 2
    folder = write_model(tmp_path / "named", per_subject=10, prompt="{}ty")
    found = run(folder, balanced, config=INSTANT, subject_of={"catty": "dog", "dogty": "cat"})
    assert found["models"]["named"]["train_images"] == {"cat": 10, "dog": 10}


def test_the_tests_attribute_decides_on_groups_and_on_nothing_else(results, models, tmp_path):
    shuffled = write_test(tmp_path / "test", grid(30))
    np.random.default_rng(0).shuffle(shuffled.attributes["colour"])
    changed = run({"base": models["base"]}, shuffled)["models"]["base"]["by_seed"]["0"]
    before = results["base"]["by_seed"]["0"]
    assert changed["accuracy"] == before["accuracy"]
    assert changed["groups"] != before["groups"]


def test_a_seed_gives_the_same_whatever_else_is_trained_and_leaves_the_global_generator(results, models, balanced):
    state = torch.random.get_rng_state()
    again = run({"guided": models["guided"]}, balanced, config=replace(FAST, seeds=(1,)))["models"]["guided"]
    assert again["by_seed"]["1"] == results["guided"]["by_seed"]["1"]
    assert again["accuracy"]["sd"] is None
    assert torch.equal(torch.random.get_rng_state(), state)


def test_group_figures_are_recalls():
    numbers = np.random.default_rng(3)
    groups, right = numbers.choice(["a", "b", "c", "d"], 400), numbers.random(400) < 0.7
    measured = group_accuracy(right, groups.tolist(), dict.fromkeys("abcd", 100))
    # Recall of a group, where a wrong image is predicted to be of no group.
    recalls = recall_score(groups, np.where(right, groups, "none"), labels=["a", "b", "c", "d"], average=None)
    assert list(measured["groups"].values()) == pytest.approx(recalls.tolist())
    assert measured["worst_accuracy"] == pytest.approx(recalls.min())
    assert measured["group_mean"] == pytest.approx(recalls.mean())


def test_figures_over_seeds_and_the_interval_are_those_of_numpy_and_scipy(results):
    base = results["base"]
    for name in ("accuracy", "group_mean", "worst_accuracy"):
        values = [fit[name] for fit in base["by_seed"].values()]
        expected = {"mean": np.mean(values), "sd": np.std(values, ddof=1)}
        assert base[name] == pytest.approx(expected)
    mean = min(spread["mean"] for spread in base["groups"].values())
    assert base["groups"][base["worst_group"]]["mean"] == mean
    expected = binomtest(round(30 * mean), 30).proportion_ci(method="wilson")
    assert base["worst_interval"] == pytest.approx((expected.low, expected.high))


def test_real_images_train_a_classifier_alone_and_beside_each_models(models, balanced, tmp_path):
    train = write_test(tmp_path / "real", {("cat", "red"): 70, ("dog", "blue"): 60})
    found = run(models, balanced, train=train)["models"]
    own, both = {"cat": 100, "dog": 100}, {"cat": 170, "dog": 160}
    expected = {"real": {"cat": 70, "dog": 60}, "base": own, "real + base": both, "guided": own, "real + guided": both}
    assert {name: model["train_images"] for name, model in found.items()} == expected
    worst = {name: model["worst_accuracy"]["mean"] for name, model in found.items()}
    assert worst["real + guided"] > max(worst["real"], worst["real + base"])
    train.attributes["subject"][0] = "horse"
    with pytest.raises(EvaluationError, match="got cat, dog, horse"):
        run(models, balanced, train=train)
    with pytest.raises(EvaluationError, match="other names than 'real'"):
        run({"real": models["base"]}, balanced, train=balanced)


def test_left_out_images_and_groups_are_named(models, tmp_path):
    extra = write_model(tmp_path / "extra", per_subject=10, prompt="a photo of a pet")
    write_test(tmp_path / "test", grid(12) | {("dog", "red"): 9})
    (tmp_path / "test" / "cat-red-0.png").write_bytes(b"no image")
    data = load_labelled_images(tmp_path / "test", max_unreadable=0.1)
    found = run({"base": [models["base"], extra]}, data, config=INSTANT)
    assert found["models"]["base"]["train_images"] == {"cat": 100, "dog": 100}
    assert found["test_images"] == {"cat x red": 11, "cat x blue": 12, "dog x blue": 12}
    assert found["notes"] == [
        "1 of 3 prompts name no subject: 20 images out",
        "1 of 45 test images cannot be read and are left out",
        "groups left out, with fewer than 10 test images: 9 of dog x red",
    ]
    with pytest.raises(DataError, match="images to be unreadable"):
        run(models, load_labelled_images(tmp_path / "test"), config=INSTANT)


def test_models_that_cannot_be_compared_are_refused(models, balanced, tmp_path):
    low, high = (write_model(tmp_path / f"cfg-{scale}", per_subject=10, guidance_scale=scale) for scale in (1, 3))
    notes = run({"base": low, "guided": high}, balanced, config=INSTANT)["notes"]
    assert notes == ["models differ in guidance scale: base 1.0, guided 3.0"]
    for folders, message in (
        ({"base": [low, high]}, r"one guidance scale, got 1\.0, 3\.0"),
        (models | {"guided": write_model(tmp_path / "other", prompt="one {}")}, "images of the same prompts"),
        (write_model(tmp_path / "pets", prompt="a photo of a pet"), "that name 'cat', got 0"),
        (write_model(tmp_path / "few", per_subject=(20, 9)), "that name 'dog', got 9"),
    ):
        with pytest.raises(EvaluationError, match=message):
            run(folders, balanced)
    (high / "dog-3.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"dog-3\.png"):
        run(high, balanced)


def test_test_images_and_settings_that_do_not_do_are_refused(models, balanced, tmp_path):
    with pytest.raises(EvaluationError, match="got 0 of cat x blue, 0 of dog x red"):
        run(models, write_test(tmp_path / "biased", {("cat", "red"): 20, ("dog", "blue"): 20}))
    with pytest.raises(DataError, match="Expected attribute 'age'"):
        augmentation_test(models, balanced, subject_attribute="subject", attribute="age")
    with pytest.raises(EvaluationError, match="Expected two attributes"):
        augmentation_test(models, balanced, subject_attribute="subject", attribute="subject")
    with pytest.raises(TrainingError, match="Lower learning_rate"):
        run(models, balanced, config=replace(INSTANT, steps=5, batch_size=8, learning_rate=1e30))
    for wrong in ({"steps": 0}, {"resolution": 7}, {"learning_rate": 0.0}, {"seeds": (1, 1)}, {"seeds": ()}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            AugmentationConfig(**wrong)
