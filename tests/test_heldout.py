import json

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import softmax
from sklearn.metrics import accuracy_score, confusion_matrix

from invdiff.errors import DataError, ModelError
from invdiff.evaluation.annotators import heldout
from invdiff.evaluation.annotators.annotations import Annotations


def drawn_from(logits, temperature, seed=0):
    """Classes drawn from softmax(logits / temperature): that temperature is the true one."""
    numbers = np.random.default_rng(seed)
    return np.array([numbers.choice(len(p), p=p) for p in softmax(logits / temperature, axis=1)])


def random_logits(count, classes=3, seed=1):
    return 3 * np.random.default_rng(seed).normal(size=(count, classes))


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_the_temperature_is_that_of_a_general_optimiser_on_smoothed_targets(temperature):
    logits = random_logits(40) * temperature
    truth = drawn_from(logits, temperature)
    targets = np.full((40, 3), 1 / 42 / 2)
    targets[np.arange(40), truth] = 41 / 42

    def loss(log_temperature):
        return -(targets * np.log(softmax(logits / np.exp(log_temperature), axis=1))).sum(axis=1).mean()

    expected = np.exp(minimize(loss, 0.0, method="Nelder-Mead", options={"xatol": 1e-8, "fatol": 1e-12}).x[0])
    assert heldout.fit_temperature(logits, truth) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("num_bins", [1, 4, 10])
def test_calibration_error_is_that_of_brute_force(num_bins):
    logits = random_logits(400, classes=4)
    probabilities, truth = softmax(logits, axis=1).round(2), drawn_from(logits, 3.0)  # many on the edge of a bin
    top, right, total = probabilities.max(axis=1), probabilities.argmax(axis=1) == truth, 0.0
    for index in range(num_bins):
        inside = (index / num_bins < top) & (top <= (index + 1) / num_bins)
        total += abs(top[inside].sum() - right[inside].sum()) / len(truth)
    assert heldout.expected_calibration_error(probabilities, truth, num_bins=num_bins) == pytest.approx(total)


CLASSES = {"side": ("left", "middle", "right"), "tone": ("cold", "warm")}


@pytest.fixture(scope="module")
def held_out():
    sides, tones = random_logits(200, 3), random_logits(200, 2, seed=4)
    truth = {"side": drawn_from(sides, 1.5), "tone": drawn_from(tones, 1.0, seed=2)}
    truth["tone"][:7] = heldout.UNLABELLED
    probabilities = {"side": softmax(sides, axis=1), "tone": softmax(tones, axis=1)}
    return heldout.HeldOut(CLASSES, {name: p.astype(np.float32) for name, p in probabilities.items()}, truth=truth)


def test_figures_are_of_labelled_images_alone_and_the_worst_combination_is_that_of_brute_force(held_out):
    labelled = held_out.truth["tone"] != heldout.UNLABELLED
    probabilities, truth = held_out.probabilities["tone"][labelled], held_out.truth["tone"][labelled]
    correct = held_out.probabilities["side"].argmax(axis=1) == held_out.truth["side"]
    combinations = 10 * held_out.truth["side"] + held_out.truth["tone"]
    cells = [combinations == combination for combination in np.unique(combinations)]
    found, worst = held_out.summary(), min(correct[cell].mean() for cell in cells if cell.sum() >= 10)
    assert found["side"]["worst_combination"] == pytest.approx(worst)
    assert found["tone"] == {
        "classes": ["cold", "warm"],
        "images": 193,
        "matrix": confusion_matrix(truth, probabilities.argmax(axis=1)).tolist(),
        "accuracy": pytest.approx(accuracy_score(truth, probabilities.argmax(axis=1))),
        "worst_combination": found["tone"]["worst_combination"],
        "calibration_error": pytest.approx(heldout.expected_calibration_error(probabilities, truth)),
    }


def test_held_out_images_come_back_as_saved_and_files_of_two_annotators_are_refused(held_out, tmp_path):
    held_out.save(tmp_path)
    loaded = heldout.HeldOut.load(tmp_path)
    assert loaded.attributes == held_out.attributes
    figures = json.loads((tmp_path / "confusion.json").read_text())
    assert loaded.summary() == held_out.summary() == figures
    assert np.array_equal(loaded.confusion("tone", 0.8), held_out.confusion("tone", 0.8))
    figures["side"]["classes"].append("top")
    (tmp_path / "confusion.json").write_text(json.dumps(figures))
    with pytest.raises(ModelError, match="which disagree"):
        heldout.HeldOut.load(tmp_path)


class ReadsBrightness(heldout.Measurable):
    """Bright images are warm; it is as sure as they are bright."""

    attributes = {"tone": CLASSES["tone"]}  # noqa: RUF012

    def predict(self, images):
        warm = np.array(list(images), dtype=np.float32)
        return Annotations(self.attributes, {"tone": np.stack([1 - warm, warm], axis=1)})


class Numbers(list):  # the images of a labelled set
    max_unreadable, image = 0.0, list.__getitem__


def labelled(*images, **attributes):
    data = Numbers(images)
    data.attributes, data.others, data.names = attributes, {}, [f"{row}.png" for row in range(len(images))]
    return data


def test_measuring_counts_what_is_seen_beside_what_is_there():
    data = labelled(0.1, 0.9, 0.8, 0.7, 0.4, tone=["cold", "warm", "cold", "", "warm"], other=list("abcde"))
    annotator = ReadsBrightness()
    assert annotator.confusion("tone") is None
    annotator.use_held_out(heldout.measure_annotator(annotator, data, progress=False))
    assert annotator.confusion("tone").tolist() == [[1, 1, 0], [1, 1, 0]]
    assert annotator.confusion("tone", 0.75).tolist() == [[1, 1, 0], [0, 1, 1]]


def test_data_that_an_annotator_cannot_be_measured_on_is_refused():
    for attributes, asked, message in (
        ({"side": ["left"] * 3}, None, "that both have, got none"),
        ({"tone": ["cold"] * 3}, ["side"], "that both have, got side"),
        ({"tone": ["cold", "warm", "hot"]}, None, "found hot"),
        ({"tone": ["", None, float("nan")]}, None, "none at all"),
    ):
        with pytest.raises(DataError, match=message):
            heldout.measure_annotator(ReadsBrightness(), labelled(0.1, 0.2, 0.3, **attributes), asked, progress=False)
