import numpy as np
import pytest
from scipy.stats import ttest_ind

from invdiff.auditing.word_effects import LEAST_IMAGES, Part, chance_maxima, compare, p_values


def part(scores, labels, usable=None, groups=2):
    usable = np.ones(scores.shape[1], dtype=bool) if usable is None else np.asarray(usable)
    return Part(scores, np.eye(groups)[labels], usable)


def tell_apart(parts, numbers, permutations=999):
    """Effects and p-values (E, V)."""
    seen = compare(parts)
    return seen.effect, p_values(seen.statistic, chance_maxima(parts, numbers, permutations=permutations))


def rng(seed=0):
    return np.random.default_rng(seed)


def correlated(numbers, count, words):
    """Scores as CLIP gives them: words share much of their variance."""
    return numbers.normal(size=(count, 5)) @ numbers.normal(size=(5, words)) + numbers.normal(size=(count, words))


def test_one_prompt_is_compared_as_welch_does():
    labels = np.arange(60) % 3 // 2
    scores = correlated(rng(), 60, 4)
    one, other = scores[labels == 1], scores[labels == 0]
    difference = one.mean(axis=0) - other.mean(axis=0)
    welch = ttest_ind(one, other, equal_var=False).statistic
    seen = compare([part(scores, labels)])
    np.testing.assert_allclose(seen.difference, [-difference, difference])
    np.testing.assert_allclose(seen.effect, [-difference / scores.std(axis=0), difference / scores.std(axis=0)])
    np.testing.assert_allclose(seen.statistic, [-welch, welch])
    np.testing.assert_allclose(compare([part(scores + 1e7, labels)]).statistic, seen.statistic, rtol=1e-4)


def test_p_values_count_the_observed_order():
    maxima = np.array([3.0, 1.0, 2.0])
    assert p_values(np.array([0.0, 1.5, -2.0, 9.0]), maxima).tolist() == [1.0, 0.75, 0.75, 0.25]


def test_prompts_count_by_the_precision_of_their_difference():
    first = part(np.repeat([[0.0], [1.0]], 10, axis=0) + rng().normal(size=(20, 1)) / 9, np.repeat([0, 1], 10))
    second = part(
        np.repeat([[0.0], [4.0]], [30, 90], axis=0) + rng(1).normal(size=(120, 1)) / 9, np.repeat([0, 1], [30, 90])
    )
    alone = [compare([one]).difference[1, 0] for one in (first, second)]
    expected = np.average(alone, weights=[10 * 10 / 20, 30 * 90 / 120])
    assert compare([first, second]).difference[1, 0] == pytest.approx(expected)


def test_one_word_and_two_groups_have_the_p_value_of_a_permutation_test_of_welch():
    labels = np.repeat([0, 1], [15, 30])
    scores = rng(4).normal(size=45) + 0.75 * labels
    _, p_values = tell_apart([part(scores[:, None], labels)], rng(), permutations=4000)
    orders = scores[rng(1).permuted(np.tile(np.arange(45), (4000, 1)), axis=1)]
    drawn = ttest_ind(orders[:, :15], orders[:, 15:], axis=1, equal_var=False).statistic
    observed = ttest_ind(scores[:15], scores[15:], equal_var=False).statistic
    expected = np.mean(np.abs(drawn) >= abs(observed))
    assert 0.005 < expected < 0.2
    np.testing.assert_allclose(p_values[:, 0], expected, rtol=0.3)


@pytest.mark.parametrize("groups", [2, 3])
@pytest.mark.parametrize("prompts", [1, 2])
def test_where_groups_look_alike_any_word_passes_as_often_as_stated(groups, prompts):
    numbers, wrong = rng(1), 0
    for _ in range(200):
        labels = numbers.permutation(np.arange(60) % groups)
        parts = [part(correlated(numbers, 60, 40), labels, groups=groups) for _ in range(prompts)]
        wrong += tell_apart(parts, numbers, permutations=99)[1].min() <= 0.05
    assert 2 <= wrong <= 20  # 10 are expected, with a standard deviation of 3.1


