import numpy as np
import pytest

from invdiff.auditing.evidence import Score
from invdiff.auditing.partition import exact_groups
from invdiff.auditing.result import Candidate
from invdiff.auditing.splits import Split, deciding_splits, separation, split
from invdiff.config import AuditConfig

CONFIG = AuditConfig()


def two_draws(values: np.ndarray, noise: float, seed: int = 0) -> Score:
    rng = np.random.default_rng(seed)
    return Score("test", np.stack([values + rng.normal(0, noise, len(values)) for _ in range(2)]))


def mixture(count: int, minority: float, distance: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    rare = int(count * minority)
    return np.concatenate([rng.normal(size=count - rare), rng.normal(distance, 1, rare)])


@pytest.mark.parametrize("minority", [0.05, 0.15, 0.3])
def test_a_far_minority_is_accepted(minority):
    found = split(two_draws(mixture(1500, minority, 8), noise=0.5), 2, CONFIG)
    assert found.candidate.accepted
    assert found.candidate.shares[1] == pytest.approx(minority, abs=0.01)


def test_a_balanced_split_is_style_however_clear():
    found = split(two_draws(mixture(1500, 0.5, 8), noise=0.5), 2, CONFIG)
    assert found.candidate.separation > 0.7
    assert not found.candidate.accepted


@pytest.mark.parametrize("draw", ["normal", "uniform", "exponential", "standard_cauchy", "lognormal"])
@pytest.mark.parametrize("seed", range(5))
def test_one_hump_is_never_accepted(draw, seed):
    values = getattr(np.random.default_rng(seed), draw)(size=1500)
    assert not split(two_draws(values, noise=0.01, seed=seed), 2, CONFIG).candidate.accepted


def test_noise_that_changes_with_the_draw_is_not_stable():
    rng = np.random.default_rng(0)
    score = Score("noise", np.stack([rng.permutation(mixture(1000, 0.1, 8)) for _ in range(2)]))
    found = split(score, 2, CONFIG)
    assert found.candidate.stability < 0.2
    assert not found.candidate.accepted


def test_separation_is_high_for_a_gap_and_zero_without():
    apart = mixture(1000, 0.2, 10)
    assert separation(apart, exact_groups(apart, 2)) > 0.85
    together = np.random.default_rng(1).normal(size=1000)
    assert separation(together, exact_groups(together, 2)) == 0


def test_separation_does_not_depend_on_scale_or_sign():
    values = mixture(1000, 0.1, 7)
    labels = exact_groups(values, 2)
    assert separation(5 * values - 3, labels) == pytest.approx(separation(values, labels), abs=1e-6)
    assert separation(-values, 1 - labels) == pytest.approx(separation(values, labels), abs=0.1)


def made_up(num_groups: int, merit: float, *, accepted: bool = True) -> Split:
    score = two_draws(mixture(100, 0.2, 8), noise=0.1)
    return Split(Candidate("made up", num_groups, [], merit, 1.0, accepted), np.zeros((100, num_groups)), score)


def test_prompts_share_the_number_of_groups_that_serves_most_and_then_of_most_merit():
    unfit = made_up(2, 0.9, accepted=False)
    ranked = {0: [made_up(3, 0.9), made_up(2, 0.8)], 1: [made_up(2, 0.9)], 2: [made_up(3, 0.95)], 3: [unfit]}
    num_groups, deciding = deciding_splits(ranked, CONFIG)
    assert num_groups == 3
    assert deciding == {0: ranked[0][0], 1: ranked[1][0], 2: ranked[2][0]}
    assert deciding_splits({3: [unfit]}, CONFIG) == (2, {})


def test_a_finding_in_more_groups_than_shared_is_cut_again():
    ranked = {0: [made_up(2, 0.9)], 1: [made_up(2, 0.9)], 2: [made_up(3, 1.0)]}
    num_groups, deciding = deciding_splits(ranked, CONFIG)
    assert num_groups == 2
    assert np.array_equal(deciding[2].weights.argmax(axis=1), np.arange(100) >= 80)
