"""How scores are cut: mixtures and e-values, and the solvers that split any scores."""

from itertools import combinations

import numpy as np
import pytest
from scipy.stats import skewnorm
from sklearn.metrics import adjusted_rand_score
from sklearn.mixture import GaussianMixture

from invdiff import AuditConfig
from invdiff.auditing import decide
from invdiff.auditing.scores import Score
from invdiff.auditing.splits import exact_groups, forced_split, gradient_groups
from invdiff.errors import AuditError

DOUBT = np.log(20)
HUMPS = {
    "normal": lambda rng, n: rng.normal(size=n),
    "skewed": lambda rng, n: skewnorm.rvs(8, size=n, random_state=rng),
    "uniform": lambda rng, n: rng.uniform(size=n),
    "exponential": lambda rng, n: rng.exponential(size=n),
    "heavy-tailed": lambda rng, n: rng.standard_t(5, size=n),
}


def two_humps(rng, count, share, distance, majority="normal"):
    rare = int(count * share)
    return np.concatenate([HUMPS[majority](rng, count - rare), rng.normal(distance, 1, rare)])


def log_e(scores, rng):
    rotations = decide.halves(np.ones(len(scores), dtype=bool), rng)
    return decide.log_e_value(lambda known: [scores], scores, 2, rotations)


@pytest.mark.parametrize("centres", [(0.0, 5.0), (0.0, 4.0, 9.0)])
def test_a_mixture_is_that_of_scikit_learn(centres):
    rng = np.random.default_rng(0)
    scores = np.concatenate([rng.normal(at, 1, count) for at, count in zip(centres, (1000, 150, 80), strict=False)])
    theirs = GaussianMixture(len(centres), covariance_type="tied", n_init=3, random_state=0).fit(scores[:, None])
    order = theirs.means_[:, 0].argsort()
    for quick in (False, True):
        ours = decide.fit_mixture(scores, len(centres), quick=quick)
        assert ours.means == pytest.approx(theirs.means_[order, 0], abs=0.05)
        assert ours.shares == pytest.approx(theirs.weights_[order], abs=0.005)
        assert ours.deviation == pytest.approx(np.sqrt(theirs.covariances_[0, 0]), rel=0.02)
        assert ours.log_density(scores).mean() == pytest.approx(theirs.score(scores[:, None]), abs=1e-3)


@pytest.mark.parametrize(
    ("means", "shares"), [([0, 3], [0.9, 0.1]), ([0, 2], [0.5, 0.5]), ([0, 3, 7], [0.2, 0.7, 0.1])]
)
def test_the_rand_index_of_a_cut_is_that_of_a_simulation(means, shares):
    mixture = decide.Mixture(np.array(means, float), np.array(shares), np.array(1.5))
    rng = np.random.default_rng(0)
    truth = rng.choice(len(shares), 100_000, p=shares)
    cut = mixture.posterior(rng.normal(mixture.means[truth], 1.5)).argmax(axis=1)
    assert mixture.rand_index() == pytest.approx(adjusted_rand_score(truth, cut), abs=0.01)


def test_intervals_hold_the_truth_and_narrow_with_more_images():
    wide = []
    for count in (300, 3000):
        rng = np.random.default_rng(count)
        scores = two_humps(rng, count, 0.2, 5)
        mixture = decide.fit_mixture(scores, 2)
        low, high = decide.share_intervals(mixture.posterior(scores))[1]
        assert low < 0.2 < high
        wide.append(high - low)
        assert 0.85 < decide.rand_low(scores, mixture, rng) < mixture.rand_index()
    assert wide[1] < wide[0] / 2


def test_intervals_of_humps_that_overlap_hold_the_truth_about_as_often_as_they_say():
    held = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        scores = two_humps(rng, 600, rng.binomial(600, 0.1) / 600, 2.8)
        low, high = decide.share_intervals(decide.fit_mixture(scores, 2).posterior(scores))[1]
        held.append(low < 0.1 < high)
    assert np.mean(held) >= 0.85


def test_e_bh_rejects_the_k_largest_that_are_at_least_their_number_over_level_and_k():
    for level, rejected in ((0.1, [True, False, True]), (0.08, [False, False, True]), (0.05, [False] * 3)):
        assert decide.e_bh(np.log([16, 9, 40]), level).tolist() == rejected
    assert decide.e_bh([], 0.05).tolist() == []
    assert decide.e_bh([-np.inf, 50.0], 0.05).tolist() == [False, True]


@pytest.mark.parametrize("shape", HUMPS)
def test_one_hump_is_never_refuted(shape):
    for seed in range(4):
        rng = np.random.default_rng(seed)
        assert log_e(HUMPS[shape](rng, 300), rng) < DOUBT


@pytest.mark.parametrize("shape", HUMPS)
def test_a_far_second_hump_is_found_beside_any(shape):
    rng = np.random.default_rng(0)
    assert log_e(two_humps(rng, 500, 0.1, 8, shape), rng) > 2 * DOUBT


def test_scores_are_learned_from_one_half_and_judged_on_the_other_and_a_choice_is_paid_for():
    rng = np.random.default_rng(0)
    scores, asked = two_humps(rng, 400, 0.2, 8), []
    rotations = decide.halves(np.arange(400) >= 100, rng)
    for known, held_out in rotations:
        assert not (known & held_out).any()
        assert (known | held_out).sum() == 300
        assert not (known | held_out)[:100].any()

    def learn(known):
        asked.append(known)
        return [rng.normal(size=400), -scores, rng.normal(size=400)]

    alone, chosen = (decide.log_e_value(one, scores, 2, rotations) for one in (lambda known: [-scores], learn))
    assert chosen == pytest.approx(alone - np.log(3))
    assert all(np.array_equal(one, known) for one, (known, _) in zip(asked, rotations, strict=False))
    assert decide.log_e_value(lambda known: [], scores, 2, rotations) == -np.inf
    for few in range(3):
        assert decide.log_e_value(learn, scores, 2, decide.halves(np.arange(400) < few, rng)) <= 0


def test_the_posterior_of_free_humps_rises_with_the_score_and_parts_them():
    rng = np.random.default_rng(0)
    scores = rng.permutation(two_humps(rng, 1000, 0.1, 8, "exponential"))
    posterior = decide.fit_humps(scores, decide.fit_mixture(scores, 2)).posterior(scores)
    assert (np.diff(posterior[np.argsort(scores), 1]) >= 0).all()
    assert np.allclose(posterior.sum(axis=1), 1)
    assert posterior[:, 1].mean() == pytest.approx(0.1, abs=0.02)
    assert decide.fit_humps(scores[:30], decide.fit_mixture(scores[:30], 2)) is None  # too few to tell


def test_more_images_show_smaller_minorities_but_never_at_the_least_share_itself():
    def least(count, candidates=50, **settings):
        told = decide.power(count, candidates, AuditConfig(**{"min_share": 0.0} | settings))
        assert f"{count:,} images" in told
        return 100.0 if "too few" in told else float(told.removeprefix("a group of ").partition("%")[0])

    shares = [least(count) for count in (10, 500, 1000, 4000, 20_000)]
    assert (np.diff(shares) <= 0).all()
    assert shares[-1] < shares[2] < shares[1] <= 50 < shares[0]
    assert least(1000, 5000) > least(1000, 5)
    assert least(20_000, 5, min_share=0.1) == 15
    assert least(20_000, 5, min_rand=0.97) == 100


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
