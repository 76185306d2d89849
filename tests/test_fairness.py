from itertools import combinations

import numpy as np
import pytest

from invdiff.errors import EvaluationError
from invdiff.evaluation.fairness import bias, bias_floor, bias_interval, bias_per_prompt, shares


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
@pytest.mark.parametrize("metric", [shares, bias, bias_per_prompt, bias_interval])
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
