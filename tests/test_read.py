"""The parts of a report, and what stays where it is: labels, private files, paths of the machine."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from conftest import made_up_measures
from invdiff import cli
from invdiff.auditing.edits import Edits, apply
from invdiff.auditing.result import Audit
from invdiff.errors import EvaluationError
from invdiff.evaluation.quality.intervals import share_interval
from invdiff.evaluation.results import Results
from invdiff.report.figures import percent
from invdiff.report.read import Parts, read_run
from invdiff.report.results_view import training_labels
from runs import LAND, WATER, Page, make_audit, make_images, make_run, report

SECRET = (1, 2, 3)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, whose data has no labels; read only."""
    folder = tmp_path_factory.mktemp("run")
    make_run(folder)
    return folder


def labelled(run: Path, folder: Path, values: Sequence[Any], *, column: str = "background") -> dict[str, Any]:
    """Return the run's parts with a column of 40 values in the data."""
    shutil.copytree(run / "data", folder)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    rows = [row | {column: value} for row, value in zip(rows, values, strict=True)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    images = {name: [run / "images" / f"{name}-cfg-{scale}" for scale in (1, 3)] for name in ("base", "guided")}
    return {"audit": run / "audit", "data": folder, "results": run / "results.json", "images": images}


# Labels of the data.


def counts(folder: Path, values: Sequence[Any], *, column: str = "background", edits: Edits | None = None) -> Any:
    """Caption to classes of 40 images with these labels, 20 under each of two prompts, in another order."""
    make_audit(folder)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    rows = [row | {column: value} for row, value in zip(rows, values, strict=True)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))
    audit = json.loads((folder / "audit.json").read_text())
    audit["prompts"][0]["captions"].append("a nice landbird")
    audit["prompts"][1]["found"] = False  # counted although it hides nothing
    (folder / "audit.json").write_text(json.dumps(audit))
    if edits:
        apply(Audit.load(folder), edits).save_edits(folder)
    run = read_run(Parts(audit=folder, data=folder))
    assert training_labels(run) == {}
    measures = made_up_measures(0.5, interval=(0.4, 0.6), floor=0.1)
    return training_labels(replace(run, results=Results({"base": {"3.0": measures}}, attribute="background")))


def test_labels_are_counted_under_all_captions_of_a_prompt(tmp_path: Path) -> None:
    found = counts(tmp_path, ["land"] * 10 + ["sea"] * 6 + ["", None, "cannot tell", float("nan")] + ["water"] * 20)
    assert found == {
        LAND: {"land": 10, "sea": 6},
        "a nice landbird": {"land": 10, "sea": 6},
        WATER: {"water": 20},
    }


def test_labels_of_images_left_out_are_not_counted(tmp_path: Path) -> None:
    found = counts(tmp_path, ["land"] * 20 + ["water"] * 20, edits=Edits().without_images([0, 3, 25]))
    assert (found[LAND], found[WATER]) == ({"land": 18}, {"water": 19})


@pytest.mark.parametrize(("values", "column"), [(["land"] * 40, "colour"), (["Land", "land "] * 20, "background")])
def test_other_columns_and_classes_are_no_labels(tmp_path: Path, values: list[str], column: str) -> None:
    assert counts(tmp_path, values, column=column) == {}


def test_training_data_stands_first_among_the_bars_of_a_class(run: Path, tmp_path: Path) -> None:
    parts = labelled(run, tmp_path / "data", ["land"] * 17 + ["water"] * 3 + ["water"] * 20)
    page, twin = report(tmp_path / "out", **parts)
    low, high = (percent(end) for end in share_interval(17, 20))
    assert f"land target 50% Training data 85% {low} to {high} Base model 90%" in " ".join(page.text.split())
    assert "| Prompt | Class | Training data | Base model | With guidance | Target |" in twin
    assert f"| {LAND} | land | 85% ({low} to {high}) | 90% (" in twin
    for text in (page.words, twin):
        assert "counts of the data's own column “background”, which was read for this report only" in text
        assert "Training data: 20 labelled images under this prompt." in text
        assert "labels that somebody wrote down" in text
        assert "the audit's groups" not in text


def test_without_labels_the_audit_s_groups_stand_for_the_data(run: Path, tmp_path: Path) -> None:
    parts = labelled(run, tmp_path / "data", ["land"] * 40, column="colour")
    page, twin = report(tmp_path / "out", **parts)
    assert "| Prompt | Data (the audit's groups) | Class | Base model | With guidance | Target |" in twin
    for text in (page.words, twin):
        assert "Training data" not in text
        assert "the audit's groups" in text
        assert "for your eyes to judge" in text


def test_a_prompt_without_labels_keeps_the_audit_s_groups(run: Path, tmp_path: Path) -> None:
    parts = labelled(run, tmp_path / "data", ["land"] * 20 + [""] * 20)
    page, twin = report(tmp_path / "out", **parts)
    assert page.words.count("Training data 100%") == 1
    assert page.text.count("In the training images: the audit's groups") == 1
    (row,) = (line for line in twin.splitlines() if line.startswith(f"| {WATER} | group"))
    assert " | – | " in row


