from itertools import combinations

import numpy as np
import pytest

from invdiff.auditing.evidence import Score
from invdiff.auditing.result import Candidate
from invdiff.auditing.splits import (
    Split,
    align_columns,
    deciding_splits,
    exact_groups,
    gradient_groups,
    separation,
    split,
)
from invdiff.config import AuditConfig
from invdiff.errors import AuditError

CONFIG = AuditConfig()


def dispersion(parts: list[np.ndarray]) -> float:
    """The between-group variance of scores."""
    scores = np.concatenate(parts)
    return sum(len(part) * (part.mean() - scores.mean()) ** 2 for part in parts) / len(scores)


@pytest.mark.parametrize(("count", "num_groups", "min_share"), [(9, 2, 0), (10, 3, 0), (11, 4, 0.15), (10, 3, 0.3)])
def test_exact_groups_beat_every_other_cut_and_rise_with_the_score(count, num_groups, min_share):
    rng = np.random.default_rng(count)
    least = max(1, int(np.ceil(min_share * count)))
    for _ in range(20):
        scores = rng.normal(size=count)
        labels = exact_groups(scores, num_groups, min_share=min_share)
        found = [scores[labels == group] for group in range(num_groups)]
        others = [np.split(np.sort(scores), cuts) for cuts in combinations(range(1, count), num_groups - 1)]
        assert min(map(len, found)) >= least
        assert (np.diff(labels[np.argsort(scores)]) >= 0).all()
        best = max(dispersion(parts) for parts in others if min(map(len, parts)) >= least)
        assert dispersion(found) == pytest.approx(best, abs=1e-12)

    with pytest.raises(AuditError, match="Expected at least 6 images for 2 groups of at least 3, got 5"):
        exact_groups(np.arange(5.0), 2, min_share=0.5)


def test_gradient_groups_find_a_far_minority_and_a_larger_omega_makes_them_more_equal():
    scores = np.concatenate([mixture(180, 0, 0), 8 + mixture(20, 0, 0, seed=1)])
    weights = gradient_groups(scores, 2, omega=0.1)
    assert ((weights[:, 1] > 0.5) == (np.arange(200) >= 180)).mean() > 0.97
    assert gradient_groups(scores, 2, omega=5.0).mean(axis=0).min() > 0.4
    three = gradient_groups(scores, 3)
    assert np.allclose(three.sum(axis=1), 1)
    assert (np.diff(three.T @ scores / three.sum(axis=0)) > 0).all()


def test_columns_mean_the_same_under_every_prompt():
    """Under the second prompt, of three groups, the first prompt's rare content is frequent."""
    content = np.array([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]])
    first, second = np.array([0] * 8 + [1] * 2), np.array([1] * 6 + [2] * 3 + [0] * 3)
    features = content[np.concatenate([first, second])] + 0.01 * np.random.default_rng(0).normal(size=(22, 2))
    groups = {7: (np.arange(10), np.eye(2)[1 - first]), 3: (np.arange(10, 22), np.eye(3)[(second + 1) % 3])}
    aligned = align_columns(groups, 3, features)
    assert aligned[7].argmax(axis=1).tolist() == first.tolist()
    assert aligned[3].argmax(axis=1).tolist() == second.tolist()


def two_draws(values: np.ndarray, noise: float, seed: int = 0) -> Score:
    rng = np.random.default_rng(seed)
    return Score("test", np.stack([values + rng.normal(0, noise, len(values)) for _ in range(2)]))


def mixture(count: int, minority: float, distance: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    rare = int(count * minority)
    return np.concatenate([rng.normal(size=count - rare), rng.normal(distance, 1, rare)])


@pytest.mark.parametrize(("minority", "accepted"), [(0.05, True), (0.15, True), (0.3, True), (0.5, False)])
def test_a_far_minority_is_accepted_and_a_balanced_split_is_style_however_clear(minority, accepted):
    found = split(two_draws(mixture(1500, minority, 8), noise=0.5), 2, CONFIG).candidate
    assert found.accepted == accepted
    assert found.shares[1] == pytest.approx(minority, abs=0.01)
    assert found.separation > 0.7


@pytest.mark.parametrize("draw", ["normal", "uniform", "exponential", "standard_cauchy", "lognormal"])
def test_one_hump_is_never_accepted(draw):
    for seed in range(5):
        values = getattr(np.random.default_rng(seed), draw)(size=1500)
        assert not split(two_draws(values, noise=0.01, seed=seed), 2, CONFIG).candidate.accepted


def test_noise_that_changes_with_the_draw_is_not_stable():
    rng = np.random.default_rng(0)
    score = Score("noise", np.stack([rng.permutation(mixture(1000, 0.1, 8)) for _ in range(2)]))
    found = split(score, 2, CONFIG).candidate
    assert found.agreement < 0.2
    assert not found.accepted


def test_separation_is_high_for_a_gap_and_zero_without_whatever_scale_and_sign():
    apart, together = mixture(1000, 0.2, 10), mixture(1000, 0, 0, seed=1)
    labels = exact_groups(apart, 2)
    assert separation(apart, labels) > 0.85
    assert separation(5 * apart - 3, labels) == pytest.approx(separation(apart, labels), abs=1e-6)
    assert separation(-apart, 1 - labels) == pytest.approx(separation(apart, labels), abs=0.1)
    assert separation(together, exact_groups(together, 2)) == 0


def made_up(num_groups: int, merit: float, *, accepted: bool = True) -> Split:
    score = two_draws(mixture(100, 0.2, 8), noise=0.1)
    return Split(
        Candidate("made up", num_groups, [], merit, 1.0, 0.0, 0.0, "" if accepted else "made up"),
        np.zeros((100, num_groups)),
        score,
    )


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
