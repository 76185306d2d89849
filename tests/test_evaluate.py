import csv
import json
import sys

import numpy as np
import pytest
from PIL import Image

from conftest import write_tiny_folder
from invdiff.config import EvaluateConfig
from invdiff.data.captioned import load_captioned_images
from invdiff.errors import DataError, EvaluationError
from invdiff.evaluation.annotate import Described, describe_images
from invdiff.evaluation.annotators.annotations import Annotations
from invdiff.evaluation.annotators.given_labels import GivenLabels
from invdiff.evaluation.evaluate import evaluate
from invdiff.evaluation.fairness.correction import correct_for_annotator
from invdiff.evaluation.fairness.floors import metric_floor
from invdiff.evaluation.fairness.intervals import interval
from invdiff.evaluation.fairness.metrics import per_prompt
from invdiff.evaluation.quality.distances import frechet_distance
from invdiff.evaluation.results import Results

LAND, WATER = "a photo of a landbird", "a photo of a waterbird"
COLOURS = {"land": 0, "water": 255, "landbird": 0, "waterbird": 255}


class ReadsPixels:
    """Red tells the background, green the subject, blue is a feature."""

    name, feature_name = "reads pixels", "pixels"

    def __init__(self, confusion=None):
        self.attributes = {"background": ("land", "water"), "subject": ("bird", "landbird", "waterbird")}
        self.batches = []
        self.table = confusion
        self.certainty = 1.0

    def confusion(self, attribute, min_confidence=0.0):
        return self.table if attribute == "background" else None

    def predict(self, images):
        pixels = np.array([image.getpixel((0, 0)) for image in images])
        self.batches.append(len(pixels))
        background, subject = pixels[:, 0] > 127, 1 + (pixels[:, 1] > 127)
        return Annotations(
            attributes=self.attributes,
            probabilities={
                "background": self.certainty * np.eye(2)[background.astype(int)],
                "subject": np.eye(3)[subject],
            },
            features=np.stack([pixels[:, 2], pixels[:, 0], np.full(len(pixels), 9)], axis=1) / 255,
        )


class Wavers(ReadsPixels):
    """Cannot tell the background of the first image."""

    def predict(self, images):
        seen = super().predict(images)
        seen.probabilities["background"][0] = [0.55, 0.45]
        return seen


def write(folder, images, *, scale=1.0, **changes):
    """Write a folder from rows (prompt, guidance_scale, background, subject)."""
    lines = []
    for index, (prompt, guidance_scale, background, subject) in enumerate(images):
        name = f"00000/{index:06d}.png"
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (COLOURS[background], COLOURS[subject], 10 * index)).save(path)
        row = {"file_name": name, "prompt": prompt, "seed": index, "environment": None, "scale": scale}
        row |= {"guidance_scale": guidance_scale, "num_inference_steps": 5} | changes
        lines.append(json.dumps(row))
    (folder / "manifest.jsonl").write_text("\n".join(lines) + "\n")
    return folder


LAND_ROWS = [(LAND, 1, "land", "landbird")] * 3 + [(LAND, 1, "water", "waterbird")]
WATER_ROWS = [(WATER, 1, "water", "waterbird")] * 2 + [(WATER, 1, "land", "waterbird")] * 2
ROWS = LAND_ROWS + WATER_ROWS


def measure(images, annotator=None, *, attribute="background", reference=None, extractors=(), **settings):
    config = EvaluateConfig(**{"num_resamples": 50} | settings)
    judge = annotator or ReadsPixels()
    return evaluate(
        images, judge, attribute, reference=reference, extractors=extractors, config=config, progress=False
    )


@pytest.fixture
def base(tmp_path):
    return write(tmp_path / "base", ROWS)


def test_bias_floor_and_shares_are_those_worked_out_by_hand(base):
    values = measure({"base": base}).to_dict()["models"]["base"]["1.0"]
    assert values["bias"] == pytest.approx((0.5 + 0.0) / 2)
    assert values["bias_floor"] == pytest.approx(metric_floor("bias", 4, 2))
    assert values["shares"] == {LAND: {"land": 0.75, "water": 0.25}, WATER: {"land": 0.5, "water": 0.5}}
    assert values["images_per_prompt"] == 4


def test_intervals_hold_the_confidence_asked_for_and_are_repeatable(base):
    narrow = measure({"base": base}, confidence=0.6).models["base"]["1.0"].bias_ci
    wide = measure({"base": base}, confidence=0.99).models["base"]["1.0"].bias_ci
    assert wide[0] <= narrow[0] < narrow[1] < wide[1]
    assert measure({"base": base}, confidence=0.6).models["base"]["1.0"].bias_ci == narrow
    assert measure({"base": base}).to_dict()["confidence"] == 0.95
    assert interval("bias", [[3, 1], [2, 2]])[0] == 0


def test_accuracy_counts_the_subject_that_the_prompt_names(base):
    measures = measure({"base": base}, subject_attribute="subject").models["base"]["1.0"]
    assert measures.accuracy == pytest.approx(7 / 8)


def test_accuracy_follows_the_mapping_given_and_leaves_other_prompts_out(base):
    measures = measure({"base": base}, subject_attribute="subject", subject_of={LAND: "waterbird"})
    assert measures.models["base"]["1.0"].accuracy == pytest.approx(1 / 4)


