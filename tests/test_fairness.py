from itertools import combinations, product

import numpy as np
import pytest
from scipy.stats import entropy

from invdiff.errors import EvaluationError
from invdiff.evaluation.fairness import metrics
from invdiff.evaluation.fairness.floors import bias_floor, metric_floor
from invdiff.evaluation.fairness.intervals import bias_interval
from invdiff.evaluation.fairness.metrics import (
    METRICS,
    bias,
    bias_per_prompt,
    fairness_discrepancy,
    intersections,
    kl_to_target,
    normalised_entropy,
    parity_gap,
    per_prompt,
    shares,
    squared_discrepancy_unbiased,
    worst_group_ratio,
)

COUNTS = np.array([[30, 50, 20], [0, 7, 3], [5, 5, 5]])
P = COUNTS / COUNTS.sum(axis=1, keepdims=True)
TARGET = np.array([0.5, 0.3, 0.2])


def brute_force(row):
    p = np.asarray(row) / np.sum(row)
    return np.mean([abs(p[i] - p[j]) for i, j in combinations(range(len(p)), 2)])


def test_shares_sum_to_one_and_keep_the_order():
    np.testing.assert_allclose(shares([[3, 1], [0, 5]]), [[0.75, 0.25], [0.0, 1.0]])


@pytest.mark.parametrize("num_groups", [2, 3, 7])
def test_bias_per_prompt_equals_the_pairs_written_out(num_groups):
    counts = np.random.default_rng(0).integers(0, 50, (6, num_groups)) + 1
    np.testing.assert_allclose(bias_per_prompt(counts), [brute_force(row) for row in counts], atol=1e-14)


def test_bias_is_the_mean_over_prompts_whatever_their_size():
    assert bias([[10, 0], [500, 500]]) == pytest.approx(0.5)


@pytest.mark.parametrize(("num_images", "expected"), [(60, 0.1026), (512, 0.0353)])
def test_bias_floor_for_two_groups_matches_the_known_values(num_images, expected):
    assert bias_floor(num_images, 2) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("num_images", "num_groups"), [(7, 2), (60, 3), (25, 10)])
def test_bias_floor_matches_monte_carlo(num_images, num_groups):
    draws = np.random.default_rng(1).multinomial(num_images, np.ones(num_groups) / num_groups, size=40_000)
    values = bias_per_prompt(draws)
    assert bias_floor(num_images, num_groups) == pytest.approx(values.mean(), abs=5 * values.std() / 200)


def test_bias_floor_of_one_image_is_its_only_value():
    assert bias_floor(1, 4) == pytest.approx(brute_force([1, 0, 0, 0]))


def test_bias_floor_averages_over_prompts_of_different_size():
    assert bias_floor([10, 20, 20], 3) == pytest.approx((bias_floor(10, 3) + 2 * bias_floor(20, 3)) / 3)


def test_bias_floor_stays_finite_for_a_million_images():
    assert bias_floor(1_000_000, 2) == pytest.approx(np.sqrt(2 / np.pi / 1e6), rel=1e-4)


def test_interval_covers_the_truth_far_from_fair():
    p = np.array([[0.9, 0.1], [0.2, 0.8]])
    generator = np.random.default_rng(2)
    covered = 0
    for trial in range(200):
        counts = np.stack([generator.multinomial(200, row) for row in p])
        low, high = bias_interval(counts, num_resamples=400, seed=trial)
        covered += low <= 0.7 <= high
    assert covered >= 180


def test_interval_narrows_with_less_confidence():
    counts = [[80, 20], [70, 30]]
    low, high = bias_interval(counts, confidence=0.95)
    inner_low, inner_high = bias_interval(counts, confidence=0.5)
    assert low < inner_low < bias(counts) < inner_high < high


def test_interval_repeats_with_its_seed_and_changes_with_another():
    counts = [[81, 20], [70, 33]]
    assert bias_interval(counts, seed=3) == bias_interval(counts, seed=3) != bias_interval(counts, seed=4)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([[1, -1]], "zero or more.*prompt 0, group 1"),
        ([[1, 1], [float("nan"), 1]], "got nan for prompt 1, group 0"),
        ([[1, 2], [0, 0]], "got none for prompt 1"),
        ([[1], [2]], "at least two groups, got 1"),
        ([1, 2], r"got \(2,\)"),
        (np.zeros((0, 2)), "at least one prompt"),
    ],
)
@pytest.mark.parametrize(
    "metric", [shares, bias, bias_per_prompt, bias_interval, *(getattr(metrics, name) for name in METRICS)]
)
def test_impossible_counts_are_refused(metric, counts, message):
    with pytest.raises(EvaluationError, match=message):
        metric(counts)


