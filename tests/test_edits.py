"""People's edits to an audit: what they may be, how they are kept, and what they do to groups and shares."""

import functools
import json
import math
import operator
from dataclasses import replace

import numpy as np
import pytest

from invdiff.auditing.edits import NAME_LIMIT, Edits, apply
from invdiff.auditing.result import Audit, PromptAudit
from invdiff.errors import AuditError, ConfigError
from invdiff.evaluation.fairness.intervals import share_interval
from invdiff.files import CURATION
from invdiff.text import one_line
from runs import built_audit

# Under prompt 0 the columns 2, 0, 1 lie from low to high scores; under prompt 1 column 1 is empty; 2 hides nothing.
LABELS = [2, 2, 2, 0, 0, 1, 0, 0, 2]
SCORES = [-3.0, -2.5, -2.0, 0.0, 0.5, 4.0, -1.0, -0.5, 2.0, 0.0, 0.0]
PROMPTS = [0] * 6 + [1] * 3 + [2] * 2


def made_up(*, factors=1):
    """An audit of eleven images under three prompts, two of which hide groups."""
    first = np.full((11, 3), 1 / 3, np.float32)
    first[:9] = np.eye(3, dtype=np.float32)[LABELS]
    further = [np.eye(2, dtype=np.float32)[np.arange(11) % 3 // 2] for _ in range(1, factors)]
    prompts = [PromptAudit(f"prompt {k}", [f"prompt {k}"], PROMPTS.count(k), k < 2, "made up") for k in range(3)]
    return built_audit((first, *further), PROMPTS, prompts, [f"{row}.png" for row in range(11)], SCORES)


def plain_edits(**options):
    return apply(made_up(**options), Edits()).edits


def test_a_name_is_one_clean_line():
    named = plain_edits().with_name(0, 1, "  on\nwater\u202e \x00")
    assert named.names == (("", "on water", ""),)
    assert [apply(made_up(), named).group_name(group) for group in (0, 1)] == ["group 0", "on water"]
    assert named.with_name(0, 1, " ") == named.with_name(0, 1, "Group 1") == plain_edits()
    for name in ("x" * NAME_LIMIT, "group 1 of birds"):
        assert named.with_name(0, 0, name).names[0][0] == name


def test_two_groups_have_no_names_that_look_alike():
    named = plain_edits(factors=2).with_name(0, 1, "water")
    for name in ("WATER", "ｗａｔｅｒ", "wa\u200dter", " water "):
        with pytest.raises(ConfigError, match="no other group has"):
            named.with_name(0, 0, name)
        assert named.with_name(0, 1, name).names[0][1] == one_line(name)  # of its own it may have a like one
        assert named.with_name(1, 0, name).names[1][0] == one_line(name)  # and so may groups of another factor


def test_other_names_are_refused():
    for factor, group, name, message in (
        *[(*place, "x", "Expected a group of the audit") for place in ((0, 3), (1, 0), (0, -1), (-1, 0))],
        (0, 0, "Group 7", "the number of another"),
        (0, 0, "x" * 10_000, "at most 60 characters, got 10000"),
    ):
        with pytest.raises(ConfigError, match=message):
            plain_edits().with_name(factor, group, name)


def test_images_are_left_out_and_put_back():
    less = Edits().without_images([4, 1]).without_images(np.array([1, 3]))
    assert less.left_out == (1, 3, 4)
    assert less.with_images([3, 9]).left_out == (1, 4)
    assert less.with_images(less.left_out) == Edits()
    with pytest.raises(ConfigError, match="from 0, got -1"):
        Edits().without_images([-1])


def test_cuts_are_finite_and_rise_and_are_taken_back():
    for cuts in ([], [1.0, 1.0], [2.0, 1.0], [math.nan, 1.0], [0.0, math.inf]):
        with pytest.raises(ConfigError, match="finite, rising"):
            Edits().with_cuts(0, 0, cuts)
    moved = Edits().with_cuts(0, 1, [0]).with_cuts(0, 0, [-1, 1])
    assert moved.cuts == {(0, 0): (-1.0, 1.0), (0, 1): (0.0,)}
    assert moved.with_cuts(0, 0, None).with_cuts(0, 1, None).with_cuts(0, 2, None) == Edits()
    assert Edits().with_cuts(1, 0, [0]).with_cuts(0, 0, [1]).cuts == {(0, 0): (1.0,), (1, 0): (0.0,)}


def test_edits_that_were_saved_are_read_back(tmp_path):
    edits = plain_edits().with_name(0, 2, '<b> "鳥" \\').without_images([0, 9]).with_cuts(0, 0, [-0.1, 1 / 3])
    changed = apply(made_up(), edits)
    changed.save_edits(made_up().save(tmp_path))
    loaded = Audit.load(tmp_path)
    assert (loaded.edits, loaded.fingerprint) == (edits, changed.fingerprint)
    kept = json.loads((tmp_path / CURATION).read_text(encoding="utf-8"))
    assert kept["left_out"] == [{"position": 0, "image": "0.png"}, {"position": 9, "image": "9.png"}]
    assert kept["cuts"][0]["caption"] == "prompt 0"
    apply(changed, Edits()).save_edits(tmp_path)
    assert not (tmp_path / CURATION).exists()
    assert Audit.load(tmp_path).edits == plain_edits()


def test_edits_to_another_audit_are_refused(tmp_path):
    edited, other = apply(made_up(), Edits().without_images([3])), made_up()
    other.group_weights[0][0] = [0, 1, 0]
    with pytest.raises(AuditError, match="got changes to"):
        apply(other, edited.edits)
    renamed = replace(made_up(), names=["new.png"] * 11)
    for audit, message in ((other, f"to another \\({made_up().fingerprint}\\)"), (renamed, "another name than in")):
        edited.save_edits(audit.save(tmp_path))
        with pytest.raises(AuditError, match=message):
            Audit.load(tmp_path)


def _put(*path, value):
    return lambda kept: functools.reduce(operator.getitem, path[:-1], kept).update({path[-1]: value}) or kept


@pytest.mark.parametrize(
    "change",
    [
        *(lambda kept: "no JSON", lambda kept: [], lambda kept: {"audit": kept["audit"]}),
        *[_put("names", value=value) for value in ([["a"]], [["a", "b", 3]], [["a", "a", ""]], [["x" * 61, "", ""]])],
        *[_put(name, value=value) for name, value in (("audit", 7), ("cuts", None))],
        _put("left_out", value=[{"position": row, "image": f"{row}.png"} for row in range(6)]),  # all of one prompt
        *[_put("left_out", 0, "position", value=value) for value in (True, -1, 11)],
        *[_put("cuts", 0, "prompt", value=value) for value in (3, -1, 2)],
        *[_put("cuts", 0, "factor", value=value) for value in (1, -1, "0")],
        *[_put("cuts", 0, "scores", value=value) for value in ([1.0], [0.0, math.nan], [0, 10**400], "01")],
    ],
)
def test_a_damaged_file_is_an_error_that_says_what_to_do(tmp_path, change):
    edits = plain_edits().with_name(0, 0, "a").without_images([0]).with_cuts(0, 0, [-1, 1])
    apply(made_up(), edits).save_edits(made_up().save(tmp_path))
    changed = change(json.loads((tmp_path / CURATION).read_text()))
    (tmp_path / CURATION).write_text(changed if isinstance(changed, str) else json.dumps(changed))
    with pytest.raises(AuditError, match=r"Expected") as raised:
        Audit.load(tmp_path)
    assert len(str(raised.value)) < 500


def test_shares_are_those_of_a_count_by_hand():
    """Under prompt 0 the intervals below -2.4, up to 0.5 and above belong to groups 2, 0 and 1."""
    new = apply(made_up(factors=2), Edits().with_cuts(0, 0, [-2.4, 0.5]).without_images([0, 8, 9]))
    assert [weights.any(axis=1).tolist() for weights in new.group_weights] == [new.kept.tolist()] * 2
    assert new.group_weights[0].argmax(axis=1)[1:6].tolist() == [2, 0, 0, 1, 1]  # 0.5 lies at a cut: above it
    assert [split.shares for split in new.factors[0].splits] == [[0.4, 0.4, 0.2], [1.0, 0.0, 0.0]]
    assert new.split(0, 0).intervals[2] == tuple(round(end, 4) for end in share_interval(1, 5))
    assert [split.shares for split in new.factors[1].splits] == [[0.6, 0.4], [1.0, 0.0]]  # images 1 to 5, and 6 and 7
    assert new.split(1, 2) is None
    assert [prompt.num_images for prompt in new.prompts] == [5, 2, 1]
    assert new.kept.tolist() == [False, *[True] * 7, False, False, True]


def test_shares_are_rounded_and_others_stay_and_a_soft_w_becomes_hard_where_cuts_were_moved():
    audit = made_up()
    audit.group_weights[0][:9] = 0.8 * audit.group_weights[0][:9] + 0.1 * (1 - audit.group_weights[0][:9])
    before = audit.fingerprint
    new = apply(audit, Edits().with_cuts(0, 1, [-0.7]))
    assert new.split(0, 1).shares == [0.3333, 0.0, 0.6667]
    assert (new.prompts, new.split(0, 0)) == (audit.prompts, audit.split(0, 0))
    assert new.group_weights[0][6:9].tolist() == np.eye(3)[[0, 2, 2]].tolist()
    assert np.array_equal(new.group_weights[0][:6], audit.group_weights[0][:6])
    assert np.array_equal(new.scores, audit.scores)
    assert audit.fingerprint == before == apply(new, Edits()).fingerprint  # and so does the audit it was applied to


def test_edits_that_an_audit_cannot_take_are_refused():
    for edits, message in (
        (Edits(left_out=(6, 7, 8)), "at least one image of “prompt 1” to keep"),
        (Edits(left_out=(11,)), "some of 11 images, got number 11"),
        *[(Edits(cuts={(m, k): (0.0,)}), f"got one of prompt {k} by") for m, k in ((0, 3), (0, 2), (0, -1), (1, 0))],
        *[(Edits(cuts={(0, k): (0.0,) * (1 + k % 2)}), f"Expected {2 - k} cuts .* of “prompt {k}”") for k in range(2)],
        (Edits(names=(("a",),)), "Expected changes to this audit"),
    ):
        with pytest.raises(AuditError, match=message):
            apply(made_up(), edits)


@pytest.mark.parametrize("text", ["{", "[]", '{"audit": "../../../etc/passwd"}', '{"audit": 3}'])
def test_a_damaged_file_is_put_aside_within_its_folder(tmp_path, text):
    (tmp_path / CURATION).write_text(text)
    assert made_up().put_aside(tmp_path) == tmp_path / "curation-damaged.json"
