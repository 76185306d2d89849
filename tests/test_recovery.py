import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score, homogeneity_score

from invdiff.errors import EvaluationError
from invdiff.evaluation.recovery import group_quality, recovery

ONE_PROMPT = np.zeros(10, dtype=int)
CLASSES = ["land"] * 8 + ["water"] * 2


def test_perfect_groups_and_scores_are_perfect():
    found = group_quality(ONE_PROMPT, [0] * 8 + [1] * 2, [0] * 8 + [1] * 2, CLASSES)
    assert (found.auroc, found.adjusted_rand, found.homogeneity, found.images) == (1.0, 1.0, 1.0, 10)


def test_finer_groups_are_homogeneous_but_do_not_agree():
    groups = [0, 0, 0, 0, 1, 1, 1, 1, 2, 3]
    found = group_quality(ONE_PROMPT, np.arange(10), groups, CLASSES)
    assert found.homogeneity == pytest.approx(1.0)
    assert found.adjusted_rand == pytest.approx(adjusted_rand_score(CLASSES, groups))
    assert found.adjusted_rand < 0.5


def test_one_group_tells_nothing():
    found = group_quality(ONE_PROMPT, np.zeros(10), np.zeros(10), CLASSES)
    assert (found.auroc, found.adjusted_rand, found.homogeneity) == (0.5, 0.0, pytest.approx(0.0))


def test_the_rarest_class_of_each_prompt_is_its_minority_and_prompts_weigh_by_images():
    prompts = [0] * 10 + [1] * 5
    classes = [*CLASSES, "water", "water", "water", "water", "land"]
    scores = [*[0] * 8, 1, 1, *[0, 1, 0, 1], 0.5]
    groups = [*[0] * 8, 1, 1, 0, 0, 1, 1, 1]
    found = group_quality(prompts, scores, groups, classes)
    assert found.auroc == pytest.approx((10 * 1.0 + 5 * 0.5) / 15)
    second = homogeneity_score(classes[10:], groups[10:])
    assert found.homogeneity == pytest.approx((10 * 1.0 + 5 * second) / 15)


def test_prompts_in_which_nothing_is_hidden_are_left_out():
    prompts = [*ONE_PROMPT, *[1] * 10]
    found = group_quality(prompts, np.arange(20), [0] * 20, [*CLASSES, *["water"] * 10])
    assert found.images == 10
    with pytest.raises(EvaluationError, match="varies within a prompt"):
        group_quality(prompts[10:], np.arange(10), [0] * 10, ["water"] * 10)


def test_recovery_by_hand():
    minority = np.array([True, True, False, False, False])
    found = recovery([0.9, 0.4, 0.5, 0.1, 0.2], [True, False, True, False, False], minority)
    assert found.auroc == pytest.approx(5 / 6)
    assert (found.precision, found.recall) == (0.5, 0.5)
    with pytest.raises(EvaluationError, match="minority and of a majority, got 5 of 5"):
        recovery(np.arange(5), minority, np.ones(5))
