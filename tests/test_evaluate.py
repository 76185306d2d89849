import json
import sys

import numpy as np
import pytest
from PIL import Image
from scipy.spatial.distance import cdist

from invdiff import EvaluateConfig, evaluate
from invdiff.errors import EvaluationError
from invdiff.evaluation.annotate import Described, describe_images
from invdiff.evaluation.annotators.annotations import Annotations
from invdiff.evaluation.annotators.labels import GivenLabels
from invdiff.evaluation.fairness.metrics import metric_floor, per_prompt
from invdiff.evaluation.quality.distances import frechet_distance
from invdiff.report.figures import images_each
from runs import LAND, WATER

COLOURS = {"land": 0, "water": 255, "landbird": 0, "waterbird": 255}
LAND_ROWS = [(LAND, 1, "land", "landbird")] * 3 + [(LAND, 1, "water", "waterbird")]
WATER_ROWS = [(WATER, 1, "water", "waterbird")] * 2 + [(WATER, 1, "land", "waterbird")] * 2
ROWS = LAND_ROWS + WATER_ROWS


class ReadsPixels:
    """Red is the background, green the subject, blue a feature; `change` may alter the annotations of a batch."""

    name, feature_name = "reads pixels", "pixels"

    def __init__(self, confusion=None, *, change=None, certainty=1.0):
        self.attributes = {"background": ("land", "water"), "subject": ("bird", "landbird", "waterbird")}
        self.batches = []
        self.table, self.change, self.certainty = confusion, change, certainty

    def confusion(self, attribute, min_confidence=0.0):
        return self.table if attribute == "background" else None

    def predict(self, images):
        pixels = np.array([image.getpixel((0, 0)) for image in images])
        self.batches.append(len(pixels))
        background = self.certainty * np.eye(2)[(pixels[:, 0] > 127).astype(int)]
        subject = np.eye(3)[1 + (pixels[:, 1] > 127)]
        features = np.stack([pixels[:, 2], pixels[:, 0], np.full(len(pixels), 9)], axis=1) / 255
        seen = Annotations(self.attributes, {"background": background, "subject": subject}, features)
        if self.change:
            self.change(seen)
        return seen


def waver(seen):
    seen.probabilities["background"][0] = [0.55, 0.45]


class Scores:
    """An extractor, and a CLIP model, whose features are all the same."""

    def __init__(self, name, features):
        self.name, self.features = name, features

    def extract(self, images):
        return np.tile(np.array([self.features], dtype=np.float32), (len(images), 1))

    def text_features(self, prompts):
        return np.array([[1.0, 0.0] if prompt == LAND else [0.0, 2.0] for prompt in prompts], dtype=np.float32)


