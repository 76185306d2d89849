"""The groups of an audit's prompts: which images are typical, which uncertain, and where groups part."""

import numpy as np
import pytest

from invdiff.auditing.edits import Edits, apply
from invdiff.auditing.result import Audit
from invdiff.report.read import gaps, rank_groups, splits_of
from runs import make_audit


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


def test_splits_are_of_the_images_kept_under_the_names_that_people_gave(tmp_path):
    make_audit(tmp_path, factors=2)
    audit = Audit.load(tmp_path)
    edits = Edits(names=(("", ""), ("", "on water"))).without_images([18, 20, 39])
    land, water, land_again, _ = splits_of(apply(audit, edits))
    assert [land.index, land_again.index, water.index] == [0, 0, 1]
    assert [group.name for group in land.groups] == ["group 0", "group 1"]
    assert [group.name for group in land_again.groups] == ["group 0", "on water"]
    assert land.rows.tolist() == [*range(18), 19]
    assert water.rows.tolist() == [*range(21, 39)]
    assert [group.size for group in water.groups] == [17, 1]
    assert np.array_equal(water.scores, audit.scores[0, 21:39])
    assert sorted(at for group in water.groups for at in group.typical) == water.rows.tolist()


def test_a_split_has_the_cuts_that_people_set(tmp_path):
    make_audit(tmp_path)
    land, water = splits_of(apply(Audit.load(tmp_path), Edits().with_cuts(0, 1, [0.25])))
    assert (land.by_hand, water.by_hand) == (False, True)
    assert water.cuts == [0.25]
    assert land.cuts == gaps(land.scores, land.labels)
    assert np.array_equal(water.labels, water.scores >= 0.25)