def test_accuracy_is_none_where_no_prompt_names_a_subject(tmp_path):
    write(tmp_path / "base", [("seabirds and birdhouses", 1, "land", "landbird")] * 2)
    results = measure({"base": tmp_path / "base"}, subject_attribute="subject")
    assert results.models["base"]["1.0"].accuracy is None
    assert any(note.startswith("1 of 1 prompts name no class of subject") for note in results.notes)


def test_the_longest_class_name_in_the_prompt_is_the_subject(tmp_path):
    annotator = ReadsPixels()
    annotator.attributes = {"background": ("land", "water"), "subject": ("bird", "landbird", "water_bird")}
    rows = [("A Water Bird, no mere bird", 1, "water", "waterbird")] * 2
    results = measure(write(tmp_path / "base", rows), annotator, subject_attribute="subject")
    assert results.models["base"]["1.0"].accuracy == 1.0


def test_frechet_compares_the_annotators_features_with_the_reference(base):
    reference = np.random.default_rng(0).random((20, 3), dtype=np.float32)
    features = np.array([[10 * i, COLOURS[row[2]], 9] for i, row in enumerate(ROWS)]) / 255
    measures = measure({"base": base}, reference=Described({}, {}, {"pixels": reference})).models["base"]["1.0"]
    assert measures.frechet == pytest.approx(frechet_distance(features, reference), rel=1e-4)


def test_frechet_and_accuracy_are_none_unless_asked_for(base):
    measures = measure({"base": base}).models["base"]["1.0"]
    assert (measures.frechet, measures.accuracy) == (None, None)


def test_guidance_scales_are_measured_apart(tmp_path):
    rows = [(LAND, 3, "land", "landbird")] * 2 + [
        (LAND, 10.0, "land", "landbird"),
        (LAND, 10, "water", "landbird"),
    ]
    results = measure({"base": write(tmp_path / "base", rows)})
    assert {scale: m.bias for scale, m in results.models["base"].items()} == {"3.0": 1.0, "10.0": 0.0}


def test_prompts_may_differ_in_their_number_of_images(tmp_path):
    measures = measure(write(tmp_path / "base", ROWS[:-2])).models["base"]["1.0"]
    assert measures.images_per_prompt == 2
    assert measures.bias_floor == pytest.approx((metric_floor("bias", 4, 2) + metric_floor("bias", 2, 2)) / 2)


def test_each_image_is_annotated_once_in_batches_no_larger_than_asked(base):
    annotator = ReadsPixels()
    measure({"base": base}, annotator, batch_size=3)
    assert annotator.batches == [3, 3, 2]


def test_a_folder_of_folders_gives_each_its_name(base, tmp_path):
    write(tmp_path / "guided", ROWS, scale=0.5)
    assert list(measure(tmp_path).models) == ["base", "guided"]


def test_results_come_back_from_their_file(base, tmp_path):
    results = measure({"base": base}, subject_attribute="subject")
    results.save(tmp_path / "results.json")
    assert Results.load(tmp_path / "results.json") == results


def test_the_file_has_exactly_the_promised_keys(base, tmp_path):
    measure({"base": base}).save(tmp_path / "results.json")
    document = json.loads((tmp_path / "results.json").read_text())
    values = document["models"]["base"]["1.0"]
    headline = "bias bias_floor bias_ci accuracy frechet images_per_prompt shares"
    assert list(values) == [
        *headline.split(),
        "attributes",
        *["subject_accuracy", "quality", "by_group", "preservation"],
    ]
    about = "attribute subject_attribute classes annotator target baseline confidence reference_images notes models"
    assert set(document) == {*about.split(), "module_scales", "run"}
    assert len(values["bias_ci"]) == 2


@pytest.mark.parametrize("models", [[], {"base": 3}, {"base": {"1.0": {"bias": 1.0}}}, {"base": {"1.0": []}}])
def test_other_json_is_not_results(tmp_path, models):
    (tmp_path / "results.json").write_text(json.dumps({"models": models}))
    with pytest.raises(EvaluationError, match="Expected the results of an evaluation"):
        Results.load(tmp_path / "results.json")


def test_a_prompt_may_hold_any_line_separator(tmp_path):
    prompt = "a bird\u2028on land"
    write(tmp_path / "base", [(prompt, 1, "land", "landbird")] * 2)
    manifest = tmp_path / "base" / "manifest.jsonl"
    manifest.write_text(manifest.read_text().replace("\\u2028", "\u2028"), encoding="utf-8")
    assert list(measure(tmp_path / "base").models["base"]["1.0"].shares) == [prompt]


def test_no_folder_is_refused():
    with pytest.raises(EvaluationError, match="at least one folder"):
        measure({})


def test_a_folder_without_a_manifest_is_refused(tmp_path):
    with pytest.raises(EvaluationError, match=r"Expected manifest.jsonl in .*, found none"):
        measure({"base": tmp_path})


def test_an_empty_manifest_is_refused(tmp_path):
    (tmp_path / "manifest.jsonl").write_text("\n")
    with pytest.raises(EvaluationError, match=r"at least one image in .*manifest.jsonl, found no rows"):
        measure(tmp_path)


