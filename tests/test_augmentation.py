"""The augmentation test: classifiers trained on generated images, measured group by group on real ones."""

import json

import numpy as np
import pytest
from augmentation import AugmentationConfig, augmentation_test, group_accuracy
from PIL import Image
from sklearn.metrics import recall_score

from invdiff.errors import DataError, EvaluationError
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


def test_the_worst_group_contradicts_the_spurious_attribute_of_the_images(models, balanced):
    found = run(models, balanced)
    base, guided = found["models"]["base"], found["models"]["guided"]
    assert base["train_images"] == {"cat": 100, "dog": 100}
    assert found["test_images"] == {f"{subject} x {colour}": 30 for subject, colour in grid(30)}
    assert base["worst_accuracy"]["mean"] < guided["worst_accuracy"]["mean"] - 0.3
    assert guided["worst_accuracy"]["mean"] > 0.8
    assert base["worst_group"] in ("cat x blue", "dog x red")


def test_group_figures_are_recalls():
    numbers = np.random.default_rng(3)
    groups, right = numbers.choice(["a", "b", "c", "d"], 400), numbers.random(400) < 0.7
    measured = group_accuracy(right, groups.tolist(), dict.fromkeys("abcd", 100))
    # Recall of a group, where a wrong image is predicted to be of no group.
    recalls = recall_score(groups, np.where(right, groups, "none"), labels=["a", "b", "c", "d"], average=None)
    assert list(measured["groups"].values()) == pytest.approx(recalls.tolist())
    assert measured["worst_accuracy"] == pytest.approx(recalls.min())
    assert measured["group_mean"] == pytest.approx(recalls.mean())


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
