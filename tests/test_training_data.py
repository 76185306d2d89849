"""Shares of training data are counts of the data's own labels, under each prompt of the audit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from invdiff.auditing.edits import Edits, apply
from invdiff.auditing.result import Audit
from invdiff.evaluation.quality.intervals import share_interval
from invdiff.evaluation.results import AttributeMeasures, Estimate, Measures, Results
from invdiff.report.sources import AuditSource, Parts, read_parts
from invdiff.report.training_data import Labels, labels
from test_pictures import HOSTILE, LAND, WATER, make_audit

OTHER_WORDS = "a nice landbird"


def source(folder: Path, values: Sequence[Any], *, column: str = "background") -> AuditSource:
    """An audit of 20 images under each of two prompts, whose column has these values."""
    make_audit(folder)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    rows = [row | {column: value} for row, value in zip(rows, values, strict=True)]
    # The data is in another order than the audit.
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))
    audit = json.loads((folder / "audit.json").read_text())
    audit["prompts"][0]["captions"].append(OTHER_WORDS)
    (folder / "audit.json").write_text(json.dumps(audit))
    return read(folder)


def read(folder: Path) -> AuditSource:
    found = read_parts(Parts(audit=folder, data=folder)).audit
    assert found is not None
    return found


def results(*classes: str) -> Results:
    bias = Estimate(value=0.5, low=0.4, high=0.6, floor=0.1)
    spread = AttributeMeasures({LAND: dict.fromkeys(classes, 10)}, {"bias": bias})
    return Results({"base": {"3.0": Measures(10, {"background": spread})}}, attribute="background")


def known(folder: Path, values: Sequence[Any], *classes: str) -> Labels:
    found = labels(source(folder, values), results(*(classes or ("land", "water"))))
    assert found is not None
    return found


def test_shares_are_counts_with_wilsons_interval(tmp_path: Path) -> None:
    found = known(tmp_path, ["land"] * 17 + ["water"] * 3 + ["water"] * 20)
    share = found.share(LAND, "water", confidence=0.9)
    assert share is not None
    assert (share.count, share.total, share.share) == (3, 20, 0.15)
    assert (share.low, share.high) == share_interval(3, 20, confidence=0.9)
    assert found.under(WATER) == {"water": 20}


def test_prompts_are_met_by_all_their_captions(tmp_path: Path) -> None:
    found = known(tmp_path, ["land"] * 20 + ["water"] * 20)
    assert found.under(OTHER_WORDS) == {"land": 20}
    assert found.under("a photo of a cat") == {}
    assert found.share("a photo of a cat", "land", confidence=0.95) is None
    assert found.note("a photo of a cat") == ""


def test_a_prompt_that_hides_nothing_is_counted_too(tmp_path: Path) -> None:
    source(tmp_path, ["land"] * 20 + ["water"] * 20)
    audit = json.loads((tmp_path / "audit.json").read_text())
    audit["prompts"][1]["found"] = False
    (tmp_path / "audit.json").write_text(json.dumps(audit))
    found = labels(read(tmp_path), results("land", "water"))
    assert found is not None
    assert found.under(WATER) == {"water": 20}


def test_other_classes_count_in_the_total_and_what_is_unknown_does_not(tmp_path: Path) -> None:
    found = known(tmp_path, ["land"] * 10 + ["sea"] * 6 + ["", None, "cannot tell", float("nan")] + ["water"] * 20)
    share = found.share(LAND, "land", confidence=0.95)
    assert share is not None
    assert (share.count, share.total) == (10, 16)
    assert found.note(LAND) == (
        "Training data: 16 labelled images under this prompt; 6 of them show other classes, such as “sea”, and count "
        "in the total."
    )
    assert found.note(WATER) == "Training data: 20 labelled images under this prompt."


def test_classes_are_matched_exactly(tmp_path: Path) -> None:
    found = known(tmp_path, ["Land"] * 5 + ["land "] * 5 + ["land"] * 10 + [1] * 20, "land", "1")
    assert found.under(LAND)["land"] == 10
    assert found.under(WATER) == {"1": 20}


def test_images_that_people_left_out_are_not_counted(tmp_path: Path) -> None:
    source(tmp_path, ["land"] * 20 + ["water"] * 20)
    apply(Audit.load(tmp_path), Edits().without_images([0, 3, 25])).save_edits(tmp_path)
    found = labels(read(tmp_path), results("land", "water"))
    assert found is not None
    assert (found.under(LAND), found.under(WATER)) == ({"land": 18}, {"water": 19})


def test_data_without_these_labels_has_none(tmp_path: Path) -> None:
    values = ["land"] * 20 + ["water"] * 20
    assert labels(None, results("land")) is None
    assert labels(source(tmp_path / "a", values, column="colour"), results("land", "water")) is None
    assert labels(source(tmp_path / "b", values), results("sea", "forest")) is None
    without_data = read_parts(Parts(audit=tmp_path / "b")).audit
    assert labels(without_data, results("land", "water")) is None


@pytest.mark.parametrize("text", HOSTILE[:5])
def test_hostile_labels_are_cut_to_a_line(tmp_path: Path, text: str) -> None:
    note = known(tmp_path, ["land"] * 10 + [text * 100] * 10 + ["water"] * 20).note(LAND)
    assert "\n" not in note
    assert len(note) < 300
