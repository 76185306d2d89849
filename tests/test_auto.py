import numpy as np
import pytest

from invdiff.auditing import splits as auto
from invdiff.auditing.partition import exact_groups
from invdiff.auditing.splits import Score, component_scores, consider, separation
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
    split = consider(two_draws(mixture(1500, minority, 8), noise=0.5), 2, CONFIG)
    assert split.candidate.accepted
    assert split.candidate.shares[1] == pytest.approx(minority, abs=0.01)


def test_a_balanced_split_is_style_however_clear():
    split = consider(two_draws(mixture(1500, 0.5, 8), noise=0.5), 2, CONFIG)
    assert split.candidate.separation > 0.7
    assert not split.candidate.accepted


@pytest.mark.parametrize("draw", ["normal", "uniform", "exponential", "standard_cauchy", "lognormal"])
@pytest.mark.parametrize("seed", range(5))
def test_one_hump_is_never_accepted(draw, seed):
    values = getattr(np.random.default_rng(seed), draw)(size=1500)
    assert not consider(two_draws(values, noise=0.01, seed=seed), 2, CONFIG).candidate.accepted


@pytest.mark.parametrize("count", [60, 131, 200])
def test_nothing_is_found_in_the_features_of_a_few_images_that_hide_nothing(count):
    accepted = []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        style = rng.normal(size=(count, 14)) @ rng.normal(size=(14, 60))
        features = np.stack([style + rng.normal(0, 0.5, style.shape) for _ in range(2)], axis=1)
        scores = component_scores(features, "features", seed=0)
        splits = [consider(score, size, CONFIG) for score in scores for size in (2, 3)]
        accepted += [split.candidate for split in splits if split.candidate.accepted]
    assert accepted == []


def test_noise_that_changes_with_the_draw_is_not_stable():
    rng = np.random.default_rng(0)
    score = Score("noise", np.stack([rng.permutation(mixture(1000, 0.1, 8)) for _ in range(2)]))
    split = consider(score, 2, CONFIG)
    assert split.candidate.stability < 0.2
    assert not split.candidate.accepted


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


def test_a_hidden_direction_of_the_features_is_found_though_it_is_not_the_largest():
    rng = np.random.default_rng(0)
    count, width = 800, 40
    rare = np.arange(count) < 80
    style = rng.normal(size=(count, 6)) @ rng.normal(size=(6, width)) * 3
    content = style + np.outer(rare * 4.0, rng.normal(size=width))
    features = np.stack([content + rng.normal(0, 0.2, content.shape) for _ in range(2)], axis=1)
    best = max(
        (consider(score, 2, CONFIG) for score in component_scores(features, "features", seed=0)),
        key=lambda split: (split.candidate.accepted, split.merit),
    )
    assert best.candidate.accepted
    assert np.array_equal(best.weights.argmax(axis=1) == 1, rare)


def test_features_without_groups_give_no_accepted_component():
    rng = np.random.default_rng(0)
    content = rng.normal(size=(800, 6)) @ rng.normal(size=(6, 40))
    features = np.stack([content + rng.normal(0, 0.2, content.shape) for _ in range(2)], axis=1)
    scores = component_scores(features, "features", seed=0)
    assert len(scores) > 0
    assert not any(consider(score, 2, CONFIG).candidate.accepted for score in scores)


def test_a_shape_of_which_no_direction_is_left_is_passed_over(monkeypatch):
    """Without any skewness FastICA's update is 0 / 0, and it raises a ValueError."""

    class Failing(auto.FastICA):
        def fit(self, values):
            if callable(self.fun):
                raise ValueError("A has a NaN entry")
            return super().fit(values)

    monkeypatch.setattr(auto, "FastICA", Failing)
    content = np.random.default_rng(0).normal(size=(800, 20))
    scores = component_scores(np.stack([content, content], axis=1), "features", seed=0)
    assert {score.evidence.split(", ")[1].split()[0] for score in scores} == {"peaked"}
