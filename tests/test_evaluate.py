import json

import numpy as np
import pytest
from PIL import Image

from invdiff.errors import EvaluationError
from invdiff.evaluation.annotators import Annotations
from invdiff.evaluation.evaluate import Results, evaluate
from invdiff.evaluation.fairness import bias_floor, bias_interval
from invdiff.evaluation.quality import frechet_distance

LAND, WATER = "a photo of a landbird", "a photo of a waterbird"
COLOURS = {"land": 0, "water": 255, "landbird": 0, "waterbird": 255}


class ReadsPixels:
    """Red tells the background, green the subject, blue is a feature."""

    def __init__(self):
        self.attributes = {"background": ("land", "water"), "subject": ("bird", "landbird", "waterbird")}
        self.batches = []

    def predict(self, images):
        pixels = np.array([image.getpixel((0, 0)) for image in images])
        self.batches.append(len(pixels))
        background, subject = pixels[:, 0] > 127, 1 + (pixels[:, 1] > 127)
        return Annotations(
            attributes=self.attributes,
            probabilities={"background": np.eye(2)[background.astype(int)], "subject": np.eye(3)[subject]},
            features=np.stack([pixels[:, 2], pixels[:, 0]], axis=1) / 255,
        )


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


def measure(folders, annotator=None, **settings):
    settings = {"attribute": "background", "progress": False, "num_resamples": 50} | settings
    return evaluate(folders, annotator or ReadsPixels(), **settings)


@pytest.fixture
def base(tmp_path):
    return write(tmp_path / "base", ROWS)


def test_bias_floor_and_shares_are_those_worked_out_by_hand(base):
    values = measure({"base": base}).to_dict()["base"]["1.0"]
    assert values["bias"] == pytest.approx((0.5 + 0.0) / 2)
    assert values["bias_floor"] == pytest.approx(bias_floor(4, 2))
    assert values["shares"] == {LAND: {"land": 0.75, "water": 0.25}, WATER: {"land": 0.5, "water": 0.5}}
    assert values["images_per_prompt"] == 4


def test_the_interval_is_that_of_the_counts(base):
    values = measure({"base": base}, confidence=0.8, num_resamples=300, seed=4).models["base"]["1.0"]
    expected = bias_interval([[3, 1], [2, 2]], confidence=0.8, num_resamples=300, seed=4)
    assert values.bias_ci == expected


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


def test_the_longest_class_name_in_the_prompt_is_the_subject(tmp_path):
    annotator = ReadsPixels()
    annotator.attributes = {"background": ("land", "water"), "subject": ("bird", "landbird", "water_bird")}
    rows = [("A Water Bird, no mere bird", 1, "water", "waterbird")] * 2
    results = measure(write(tmp_path / "base", rows), annotator, subject_attribute="subject")
    assert results.models["base"]["1.0"].accuracy == 1.0


def test_frechet_compares_the_annotators_features_with_the_reference(base):
    reference = np.random.default_rng(0).random((20, 2))
    features = np.array([[10 * i, COLOURS[row[2]]] for i, row in enumerate(ROWS)]) / 255
    measures = measure({"base": base}, reference_features=reference).models["base"]["1.0"]
    assert measures.frechet == pytest.approx(frechet_distance(features, reference))


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
    assert measures.bias_floor == pytest.approx((bias_floor(4, 2) + bias_floor(2, 2)) / 2)


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
    values = json.loads((tmp_path / "results.json").read_text())["base"]["1.0"]
    promised = "bias bias_floor bias_ci accuracy frechet images_per_prompt shares"
    assert list(values) == promised.split()
    assert len(values["bias_ci"]) == 2


@pytest.mark.parametrize("values", [[], {"base": 3}, {"base": {"1.0": {"bias": 1.0}}}, {"base": {"1.0": []}}])
def test_other_json_is_not_results(tmp_path, values):
    (tmp_path / "results.json").write_text(json.dumps(values))
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
    with pytest.raises(EvaluationError, match=r"Expected images in .*manifest.jsonl, found none"):
        measure(tmp_path)


def test_a_manifest_in_another_encoding_is_refused(tmp_path):
    (tmp_path / "manifest.jsonl").write_bytes(b"\xff\xfe{}")
    with pytest.raises(EvaluationError, match="Expected UTF-8"):
        measure(tmp_path)


@pytest.mark.parametrize("line", ["{", "[]", '{"prompt": "x"}', '{"file_name": "a.png", "prompt": "x", "scale": 1}'])
def test_a_line_that_is_no_row_is_refused_by_its_number(base, line):
    with (base / "manifest.jsonl").open("a") as manifest:
        manifest.write(line)
    with pytest.raises(EvaluationError, match="in line 9 of"):
        measure({"base": base})


def test_absent_images_are_refused_with_their_number_and_the_first(base):
    (base / "00000" / "000003.png").unlink()
    (base / "00000" / "000005.png").unlink()
    with pytest.raises(EvaluationError, match=r"found 2 absent, first .*000003.png"):
        measure({"base": base})


def test_a_damaged_image_is_refused(base):
    (base / "00000" / "000003.png").write_bytes(b"not a picture")
    with pytest.raises(EvaluationError, match=r"readable image in .*000003.png"):
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
        ({"subject_of": {LAND: "landbird"}}, "subject_attribute beside subject_of"),
        ({"subject_attribute": "subject", "subject_of": {LAND: "cat"}}, "got 'cat'; it knows bird, landbird"),
        ({"batch_size": 0}, "batch_size of at least 1"),
    ],
)
def test_settings_that_do_not_fit_the_annotator_are_refused(base, settings, message):
    with pytest.raises(EvaluationError, match=message):
        measure({"base": base}, **settings)
