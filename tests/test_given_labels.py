import numpy as np
import pytest

from invdiff.errors import EvaluationError
from invdiff.evaluation.annotators.annotations import CANNOT_TELL
from invdiff.evaluation.annotators.labels import GivenLabels

ROWS = [
    {"file_name": "0.png", "gender": "woman", "smiles": True},
    {"file_name": "1.png", "gender": "man", "smiles": False},
    {"file_name": "2.png", "gender": "", "smiles": None},
    {"file_name": "3.png", "gender": CANNOT_TELL, "smiles": float("nan")},
    {"file_name": "4.png"},
]


def test_labels_become_probabilities_of_one():
    labels = GivenLabels(["gender"]).discover(ROWS[::-1])  # the order of rows does not matter
    seen = labels.annotate(ROWS[:2])
    assert seen.attributes == {"gender": ("man", "woman")}
    assert seen.probabilities["gender"].tolist() == [[0, 1], [1, 0]]
    assert seen.probabilities["gender"].dtype == np.float32
    assert (seen.features, labels.confusion("gender"), labels.name, labels.feature_name) == (None, None, "labels", "")
    assert labels.annotate([]).classes("gender").shape == (0,)


@pytest.mark.parametrize("confidence", [0.0, 0.5, 1.0])
def test_images_without_a_label_have_no_class_at_any_confidence(confidence):
    seen = GivenLabels(["gender", "smiles"]).discover(ROWS).annotate(ROWS)
    assert seen.labels("gender", confidence) == ["woman", "man", *[CANNOT_TELL] * 3]
    assert seen.labels("smiles", confidence) == ["True", "False", *[CANNOT_TELL] * 3]


def test_classes_add_up_over_the_rows_discovered():
    labels = GivenLabels(["gender"])
    assert labels.discover(ROWS[:1]) is labels
    labels.discover(ROWS[1:2])
    assert labels.attributes == {"gender": ("man", "woman")}


@pytest.mark.parametrize(
    ("use", "message"),
    [
        *((lambda names=names: GivenLabels(names), "Expected columns") for names in ([], [""], "gender")),
        (lambda: GivenLabels(["age"]).discover(ROWS), "'age' of labels, found file_name, gender, smiles"),
        (lambda: GivenLabels(["gender"]).attributes, "found none"),
        (lambda: GivenLabels(["gender"]).discover(ROWS[:1]).attributes, "found woman"),
        (lambda: GivenLabels(["gender"]).discover(ROWS[2:4]).attributes, "found none"),
        (lambda: GivenLabels(["id"]).discover([{"id": str(index)} for index in range(60)]), "at most 50 classes"),
        (
            lambda: GivenLabels(["gender"]).discover(ROWS).annotate([{"gender": "other"}]),
            "among man, woman, got 'other'",
        ),
    ],
)
def test_columns_and_labels_that_do_not_fit_are_refused(use, message):
    with pytest.raises(EvaluationError, match=message):
        use()
