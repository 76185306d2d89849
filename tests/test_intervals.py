import numpy as np
import pytest

from invdiff.evaluation.fairness.intervals import interval
from invdiff.evaluation.fairness.metrics import METRICS, metric_floor, per_prompt, squared_discrepancy_unbiased
from invdiff.evaluation.measure import estimate


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


def test_estimate_agrees_with_its_parts():
    counts, target = np.array([[30, 50, 20], [10, 60, 30]]), [0.2, 0.5, 0.3]
    found = estimate("fairness_discrepancy", counts, np.zeros(2), target=target, seed=3)
    values = per_prompt("fairness_discrepancy", counts, target=target)
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == interval("fairness_discrepancy", counts, target=target, seed=3)
    assert found.floor == metric_floor("fairness_discrepancy", 100, 3, target=target)
    assert found.sd_over_prompts == pytest.approx(values.std(ddof=1))
    assert found.unbiased_square == squared_discrepancy_unbiased(counts, target)
    assert (found.corrected, found.corrected_low, found.corrected_high, found.note) == (None, None, None, "")


def test_estimate_says_what_is_not_defined():
    for counts, note in (([[30, 50, 20]], "sd_over"), ([[0, 1, 0], [5, 5, 5]], "one image")):
        assert note in estimate("fairness_discrepancy", np.array(counts), np.zeros(len(counts))).note
