"""Images without a class, prompts without figures, and figures that are corrected for an annotator's errors."""

import numpy as np
import pytest

from invdiff.errors import EvaluationError
from invdiff.evaluation.annotators.labels import GivenLabels
from invdiff.evaluation.fairness.correction import correct_for_annotator
from invdiff.evaluation.images import read_images
from invdiff.report.read import measured
from runs import LAND, WATER
from test_evaluate import LAND_ROWS, ROWS, ReadsPixels, change_rows, measure, of_base, waver, write


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
