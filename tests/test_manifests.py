"""Folders of images that are evaluated, and files of results: what is read, left out, corrected and refused."""

import csv
import functools
import json
import operator
import shutil

import numpy as np
import pytest
from PIL import Image

from conftest import write_tiny_folder
from invdiff import Results, load_captioned_images
from invdiff.errors import DataError, EvaluationError, InvDiffError
from invdiff.evaluation.annotate import describe_images
from invdiff.evaluation.annotators.labels import GivenLabels
from invdiff.evaluation.fairness.correction import correct_for_annotator
from invdiff.evaluation.images import read_images
from invdiff.report.read import measured
from runs import LAND, WATER
from test_evaluate import LAND_ROWS, ROWS, ReadsPixels, change_rows, measure, of_base, waver, write


def test_one_label_and_one_prompt_in_several_spellings_are_one(tmp_path):
    for name, spelled in (("base", [0, 1]), ("guided", [0.0, 1.0]), ("text", ["0.0", "1"])):
        write(tmp_path / name, ROWS)
        labels = {i: {"male": spelled[i % 2], "prompt": (3, "3")[i % 2], "seed": float(i)} for i in range(8)}
        change_rows(tmp_path / name, labels)
    folders = {name: tmp_path / name for name in ("base", "guided", "text")}
    found = measure(folders, GivenLabels(["male"]), attribute="male", target={"0.0": 0.5, "1": 0.5})
    for measures in found.at("1.0").values():
        assert (measures.first.counts, measures.bias) == ({"3": {"0": 4, "1": 4}}, 0)
    with pytest.raises(EvaluationError, match=r"a target share for each class of male .*, got 0\.0, 0, 1"):
        measure(folders, GivenLabels(["male"]), attribute="male", target={"0.0": 0.25, "0": 0.25, "1": 0.5})


def test_a_prompt_may_hold_any_line_break_and_is_one_cell_of_the_table(tmp_path):
    prompt = 'a "bird"\r, or\n<two>\u2028on land'
    folder = write(tmp_path / "base", [(prompt, 1, "land", "landbird")] * 2)
    manifest = folder / "manifest.jsonl"
    manifest.write_text(manifest.read_text().replace("\\u2028", "\u2028"), encoding="utf-8")
    results = measure(folder)
    assert list(results.models["base"]["1.0"].shares) == [prompt]
    results.save(tmp_path / "r.json")
    with (tmp_path / "r.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["of"] for row in rows if row["kind"] == "count"} == {f"prompt: {prompt}"}
    assert all(None not in row for row in rows)


def test_links_inside_the_folder_or_into_the_hub_s_cache_are_read(base, tmp_path):
    (base / "again.png").symlink_to(base / "00000" / "000002.png")
    change_rows(base, {2: {"file_name": "again.png"}, 3: {"file_name": str(base / "00000" / "000003.png")}})
    expected = measure({"base": base}).to_dict()
    snapshot, blobs = tmp_path / "birds" / "snapshots" / "digest", tmp_path / "birds" / "blobs"
    shutil.copytree(base, blobs)
    write(snapshot, ROWS)
    for path in (blobs / "00000").iterdir():
        (snapshot / "00000" / path.name).unlink()
        (snapshot / "00000" / path.name).symlink_to(path)
    (tmp_path / "link").symlink_to(snapshot)
    assert measure({"base": snapshot}).to_dict() == measure({"base": tmp_path / "link"}).to_dict() == expected


@pytest.mark.parametrize("name", ["{outside}/private.png", "link.png"])
def test_an_image_outside_its_folder_is_refused(base, name):
    # Else another person's manifest brings a private picture into figures and reports.
    Image.new("RGB", (4, 4)).save(base.parent / "private.png")
    (base / "link.png").symlink_to(base.parent / "private.png")
    change_rows(base, {2: {"file_name": name.format(outside=base.parent)}})
    with pytest.raises(EvaluationError, match=r"inside .*base, found .*line 3 of .*which lies outside"):
        measure({"base": base})


BAD_NUMBERS = ('"x", "scale": "strong"', '"x", "guidance_scale": NaN', f'"x", "scale": 1{"0" * 400}')
BAD_PROMPTS = ("null", "[3]", '"\\ud800"', *BAD_NUMBERS)


def _append(line):
    return lambda base: (base / "manifest.jsonl").write_text((base / "manifest.jsonl").read_text() + line)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        *((_append(line), "line 9 of") for line in ('{"prompt": "x"}', '{"file_name": "a.png"}')),
        *((_append(f'{{"file_name": "x", "prompt": {text}}}'), "line 9 of") for text in BAD_PROMPTS),
        (lambda base: (base / "manifest.jsonl").unlink(), "Expected manifest.jsonl in .*, found none"),
        (lambda base: (base / "00000" / "000003.png").unlink(), r"found 1 absent, first .*000003.png"),
        (lambda base: (base / "00000" / "000003.png").write_bytes(b"no"), "not read the image .*000003.png"),
        (lambda base: change_rows(base, {0: {"file_name": "x" * 10_000}}), "found 1 absent"),
        (lambda base: change_rows(base, {1: {"file_name": "00000/../00000/000000.png"}}), "once.*000000.png again"),
        (lambda base: change_rows(base, [{"prompt": LAND}] * 7), f"found 1 of '{WATER}' at guidance scale 1.0"),
        (lambda base: change_rows(base, {0: {"scale": 0.5}}), r"found \[0.5, 1.0\]. Generate each scale"),
    ],
)
def test_damaged_folders_are_refused_with_the_place_of_the_fault(base, damage, message):
    damage(base)
    with pytest.raises(InvDiffError, match=message):
        measure({"base": base})


