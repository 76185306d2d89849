from itertools import combinations

import numpy as np
import pytest

from invdiff.auditing.partition import align_columns, exact_groups, gradient_groups, group_losses
from invdiff.errors import AuditError


def dispersion(scores: np.ndarray, labels: np.ndarray) -> float:
    """The between-group variance of scores."""
    parts = [scores[labels == label] for label in np.unique(labels)]
    return sum(len(part) * (part.mean() - scores.mean()) ** 2 for part in parts) / len(scores)


def best_dispersion(scores: np.ndarray, num_groups: int, least: int) -> float:
    """Try every way to cut the sorted scores."""
    ordered = np.sort(scores)
    best = 0.0
    for cuts in combinations(range(1, len(scores)), num_groups - 1):
        parts = np.split(ordered, cuts)
        if min(map(len, parts)) >= least:
            best = max(best, sum(len(p) * (p.mean() - ordered.mean()) ** 2 for p in parts) / len(scores))
    return best


@pytest.mark.parametrize(("count", "num_groups", "min_share"), [(9, 2, 0), (10, 3, 0), (11, 4, 0.15), (10, 3, 0.3)])
def test_exact_groups_beat_every_other_cut(count, num_groups, min_share):
    rng = np.random.default_rng(count)
    least = max(1, int(np.ceil(min_share * count)))
    for _ in range(20):
        scores = rng.normal(size=count)
        labels = exact_groups(scores, num_groups, min_share=min_share)
        assert np.bincount(labels, minlength=num_groups).min() >= least
        assert dispersion(scores, labels) == pytest.approx(best_dispersion(scores, num_groups, least), abs=1e-12)


def test_exact_groups_rise_with_the_score():
    scores = np.array([5.0, 0.0, 5.1, 0.1, 9.0, 9.2])
    assert exact_groups(scores, 3).tolist() == [1, 0, 1, 0, 2, 2]


def test_exact_groups_need_enough_images():
    with pytest.raises(AuditError, match="Expected at least 6 images for 2 groups of at least 3, got 5"):
        exact_groups(np.arange(5.0), 2, min_share=0.5)


def test_exact_groups_refuse_scores_that_are_not_finite():
    with pytest.raises(AuditError, match="got 1 that are not"):
        exact_groups(np.array([0.0, np.nan, 1.0]), 2)


def test_gradient_groups_find_a_far_minority():
    rng = np.random.default_rng(0)
    scores = np.concatenate([rng.normal(size=180), rng.normal(8, 1, size=20)])
    weights = gradient_groups(scores, 2, omega=0.1)
    assert ((weights[:, 1] > 0.5) == (np.arange(200) >= 180)).mean() > 0.97


def test_gradient_groups_stay_on_the_simplex_and_rise_with_the_score():
    scores = np.random.default_rng(1).normal(size=60)
    weights = gradient_groups(scores, 3)
    assert np.allclose(weights.sum(axis=1), 1)
    assert (np.diff(group_losses(scores, weights)) > 0).all()


def test_a_larger_omega_makes_groups_more_equal():
    rng = np.random.default_rng(0)
    scores = np.concatenate([rng.normal(size=180), rng.normal(8, 1, size=20)])
    rare = [gradient_groups(scores, 2, omega=omega).mean(axis=0).min() for omega in (0.01, 5.0)]
    assert rare[0] < 0.2 < 0.4 < rare[1]


def test_gradient_groups_refuse_scores_that_do_not_vary():
    with pytest.raises(AuditError, match="that vary"):
        gradient_groups(np.ones(10), 2)


def test_group_losses_are_weighted_means():
    weights = np.array([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.0, 1.0, 0.0]])
    losses = group_losses(np.array([0.0, 3.0, 6.0]), weights)
    assert losses[:2] == pytest.approx([1.0, 5.0])
    assert np.isnan(losses[2])


def test_columns_mean_the_same_under_every_prompt():
    """Under the second prompt, of three groups, the first prompt's rare content is frequent."""
    content = np.array([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]])
    first, second = np.array([0] * 8 + [1] * 2), np.array([1] * 6 + [2] * 3 + [0] * 3)
    features = content[np.concatenate([first, second])] + 0.01 * np.random.default_rng(0).normal(size=(22, 2))
    groups = {7: (np.arange(10), np.eye(2)[1 - first]), 3: (np.arange(10, 22), np.eye(3)[(second + 1) % 3])}
    aligned = align_columns(groups, 3, features)
    assert aligned[7].argmax(axis=1).tolist() == first.tolist()
    assert aligned[3].argmax(axis=1).tolist() == second.tolist()