def test_a_manifest_in_another_encoding_is_refused(tmp_path):
    (tmp_path / "manifest.jsonl").write_bytes(b"\xff\xfe{}")
    with pytest.raises(EvaluationError, match="Expected UTF-8"):
        measure(tmp_path)


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '{"prompt": "x"}',
        '{"file_name": "a.png"}',
        '{"file_name": "a.png", "prompt": "x", "scale": "strong"}',
        '{"file_name": "a.png", "prompt": "x", "guidance_scale": NaN}',
    ],
)
def test_a_line_that_is_no_row_is_refused_by_its_number(base, line):
    with (base / "manifest.jsonl").open("a") as manifest:
        manifest.write(line)
    with pytest.raises(EvaluationError, match="line 9 of"):
        measure({"base": base})


def test_absent_images_are_refused_with_their_number_and_the_first(base):
    (base / "00000" / "000003.png").unlink()
    (base / "00000" / "000005.png").unlink()
    with pytest.raises(EvaluationError, match=r"found 2 absent, first .*000003.png"):
        measure({"base": base})


@pytest.mark.parametrize("name", ["../private.png", "00000/../../private.png", "{outside}/private.png", "link.png"])
def test_an_image_outside_its_folder_is_refused(base, name):
    # Else somebody's manifest brings a private picture into figures and reports.
    Image.new("RGB", (4, 4)).save(base.parent / "private.png")
    (base / "link.png").symlink_to(base.parent / "private.png")
    rows = [json.loads(line) for line in (base / "manifest.jsonl").read_text().splitlines()]
    rows[2]["file_name"] = name.format(outside=base.parent)
    (base / "manifest.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(EvaluationError, match=r"inside .*base, found .*line 3 of .*which lies outside"):
        measure({"base": base})


def test_a_folder_of_links_inside_it_or_of_the_hub_s_cache_is_read(base, tmp_path):
    (base / "again.png").symlink_to(base / "00000" / "000002.png")
    rows = [json.loads(line) for line in (base / "manifest.jsonl").read_text().splitlines()]
    rows[2]["file_name"] = "again.png"
    rows[3]["file_name"] = str(base / rows[3]["file_name"])
    (base / "manifest.jsonl").write_text("\n".join(map(json.dumps, rows)))
    expected = measure({"base": base}).to_dict()
    snapshot = tmp_path / "datasets--org--birds" / "snapshots" / "digest"
    snapshot.mkdir(parents=True)
    (tmp_path / "link").symlink_to(snapshot)
    blobs = snapshot.parents[1] / "blobs"
    blobs.mkdir()
    for place, row in enumerate(rows):
        (blobs / str(place)).write_bytes((base / row["file_name"]).read_bytes())
        (snapshot / f"{place}.png").symlink_to(blobs / str(place))
        row["file_name"] = f"{place}.png"
    (snapshot / "manifest.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for folder in (snapshot, tmp_path / "link"):
        assert measure({"base": folder}).to_dict() == expected


def test_a_name_too_long_for_a_file_is_an_absent_image(base):
    rows = [json.loads(line) for line in (base / "manifest.jsonl").read_text().splitlines()]
    rows[0]["file_name"] = "x" * 10_000
    (base / "manifest.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(EvaluationError, match="found 1 absent"):
        measure({"base": base})


def test_the_module_s_scale_of_each_model_is_recorded(base, tmp_path):
    weak, theirs = write(tmp_path / "weak", ROWS, scale=0.5), write(tmp_path / "theirs", ROWS, scale=None)
    results = measure({"base": base, "weak": weak, "theirs": theirs})
    assert results.module_scales == {"base": 1.0, "weak": 0.5}
    results.save(tmp_path / "results.json")
    assert Results.load(tmp_path / "results.json") == results


@pytest.mark.parametrize("scales", [3, {"base": "strong"}, {"base": None}])
def test_damaged_module_scales_are_refused(base, tmp_path, scales):
    document = measure({"base": base}).to_dict() | {"module_scales": scales}
    (tmp_path / "results.json").write_text(json.dumps(document))
    with pytest.raises(EvaluationError, match="Expected the results of an evaluation"):
        Results.load(tmp_path / "results.json")


def test_a_damaged_image_is_refused(base):
    (base / "00000" / "000003.png").write_bytes(b"not a picture")
    with pytest.raises(DataError, match=r"not read the image .*000003.png"):
        measure({"base": base})


def test_an_image_listed_twice_is_refused(base):
    manifest = base / "manifest.jsonl"
    manifest.write_text(manifest.read_text() * 2)
    with pytest.raises(EvaluationError, match=r"each image once.*000000.png again"):
        measure({"base": base})


def test_an_empty_prompt_folder_is_refused(base):
    (base / "00001").mkdir()
    with pytest.raises(EvaluationError, match=r"Expected images in .*00001, found none"):
        measure({"base": base})


def test_one_image_of_a_prompt_is_too_few(tmp_path):
    with pytest.raises(EvaluationError, match=f"found 1 of '{WATER}' at guidance scale 1.0"):
        measure(write(tmp_path / "base", ROWS[:5]))


def test_mixed_module_scales_are_refused_with_the_way_to_separate_them(base):
    manifest = base / "manifest.jsonl"
    manifest.write_text(manifest.read_text().replace('"scale": 1.0', '"scale": 0.5', 1))
    with pytest.raises(EvaluationError, match=r"found \[0.5, 1.0\]. Generate each scale into a folder of its own"):
        measure({"base": base})


def test_models_with_different_prompts_are_not_compared(base, tmp_path):
    write(tmp_path / "guided", LAND_ROWS)
    with pytest.raises(EvaluationError, match=f"none of '{WATER}' in guided"):
        measure(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attribute": "age"}, "got 'age'; it knows background, subject"),
        ({"subject_attribute": "age"}, "got 'age'; it knows background, subject"),
        ({"subject_attribute": "subject", "subject_of": {LAND: "cat"}}, "got 'cat'"),
    ],
)
def test_settings_that_do_not_fit_the_annotator_are_refused(base, settings, message):
    with pytest.raises(EvaluationError, match=message):
        measure({"base": base}, **settings)


def test_images_below_the_confidence_are_counted_as_a_class_of_their_own(base):
    annotator = ReadsPixels()
    certain = measure({"base": base}, annotator, min_confidence=0.5).models["base"]["1.0"].first.counts
    assert certain[LAND] == {"land": 3, "water": 1, "cannot tell": 0}
    annotator.certainty = 0.9
    with pytest.raises(EvaluationError, match=r"with a class of background, found none at a confidence of 0.95"):
        measure({"base": base}, annotator, min_confidence=0.95)


def test_an_unsure_image_is_outside_the_shares(tmp_path):
    measures = measure(write(tmp_path / "base", ROWS), Wavers(), min_confidence=0.6).models["base"]["1.0"]
    assert measures.first.counts[LAND] == {"land": 2, "water": 1, "cannot tell": 1}
    assert measures.first.shares[LAND] == pytest.approx({"land": 2 / 3, "water": 1 / 3})


def test_figures_are_corrected_where_the_annotators_errors_are_known(base):
    confusion = np.array([[90, 10, 0], [10, 90, 0]])
    results = measure({"base": base}, ReadsPixels(confusion))
    estimate = results.models["base"]["1.0"].first.overall["bias"]
    corrected = correct_for_annotator([[3, 1], [2, 2]], confusion[:, :2])
    assert estimate.corrected == pytest.approx(np.mean(np.abs(corrected[:, 0] - corrected[:, 1]) / 4))
    assert estimate.corrected > estimate.value
    assert estimate.corrected_low <= estimate.corrected <= estimate.corrected_high
    assert results.annotator.accuracy == {"background": 0.9}
    assert not any("errs" in note for note in results.notes)


def test_an_annotator_that_cannot_tell_the_classes_apart_corrects_nothing_and_it_is_said(base):
    results = measure({"base": base}, ReadsPixels(np.array([[50, 50, 0], [50, 50, 0]])))
    assert results.models["base"]["1.0"].first.overall["bias"].corrected is None
    assert results.annotator.accuracy == {"background": 0.5}
    assert any(note.startswith("no figure of background is corrected for the errors of") for note in results.notes)


def test_an_annotator_of_unknown_errors_is_said_to_be_one(base):
    results = measure({"base": base})
    assert results.models["base"]["1.0"].first.overall["bias"].corrected is None
    assert any("how reads pixels errs on background is not known" in note for note in results.notes)


def test_a_class_never_drawn_is_said(tmp_path):
    results = measure(write(tmp_path / "base", [(LAND, 1, "land", "landbird")] * 4))
    assert results.models["base"]["1.0"].bias == 1.0
    assert "no image of any model was annotated 'water' (background)" in results.notes


def test_figures_among_images_whose_subject_is_right(base):
    measures = measure({"base": base}, subject_attribute="subject").models["base"]["1.0"]
    # Under "landbird" the one image on water shows a waterbird.
    assert measures.first.subject_right["bias"].value == pytest.approx((1.0 + 0.0) / 2)
    assert measures.first.overall["bias"].value == pytest.approx((0.5 + 0.0) / 2)


def test_a_prompt_without_a_right_image_is_left_out_and_said(tmp_path):
    rows = [(LAND, 1, "land", "waterbird")] * 2 + [(WATER, 1, "land", "waterbird")] * 2
    results = measure(write(tmp_path / "b", rows), subject_attribute="subject")
    first = results.models["b"]["1.0"].first
    assert first.subject_right["bias"].value == 1.0
    assert f"leave out 1 of 2 prompts that have none, first '{LAND}'" in first.note
    assert any(first.note in note for note in results.notes)


def test_every_prompt_has_figures_of_its_own(base):
    by_prompt = measure({"base": base}).models["base"]["1.0"].first.by_prompt
    assert {prompt: estimates["bias"].value for prompt, estimates in by_prompt.items()} == {LAND: 0.5, WATER: 0.0}


def test_several_attributes_are_measured_each_and_together(base):
    measures = measure({"base": base}, attribute=["background", "subject"]).models["base"]["1.0"]
    assert list(measures.attributes) == ["background", "subject", "background x subject"]
    joint = measures.attributes["background x subject"].counts[LAND]
    assert {name: count for name, count in joint.items() if count} == {"land x landbird": 3, "water x waterbird": 1}
    assert measures.bias == pytest.approx(0.25)


def test_a_target_mix_is_what_distances_are_measured_against(base):
    target = {"water": 0.25, "land": 0.75}
    expected = per_prompt("kl_to_target", [[3, 1], [2, 2]], target=[0.75, 0.25]).mean()
    first = measure({"base": base}, target=target).models["base"]["1.0"].first
    assert first.overall["kl_to_target"].value == pytest.approx(expected)
    assert first.by_prompt[LAND]["fairness_discrepancy"].value == pytest.approx(0.0)
    assert first.overall["bias"].value == pytest.approx(0.25)


def test_the_softmax_form_is_of_mean_probabilities(base):
    class Hedges(ReadsPixels):
        def predict(self, images):
            seen = super().predict(images)
            seen.probabilities["background"][:] = 0.8 * seen.probabilities["background"] + 0.1
            return seen

    first = measure({"base": base}, Hedges()).models["base"]["1.0"].first
    softmax = first.softmax_discrepancy
    assert first.overall["fairness_discrepancy"].value == pytest.approx(np.hypot(0.25, 0.25) / 2)
    assert softmax.value == pytest.approx(0.8 * np.hypot(0.25, 0.25) / 2)
    assert 0 <= softmax.low <= softmax.value <= softmax.high
    floor = metric_floor("fairness_discrepancy", 4, 2)
    assert f"floor ({floor:.3g}) are those of labels" in softmax.note


def test_images_of_no_probability_are_outside_the_softmax_form(tmp_path):
    folder = write(tmp_path / "base", ROWS)
    rows = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    rows = [row | {"who": label.strip("-")} for row, label in zip(rows, "aaab-bbb", strict=True)]
    (folder / "manifest.jsonl").write_text("\n".join(map(json.dumps, rows)))
    first = measure(folder, GivenLabels(["who"]), attribute="who").models["base"]["1.0"].first
    assert first.softmax_discrepancy.value == pytest.approx((np.hypot(0.25, 0.25) + np.hypot(0.5, 0.5)) / 2)


def test_the_baseline_is_compared_with_seed_by_seed(base, tmp_path):
    turned = [(prompt, cfg, "water", subject) for prompt, cfg, _, subject in ROWS]
    write(tmp_path / "guided", turned)
    results = measure(tmp_path, subject_attribute="subject")
    kept = results.models["guided"]["1.0"].preservation
    assert kept["subject unchanged"].value == 1.0
    features = [
        np.array([[10 * i, COLOURS[row[2]], 9] for i, row in enumerate(rows)], dtype=float) for rows in (ROWS, turned)
    ]
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in features]
    assert kept["feature shift (pixels)"].value == pytest.approx(
        np.mean(1 - (unit[0] * unit[1]).sum(axis=1)), rel=1e-4
    )
    assert results.models["base"]["1.0"].preservation == {}
    assert results.baseline == "base"


def test_without_common_seeds_preservation_is_not_defined(base, tmp_path):
    write(tmp_path / "guided", ROWS)
    manifest = tmp_path / "guided" / "manifest.jsonl"
    manifest.write_text(manifest.read_text().replace('"seed": ', '"seed": 1000'))
    kept = measure(tmp_path).models["guided"]["1.0"].preservation
    assert kept["feature shift"].value is None
    assert "share no two seeds" in kept["feature shift"].note


def reference_of(count, seed=0):
    rng = np.random.default_rng(seed)
    return [Image.new("RGB", (4, 4), (int(255 * (i % 2)), 255, int(rng.integers(0, 255)))) for i in range(count)]


def test_groups_are_compared_with_the_references_of_their_class(tmp_path):
    rows = [(LAND, 1, "land", "landbird")] * 60 + [(LAND, 1, "water", "landbird")] * 52
    write(tmp_path / "base", rows)
    reference = describe_images(reference_of(200), ReadsPixels())
    groups = measure(tmp_path / "base", reference=reference).models["base"]["1.0"].by_group
    assert {name: figures["images"].value for name, figures in groups.items()} == {"land": 60, "water": 52}
    assert groups["land"]["Frechet distance (pixels)"].note == "52 images of each group against as many"
    assert groups["land"]["coverage (pixels)"].note == "52 images of each group against as many"


def test_groups_of_all_models_are_compared_at_one_number_of_images(tmp_path):
    write(tmp_path / "base", [(LAND, 1, "land", "landbird")] * 90 + [(LAND, 1, "water", "landbird")] * 55)
    write(tmp_path / "guided", [(LAND, 1, "land", "landbird")] * 70 + [(LAND, 1, "water", "landbird")] * 75)
    reference = describe_images(reference_of(400), ReadsPixels())
    models = measure(tmp_path, reference=reference).models
    notes = {
        figures["Frechet distance (pixels)"].note
        for model in ("base", "guided")
        for figures in models[model]["1.0"].by_group.values()
    }
    assert notes == {"55 images of each group against as many"}


def test_a_group_with_few_images_has_no_distance(base):
    reference = describe_images(reference_of(200), ReadsPixels())
    figure = measure({"base": base}, reference=reference).models["base"]["1.0"].by_group["land"]
    assert figure["Frechet distance (pixels)"].value is None
    assert "needs 50 of each" in figure["Frechet distance (pixels)"].note


def test_subject_accuracy_of_each_group(base):
    groups = measure({"base": base}, subject_attribute="subject").models["base"]["1.0"].by_group
    assert groups["land"]["subject accuracy"].value == 1.0
    assert groups["water"]["subject accuracy"].value == pytest.approx(2 / 3)


def test_too_few_images_for_neighbourhoods_are_said_to_be(tmp_path):
    write(tmp_path / "base", ROWS[:4])
    reference = describe_images(reference_of(20), ReadsPixels())
    quality = measure({"base": tmp_path / "base"}, reference=reference).models["base"]["1.0"].quality
    assert quality["coverage (pixels)"].value is None
    assert quality["coverage (pixels)"].note == "not defined at 4 against 20 images: needs 6 of each"


def test_a_metadata_file_of_another_tool_will_do(tmp_path):
    folder = write(tmp_path / "other", ROWS)
    (folder / "manifest.jsonl").unlink()
    lines = [f"00000/{i:06d}.png,{row[0]},{i % 2}" for i, row in enumerate(ROWS)]
    (folder / "metadata.csv").write_text("\n".join(["file_name,text,gender", *lines]))
    measures = measure(folder).models["other"]["unstated"]
    assert measures.bias == pytest.approx(0.25)
    labelled = measure(folder, GivenLabels(["gender"]), attribute="gender").models["other"]["unstated"]
    assert labelled.first.counts[LAND] == {"0": 2, "1": 2}


def test_given_labels_open_no_image(base):
    manifest = base / "manifest.jsonl"
    rows = [json.loads(line) | {"who": "ab"[i % 2]} for i, line in enumerate(manifest.read_text().splitlines())]
    manifest.write_text("\n".join(map(json.dumps, rows)))
    (base / "00000" / "000003.png").write_bytes(b"not a picture")
    assert measure(base, GivenLabels(["who"]), attribute="who").models["base"]["1.0"].bias == 0.0


def test_features_that_are_not_finite_are_refused_by_the_image(base):
    class Breaks(ReadsPixels):
        def predict(self, images):
            seen = super().predict(images)
            seen.features[2, 0] = np.nan
            return seen

    with pytest.raises(EvaluationError, match=r"from pixels, got NaN or infinity for .*000002.png"):
        measure({"base": base}, Breaks())


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (Described({}, {}, {"pixels": np.zeros((20, 7), np.float32)}), r"of shape \(M, 3\), got \(20, 7\)"),
        (
            Described({}, {}, {"others": np.zeros((20, 3), np.float32)}),
            "among those of the images .pixels., got others",
        ),
    ],
)
def test_a_reference_of_other_features_is_refused(base, reference, message):
    with pytest.raises(EvaluationError, match=message):
        measure({"base": base}, reference=reference)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": {"land": 1.0}}, "share for each class of background .land, water., got land"),
        ({"subject_attribute": "subject", "subject_of": {"a cat": "bird"}}, "prompts of the images in subject_of"),
        ({"baseline": "plain"}, "baseline among base, got 'plain'"),
        ({"attribute": []}, "one or more"),
        ({"attribute": ["background", "background"]}, "different attributes"),
        ({"subject_attribute": "background"}, "another as subject_attribute"),
    ],
)
def test_settings_out_of_range_are_refused(base, settings, message):
    with pytest.raises(EvaluationError, match=message):
        measure({"base": base}, **settings)