def test_hostile_labels_are_text(run: Path, tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script>|`\n\n# \u202ex" + "y" * 10_000
    harmless = labelled(run, tmp_path / "a", ["land"] * 19 + ["else"] + ["water"] * 20)
    parts = labelled(run, tmp_path / "b", ["land"] * 19 + [hostile] + ["water"] * 20)
    expected, markdown = report(tmp_path / "harmless", **harmless)
    page, twin = report(tmp_path / "hostile", **parts)
    assert [tag for tag, _ in page.elements] == [tag for tag, _ in expected.elements]
    assert twin.count("\n") == markdown.count("\n")
    assert "<script>alert(1)</script>|`" in page.text
    assert "y" * 301 not in twin + page.text
    assert "\u202e" not in twin + page.text


# Private files.


def hide(secret: Path, link: Path) -> None:
    """Put a link to a private picture in the place of an image."""
    Image.new("RGB", (12, 12), SECRET).save(secret)
    link.unlink()
    link.symlink_to(secret)


def test_generated_images_outside_their_folder_are_refused(run: Path, tmp_path: Path) -> None:
    images = {name: make_images(tmp_path / name, {LAND: 18, WATER: 2}) for name in ("base", "guided")}
    hide(tmp_path / "private.png", images["guided"] / "0-3.png")
    with pytest.raises(EvaluationError, match=r"inside .*guided, found '0-3\.png'"):
        report(tmp_path / "out", audit=run / "audit", images=images)
    assert not (tmp_path / "out").exists()


def test_audited_images_outside_the_data_are_not_shown(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "data", tmp_path / "data")
    hide(tmp_path / "private.png", tmp_path / "data" / "images" / "0-19.png")
    page, twin = report(tmp_path / "out", audit=run / "audit", data=tmp_path / "data")
    assert not any("images/0-19.png" in alt for alt in page.values("alt"))
    assert sum("typical of group 1: images/0-" in alt for alt in page.values("alt")) == 1
    for text in (page.words, twin):
        assert "1 of 36 images is not shown here: its file lies outside the data's folder" in text
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.html", "report.md"]


def test_images_inside_the_data_are_all_shown(run: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(run / "data")
    page, twin = report(tmp_path / "out", audit=run / "audit", data=tmp_path / "link")
    assert "not shown" not in page.words + twin
    assert (tmp_path / "out" / "report-groups.png").is_file()


def test_the_audit_s_own_picture_is_no_link_to_another_file(tmp_path: Path) -> None:
    make_audit(tmp_path / "audit")
    (tmp_path / "private").write_bytes(b"private")
    (tmp_path / "audit" / "groups.png").write_bytes(b"picture")
    report(tmp_path / "own", audit=tmp_path / "audit")
    assert (tmp_path / "own" / "report-groups.png").read_bytes() == b"picture"
    (tmp_path / "audit" / "groups.png").unlink()
    (tmp_path / "audit" / "groups.png").symlink_to(tmp_path / "private")
    _, twin = report(tmp_path / "link", audit=tmp_path / "audit")
    assert "report-groups.png" not in twin
    assert not (tmp_path / "link" / "report-groups.png").exists()


# Paths.


def everything(folder: Path) -> str:
    return "".join((folder / name).read_text(encoding="utf-8") for name in ("report.html", "report.md"))


def test_no_path_of_the_machine_is_written(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    audit = json.loads((tmp_path / "run" / "audit" / "audit.json").read_text())
    audit["settings"] = {"vision_encoder": str(tmp_path / "encoders" / "dino"), "seed": 4, "max_groups": 5}
    (tmp_path / "run" / "audit" / "audit.json").write_text(json.dumps(audit))
    (tmp_path / "run" / "images" / "base-cfg-1" / "generate.json").write_text(
        json.dumps({"prompts": [LAND], "guidance_scale": 1.0, "seed": 2, "module": None})
    )
    words = ["report", str(tmp_path / "run"), "--output", str(tmp_path / "out")]
    assert CliRunner().invoke(cli.app, words, catch_exceptions=False).exit_code == 0
    page = Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    assert str(tmp_path) not in everything(tmp_path / "out")
    assert "invdiff audit org/birds data --output audit --max-groups 5 --vision-encoder dino --seed 4" in page.words
    drawn = f"invdiff generate org/birds '{LAND}' --output images/base-cfg-1 --guidance-scale 1 --seed 2"
    assert drawn in page.words
    assert "Run the evaluation below again with --reference." in page.words
    assert not re.search("DATA|SETTINGS", page.words)


def test_data_is_called_as_it_was_typed(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "data").rename(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    words = ["report", "run", "--data", "photos", "--max-unreadable", "0.5", "--output", "out"]
    assert CliRunner().invoke(cli.app, words, catch_exceptions=False).exit_code == 0
    told = everything(tmp_path / "out")
    assert "invdiff audit org/birds photos --max-unreadable 0.5 --output run/audit" in told
    assert "invdiff train org/birds photos run/audit --output run/module --max-unreadable 0.5 --steps 77" in told


def test_parts_elsewhere_are_called_by_their_last_name(run: Path, tmp_path: Path) -> None:
    images = {"base": run / "images" / "base-cfg-1", "guided": run / "images" / "guided-cfg-1"}
    report(tmp_path / "out", audit=run / "audit", data=run / "data", results=run / "results.json", images=images)
    told = everything(tmp_path / "out")
    assert "invdiff audit MODEL data --output audit" in told
    assert "invdiff evaluate base=base-cfg-1 guided=guided-cfg-1 --annotator labels" in told
    assert str(run) not in told