def write(folder, images, *, scale=1.0):
    """Write a folder from rows (prompt, guidance_scale, background, subject)."""
    (folder / "00000").mkdir(parents=True)
    rows = []
    for index, (prompt, guidance_scale, background, subject) in enumerate(images):
        name = f"00000/{index:06d}.png"
        Image.new("RGB", (4, 4), (COLOURS[background], COLOURS[subject], 10 * index % 256)).save(folder / name)
        row = {"file_name": name, "prompt": prompt, "seed": index, "guidance_scale": guidance_scale}
        rows.append(row | {"scale": scale})
    (folder / "manifest.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


def change_rows(folder, changes):
    """Update rows of a manifest: one mapping for each row, or row number to mapping."""
    rows = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    for number, change in changes.items() if isinstance(changes, dict) else enumerate(changes):
        rows[number] |= change
    (folder / "manifest.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


def folders_in(folder):
    return {name: folder / name for name in ("base", "guided")}


def measure(images, annotator=None, *, attribute="background", reference=None, extractors=(), **settings):
    config = EvaluateConfig(**{"num_resamples": 50} | settings)
    options = {"reference": reference, "extractors": extractors, "config": config, "progress": False}
    return evaluate(images, annotator or ReadsPixels(), attribute, **options)


def of_base(images, *arguments, **settings):
    """Measures of the model "base" at guidance scale 1."""
    images = images if isinstance(images, dict) else {"base": images}
    return measure(images, *arguments, **settings).models["base"]["1.0"]


def reference_of(count, **settings):
    rng = np.random.default_rng(0)
    images = [Image.new("RGB", (4, 4), (int(255 * (i % 2)), 255, int(rng.integers(0, 255)))) for i in range(count)]
    return describe_images(images, ReadsPixels(), **settings)


def test_figures_are_those_worked_out_by_hand_and_the_file_has_the_promised_keys(base):
    annotator = ReadsPixels()
    results = measure({"base": base}, annotator, batch_size=3)
    assert annotator.batches == [3, 3, 2]  # each image once
    by_prompt = results.models["base"]["1.0"].first.by_prompt
    assert {prompt: estimates["bias"].value for prompt, estimates in by_prompt.items()} == {LAND: 0.5, WATER: 0.0}
    document = results.to_dict()
    values = document["models"]["base"]["1.0"]
    assert values["bias"] == pytest.approx((0.5 + 0.0) / 2)
    assert values["bias_floor"] == pytest.approx(metric_floor("bias", 4, 2))
    assert values["shares"] == {LAND: {"land": 0.75, "water": 0.25}, WATER: {"land": 0.5, "water": 0.5}}
    assert (values["images_per_prompt"], values["frechet"], values["accuracy"]) == (4, None, None)
    headline = "bias bias_floor bias_ci accuracy frechet images_per_prompt shares"
    assert list(values) == f"{headline} attributes subject_accuracy quality by_group preservation".split()
    about = "attribute subject_attribute classes annotator target baseline confidence reference_images module_scales"
    assert {*document} == {*about.split(), "notes", "run", "models"}
    assert json.loads(json.dumps(document)) == document


def test_intervals_are_repeatable(base):
    ends, again, other = (of_base(base, seed=seed).bias_ci for seed in (0, 0, 1))
    assert ends == again != other


def test_accuracy_counts_the_subject_that_the_prompt_names(base):
    measures = of_base(base, subject_attribute="subject")
    assert measures.accuracy == pytest.approx(7 / 8)
    # Under "landbird" the one image on water shows a waterbird.
    assert measures.first.subject_right["bias"].value == pytest.approx((1.0 + 0.0) / 2)
    assert measures.first.overall["bias"].value == pytest.approx((0.5 + 0.0) / 2)
    assert measures.by_group["land"]["subject accuracy"].value == 1.0
    assert measures.by_group["water"]["subject accuracy"].value == pytest.approx(2 / 3)


def test_an_image_whose_subject_is_not_told_is_no_wrong_one(base):
    def unsure(seen):
        seen.probabilities["subject"][:5] = [0.2, 0.4, 0.4]

    results = measure({"base": base}, ReadsPixels(change=unsure), subject_attribute="subject", min_confidence=0.6)
    assert results.models["base"]["1.0"].accuracy == 1.0  # of the other three
    assert any("accuracy leaves out 5 of 8 images, whose subject is not told" in note for note in results.notes)


def test_the_subject_is_the_one_class_that_words_of_the_prompt_name_if_any(tmp_path):
    annotator = ReadsPixels()
    annotator.attributes = annotator.attributes | {"subject": ("bird", "landbird", "water_bird")}
    prompts = {"A Water Bird, no mere bird": 1.0, "seabirds, birdhouses": None, "a landbird beside a bird": None}
    for prompt, accuracy in prompts.items():
        folder = write(tmp_path / prompt, [(prompt, 1, "water", "waterbird")] * 2)
        results = measure({"base": folder}, annotator, subject_attribute="subject")
        assert results.models["base"]["1.0"].accuracy == accuracy
        assert any(note.startswith("1 of 1 prompts name no class") for note in results.notes) == (accuracy is None)


def test_frechet_compares_the_annotators_features_with_the_reference(base):
    reference = np.random.default_rng(0).random((20, 3), dtype=np.float32)
    features = np.array([[10 * i, COLOURS[row[2]], 9] for i, row in enumerate(ROWS)]) / 255
    found = of_base(base, reference=Described({}, {}, {"pixels": reference})).frechet
    assert found == pytest.approx(frechet_distance(features, reference), rel=1e-4)


def test_guidance_scales_are_measured_apart_in_order_and_a_class_never_drawn_is_stated(tmp_path):
    rows = [(LAND, 10, "land", "landbird"), (LAND, 10.0, "land", "landbird"), *[(LAND, 3, "land", "landbird")] * 2]
    results = measure({"base": write(tmp_path / "base", rows)})
    assert [(scale, m.bias) for _, scale, m in results.each()] == [("3.0", 1.0), ("10.0", 1.0)]
    assert list(results.at("3.0")) == list(results.at(3)) == ["base"]
    with pytest.raises(EvaluationError, match=r"that was measured \(3\.0, 10\.0\), got 2\.5"):
        results.at(2.5)
    assert "no image of any model was annotated 'water' (background)" in results.notes


def test_prompts_may_differ_in_their_number_of_images_which_is_noted(base, tmp_path):
    assert not any("number" in note for note in measure({"base": base}).notes)
    results = measure({"base": write(tmp_path / "fewer", ROWS[:-2])})
    measures = results.models["base"]["1.0"]
    assert measures.images_per_prompt == 2
    assert measures.bias_floor == pytest.approx((metric_floor("bias", 4, 2) + metric_floor("bias", 2, 2)) / 2)
    assert any("images of a prompt number 2 to 4" in note for note in results.notes)
    assert {images_each(measures) for *_, measures in results.each()} == {"2 to 4"}


def test_several_attributes_are_measured_each_and_together(base):
    measures = of_base(base, ReadsPixels(change=waver), attribute=["background", "subject"], min_confidence=0.6)
    assert list(measures.attributes) == ["background", "subject", "background x subject"]
    joint = measures.attributes["background x subject"].counts[LAND]
    known = {"land x landbird": 2, "water x waterbird": 1, "cannot tell": 1}
    assert {name: count for name, count in joint.items() if count} == known
    assert measures.bias_estimate == measures.attributes["background"].overall["bias"]


def test_a_target_mix_is_what_distances_are_measured_against(base):
    first = of_base(base, target={"water": 0.25, "land": 0.75}).first
    expected = per_prompt("kl_to_target", [[3, 1], [2, 2]], target=[0.75, 0.25]).mean()
    assert first.overall["kl_to_target"].value == pytest.approx(expected)
    assert first.by_prompt[LAND]["fairness_discrepancy"].value == pytest.approx(0.0)
    assert first.overall["bias"].value == pytest.approx(0.25)


def test_an_intersection_is_measured_against_the_target_beside_an_even_mix_of_the_other(base):
    target = {"water": 0.25, "land": 0.75}
    joint = of_base(base, attribute=["background", "subject"], target=target).attributes["background x subject"]
    counts = [[0, 3, 0, 0, 0, 1], [0, 0, 2, 0, 0, 2]]
    for metric in ("fairness_discrepancy", "kl_to_target"):
        expected = per_prompt(metric, counts, target=np.repeat([0.25, 1 / 12], 3)).mean()
        assert joint.overall[metric].value == pytest.approx(expected)


def test_a_prompt_without_a_right_image_is_left_out_and_named(tmp_path):
    rows = [(LAND, 1, "land", "waterbird")] * 2 + [(WATER, 1, "land", "waterbird")] * 2
    results = measure(write(tmp_path / "b", rows), subject_attribute="subject")
    first = results.models["b"]["1.0"].first
    assert first.subject_right["bias"].value == 1.0
    assert f"leave out 1 of 2 prompts that have none, first '{LAND}'" in first.note
    assert any(first.note in note for note in results.notes)
    assert {first.note in row["note"] for row in results.table() if row["of"] == "subject right"} == {True}


def test_errors_that_cannot_be_corrected_are_stated(base):
    for confusion, accuracy, note in (
        (np.array([[50, 50, 0], [50, 50, 0]]), 0.5, "no figure of background is corrected for the errors of"),
        (None, None, "how reads pixels errs on background is not known"),
    ):
        results = measure({"base": base}, ReadsPixels(confusion))
        assert results.models["base"]["1.0"].bias_estimate.corrected is None
        assert results.annotator.accuracy == {"background": accuracy}
        assert any(found.startswith(note) for found in results.notes)


@pytest.mark.parametrize("certainty", [0.8, 1.0])
def test_the_softmax_form_is_of_mean_probabilities_scaled_to_sum_to_one(base, certainty):
    def hedge(seen):
        seen.probabilities["background"][:] = 0.8 * seen.probabilities["background"] + 0.1 * certainty

    first = of_base(base, ReadsPixels(certainty=certainty, change=hedge)).first
    softmax = first.softmax_discrepancy
    assert first.overall["fairness_discrepancy"].value == pytest.approx(np.hypot(0.25, 0.25) / 2)
    assert softmax.value == pytest.approx(0.8 * np.hypot(0.25, 0.25) / 2)
    assert 0 <= softmax.low <= softmax.value <= softmax.high
    floor = metric_floor("fairness_discrepancy", 4, 2)
    assert f"floor ({floor:.3g}) are those of labels" in softmax.note


def test_images_of_no_label_are_outside_the_softmax_form_and_given_labels_open_no_image(base):
    change_rows(base, [{"who": label.strip("-")} for label in "aaab-bbb"])
    (base / "00000" / "000003.png").write_bytes(b"not a picture")
    first = of_base(base, GivenLabels(["who"]), attribute="who").first
    assert first.softmax_discrepancy.value == pytest.approx((np.hypot(0.25, 0.25) + np.hypot(0.5, 0.5)) / 2)


def test_the_baseline_is_compared_with_seed_by_seed(base, tmp_path):
    turned = [(prompt, cfg, "water", subject) for prompt, cfg, _, subject in ROWS]
    write(tmp_path / "guided", turned)
    results = measure(folders_in(tmp_path), subject_attribute="subject")
    kept = results.models["guided"]["1.0"].preservation
    assert kept["subject unchanged"].value == 1.0
    features = [[[10 * i, COLOURS[row[2]], 9] for i, row in enumerate(rows)] for rows in (ROWS, turned)]
    each = np.diag(cdist(*features, "cosine"))
    assert kept["feature shift (pixels)"].value == pytest.approx(each.mean(), rel=1e-4)
    apart = cdist(features[0], features[0], "cosine")[~np.eye(8, dtype=bool)].mean()
    assert f"the baseline's own images are {apart:.3g} apart" in kept["feature shift (pixels)"].note
    for prompt in dict.fromkeys(row[0] for row in ROWS):
        of_prompt = each[[row[0] == prompt for row in ROWS]].mean()
        assert kept[f"feature shift (pixels), {prompt!r}"].value == pytest.approx(of_prompt, rel=1e-4)
    assert results.models["base"]["1.0"].preservation == {}
    assert results.baseline == "base"


def test_an_empty_prompt_has_a_shift_of_its_own(tmp_path):
    rows = [("" if prompt == WATER else prompt, *rest) for prompt, *rest in ROWS]
    write(tmp_path / "base", rows)
    write(tmp_path / "guided", [(prompt, cfg, "water" if prompt else place, of) for prompt, cfg, place, of in rows])
    kept = measure(folders_in(tmp_path)).models["guided"]["1.0"].preservation
    names = ("", ", ''", f", {LAND!r}")
    every, empty, of_land = (kept[f"feature shift (pixels){name}"].value for name in names)
    assert empty == pytest.approx(0, abs=1e-6)
    assert every == pytest.approx(of_land / 2, rel=1e-4)


def test_pairs_are_of_seeds_that_both_have_once_in_a_prompt_and_none_is_stated(base, tmp_path):
    other = write(tmp_path / "guided", ROWS)
    for folder in (base, other):
        change_rows(folder, [*[{"seed": 0}] * 3, {"seed": None}])
    (other / "manifest.jsonl").write_text("\n".join(reversed((other / "manifest.jsonl").read_text().splitlines())))
    shift = measure(folders_in(tmp_path)).models["guided"]["1.0"].preservation["feature shift (pixels)"]
    assert shift.value == pytest.approx(0.0, abs=1e-6)
    assert "4 pairs" in shift.note
    change_rows(other, [{"seed": 1000 + number} for number in range(8)])
    none = measure(folders_in(tmp_path)).models["guided"]["1.0"].preservation["feature shift"]
    assert none.value is None
    assert "share no two seeds" in none.note
    change_rows(other, [{"guidance_scale": 3}] * 8)
    note = "guided at guidance scale 3.0: base has no images at this guidance scale to compare seed by seed"
    assert note in measure(folders_in(tmp_path)).notes


def test_an_attribute_is_unchanged_among_pairs_with_classes_only(tmp_path):
    for name, labels in (("base", "ab------"), ("guided", "ac------")):
        rows = [{"who": "xy"[i % 2], "age": label.strip("-")} for i, label in enumerate(labels)]
        change_rows(write(tmp_path / name, ROWS), rows)
    results = measure(folders_in(tmp_path), GivenLabels(["who", "age"]), attribute="who", subject_attribute="")
    kept = results.models["guided"]["1.0"].preservation["age unchanged"]
    assert (kept.value, kept.note) == (0.5, "2 of 8 pairs")


def test_groups_of_all_models_are_compared_at_one_number_of_images(tmp_path, monkeypatch):
    sizes = []
    distance = lambda features, reference: sizes.append((len(features), len(reference))) or 1.0  # noqa: E731
    monkeypatch.setattr("invdiff.evaluation.quality.distances.frechet_distance", distance)
    write(tmp_path / "base", [(LAND, 1, "land", "landbird")] * 90 + [(LAND, 1, "water", "landbird")] * 55)
    write(tmp_path / "guided", [(LAND, 1, "land", "landbird")] * 70 + [(LAND, 1, "water", "landbird")] * 75)
    measured = measure(folders_in(tmp_path), reference=reference_of(400)).at("1.0")
    assert sizes == [(145, 400), (55, 55), (55, 55)] * 2
    groups = measured["base"].by_group
    assert {name: figures["images"].value for name, figures in groups.items()} == {"land": 90, "water": 55}
    for name in ("Frechet distance (pixels)", "coverage (pixels)"):
        notes = {figures[name].note for measures in measured.values() for figures in measures.by_group.values()}
        assert notes == {"55 images of each group against as many"}


def test_too_few_images_for_a_figure_are_stated(tmp_path):
    measures = of_base(write(tmp_path / "base", LAND_ROWS), reference=reference_of(20))
    group, coverage = measures.by_group["land"]["Frechet distance (pixels)"], measures.quality["coverage (pixels)"]
    assert (group.value, coverage.value) == (None, None)
    assert "needs 50 of each" in group.note
    assert coverage.note == "not defined at 4 against 20 images: needs 6 of each"


def test_clip_t_is_the_mean_cosine_with_prompts_and_features_of_zeros_have_no_diversity_which_a_note_says(base):
    extractors = [Scores("scorer", [1.0, 0.0]), Scores("nothing", [0.0, 0.0])]
    quality = of_base(base, extractors=extractors, reference=reference_of(20, extractors=extractors)).quality
    figure = quality["CLIP-T (scorer)"]
    assert (figure.value, figure.low < 0.5 < figure.high, "Vendi score (scorer)" in quality) == (0.5, True, True)
    for name in ("Vendi score (nothing)", "CMMD (nothing)"):
        assert quality[name].value is None
        assert quality[name].note.startswith("not defined: ")
    assert quality["Frechet distance (nothing)"].value == 0.0


def test_a_missing_extra_is_found_out_before_any_image_is_looked_at(base, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.image.lpip", None)
    annotator = ReadsPixels()
    with pytest.raises(EvaluationError, match="LPIPS"):
        of_base(base, annotator, lpips=True)
    assert annotator.batches == []


def test_lpips_is_the_mean_over_prompts_of_their_first_twenty_images(tmp_path, monkeypatch):
    asked = []
    network = lambda first, second: asked.append(len(first)) or (first - second).abs().mean()  # noqa: E731
    monkeypatch.setattr("invdiff.evaluation.evaluate.lpips_network", lambda: network)
    rows = [(LAND, 1, "land", "landbird")] * 23 + WATER_ROWS
    assert of_base(write(tmp_path / "base", rows), lpips=True).quality["LPIPS diversity (alexnet)"].value > 0
    assert sum(asked) == 20 * 19 / 2 + 4 * 3 / 2


def test_settings_that_do_not_fit_are_refused(base):
    wider, other = (Described({}, {}, {name: np.zeros((20, n))}) for name, n in (("pixels", 7), ("others", 3)))
    for settings, message in (
        ({"subject_attribute": "age"}, "background, subject, got 'age'"),
        ({"target": {"land": 1.0}}, "share for each class of background .land, water., got land"),
        ({"baseline": "plain"}, "baseline among base, got 'plain'"),
        *[({"attribute": names}, "one attribute or more, all different") for names in ([], ["background"] * 2)],
        ({"subject_attribute": "background"}, "all different, and another as subject"),
        ({"extractors": [Scores("twin", [1.0]), Scores("twin", [1.0])]}, "of different names, got twin, twin"),
        ({"reference": wider}, "features of one width, got 3 and 7"),
        ({"reference": other}, "images and reference share, got pixels and others"),
    ):
        with pytest.raises(EvaluationError, match=message):
            measure({"base": base}, **settings)