def test_models_that_do_not_fit_together_are_refused(base, tmp_path):
    other = write(tmp_path / "guided", LAND_ROWS, scale=0.5)
    again = shutil.copytree(base, tmp_path / "again")
    for images, message in (
        ({}, "at least one folder"),
        ({"base": []}, "at least one folder"),
        ({"base": base, "guided": other}, f"none of '{WATER}' in guided"),
        ({"base": [base, base]}, "each image once in .* and "),
        ({"base": [base, again]}, "different images in .* again as .*, of the same prompt and seed. A copy is"),
        ({"base": [base, other]}, r"one module scale in .* and .*, found \[0.5, 1.0\]"),
    ):
        with pytest.raises(EvaluationError, match=message):
            measure(images)


def test_results_come_back_from_their_file_and_the_table_lies_beside(base, tmp_path):
    theirs = write(tmp_path / "theirs", ROWS, scale=None)
    settings = {"subject_attribute": "subject", "target": {"land": 0.3, "water": 0.7}}
    results = measure({"base": base, "theirs": theirs}, **settings)
    assert results.module_scales == {"base": 1.0}
    results.save(tmp_path / "v1.5")
    assert Results.load(tmp_path / "v1.5") == results
    with (tmp_path / "v1.5.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    bias = next(row for row in rows if row["figure"] == "bias" and row["of"] == "all images")
    assert (bias["model"], bias["guidance_scale"], float(bias["value"])) == ("base", "1.0", 0.25)
    assert {row["kind"] for row in rows} == {"count", "fairness", "quality", "group", "preservation"}
    assert {"subject right", f"prompt: {LAND}", "group: water"} <= {row["of"] for row in rows}
    with pytest.raises(EvaluationError, match=r"Expected a .json file"):
        results.save(tmp_path / "results.csv")
    (tmp_path / "mine.csv").write_text("my,table\n")
    with pytest.raises(EvaluationError, match=r"mine\.csv to be of earlier results, found another table"):
        results.save(tmp_path / "mine.json")
    (tmp_path / "audit.json").write_text('{"settings": {}}\n')
    with pytest.raises(EvaluationError, match=r"audit\.json to be earlier results, found another file"):
        results.save(tmp_path / "audit.json")
    results.save(tmp_path / "v1.5")  # again


def test_damaged_results_are_refused_with_the_place_of_the_fault(base, tmp_path):
    for path, value, message in (
        ("models", [], "expected a mapping in 'models', got []"),
        ("models", {}, "measures of base, found none"),
        ("baseline", "absent", "measures of absent, found none"),
        ("models/base/1.0", {"bias": 1.0}, "images_per_prompt"),
        ("models/base", {"x": "1.0"}, "'x' in 'base' in 'models'"),
        ("models/base/1.0/attributes", {}, "StopIteration"),
        ("models/base/1.0/attributes/background/overall/bias/high", float("nan"), "'high' in 'bias' in 'overall'"),
        ("models/base/1.0/attributes/background/counts", {LAND: {"land": 0}}, "division by zero"),
        ("module_scales", {"base": "strong"}, "'base' in 'module_scales'"),
    ):
        document = measure({"base": base}).to_dict()
        *parents, last = path.split("/")
        functools.reduce(operator.getitem, parents, document)[last] = value
        (tmp_path / "results.json").write_text(json.dumps(document))
        with pytest.raises(EvaluationError, match=r"results.json: Expected .*(?i:evaluate again)") as raised:
            Results.load(tmp_path / "results.json")
        assert message in str(raised.value)


def test_a_reference_may_be_captioned_images_of_which_as_many_are_unreadable_as_it_allows(base, tmp_path):
    folder = write_tiny_folder(tmp_path / "photos")
    (folder / "03.png").write_bytes(b"not a picture")
    results = measure({"base": base}, reference=load_captioned_images(folder, max_unreadable=0.1))
    assert results.reference_images == 11
    assert any("1 of 12 images could not be read and is left out: 03.png (not an" in note for note in results.notes)
    assert results.models["base"]["1.0"].frechet > 0
    with pytest.raises(DataError, match=r"03.png"):
        measure({"base": base}, reference=load_captioned_images(folder))


def test_features_that_are_not_finite_are_refused_by_the_image(base):
    def spoil(seen):
        seen.features[:] = np.where(seen.features[:, :1] == 20 / 255, np.nan, seen.features)

    with pytest.raises(EvaluationError, match=r"from pixels, got NaN or infinity for .*000002.png"):
        of_base(base, ReadsPixels(change=spoil))
    images = [Image.new("RGB", (4, 4), (0, 0, 20 * (i == 70))) for i in range(80)]
    with pytest.raises(EvaluationError, match="for image 70"):
        describe_images(images, ReadsPixels(change=spoil))


def test_images_below_the_confidence_are_a_class_of_their_own(base):
    assert of_base(base, min_confidence=0.5).first.counts[LAND] == {"land": 3, "water": 1, "cannot tell": 0}
    wavering = of_base(base, ReadsPixels(change=waver), min_confidence=0.6).first
    assert wavering.counts[LAND] == {"land": 2, "water": 1, "cannot tell": 1}
    assert wavering.shares[LAND] == pytest.approx({"land": 2 / 3, "water": 1 / 3})
    with pytest.raises(EvaluationError, match="have classes of background in every model, found none"):
        of_base(base, ReadsPixels(certainty=0.9), min_confidence=0.95)


def test_figures_are_corrected_where_the_annotators_errors_are_known(base, tmp_path):
    confusion = np.array([[90, 10, 0], [10, 90, 0]])
    results = measure({"base": base}, ReadsPixels(confusion))
    estimate = results.models["base"]["1.0"].bias_estimate
    corrected = correct_for_annotator([[3, 1], [2, 2]], confusion[:, :2])
    assert estimate.corrected == pytest.approx(np.mean(np.abs(corrected[:, 0] - corrected[:, 1]) / 4))
    assert estimate.corrected_low <= estimate.corrected <= estimate.corrected_high
    assert results.annotator.accuracy == {"background": 0.9}
    assert not any("errs" in note for note in results.notes)
    confusion = np.array([[80, 10, 10], [5, 90, 5]])  # images without a class count too
    folder = write(tmp_path / "unsure", LAND_ROWS)
    results = measure({"base": folder}, ReadsPixels(confusion, change=waver), min_confidence=0.6)
    corrected = correct_for_annotator([[2, 1, 1]], confusion)[0]
    expected = abs(corrected[0] - corrected[1]) / corrected.sum()
    assert results.models["base"]["1.0"].bias_estimate.corrected == pytest.approx(expected)
    assert results.annotator.accuracy["background"] == pytest.approx(170 / 185)  # of the images that it names


def test_images_without_a_class_are_counted_in_a_note_and_a_prompt_of_them_alone_is_left_out(tmp_path):
    folder = write(tmp_path / "base", ROWS)
    rows = [{"background": background} for _, _, background, _ in ROWS]
    change_rows(folder, [{"background": ""} if number in (0, 4, 5, 6, 7) else row for number, row in enumerate(rows)])
    results = measure({"base": folder}, GivenLabels(["background"]))
    first = results.models["base"]["1.0"].first
    assert list(first.counts) == [LAND]
    assert first.overall["bias"].value == pytest.approx(1 / 3)
    assert any("outside its figures: 1 of 4 of base at guidance scale 1.0" in note for note in results.notes)
    told = "leave out 1 of 2 prompts, of which nothing is told in some model's images, first "
    assert any(told + repr(WATER) in note for note in results.notes)
    # Models are compared on the same prompts, and what was measured is known as such.
    whole = change_rows(write(tmp_path / "guided", ROWS), rows)
    both = measure({"base": folder, "guided": whole}, GivenLabels(["background"]))
    assert [list(measures.first.counts) for *_, measures in both.each()] == [[LAND], [LAND]]
    assert measured(both, "base", read_images(folder))


def test_two_attributes_that_no_image_has_both_of_have_no_intersection_and_it_is_said(tmp_path):
    one, other = {"background": "land", "kind": ""}, {"background": "", "kind": "a"}
    rows = [one, one | {"background": "water"}, other, other | {"kind": "b"}] * 2
    folder = change_rows(write(tmp_path / "base", ROWS), rows)
    results = measure({"base": folder}, GivenLabels(["background", "kind"]), attribute=["background", "kind"])
    assert list(results.models["base"]["1.0"].attributes) == ["background", "kind"]
    assert any("figures of the intersection leave out 2 of 2 prompts" in note for note in results.notes)