def test_seeds_that_repeat_are_no_pairs(tmp_path):
    for name in ("base", "guided"):
        folder = write(tmp_path / name, ROWS)
        rows = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
        for row in rows[:3]:
            row["seed"] = 0
        (folder / "manifest.jsonl").write_text("\n".join(map(json.dumps, rows)))
    kept = measure(tmp_path).models["guided"]["1.0"].preservation
    assert kept["feature shift (pixels)"].value == pytest.approx(0.0, abs=1e-6)
    assert "5 pairs" in kept["feature shift (pixels)"].note


def test_an_attribute_is_unchanged_among_pairs_that_are_told_only(tmp_path):
    for name, labels in (("base", "ab------"), ("guided", "ac------")):
        folder = write(tmp_path / name, ROWS)
        rows = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
        rows = [
            row | {"who": "xy"[i % 2], "age": label.strip("-")}
            for i, (row, label) in enumerate(zip(rows, labels, strict=True))
        ]
        (folder / "manifest.jsonl").write_text("\n".join(map(json.dumps, rows)))
    judge = GivenLabels(["who", "age"])
    kept = measure(tmp_path, judge, attribute="who").models["guided"]["1.0"].preservation
    assert kept["age unchanged"].value == 0.5
    assert kept["age unchanged"].note == "2 of 8 pairs"


