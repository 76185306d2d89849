"""People's changes to an audit: what they may be, how they are kept, and what they do to groups and shares."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from invdiff.auditing.edits import (
    CURATION,
    NAME_LIMIT,
    Curation,
    audit_fingerprint,
    curated,
    is_kept,
    put_aside,
    read_curation,
)
from invdiff.auditing.result import Audit
from invdiff.errors import AuditError, ConfigError, DataError
from invdiff.text import one_line

# Under prompt 0 the columns 2, 0, 1 lie from low to high scores; under prompt 1 column 1 is empty; 2 hides nothing.
LABELS = [2, 2, 2, 0, 0, 1, 0, 0, 2]
SCORES = [-3.0, -2.5, -2.0, 0.0, 0.5, 4.0, -1.0, -0.5, 2.0, 0.0, 0.0]
PROMPTS = [0] * 6 + [1] * 3 + [2] * 2
SHARES = [[0.3333, 0.1667, 0.5], [0.6667, 0.0, 0.3333], []]


def made_up(*, factors: int = 1) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """An audit of eleven images under three prompts, two of which hide groups."""
    weights = np.full((11, 3), 1 / 3, np.float32)
    weights[:9] = np.eye(3, dtype=np.float32)[LABELS]
    tensors = {"group_weights.0": weights, "scores": np.array(SCORES, np.float32), "prompt_ids": np.array(PROMPTS)}
    further = {m: np.full((11, 2), [0.5 + m / 50, 0.5 - m / 50], np.float32) for m in range(1, factors)}
    tensors |= {f"group_weights.{m}": weights for m, weights in further.items()}
    prompts = [
        {
            **{"prompt": f"prompt {index}", "captions": [f"prompt {index}"], "num_images": PROMPTS.count(index)},
            **{"found": index < 2, "reason": "made up", "evidence": "", "shares": SHARES[index]},
            **{"stability": 1.0, "separation": 1.0, "candidates": []},
        }
        for index in range(3)
    ]
    document = {
        **{"biased": True, "num_groups": [3, *[2] * (factors - 1)], "forwards_per_image": 0.0},
        **{"prompts": prompts, "settings": {}, "names": [f"{row}.png" for row in range(11)]},
    }
    return document, tensors


def write(folder: Path, **options: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    document, tensors = made_up(**options)
    folder.mkdir(exist_ok=True)
    (folder / "audit.json").write_text(json.dumps(document))
    save_file(tensors, folder / "audit.safetensors")
    return document, tensors


@pytest.fixture
def plain(tmp_path: Path) -> Curation:
    """No changes, to the audit that lies in `tmp_path`."""
    return read_curation(tmp_path, *write(tmp_path))


def test_no_changes_are_read_where_nobody_made_any(plain: Curation) -> None:
    assert not plain.changed
    assert plain.names == (("", "", ""),)
    assert [plain.group_name(group) for group in range(4)] == ["group 0", "group 1", "group 2", "group 3"]


def test_a_name_is_one_clean_line(plain: Curation) -> None:
    named = plain.with_name(0, 1, "  on\nwater\u202e \x00")
    assert named.names == (("", "on water", ""),)
    assert (named.group_name(1), named.group_name(0)) == ("on water", "group 0")
    assert named.with_name(0, 1, " ") == plain


def test_the_longest_name_is_kept_and_a_longer_one_refused(plain: Curation) -> None:
    assert plain.with_name(0, 0, "x" * NAME_LIMIT).group_name(0) == "x" * NAME_LIMIT
    with pytest.raises(ConfigError, match="at most 60 characters, got 10000"):
        plain.with_name(0, 0, "x" * 10_000)


@pytest.mark.parametrize("name", ["water", "WATER", "ｗａｔｅｒ", "wa\u200dter", " water "])
def test_two_groups_have_no_names_that_look_alike(plain: Curation, name: str) -> None:
    named = plain.with_name(0, 1, "water")
    with pytest.raises(ConfigError, match="no other group has"):
        named.with_name(0, 0, name)
    assert named.with_name(0, 1, name).names[0][1] == one_line(name)  # of its own it may have a like one


def test_groups_of_two_factors_may_share_a_name(tmp_path: Path) -> None:
    plain = read_curation(tmp_path, *write(tmp_path, factors=2))
    named = plain.with_name(0, 0, "dark").with_name(1, 0, "dark")
    assert (named.group_name(0, 1), named.group_name(1, 1)) == ("dark", "group 1")


def test_the_number_of_another_group_is_no_name(plain: Curation) -> None:
    for name in ("group 1", "Group 7"):
        with pytest.raises(ConfigError, match="the number of another"):
            plain.with_name(0, 0, name)
    assert plain.with_name(0, 1, "Group 1") == plain
    assert plain.with_name(0, 0, "group 1 of birds").group_name(0) == "group 1 of birds"


@pytest.mark.parametrize(("factor", "group"), [(0, 3), (1, 0), (0, -1), (-1, 0)])
def test_only_groups_of_the_audit_have_names(plain: Curation, factor: int, group: int) -> None:
    with pytest.raises(ConfigError, match="Expected a group of the audit"):
        plain.with_name(factor, group, "x")


def test_images_are_left_out_and_put_back(plain: Curation) -> None:
    less = plain.without_images([4, 1]).without_images(np.array([1, 3]))
    assert less.left_out == (1, 3, 4)
    assert less.with_images([3, 9]).left_out == (1, 4)
    assert less.with_images(less.left_out) == plain
    with pytest.raises(ConfigError, match="from 0, got -1"):
        plain.without_images([-1])


@pytest.mark.parametrize("cuts", [[], [1.0, 1.0], [2.0, 1.0], [math.nan, 1.0], [0.0, math.inf]])
def test_cuts_are_finite_and_rise(plain: Curation, cuts: list[float]) -> None:
    with pytest.raises(ConfigError, match="finite, rising"):
        plain.with_cuts(0, cuts)


def test_cuts_are_taken_back(plain: Curation) -> None:
    moved = plain.with_cuts(1, [0]).with_cuts(0, [-1, 1])
    assert moved.cuts == {0: (-1.0, 1.0), 1: (0.0,)}
    assert moved.with_cuts(0, None).with_cuts(1, None).with_cuts(2, None) == plain


def test_what_was_saved_is_read_back(tmp_path: Path, plain: Curation) -> None:
    changed = plain.with_name(0, 2, '<b> "鳥" \\').without_images([0, 9]).with_cuts(0, [-0.1, 1 / 3])
    changed.save(tmp_path)
    assert read_curation(tmp_path, *made_up()) == changed
    kept = json.loads((tmp_path / CURATION).read_text(encoding="utf-8"))
    assert kept["left_out"] == [{"position": 0, "image": "0.png"}, {"position": 9, "image": "9.png"}]
    assert kept["cuts"][0]["caption"] == "prompt 0"


def test_no_file_is_left_where_nothing_is_changed(tmp_path: Path, plain: Curation) -> None:
    plain.save(tmp_path)
    plain.without_images([0]).save(tmp_path)
    assert (tmp_path / CURATION).is_file()
    plain.save(tmp_path)
    assert not (tmp_path / CURATION).exists()


def test_changes_to_what_an_audit_lacks_are_not_saved(tmp_path: Path, plain: Curation) -> None:
    for changed in (plain.without_images([11]), plain.with_cuts(3, [0.0])):
        with pytest.raises(AuditError, match="got number"):
            changed.save(tmp_path)
    with pytest.raises(DataError, match=r"audit\.json"):
        plain.without_images([0]).save(tmp_path / "empty")
    assert not (tmp_path / CURATION).exists()


def test_changes_to_another_audit_are_refused(tmp_path: Path, plain: Curation) -> None:
    plain.without_images([0]).save(tmp_path)
    document, tensors = made_up()
    tensors["group_weights.0"][0] = [0, 1, 0]
    with pytest.raises(AuditError, match=f"changes to another \\({plain.audit}\\)"):
        read_curation(tmp_path, document, tensors)
    with pytest.raises(AuditError, match="got changes to"):
        curated(document, tensors, plain)


def test_changes_to_images_of_other_names_are_refused(tmp_path: Path, plain: Curation) -> None:
    plain.without_images([3]).save(tmp_path)
    document, tensors = made_up()
    document["names"][3] = "new.png"
    with pytest.raises(AuditError, match="another name than in the audit"):
        read_curation(tmp_path, document, tensors)


def _put(*path: str | int, value: Any) -> Callable[[Any], Any]:
    def change(kept: Any) -> Any:
        inner = kept
        for part in path[:-1]:
            inner = inner[part]
        inner[path[-1]] = value
        return kept

    return change


@pytest.mark.parametrize(
    "change",
    [
        lambda kept: [],
        lambda kept: {"audit": kept["audit"]},
        _put("audit", value=7),
        _put("names", value=[["a"]]),
        _put("names", value=[["a", "b", 3]]),
        _put("names", value=[["a", "a", ""]]),
        _put("names", value=[["x" * 61, "", ""]]),
        _put("names", value={"a": 1}),
        _put("left_out", value=[5]),
        _put("left_out", 0, "position", value=True),
        _put("left_out", 0, "position", value=-1),
        _put("left_out", 0, "position", value=11),
        _put("left_out", 0, "position", value="0"),
        _put("left_out", value=[{"position": row, "image": f"{row}.png"} for row in range(6)]),
        _put("cuts", 0, "prompt", value=3),
        _put("cuts", 0, "prompt", value=-1),
        _put("cuts", 0, "prompt", value=2),
        _put("cuts", 0, "scores", value=[1.0]),
        _put("cuts", 0, "scores", value=[1.0, 0.0]),
        _put("cuts", 0, "scores", value=[0.0, math.nan]),
        _put("cuts", 0, "scores", value=[0.0, 10**400]),
        _put("cuts", 0, "scores", value=["0", "1"]),
        _put("cuts", 0, "scores", value="01"),
        lambda kept: {**kept, "cuts": kept["cuts"] * 2},
        _put("cuts", value=None),
    ],
)
def test_a_damaged_file_is_an_error_that_says_what_to_do(
    tmp_path: Path, plain: Curation, change: Callable[[Any], Any]
) -> None:
    plain.with_name(0, 0, "a").without_images([0]).with_cuts(0, [-1, 1]).save(tmp_path)
    kept = json.loads((tmp_path / CURATION).read_text())
    (tmp_path / CURATION).write_text(json.dumps(change(kept)))
    with pytest.raises(AuditError, match=r"Expected") as raised:
        read_curation(tmp_path, *made_up())
    assert len(str(raised.value)) < 500


def test_a_file_that_is_no_json_is_an_error(tmp_path: Path, plain: Curation) -> None:
    (tmp_path / CURATION).write_text('{"audit": ')
    with pytest.raises(AuditError, match=r"Expected JSON .* Mend it or move it elsewhere"):
        read_curation(tmp_path, *made_up())


def test_the_fingerprint_is_that_of_the_audit(tmp_path: Path) -> None:
    _, tensors = write(tmp_path, factors=12)
    assert audit_fingerprint(tensors) == Audit.load(tmp_path).fingerprint


def test_shares_are_those_of_a_count_by_hand(plain: Curation) -> None:
    """Under prompt 0 the intervals below -2.4, up to 0.5 and above belong to groups 2, 0 and 1."""
    document, tensors = made_up()
    new, arrays = curated(document, tensors, plain.with_cuts(0, [-2.4, 0.5]).without_images([0, 8, 9]))
    assert arrays["group_weights.0"].argmax(axis=1)[1:6].tolist() == [2, 0, 0, 1, 1]  # 0.5 lies at a cut: above it
    assert new["prompts"][0]["shares"] == [0.4, 0.4, 0.2]
    assert new["prompts"][1]["shares"] == [1.0, 0.0, 0.0]
    assert new["prompts"][2]["shares"] == []
    assert [prompt["num_images"] for prompt in new["prompts"]] == [5, 2, 1]
    assert is_kept({"group_weights.0": arrays["group_weights.0"]}).tolist() == [False, *[True] * 7, False, False, True]


def test_shares_are_rounded_and_others_stay(plain: Curation) -> None:
    document, tensors = made_up()
    new, arrays = curated(document, tensors, plain.with_cuts(1, [-0.7]))
    assert new["prompts"][1]["shares"] == [0.3333, 0.0, 0.6667]
    assert new["prompts"][0] is document["prompts"][0]
    assert np.array_equal(arrays["group_weights.0"][:6], tensors["group_weights.0"][:6])
    assert np.array_equal(arrays["scores"], tensors["scores"])


def test_an_image_left_out_is_in_no_group_of_any_factor(plain: Curation) -> None:
    document, tensors = made_up(factors=2)
    plain = Curation(names=(("",) * 3, ("",) * 2))
    _, arrays = curated(document, tensors, plain.without_images([4, 10]))
    for name in ("group_weights.0", "group_weights.1"):
        assert not arrays[name][[4, 10]].any()
        assert arrays[name][[3, 9]].sum() == pytest.approx(2)


def test_what_is_given_stays_as_it_is(plain: Curation) -> None:
    document, tensors = made_up()
    curated(document, tensors, plain.with_cuts(0, [-2.4, 0.5]).without_images([0, 8]))
    again, arrays = made_up()
    assert document == again
    assert all(np.array_equal(arrays[name], tensor) for name, tensor in tensors.items())


def test_a_soft_w_becomes_hard_where_cuts_were_moved(plain: Curation) -> None:
    document, tensors = made_up()
    tensors["group_weights.0"][:9] = 0.8 * tensors["group_weights.0"][:9] + 0.1 * (1 - tensors["group_weights.0"][:9])
    _, arrays = curated(document, tensors, Curation(cuts={0: (-1.0, 1.0)}))
    assert arrays["group_weights.0"][:6].tolist() == np.eye(3)[LABELS[:6]].tolist()
    assert np.array_equal(arrays["group_weights.0"][6:], tensors["group_weights.0"][6:])


def test_one_image_of_a_prompt_is_always_kept(plain: Curation) -> None:
    curated(*made_up(), plain.without_images([6, 7]))
    with pytest.raises(AuditError, match=r"at least one image of “prompt 1” to keep"):
        curated(*made_up(), plain.without_images([6, 7, 8]))


@pytest.mark.parametrize(("prompt", "cuts", "needed"), [(0, [0.0], 2), (1, [0.0, 1.0], 1), (2, [0.0], 0)])
def test_there_is_a_cut_between_two_groups_that_have_images(
    plain: Curation, prompt: int, cuts: list[float], needed: int
) -> None:
    with pytest.raises(AuditError, match=f"Expected {needed} cuts between the groups of “prompt {prompt}”"):
        curated(*made_up(), plain.with_cuts(prompt, cuts))


def test_changes_to_another_audit_are_put_aside(tmp_path: Path, plain: Curation) -> None:
    assert put_aside(tmp_path, *made_up()) is None
    changed = plain.without_images([1])
    document, tensors = made_up()
    tensors["prompt_ids"][-1] = 0
    places = []
    for _ in range(2):
        changed.save(tmp_path)
        text = (tmp_path / CURATION).read_text()
        assert put_aside(tmp_path, *made_up()) is None
        place = put_aside(tmp_path, document, tensors)
        assert place is not None
        assert place.read_text() == text
        assert not (tmp_path / CURATION).exists()
        places.append(place.name)
    assert places == [f"curation-{plain.audit}.json", f"curation-{plain.audit}-2.json"]


@pytest.mark.parametrize("text", ["{", "[]", '{"audit": "../../../etc/passwd"}', '{"audit": 3}'])
def test_a_damaged_file_is_put_aside_within_its_folder(tmp_path: Path, plain: Curation, text: str) -> None:
    (tmp_path / CURATION).write_text(text)
    assert put_aside(tmp_path, *made_up()) == tmp_path / "curation-damaged.json"
