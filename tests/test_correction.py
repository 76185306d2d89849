import numpy as np
import pytest
from scipy.optimize import minimize

from invdiff.errors import EvaluationError
from invdiff.evaluation.fairness.correction import correct_for_annotator, corrected_interval, project_to_simplex
from invdiff.evaluation.fairness.metrics import METRICS, per_prompt

SYMMETRIC = np.array([[0.9, 0.1], [0.1, 0.9]])
ASYMMETRIC = np.array([[0.85, 0.15], [0.05, 0.95]])
THREE = np.full((3, 3), 0.05) + 0.85 * np.eye(3)
UNSURE = np.array([[0.7, 0.1, 0.2], [0.05, 0.9, 0.05]])


def bias(counts):
    return per_prompt("bias", counts).mean()


@pytest.mark.parametrize("rates", [SYMMETRIC, ASYMMETRIC, THREE, UNSURE])
def test_expected_annotations_are_corrected_to_the_truth(rates):
    p = np.array([0.6, 0.3, 0.1])[: len(rates)]
    p = p / p.sum()
    corrected = correct_for_annotator([p @ rates * 1000, np.full(len(rates), 1 / len(rates)) @ rates * 50], rates)
    np.testing.assert_allclose(corrected[0], p * 1000)
    np.testing.assert_allclose(corrected[1], np.full(len(rates), 50 / len(rates)))


def test_more_columns_than_classes_are_least_squares():
    counts = np.array([50.0, 30.0, 20.0])
    found = correct_for_annotator([counts], UNSURE)[0] / 100
    best = minimize(
        lambda x: np.sum((np.array([x[0], 1 - x[0]]) @ UNSURE - counts / 100) ** 2), [0.5], bounds=[(0, 1)], tol=1e-12
    )
    assert found[0] == pytest.approx(best.x[0], abs=1e-5)


def test_correction_keeps_the_number_of_images_within_the_simplex():
    counts = [[100, 0, 0], *np.random.default_rng(1).integers(1, 100, size=(7, 3))]
    corrected = correct_for_annotator(counts, THREE)
    np.testing.assert_allclose(corrected[0], [100, 0, 0], atol=1e-9)
    np.testing.assert_allclose(corrected.sum(axis=1), np.sum(counts, axis=1))
    assert corrected.min() >= 0
    np.testing.assert_allclose(corrected, correct_for_annotator(counts, THREE * 400))
    np.testing.assert_allclose(correct_for_annotator(counts, np.eye(3) * 40), counts)


@pytest.mark.parametrize("num_groups", [2, 4])
def test_projection_is_the_nearest_point_of_the_simplex(num_groups):
    for x in np.random.default_rng(0).normal(size=(5, num_groups)):
        nearest = project_to_simplex(x)
        assert nearest.min() >= 0
        assert nearest.sum() == pytest.approx(1)
        moved = x - nearest  # alike in every group that is not empty, and less in those (Karush, Kuhn and Tucker)
        np.testing.assert_allclose(moved[nearest > 0], moved.max())


def coverage(metric, rates, p, num_images, num_prompts, *, evaluations=250, held=(400, 400, 400), resamples=100):
    generator = np.random.default_rng(3)
    truth = float(per_prompt(metric, [p * 1e9])[0])
    covered = 0
    for _ in range(evaluations):
        counts = generator.multinomial(num_images, p @ rates, size=num_prompts)
        held_out = np.array([generator.multinomial(n, row) for n, row in zip(held, rates, strict=False)])
        low, high = corrected_interval(metric, counts, held_out, num_resamples=resamples)
        covered += low - 1e-9 <= truth <= high + 1e-9
    return covered / evaluations


@pytest.mark.parametrize("rates", [SYMMETRIC, ASYMMETRIC], ids=["alike", "apart"])
@pytest.mark.parametrize(("share", "prompts"), [(0.5, 1), (0.9, 1), (0.5, 10)])
def test_corrected_interval_covers(rates, share, prompts):
    assert coverage("bias", rates, np.array([share, 1 - share]), 200, prompts) >= 0.93


def test_few_held_out_images_of_the_common_class_are_counted():
    options = {"evaluations": 60, "held": (300, 15), "resamples": 1000}
    assert coverage("bias", SYMMETRIC, np.array([0.05, 0.95]), 500, 2, **options) >= 0.93


@pytest.mark.parametrize("metric", METRICS)
def test_corrected_interval_covers_every_metric_near_one_class(metric):
    assert coverage(metric, UNSURE, np.array([0.97, 0.03]), 200, 1) >= 0.92


def test_more_prompts_do_not_hide_what_few_held_out_images_leave_open():
    counts = np.tile([[700, 300]], (30, 1))
    few, many = (np.ptp(corrected_interval("bias", counts, SYMMETRIC * n)) for n in (50, 50_000))
    assert few > 3 * many


def test_corrected_interval_repeats_with_its_seed_and_takes_a_target():
    arguments = ("parity_gap", [[70, 30]], SYMMETRIC * 100)
    assert corrected_interval(*arguments, seed=1) == corrected_interval(*arguments, seed=1)
    assert corrected_interval(*arguments, seed=1) != corrected_interval(*arguments, seed=2)
    low, high = corrected_interval("kl_to_target", [[660, 340]], SYMMETRIC * 1000, target=[0.7, 0.3])
    assert low == 0 < high < 0.02


@pytest.mark.parametrize(
    ("confusion", "message"),
    [
        ([[9, 1], [0, 0]], "none of class 1"),
        ([[9, 1], [9, 1]], "tells class 0 from class 1"),
        ([[0.9, 0.05, 0.05], [0.02, 0.5, 0.48], [0.02, 0.48, 0.5]], "class 1 from class 2"),
        ([[9, -1], [1, 9]], "zero or more, got .*-1.0"),
        ([[9, 1], [np.nan, 9]], "zero or more, got .*nan"),
        ([[9, 1]], r"got \(1, 2\)"),
        ([9, 1], r"got \(2,\)"),
    ],
)
@pytest.mark.parametrize("correct", [correct_for_annotator, lambda *given: corrected_interval("bias", *given)])
def test_confusion_matrices_that_cannot_correct_are_refused(correct, confusion, message):
    num_columns = np.shape(confusion)[-1]
    with pytest.raises(EvaluationError, match=message):
        correct([[5] * num_columns], confusion)
    with pytest.raises(EvaluationError, match="got 3 and 2"):
        correct([[1, 2, 3]], SYMMETRIC)
