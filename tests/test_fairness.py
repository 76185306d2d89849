"""Fairness metrics, their floors and intervals, and what is corrected for an annotator's errors."""

import re
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import entropy

from invdiff.errors import EvaluationError
from invdiff.evaluation.fairness.correction import (
    correct_for_annotator,
    corrected_floor,
    corrected_interval,
    project_to_simplex,
)
from invdiff.evaluation.fairness.intervals import interval
from invdiff.evaluation.fairness.metrics import METRICS, metric_floor, per_prompt, squared_discrepancy_unbiased
from invdiff.evaluation.measure import estimate

COUNTS = np.array([[30, 50, 20], [0, 7, 3], [5, 5, 5]])
TARGET = np.array([0.5, 0.3, 0.2])
EVEN = np.ones(3) / 3
FORMULAS = {
    "bias": lambda p, t: np.mean([abs(p[i] - p[j]) for i, j in combinations(range(len(p)), 2)]),
    "fairness_discrepancy": lambda p, t: np.sqrt(np.sum((p - t) ** 2)),
    "parity_gap": lambda p, t: max(p) - min(p),
    "kl_to_target": entropy,
    "normalised_entropy": lambda p, t: entropy(p, base=len(p)),
    "worst_group_ratio": lambda p, t: min(p) / max(p),
}


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("counts", [COUNTS, np.random.default_rng(0).integers(1, 50, (6, 7)), [[3, 1], [500, 500]]])
def test_metrics_equal_their_formulas_written_out(name, counts):
    for target in (None, TARGET) if METRICS[name].takes_target and np.shape(counts)[1] == 3 else (None,):
        shares = np.asarray(counts) / np.sum(counts, axis=1, keepdims=True)
        t = np.full(shares.shape[1], 1 / shares.shape[1]) if target is None else target
        expected = [FORMULAS[name](row, t) for row in shares]
        np.testing.assert_allclose(per_prompt(name, counts, target=target), expected, atol=1e-14)


@pytest.mark.parametrize("name", METRICS)
def test_metrics_are_at_their_fair_value_for_even_shares_only_and_within_their_limits(name):
    fair, skewed = per_prompt(name, [[25, 25, 25, 25], [26, 24, 25, 25]])
    assert fair == pytest.approx(METRICS[name].fair_value, abs=1e-12)
    assert abs(skewed - METRICS[name].fair_value) > 1e-4
    values = per_prompt(name, np.random.default_rng(3).dirichlet(np.full(3, 0.3), size=5000))
    low, high = METRICS[name].limits(EVEN)
    assert low <= values.min() <= values.max() <= high


def test_the_documented_table_of_metrics_is_the_table_of_metrics():
    page = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    documented = re.findall(r"^\| `(\w+)` \|.*\| ([01]) \|$", page, flags=re.MULTILINE)
    assert documented == [(name, str(metric.fair_value)) for name, metric in METRICS.items()]
    assert all(metric.label and metric.formula.__doc__ for metric in METRICS.values())


def test_impossible_counts_are_refused():
    for counts, message in (
        ([[1, -1]], "zero or more.*row 0"),
        ([[1, 1], [float("nan"), 1]], "row 1"),
        ([[1, 2], [0, 0]], "row 1"),
        ([[1], [2]], r"got \(2, 1\)"),
        ([1, 2], r"got \(2,\)"),
        (np.zeros((0, 2)), r"got \(0, 2\)"),
    ):
        for take in (lambda x: per_prompt("bias", x), lambda x: interval("bias", x), squared_discrepancy_unbiased):
            with pytest.raises(EvaluationError, match=message):
                take(counts)


@pytest.mark.parametrize("p", [EVEN, np.array([0.7, 0.2, 0.1])])
def test_unbiased_square_averages_to_the_truth_over_all_samples(p):
    tables = {}
    for sample in product(range(3), repeat=5):
        key = tuple(np.bincount(sample, minlength=3))
        tables[key] = tables.get(key, 0) + np.prod(p[list(sample)])
    mean = sum(weight * squared_discrepancy_unbiased([key]) for key, weight in tables.items())
    assert mean == pytest.approx(np.sum((p - 1 / 3) ** 2), abs=1e-12)


@pytest.mark.parametrize(("num_images", "num_groups"), [(6, 2), (5, 3), (4, 4), (1, 4)])
@pytest.mark.parametrize("name", METRICS)
def test_floor_equals_the_mean_over_all_sequences_of_images(name, num_images, num_groups):
    sequences = np.array(list(product(range(num_groups), repeat=num_images)))
    counts = (sequences[:, :, None] == np.arange(num_groups)).sum(axis=1)
    expected = per_prompt(name, counts).mean()
    assert metric_floor(name, num_images, num_groups) == pytest.approx(expected, abs=1e-10)


def test_the_floor_of_many_images_is_that_of_a_normal_distribution():
    assert metric_floor("bias", 1_000_000, 2) == pytest.approx(np.sqrt(2 / np.pi / 1e6), rel=1e-3)


@pytest.mark.parametrize(
    ("name", "num_images", "target"),
    [
        ("bias", 60, None),
        *product(("fairness_discrepancy", "kl_to_target"), (20, 600), [TARGET]),
        *product(("parity_gap", "worst_group_ratio"), [600], [None]),
    ],
)
def test_floor_matches_monte_carlo(name, num_images, target):
    draws = np.random.default_rng(5).multinomial(num_images, EVEN if target is None else target, size=40_000)
    values = per_prompt(name, draws, target=target)
    error = 5 * values.std() / 200 + 0.01 * values.mean()
    assert metric_floor(name, num_images, 3, target=target) == pytest.approx(values.mean(), abs=error)