def test_interval_refuses_shares_in_place_of_counts():
    with pytest.raises(EvaluationError, match="not shares"):
        bias_interval([[0.5, 0.5]])


@pytest.mark.parametrize("setting", [{"confidence": 1.0}, {"confidence": 0.0}, {"num_resamples": 0}])
def test_interval_refuses_settings_out_of_range(setting):
    with pytest.raises(EvaluationError, match="Expected"):
        bias_interval([[1, 2]], **setting)


@pytest.mark.parametrize("num_images", [0, 2.5, float("nan"), [], [3, 0]])
def test_bias_floor_refuses_impossible_numbers_of_images(num_images):
    with pytest.raises(EvaluationError, match="whole number of images"):
        bias_floor(num_images, 2)


def test_bias_floor_refuses_one_group():
    with pytest.raises(EvaluationError, match="two groups, got 1"):
        bias_floor(10, 1)


@pytest.mark.parametrize("target", [None, TARGET])
def test_fairness_discrepancy_is_the_mean_distance_to_the_target(target):
    expected = np.mean([np.sqrt(np.sum((row - (1 / 3 if target is None else target)) ** 2)) for row in P])
    assert fairness_discrepancy(COUNTS, target) == pytest.approx(expected)


@pytest.mark.parametrize("target", [None, TARGET])
def test_kl_equals_that_of_scipy(target):
    expected = np.mean([entropy(row, np.ones(3) / 3 if target is None else target) for row in P])
    assert kl_to_target(COUNTS, target) == pytest.approx(expected)


def test_normalised_entropy_equals_that_of_scipy():
    assert normalised_entropy(COUNTS) == pytest.approx(np.mean([entropy(row, base=3) for row in P]))


def test_parity_gap_and_worst_group_ratio_compare_the_extremes():
    assert parity_gap(COUNTS) == pytest.approx((0.3 + 0.7 + 0) / 3)
    assert worst_group_ratio(COUNTS) == pytest.approx((0.4 + 0 + 1) / 3)


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_metrics_are_at_their_fair_value_for_even_shares_only(metric):
    assert metric.per_prompt(np.full(4, 0.25)) == pytest.approx(metric.fair_value, abs=1e-12)
    assert abs(metric.per_prompt(np.array([0.26, 0.24, 0.25, 0.25])) - metric.fair_value) > 1e-4


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_metrics_stay_within_their_limits(metric):
    draws = np.random.default_rng(3).dirichlet(np.full(3, 0.3), size=5000)
    low, high = metric.limits(np.full(3, 1 / 3))
    values = metric.per_prompt(draws)
    assert low <= values.min() <= values.max() <= high


def test_softmax_sums_are_counts_too():
    probabilities = np.random.default_rng(4).dirichlet(np.ones(3), size=40)
    expected = np.linalg.norm(probabilities.mean(axis=0) - 1 / 3)
    assert fairness_discrepancy(probabilities.sum(axis=0)[None]) == pytest.approx(expected)


def test_kl_names_the_group_that_the_target_excludes():
    with pytest.raises(EvaluationError, match=r"no image of group 2.*0\.2 for prompt 0"):
        kl_to_target(COUNTS, [0.5, 0.5, 0])


def test_kl_allows_a_group_that_neither_target_nor_images_have():
    assert kl_to_target([[5, 5, 0]], [0.5, 0.5, 0]) == 0


@pytest.mark.parametrize("target", [[0.5, 0.5], [0.5, 0.6, -0.1], [0.2, 0.2, 0.2], [np.nan, 0.5, 0.5]])
def test_a_target_that_is_not_shares_is_refused(target):
    with pytest.raises(EvaluationError, match="3 target shares"):
        fairness_discrepancy(COUNTS, target)


def test_a_target_is_refused_by_metrics_that_compare_groups():
    with pytest.raises(EvaluationError, match="no target for parity_gap"):
        per_prompt("parity_gap", COUNTS, target=TARGET)