def test_a_group_that_is_only_more_varied_passes_seldom():
    numbers, wrong = rng(2), 0
    labels = np.repeat([0, 1], [20, 80])
    for _ in range(200):
        scores = correlated(numbers, 100, 40) * np.where(labels == 0, 2, 1)[:, None]
        wrong += tell_apart([part(scores, labels)], numbers, permutations=99)[1].min() <= 0.05
    assert wrong <= 30  # a common variance would let about 60 pass


def test_soft_weights_count_images_by_their_weight():
    labels = np.arange(80) % 2
    scores = rng().normal(size=(80, 3))
    scores[:, 1] += 3 * labels
    hard = np.eye(2)[labels]
    soft = np.where(rng(1).random(80)[:, None] < 0.3, 0.5, hard)
    whole = np.ones(3, dtype=bool)
    effects, p_values = tell_apart([Part(scores, soft, whole)], rng())
    assert p_values[1, 1] == 0.001
    sharp = tell_apart([Part(scores, hard, whole)], rng())[0]
    assert 0.5 < effects[1, 1] < sharp[1, 1]


def test_prompts_are_compared_within_not_with_each_other():
    """Group 1 is frequent under the prompt whose images all score high."""
    labels = [np.arange(100) % 10 // 9, 1 - np.arange(100) % 10 // 9]
    parts = [part(rng(k).normal(size=(100, 2)) + 9 * k, of_prompt) for k, of_prompt in enumerate(labels)]
    together = part(np.concatenate([p.scores for p in parts]), np.concatenate(labels))
    assert tell_apart([together], rng())[1].min() <= 0.01
    effects, p_values = tell_apart(parts, rng())
    assert p_values.min() > 0.05
    assert np.abs(effects).max() < 0.5


def test_small_effects_of_several_prompts_add_up():
    parts = []
    for prompt in range(6):
        labels = np.arange(60) % 2
        scores = rng(prompt).normal(size=(60, 20))
        scores[:, 7] += 0.8 * labels
        parts.append(part(scores, labels))
    alone = [tell_apart([one], rng())[1][1, 7] for one in parts]
    assert tell_apart(parts, rng())[1][1, 7] <= 0.002 < np.median(alone)


def test_words_that_are_not_tried_or_do_not_vary_never_pass():
    labels = np.arange(60) % 2
    scores = np.stack([5.0 * labels, 5.0 * labels, np.full(60, 0.1)], axis=1) + rng().normal(size=(60, 3)) * [1, 1, 0]
    effects, p_values = tell_apart([part(scores, labels, usable=[True, False, True])], rng())
    assert p_values[:, 0].max() == 0.001
    assert (p_values[:, 1:] == 1).all()
    assert (effects[:, 1:] == 0).all()


def test_a_word_is_judged_by_the_prompts_that_try_it():
    labels = np.arange(60) % 2
    told = 3.0 * labels[:, None] + rng().normal(size=(60, 1))
    parts = [part(told, labels, usable=[True]), part(-told, labels, usable=[False])]
    assert tell_apart(parts, rng())[0][1, 0] > 0


def test_small_groups_are_not_judged():
    labels = np.repeat([0, 1], [50, LEAST_IMAGES - 1])
    scores = 9.0 * labels[:, None] + rng().normal(size=(len(labels), 2))
    few = part(scores, labels)
    assert not few.judged.any()
    assert (tell_apart([few], rng())[1] == 1).all()
    enough = part(np.vstack([scores, [[9.0, 9.0]]]), np.append(labels, 1))
    assert enough.judged.all()


def test_a_group_without_images_under_a_prompt_is_not_judged():
    labels = np.arange(60) % 2
    effects, p_values = tell_apart([part(rng().normal(size=(60, 3)), labels, groups=3)], rng())
    assert (p_values[2] == 1).all()
    assert np.isfinite(effects).all()


def test_the_same_seed_gives_the_same_figures():
    one = part(correlated(rng(), 50, 30), np.arange(50) % 2)
    first, second = (tell_apart([one], rng(5), permutations=250) for _ in range(2))
    assert np.array_equal(first[1], second[1])
