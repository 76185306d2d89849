"""The groups of an audit's prompts: which images are typical, which uncertain, and where groups part."""

import numpy as np
import pytest

from invdiff.report.read import gaps, rank_groups


@pytest.mark.parametrize(
    ("labels", "scores", "typical", "uncertain"),
    [
        ([0, 0, 0, 1, 1, 1], [-3, -1, 0, 4, 5, 9], [[0, 1, 2], [5, 4, 3]], [[2, 1, 0], [3, 4, 5]]),
        ([0, 0, 1, 1], [9, 5, -3, -1], [[0, 1], [2, 3]], [[1, 0], [3, 2]]),  # sides follow scores, not numbers
        ([0, 1, 1, 1, 2], [0, 10, 11, 13, 20], [[0], [2, 1, 3], [4]], [[0], [3, 2, 1], [4]]),  # the middle one first
    ],
)
def test_images_are_ranked_from_their_group_s_side(labels, scores, typical, uncertain):
    weights = np.eye(max(labels) + 1)[labels]
    groups = rank_groups(weights, np.array(scores, float), np.arange(len(labels)) + 10, "abc"[: weights.shape[1]])
    assert [[place - 10 for place in group.typical] for group in groups] == typical
    assert [[place - 10 for place in group.uncertain] for group in groups] == uncertain


def test_weights_come_before_scores():
    weights = np.array([[0.9, 0.1], [0.6, 0.4], [0.1, 0.9]])
    group = rank_groups(weights, np.array([1.0, -5, 7]), np.arange(3), "ab")[0]
    assert (group.typical, group.uncertain) == ([0, 1], [1, 0])


def test_gaps_are_parted_in_the_middle():
    assert gaps(np.array([0.0, 1, 3, 8, 9]), np.array([1, 1, 1, 0, 0])) == [5.5]
    assert gaps(np.array([0.0, 9, 3, 8]), np.array([1, 1, 0, 0])) == []
