import numpy as np
import pytest

from invdiff.errors import EvaluationError
from invdiff.evaluation.annotators.annotations import CANNOT_TELL
from invdiff.evaluation.annotators.given_labels import GivenLabels

ROWS = [
    {"file_name": "0.png", "gender": "woman", "smiles": True},
    {"file_name": "1.png", "gender": "man", "smiles": False},
    {"file_name": "2.png", "gender": "", "smiles": None},
    {"file_name": "3.png", "gender": CANNOT_TELL, "smiles": float("nan")},
    {"file_name": "4.png"},
]


def test_labels_become_probabilities_of_one():
    seen = GivenLabels(["gender"], ROWS).annotate(ROWS[:2])
    assert seen.attributes == {"gender": ("man", "woman")}
    assert seen.probabilities["gender"].tolist() == [[0, 1], [1, 0]]
    assert seen.features is None


@pytest.mark.parametrize("confidence", [0.0, 0.5, 1.0])
def test_images_without_a_label_cannot_be_told_at_any_confidence(confidence):
    seen = GivenLabels(["gender", "smiles"], ROWS).annotate(ROWS)
    assert seen.labels("gender", confidence) == ["woman", "man", *[CANNOT_TELL] * 3]
    assert seen.labels("smiles", confidence) == ["True", "False", *[CANNOT_TELL] * 3]


def test_classes_add_up_over_what_was_discovered():
    labels = GivenLabels(["gender"])
    assert labels.discover(ROWS[:1]) is labels
    labels.discover(ROWS[1:2])
    assert labels.attributes == {"gender": ("man", "woman")}


def test_order_of_rows_does_not_matter():
    assert GivenLabels(["gender"], ROWS).attributes == GivenLabels(["gender"], ROWS[::-1]).attributes


def test_no_row_gives_empty_annotations():
    assert GivenLabels(["gender"], ROWS).annotate([]).classes("gender").shape == (0,)


def test_given_labels_have_no_confusion_and_no_features():
    labels = GivenLabels(["gender"], ROWS)
    assert labels.confusion("gender") is None
    assert (labels.name, labels.feature_name) == ("labels", "")


def test_probabilities_are_single_precision():
    assert GivenLabels(["gender"], ROWS).annotate(ROWS).probabilities["gender"].dtype == np.float32


@pytest.mark.parametrize("names", [[], [""], "gender"])
def test_columns_must_be_named(names):
    with pytest.raises(EvaluationError, match="Expected columns"):
        GivenLabels(names)


def test_an_absent_column_is_refused_with_those_there_are():
    with pytest.raises(EvaluationError, match="'age' of labels, found file_name, gender, smiles"):
        GivenLabels(["age"], ROWS)


@pytest.mark.parametrize(("rows", "found"), [([], "none"), (ROWS[:1], "woman"), (ROWS[2:4], "none")])
def test_fewer_than_two_classes_are_refused(rows, found):
    with pytest.raises(EvaluationError, match=f"found {found}"):
        _ = GivenLabels(["gender"], rows).attributes


def test_a_column_of_names_is_no_column_of_labels():
    rows = [{"file_name": f"{index}.png"} for index in range(60)]
    with pytest.raises(EvaluationError, match="at most 50 classes"):
        GivenLabels(["file_name"], rows)


def test_a_label_that_was_not_discovered_is_refused():
    with pytest.raises(EvaluationError, match="among man, woman, got 'other'"):
        GivenLabels(["gender"], ROWS).annotate([{"gender": "other"}])


def test_confusion_of_an_unknown_attribute_is_refused():
    with pytest.raises(EvaluationError, match="one of the attributes gender, got 'age'"):
        GivenLabels(["gender"], ROWS).confusion("age")
