"""Labels that images come with, as an annotator and as what one learns."""

from dataclasses import replace
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
from PIL import Image

from invdiff.errors import DataError, EvaluationError
from invdiff.evaluation.annotators.annotations import CANNOT_TELL
from invdiff.evaluation.annotators.heldout import measure_annotator
from invdiff.evaluation.annotators.labels import GivenLabels, load_labelled_images, read_targets

GENDERS, SMILES = ("woman", "man", "", CANNOT_TELL), (True, False, None, float("nan"))
ROWS = [*({"gender": gender, "smiles": smiles} for gender, smiles in zip(GENDERS, SMILES, strict=True)), {}]


def given(*names, rows=ROWS):
    return GivenLabels(names).discover(rows)


def test_labels_become_probabilities_of_one_and_images_without_have_no_class_at_any_confidence():
    labels = given("gender", rows=ROWS[:1])
    labels.discover(ROWS[1:])  # classes add up
    seen = labels.annotate(ROWS)
    assert seen.attributes == {"gender": ("man", "woman")}
    assert seen.probabilities["gender"].tolist() == [[0, 1], [1, 0], [0, 0], [0, 0], [0, 0]]
    assert seen.probabilities["gender"].dtype == np.float32
    assert (seen.features, labels.confusion("gender"), labels.name, labels.feature_name) == (None, None, "labels", "")
    assert labels.annotate([]).classes("gender").shape == (0,)
    for confidence in (0.0, 1.0):
        assert given("smiles").annotate(ROWS).labels("smiles", confidence) == ["True", "False", *[CANNOT_TELL] * 3]


def test_truth_values_are_classes_of_one_spelling_and_other_text_stays_as_it_is():
    rows = [{"label": value} for value in (True, "true", "TRUE", False, "False")]
    assert given("label", rows=rows).annotate(rows).labels("label") == ["True"] * 3 + ["False"] * 2
    rows = [{"label": value} for value in ("007", "7", "1.50", "1.5", 0.5, "v1.0", 10**20, 1e20)]
    known = ("0.5", "007", "1.5", "1.50", "100000000000000000000", "7", "v1.0")
    assert given("label", rows=rows).attributes == {"label": known}


def test_spaces_around_a_label_and_how_its_accents_are_encoded_do_not_count():
    rows = [{"label": value} for value in ("land", "land ", "\tland", "caf\u00e9", "cafe\u0301", " ", "nan ")]
    labels = given("label", rows=rows)
    assert labels.attributes == {"label": ("caf\u00e9", "land")}
    assert labels.annotate(rows).labels("label")[:5] == ["land"] * 3 + ["caf\u00e9"] * 2


def test_true_beside_one_is_refused_wherever_labels_are_read():
    labels = GivenLabels(["male"]).discover([{"male": True}], ["line 1 of a"])
    with pytest.raises(EvaluationError, match="in one spelling, found True in line 1 of a and 0 in line 2 of b"):
        labels.discover([{"male": 2}, {"male": "0.0"}], ["line 1 of b", "line 2 of b"])
    data = load_labelled_images(datasets.Dataset.from_dict({"image": ["a.png", "b.png"], "male": ["1", "false"]}))
    with pytest.raises(DataError, match=r"found False in b\.png and 1 in a\.png"):
        read_targets(data)
    images = replace(data, attributes={"label": ["true", "false"]})
    with pytest.raises(DataError, match="0 in the annotator's classes"):
        measure_annotator(SimpleNamespace(name="zeros", attributes={"label": ("0", "1")}), images)


def test_labels_of_another_type_are_called_so():
    with pytest.raises(EvaluationError, match=r"one class of 'male' in row 0, found a list: \['yes'\]"):
        given("male", rows=[{"male": ["yes"]}])
    data = load_labelled_images(datasets.Dataset.from_dict({"image": ["a.png"], "male": [["yes"]]}))
    with pytest.raises(DataError, match=r"found male \(several values a row, List"):
        read_targets(data, ["male"])


def test_columns_and_labels_that_do_not_fit_are_refused():
    for use, message in (
        (lambda: given("age"), "'age' of labels, found gender, smiles"),
        (lambda: given("gender", rows=[]).attributes, "found none"),
        (lambda: given("gender", rows=ROWS[:1]).attributes, "found woman"),
        (lambda: given("gender", rows=ROWS[2:4]).attributes, "found none"),
        (lambda: given("id", rows=[{"id": str(index)} for index in range(60)]), "at most 50 classes"),
    ):
        with pytest.raises(EvaluationError, match=message):
            use()


@pytest.mark.parametrize(("header", "caption_column"), [("text", None), ("title", "title"), ("", None)])
def test_columns_are_learnt_without_captions_and_captions_are_never_classes(tmp_path, header, caption_column):
    rows = [f"file_name,side{f',{header}' if header else ''}"]
    for index in range(4):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{index}.png")
        rows.append(f"{index}.png,{'ab'[index % 2]}{',a photo' if header else ''}")
    (tmp_path / "metadata.csv").write_text("\n".join(rows) + "\n")
    assert load_labelled_images(tmp_path, caption_column=caption_column).attributes == {"side": ["a", "b", "a", "b"]}