def test_an_unknown_metric_is_refused_with_the_known_ones():
    with pytest.raises(EvaluationError, match=r"among bias, fairness_discrepancy.*got 'skew'"):
        per_prompt("skew", COUNTS)


def test_unbiased_square_equals_the_mean_over_pairs_of_images():
    row = [4, 2, 1]
    images = np.repeat(np.eye(3), row, axis=0) - TARGET
    pairs = [images[i] @ images[j] for i, j in combinations(range(7), 2)]
    assert squared_discrepancy_unbiased([row], TARGET) == pytest.approx(np.mean(pairs))


@pytest.mark.parametrize("p", [np.full(3, 1 / 3), np.array([0.7, 0.2, 0.1])])
def test_unbiased_square_averages_to_the_truth_over_all_samples(p):
    tables = {}
    for sample in product(range(3), repeat=5):
        key = tuple(np.bincount(sample, minlength=3))
        tables[key] = tables.get(key, 0) + np.prod(p[list(sample)])
    mean = sum(weight * squared_discrepancy_unbiased([key]) for key, weight in tables.items())
    assert mean == pytest.approx(np.sum((p - 1 / 3) ** 2), abs=1e-12)


@pytest.mark.parametrize(("counts", "message"), [([[1, 0]], "one for prompt 0"), ([[1.5, 1.5]], "fractions")])
def test_unbiased_square_is_refused_where_there_is_none(counts, message):
    with pytest.raises(EvaluationError, match=message):
        squared_discrepancy_unbiased(counts)


@pytest.mark.parametrize(("num_images", "num_groups"), [(6, 2), (5, 3), (4, 4)])
@pytest.mark.parametrize("name", METRICS)
def test_floor_equals_the_mean_over_all_sequences_of_images(name, num_images, num_groups):
    sequences = np.array(list(product(range(num_groups), repeat=num_images)))
    counts = (sequences[:, :, None] == np.arange(num_groups)).sum(axis=1)
    expected = per_prompt(name, counts).mean()
    assert metric_floor(name, num_images, num_groups) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("name", ["fairness_discrepancy", "kl_to_target"])
@pytest.mark.parametrize("num_images", [20, 600])
def test_floor_of_a_target_matches_monte_carlo(name, num_images):
    draws = np.random.default_rng(5).multinomial(num_images, TARGET, size=40_000)
    values = per_prompt(name, draws, target=TARGET)
    error = 5 * values.std() / 200 + 0.01 * values.mean()
    assert metric_floor(name, num_images, 3, target=TARGET) == pytest.approx(values.mean(), abs=error)


@pytest.mark.parametrize("name", ["fairness_discrepancy", "parity_gap", "worst_group_ratio"])
def test_drawn_floor_is_within_two_percent_whatever_the_seed(name):
    floors = [metric_floor(name, 512, 5, seed=seed) for seed in range(5)]
    assert np.ptp(floors) < 0.02 * np.mean(floors)


def test_floor_of_kl_approaches_its_chi_square_limit():
    assert metric_floor("kl_to_target", 100_000, 4) == pytest.approx(3 / 2 / 100_000, rel=1e-3)


def test_floor_of_bias_is_bias_floor():
    assert metric_floor("bias", [20, 30], 5) == bias_floor([20, 30], 5)


def test_floor_averages_over_prompts_of_different_size():
    sizes = [metric_floor("kl_to_target", size, 3) for size in (10, 40, 40)]
    assert metric_floor("kl_to_target", [10, 40, 40], 3) == pytest.approx(np.mean(sizes))


def test_intersections_count_the_joint_classes():
    joint, num_joint = intersections([0, 1, 1], [2, 0, 2], num_classes=(2, 3))
    assert (joint.tolist(), num_joint) == ([2, 3, 5], 6)


@pytest.mark.parametrize(
    ("labels", "num_classes", "message"),
    [
        ([], [], "0 attributes"),
        ([[0, 1]], [2, 2], "1 attributes and 2 numbers"),
        ([[0, 1], [0]], [2, 2], "attribute 1. Label the same"),
        ([[0, 1], [0.0, 1.0]], [2, 2], "float64"),
        ([[0, 2]], [2], "0 to 1 for attribute 0, got 0 to 2"),
    ],
)
def test_intersections_refuse_labels_that_do_not_fit(labels, num_classes, message):
    with pytest.raises(EvaluationError, match=message):
        intersections(*labels, num_classes=num_classes)