def test_a_baseline_without_that_guidance_scale_is_said(tmp_path):
    write(tmp_path / "base", [(LAND, 1, "land", "landbird")] * 2)
    write(tmp_path / "guided", [(LAND, 3, "land", "landbird")] * 2)
    results = measure(tmp_path)
    assert "guided at guidance scale 3.0: base has no images at this guidance scale to compare with seed by seed" in (
        results.notes
    )


def test_folders_of_one_model_share_no_image_and_one_module_scale(base, tmp_path):
    with pytest.raises(EvaluationError, match=r"each image once in .* and "):
        measure({"base": [base, base]})
    other = write(tmp_path / "other", ROWS, scale=0.5)
    with pytest.raises(EvaluationError, match=r"one module scale in .* and .*, found \[0.5, 1.0\]"):
        measure({"base": [base, other]})


def test_a_folder_of_images_without_a_manifest_is_not_passed_over(base, tmp_path):
    write(tmp_path / "guided", ROWS)
    (tmp_path / "guided" / "manifest.jsonl").unlink()
    with pytest.raises(EvaluationError, match=r"found none in .*guided"):
        measure(tmp_path)


@pytest.mark.parametrize("row", ["0.png,a bird, on land,3", "0.png"])
def test_a_table_with_other_cells_than_columns_is_refused(tmp_path, row):
    (tmp_path / "metadata.csv").write_text(f"file_name,text,seed\n{row}\n")
    with pytest.raises(EvaluationError, match=r"line 2 of .*Put text that holds a comma"):
        measure(tmp_path)


