from itertools import combinations

import numpy as np
import pytest

from invdiff.auditing.scores import Score
from invdiff.auditing.splits import exact_groups, forced_split, gradient_groups
from invdiff.config import AuditConfig
from invdiff.errors import AuditError
from test_decide import two_humps


def dispersion(parts):
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

    with pytest.raises(AuditError, match="Expected at least 6 images for 2 groups, got 5"):
        exact_groups(np.arange(5.0), 2, min_share=0.5)


def test_gradient_groups_find_a_far_minority_and_a_larger_omega_makes_them_more_equal():
    scores = two_humps(np.random.default_rng(0), 200, 0.1, 8)
    weights = gradient_groups(scores, 2, omega=0.1)
    assert ((weights[:, 1] > 0.5) == (np.arange(200) >= 180)).mean() > 0.97
    assert gradient_groups(scores, 2, omega=5.0).mean(axis=0).min() > 0.4
    three = gradient_groups(scores, 3)
    assert np.allclose(three.sum(axis=1), 1)
    assert (np.diff(three.T @ scores / three.sum(axis=0)) > 0).all()


@pytest.mark.parametrize("solver", ["exact", "gradient"])
def test_a_forced_split_says_how_well_independent_draws_agree(solver):
    rng = np.random.default_rng(0)
    values = rng.permutation(two_humps(rng, 400, 0.1, 8))
    far = np.stack([values + rng.normal(0, 0.5, 400) for _ in range(2)])
    noise = np.stack([rng.permutation(values) for _ in range(2)])
    config = AuditConfig(solver=solver, contrast_log_snr=(0.0,), min_share=0.05)
    stable, unstable = (forced_split(Score("made up", draws, lambda known: []), config) for draws in (far, noise))
    assert ((stable.weights.argmax(axis=1) == 1) == (values > 4)).mean() > 0.98
    assert stable.candidate.agreement > 0.85
    assert unstable.candidate.agreement < 0.2
