"""The parts of a report, typical images of groups, and what stays where it is: labels, private files, paths."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from conftest import made_up_measures
from invdiff import Audit, Results
from invdiff.auditing.edits import Edits, apply
from invdiff.errors import AuditError
from invdiff.evaluation.fairness.intervals import share_interval
from invdiff.report.figures import percent
from invdiff.report.read import Parts, find_parts, rank_groups, read_run
from invdiff.report.results_view import training_labels
from runs import LAND, SCRIPT, WATER, Page, make_audit, make_images, measured, report
from test_cli import succeed

pytestmark = pytest.mark.usefixtures("plain")


def label(folder, values, column="background"):
    """Give the images of a folder a column of labels, and list them in another order."""
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    rows = [row | {column: value} for row, value in zip(rows, values, strict=True)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))


def labelled(run, folder, values, column="background"):
    """The report of a run with a column of 40 labels in its data."""
    shutil.copytree(run / "data", folder / "data")
    label(folder / "data", values, column)
    return report(folder / "out", audit=run / "audit", data=folder / "data", results=run / "results.json")


IN_PART = ["land"] * 10 + ["sea"] * 6 + ["", None, "cannot tell", float("nan")] + ["water"] * 20


@pytest.mark.parametrize(
    ("values", "column", "edits", "land", "water"),
    [
        (IN_PART, "background", Edits(), {"land": 10, "sea": 6}, {"water": 20}),
        (["land"] * 20 + ["water"] * 20, "background", Edits(left_out=(0, 3, 25)), {"land": 18}, {"water": 19}),
        (["land"] * 40, "colour", Edits(), None, None),
        (["Land", "LAND"] * 20, "background", Edits(), None, None),
    ],
)
def test_labels_are_counted_under_all_captions_of_a_prompt(tmp_path, values, column, edits, land, water):
    make_audit(tmp_path)
    label(tmp_path, values, column)
    audit = json.loads((tmp_path / "audit.json").read_text())
    audit["prompts"][0]["captions"].append("a nice landbird")
    audit["prompts"][1]["found"] = False  # counted although it hides nothing
    (tmp_path / "audit.json").write_text(json.dumps(audit))
    apply(Audit.load(tmp_path), edits).save_edits(tmp_path)
    run = read_run(Parts(audit=tmp_path, data=tmp_path))
    assert training_labels(run) == {}
    measures = made_up_measures(0.5, interval=(0.4, 0.6), floor=0.1)
    found = training_labels(replace(run, results=Results({"base": {"3.0": measures}}, attribute="background")))
    assert found == ({LAND: land, "a nice landbird": land, WATER: water} if land else {})


def test_labels_stand_for_the_data_where_there_are_any(finished, tmp_path):
    page, twin = labelled(finished, tmp_path, ["land"] * 17 + ["water"] * 23)
    assert "| Prompt | Class | Training data | Base model | With guidance | Target |" in twin
    for text in (page.words, twin):
        assert "counts of the data's own column “background”, which was read for this report only" in text
        assert "Training data: 20 labelled images under this prompt." in text
        assert "the audit's groups" not in text
    low, high = (percent(end) for end in share_interval(17, 20))
    assert f"land target 50% Training data 85% {low} to {high} Base model 90%" in page.words
    assert f"| {LAND} | land | 85% ({low} to {high}) | 90% (" in twin


def test_hostile_labels_are_text_and_a_prompt_without_labels_keeps_the_audit_s_groups(finished, tmp_path):
    hostile = SCRIPT + "|`\n\n# \u202ex" + "y" * 10_000
    expected, markdown = labelled(finished, tmp_path / "a", ["land"] * 19 + ["else"] + [""] * 20)
    page, twin = labelled(finished, tmp_path / "b", ["land"] * 19 + [hostile] + [""] * 20)
    assert [tag for tag, _ in page.elements] == [tag for tag, _ in expected.elements]
    assert twin.count("\n") == markdown.count("\n")
    assert SCRIPT + "|`" in page.text
    for text in (twin, page.text):
        assert "y" * 301 not in text
        assert "\u202e" not in text
    assert page.words.count("Training data 95%") == 1
    assert page.text.count("In the training images: the audit's groups") == 1
    (row,) = (line for line in twin.splitlines() if line.startswith(f"| {WATER} | group"))
    assert " | – | " in row


def test_other_images_or_captions_under_the_same_names_are_not_what_was_audited(tmp_path):
    data = make_audit(tmp_path)
    data = replace(data.select([*range(40), 0]), names=[f"row {row}" for row in range(41)])
    made = replace(Audit.load(tmp_path), names=data.names[:40])
    replace(made, settings={"data_fingerprint": data.select(range(40)).fingerprint}).save(tmp_path)
    assert read_run(Parts(audit=tmp_path, data=data)).rows == list(range(40))
    other_captions = replace(data, captions=[*data.captions[:39], LAND, LAND])
    other_images = replace(data.select([*range(39), 0, 40]), captions=data.captions, names=data.names)
    for others in (other_captions, other_images):
        with pytest.raises(AuditError, match="Expected the images that were audited"):
            read_run(Parts(audit=tmp_path, data=others))
    assert read_run(Parts(audit=tmp_path, data=data.select(reversed(range(41))))).rows == list(range(40, 0, -1))
    repaired = {"data_fingerprint": data.fingerprint}  # of 41 files, one of which was damaged
    replace(made, settings=repaired, unreadable={"row 40": "damaged"}).save(tmp_path)
    assert read_run(Parts(audit=tmp_path, data=data.select(range(40)))).rows == list(range(40))


def test_audited_images_outside_the_data_are_not_shown(finished, tmp_path):
    shutil.copytree(finished / "data", tmp_path / "data")
    Image.new("RGB", (12, 12), (1, 2, 3)).save(tmp_path / "private.png")
    (link := tmp_path / "data" / "images" / "0-19.png").unlink()
    link.symlink_to(tmp_path / "private.png")
    page, twin = report(tmp_path / "out", audit=finished / "audit", data=tmp_path / "data")
    assert not any("images/0-19.png" in alt for alt in page.values("alt"))
    assert sum("typical of group 1: images/0-" in alt for alt in page.values("alt")) == 1
    for text in (page.words, twin):
        assert "1 of 40 images is not shown here: its file lies outside the data's folder" in text
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.html", "report.md"]


def everything(folder):
    return "".join((folder / name).read_text(encoding="utf-8") for name in ("report.html", "report.md"))


def test_no_path_of_the_machine_is_written(run, tmp_path):
    audit = json.loads((run / "audit" / "audit.json").read_text())
    audit["settings"] = {"vision_encoder": str(tmp_path / "encoders" / "dino"), "seed": 4, "max_groups": 5}
    (run / "audit" / "audit.json").write_text(json.dumps(audit))
    settings = {"prompts": [LAND], "guidance_scale": 1.0, "seed": 2, "module": None}
    (run / "images" / "base-cfg-1" / "generate.json").write_text(json.dumps(settings))
    succeed("report", run, "--output", tmp_path / "out")
    page = Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    assert str(tmp_path) not in everything(tmp_path / "out")
    assert "invdiff audit org/birds data --output audit --max-groups 5 --vision-encoder dino --seed 4" in page.words
    drawn = f"invdiff generate org/birds '{LAND}' --output images/base-cfg-1 --guidance-scale 1 --seed 2"
    assert drawn in page.words
    assert "Run the evaluation below again with --reference." in page.words
    assert not re.search("DATA|SETTINGS", page.words)


def test_data_is_called_as_it_was_typed(run, tmp_path, monkeypatch):
    (run / "data").rename(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    succeed("report", "run", "--data", "photos", "--max-unreadable", 0.5, "--output", "out")
    told = everything(tmp_path / "out")
    assert "invdiff audit org/birds photos --max-unreadable 0.5 --output run/audit" in told
    assert "invdiff train org/birds photos run/audit --output run/module --max-unreadable 0.5 --steps 77" in told


def test_only_folders_that_the_results_can_be_of_are_shown(tmp_path):
    scales = {"base": 0, "guided": 0.5, "guided-cfg-3": 0.5, "guided-cfg-7.5": 1, "guided-0.5": 0.5, "guided-1": 1}
    made = {name: make_images(tmp_path / name, {LAND: 9}, scale=scale) for name, scale in scales.items()}
    shown = {"guided": [], "guided-1": ["guided-1"], "mine": []}  # either folder of guided may be the measured one
    for name, folders in shown.items():
        measured({"base": made["base"], name: made.get(name, made["guided-0.5"])}).save(tmp_path / "results.json")
        found = read_run(find_parts(tmp_path)).images
        assert found.keys() == ({"base", name} if folders else {"base"})
        assert not folders or found[name].folders == folders


def test_images_drawn_anew_since_they_were_measured_are_left_out_and_it_is_said(run, tmp_path):
    shutil.rmtree(run / "images" / "guided-cfg-3")
    make_images(run / "images" / "guided-cfg-3", {LAND: 7, "a photo of a doctor": 7}, count=7)
    found = read_run(find_parts(run))
    assert {name: of.folders for name, of in found.images.items()}["guided"] == ["images/guided-cfg-1"]
    page, _ = report(tmp_path / "out", **vars(find_parts(run)))
    assert "Images of images/guided-cfg-3 are not shown: they are not those that were measured." in page.words


def test_images_are_ranked_from_their_group_s_side():
    for weights, scores, typical, uncertain in (
        (np.eye(2)[[0, 0, 0, 1, 1, 1]], [-3, -1, 0, 4, 5, 9], [[0, 1, 2], [5, 4, 3]], [[2, 1, 0], [3, 4, 5]]),
        (np.eye(2)[[0, 0, 1, 1]], [9, 5, -3, -1], [[0, 1], [2, 3]], [[1, 0], [3, 2]]),  # by scores, not numbers
        (np.eye(3)[[0, 1, 1, 1, 2]], [0, 10, 11, 13, 20], [[0], [2, 1, 3], [4]], [[0], [3, 2, 1], [4]]),
        (np.array([[0.9, 0.1], [0.6, 0.4], [0.1, 0.9]]), [1, -5, 7], [[0, 1], [2]], [[1, 0], [2]]),  # by weights first
    ):
        groups = rank_groups(weights, np.array(scores, float), np.arange(len(scores)) + 10, "abc"[: weights.shape[1]])
        assert [[place - 10 for place in group.typical] for group in groups] == typical
        assert [[place - 10 for place in group.uncertain] for group in groups] == uncertain