@pytest.mark.parametrize("prompt", ["null", "3", '"\\ud800"'])
def test_a_prompt_is_text_that_can_be_written(base, prompt):
    manifest = base / "manifest.jsonl"
    manifest.write_text(manifest.read_text() + f'{{"file_name": "x.png", "prompt": {prompt}}}')
    with pytest.raises(EvaluationError, match="line 9 of"):
        measure({"base": base})


def test_two_extractors_of_one_name_are_refused(base):
    class Twin:
        name = "twin"

        def extract(self, images):
            return np.ones((len(images), 2), dtype=np.float32)

    with pytest.raises(EvaluationError, match="extractors of different names, got twin, twin"):
        measure({"base": base}, extractors=[Twin(), Twin()])


def test_features_of_zeros_have_no_diversity_and_it_is_said(base):
    class Nothing:
        name = "nothing"

        def extract(self, images):
            return np.zeros((len(images), 2), dtype=np.float32)

    reference = describe_images(reference_of(20), ReadsPixels(), extractors=[Nothing()])
    quality = measure({"base": base}, extractors=[Nothing()], reference=reference).models["base"]["1.0"].quality
    for figure in ("Vendi score (nothing)", "CMMD (nothing)"):
        assert quality[figure].value is None
        assert quality[figure].note.startswith("not defined: ")
    assert quality["Frechet distance (nothing)"].value == 0.0