def extreme(share, num_groups):
    return np.r_[share, np.full(num_groups - 1, (1 - share) / (num_groups - 1))]


TRUTHS = {
    "two fair groups": np.full((1, 2), 1 / 2),
    "three fair groups": np.full((1, 3), 1 / 3),
    "thirty fair prompts": np.full((30, 2), 1 / 2),
    "nearly one class": np.tile(extreme(0.95, 3), (2, 1)),
    "tied in part": np.array([[0.5, 0.5, 0.0]] * 2),
    "prompts that differ": np.array([extreme(share, 3) for share in (1 / 3, 0.99, 1.0, 0.38, 0.8)]),
}


def test_the_floor_of_corrected_figures_is_a_fair_sampler_s_and_higher_the_worse_the_annotator():
    confusions = ([[right, 1000 - right], [1000 - right, right]] for right in (700, 1000))
    floors = [corrected_floor("bias", [[50, 50]], confusion) for confusion in confusions]
    assert floors == pytest.approx([0.2, metric_floor("bias", 100, 2)], rel=0.05)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("truth", TRUTHS)
def test_interval_covers_the_truth_in_simulated_evaluations(metric, truth):
    p = TRUTHS[truth]
    # Nearly every evaluation of many prompts has counts of its own, so there are fewer of them.
    evaluations, num_resamples = (1000, 100) if len(p) <= 2 else (150, 40)
    value = per_prompt(metric, p * 1e9).mean()
    simulated = np.random.default_rng(0).multinomial(20, p, size=(evaluations, len(p)))
    covered = 0
    for table, number in zip(*np.unique(simulated, axis=0, return_counts=True), strict=True):
        low, high = interval(metric, table, num_resamples=num_resamples)
        covered += number * (low - 1e-9 <= value <= high + 1e-9)
    assert covered / evaluations >= 0.93


@pytest.mark.parametrize("metric", METRICS)
def test_interval_has_width_within_the_limits(metric):
    fair = METRICS[metric].fair_value
    low, high = interval(metric, np.random.default_rng(1).multinomial(100, [0.5, 0.5], size=30))
    assert low <= fair <= high < low + 3.2 * abs(metric_floor(metric, 100, 2) - fair)
    low, high = interval(metric, [[100, 0, 0]])
    assert 0.01 < high - low < 0.25
    assert interval("bias", [[0, 1]]) == (0.0, 1.0)
    least, most = METRICS[metric].limits(np.full(3, 1 / 3))
    for row in ([0, 0, 1], [1, 1, 1], [3, 0, 2], [0, 50, 0]):
        low, high = interval(metric, [row])
        assert least <= low <= high <= most


def test_interval_of_a_target_covers_zero_for_a_sampler_that_draws_from_it():
    target = np.array([0.7, 0.2, 0.1])
    counts = np.random.default_rng(2).multinomial(60, target, size=(300, 2))
    covered = [interval("kl_to_target", table, target=target, num_resamples=100)[0] <= 0 for table in counts]
    assert np.mean(covered) >= 0.93


def test_estimate_agrees_with_its_parts_and_says_what_is_not_defined():
    counts, target = np.array([[30, 50, 20], [10, 60, 30]]), [0.2, 0.5, 0.3]
    found = estimate("fairness_discrepancy", counts, np.zeros(2), target=target, seed=3)
    values = per_prompt("fairness_discrepancy", counts, target=target)
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == interval("fairness_discrepancy", counts, target=target, seed=3)
    assert found.floor == metric_floor("fairness_discrepancy", 100, 3, target=target)
    assert found.sd_over_prompts == pytest.approx(values.std(ddof=1))
    assert found.unbiased_square == squared_discrepancy_unbiased(counts, target)
    assert (found.corrected, found.corrected_low, found.corrected_high, found.note) == (None, None, None, "")
    for counts, note in (([[30, 50, 20]], "sd_over"), ([[0, 1, 0], [5, 5, 5]], "one image")):
        assert note in estimate("fairness_discrepancy", np.array(counts), np.zeros(len(counts))).note


SYMMETRIC = np.array([[0.9, 0.1], [0.1, 0.9]])
ASYMMETRIC = np.array([[0.85, 0.15], [0.05, 0.95]])
THREE = np.full((3, 3), 0.05) + 0.85 * np.eye(3)
UNSURE = np.array([[0.7, 0.1, 0.2], [0.05, 0.9, 0.05]])


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
    options = {"bounds": [(0, 1)], "tol": 1e-12}
    best = minimize(lambda x: np.sum((np.array([x[0], 1 - x[0]]) @ UNSURE - counts / 100) ** 2), [0.5], **options)
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


@pytest.mark.parametrize("correct", [correct_for_annotator, lambda *given: corrected_interval("bias", *given)])
def test_confusion_matrices_that_cannot_correct_are_refused(correct):
    for confusion, message in (
        ([[9, 1], [0, 0]], "none of class 1"),
        ([[9, 1], [9, 1]], "tells class 0 from class 1"),
        ([[0.9, 0.05, 0.05], [0.02, 0.5, 0.48], [0.02, 0.48, 0.5]], "class 1 from class 2"),
        ([[9, -1], [1, 9]], "zero or more, got .*-1.0"),
        ([[9, 1], [np.nan, 9]], "zero or more, got .*nan"),
        ([[9, 1]], r"got \(1, 2\)"),
        ([9, 1], r"got \(2,\)"),
    ):
        with pytest.raises(EvaluationError, match=message):
            correct([[5] * np.shape(confusion)[-1]], confusion)
    with pytest.raises(EvaluationError, match="got 3 and 2"):
        correct([[1, 2, 3]], SYMMETRIC)