class ScoresNothing:
    """A CLIP scorer whose images all have the direction of the first prompt."""

    name = "scorer"

    def __init__(self, length=1.0):
        self.length = length

    def extract(self, images):
        return np.tile(np.array([[self.length, 0.0]], dtype=np.float32), (len(images), 1))

    def text_features(self, prompts):
        return np.array([[1.0, 0.0] if prompt == LAND else [0.0, 2.0] for prompt in prompts], dtype=np.float32)


def test_clip_t_is_the_mean_cosine_of_images_and_their_prompts(base):
    quality = measure({"base": base}, extractors=[ScoresNothing()]).models["base"]["1.0"].quality
    assert quality["CLIP-T (scorer)"].value == pytest.approx(0.5)
    assert quality["CLIP-T (scorer)"].low < 0.5 < quality["CLIP-T (scorer)"].high
    assert "Vendi score (scorer)" in quality
    assert (
        measure({"base": base}, extractors=[ScoresNothing(0.0)]).models["base"]["1.0"].quality["CLIP-T (scorer)"].value
        is None
    )


def test_a_missing_extra_is_found_out_before_any_image_is_looked_at(base, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.image.lpip", None)
    annotator = ReadsPixels()
    with pytest.raises(EvaluationError, match="LPIPS"):
        measure({"base": base}, annotator, lpips=True)
    assert annotator.batches == []


def test_lpips_is_the_mean_over_prompts_of_their_first_images(base, monkeypatch):
    asked = []

    def distance(first, second):
        asked.append(len(first))
        return (first - second).abs().mean()

    monkeypatch.setattr("invdiff.evaluation.evaluate.lpips_network", lambda: distance)
    quality = measure({"base": base}, lpips=True).models["base"]["1.0"].quality
    assert quality["LPIPS diversity (alexnet)"].value > 0
    assert sum(asked) == 2 * 6


def test_a_reference_is_described_at_the_confidence_of_the_images(base):
    reference = describe_images(reference_of(20), ReadsPixels(), min_confidence=0.5)
    with pytest.raises(EvaluationError, match=r"images' min_confidence, 0, got one at 0.5"):
        measure({"base": base}, reference=reference)


def test_a_bad_reference_image_is_named_by_its_place(base):
    class Breaks(ReadsPixels):
        def predict(self, images):
            seen = super().predict(images)
            seen.features[:] = np.where(seen.features[:, :1] > 0.99, np.nan, seen.features)
            return seen

    images = [Image.new("RGB", (4, 4), (0, 0, 255 * (i == 70))) for i in range(80)]
    with pytest.raises(EvaluationError, match="for image 70"):
        describe_images(images, Breaks())


def test_results_are_json_and_the_table_lies_beside(base, tmp_path):
    results = measure({"base": base})
    with pytest.raises(EvaluationError, match=r"Expected a .json file"):
        results.save(tmp_path / "results.csv")
    results.save(tmp_path / "v1.5")
    assert json.loads((tmp_path / "v1.5").read_text())["attribute"] == "background"
    assert (tmp_path / "v1.5.csv").is_file()


def test_a_prompt_with_any_line_break_is_one_cell_of_the_table(tmp_path):
    prompt = 'a "bird"\r, or\n<two>'
    write(tmp_path / "base", [(prompt, 1, "land", "landbird")] * 2)
    measure(tmp_path / "base").save(tmp_path / "r.json")
    with (tmp_path / "r.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["of"] for row in rows if row["kind"] == "count"} == {f"prompt: {prompt}"}
    assert all(None not in row for row in rows)


def test_every_figure_is_a_row_of_the_table_beside(base, tmp_path):
    results = measure({"base": base}, subject_attribute="subject")
    results.save(tmp_path / "results.json")
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    (bias,) = [row for row in rows if row["figure"] == "bias" and row["of"] == "all images"]
    assert (bias["model"], bias["guidance_scale"], float(bias["value"])) == ("base", "1.0", 0.25)
    assert {row["kind"] for row in rows} == {"count", "fairness", "quality", "group"}
    assert {"subject right", f"prompt: {LAND}", "group: water"} <= {row["of"] for row in rows}


def test_a_reference_may_have_as_many_unreadable_images_as_its_data_allow(tmp_path):
    folder = write_tiny_folder(tmp_path / "photos")
    (folder / "03.png").write_bytes(b"not a picture")
    seen = describe_images(load_captioned_images(folder, max_unreadable=0.1), ReadsPixels(), progress=False)
    assert len(seen) == 11
    with pytest.raises(DataError, match=r"images to be unreadable, found 1 .*03.png"):
        describe_images(load_captioned_images(folder), ReadsPixels(), progress=False)


def test_the_yardstick_of_preservation_is_of_the_baseline_alone(tmp_path):
    class Turns(ReadsPixels):
        """The features of images on water stand at a right angle to those on land, whatever else they show."""

        def predict(self, images):
            seen = super().predict(images)
            seen.features[:] = np.where(seen.features[:, 1:2] > 0.5, [0, 0, 1], [1, 0, 0])
            return seen

    write(tmp_path / "base", [(LAND, 1, "land", "landbird")] * 6)
    write(tmp_path / "guided", [(LAND, 1, "water", "landbird")] * 6)
    shift = measure(tmp_path, Turns()).models["guided"]["1.0"].preservation["feature shift (pixels)"]
    assert shift.value == pytest.approx(1.0)
    assert "the baseline's own images are 0 apart" in shift.note


def test_images_that_cannot_be_told_count_in_the_correction(tmp_path):
    confusion = np.array([[80, 10, 10], [5, 90, 5]])
    folder = write(tmp_path / "base", LAND_ROWS)
    measures = measure(folder, Wavers(confusion), min_confidence=0.6).models["base"]["1.0"]
    corrected = correct_for_annotator([[2, 1, 1]], confusion)[0]
    expected = abs(corrected[0] - corrected[1]) / corrected.sum()
    assert measures.first.overall["bias"].corrected == pytest.approx(expected)


def test_an_intersection_is_untold_where_one_attribute_is(tmp_path):
    folder = write(tmp_path / "base", LAND_ROWS)
    settings = {"attribute": ["background", "subject"], "min_confidence": 0.6}
    joint = measure(folder, Wavers(), **settings).models["base"]["1.0"].attributes["background x subject"].counts[LAND]
    assert {name: count for name, count in joint.items() if count} == {
        "land x landbird": 2,
        "water x waterbird": 1,
        "cannot tell": 1,
    }


def test_probabilities_that_do_not_sum_to_one_are_scaled(base):
    annotator = ReadsPixels()
    annotator.certainty = 0.8  # the rest of the probability is nobody's
    softmax = measure({"base": base}, annotator).models["base"]["1.0"].first.softmax_discrepancy
    assert softmax.value == pytest.approx(np.hypot(0.25, 0.25) / 2)


def test_distances_by_group_are_of_as_many_images_as_they_say(tmp_path, monkeypatch):
    sizes = []

    def distance(features, reference):
        sizes.append((len(features), len(reference)))
        return 1.0

    monkeypatch.setattr("invdiff.evaluation.quality.figures.frechet_distance", distance)
    rows = [(LAND, 1, "land", "landbird")] * 90 + [(LAND, 1, "water", "landbird")] * 55
    measure(write(tmp_path / "base", rows), reference=describe_images(reference_of(400), ReadsPixels()))
    assert sizes == [(145, 400), (55, 55), (55, 55)]


def test_lpips_looks_at_twenty_images_of_a_prompt(tmp_path, monkeypatch):
    asked = []
    network = lambda first, second: asked.append(len(first)) or (first - second).abs().mean()  # noqa: E731
    monkeypatch.setattr("invdiff.evaluation.evaluate.lpips_network", lambda: network)
    measure(write(tmp_path / "base", [(LAND, 1, "land", "landbird")] * 23), lpips=True)
    assert sum(asked) == 190


def test_an_image_listed_under_two_spellings_is_refused(base):
    manifest = base / "manifest.jsonl"
    row = json.loads(manifest.read_text().splitlines()[0])
    row["file_name"] = "00000/../" + row["file_name"]
    manifest.write_text(manifest.read_text() + json.dumps(row))
    with pytest.raises(EvaluationError, match="each image once"):
        measure({"base": base})


def test_the_table_says_which_prompts_a_figure_leaves_out(tmp_path):
    rows = [(LAND, 1, "land", "waterbird")] * 2 + [(WATER, 1, "land", "waterbird")] * 2
    measure(write(tmp_path / "b", rows), subject_attribute="subject").save(tmp_path / "r.json")
    with (tmp_path / "r.csv").open(newline="") as file:
        notes = {row["note"] for row in csv.DictReader(file) if row["of"] == "subject right"}
    assert len(notes) > 0
    assert all("leave out 1 of 2 prompts" in note for note in notes)
