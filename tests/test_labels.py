import numpy as np
import pytest
from PIL import Image

from invdiff.errors import EvaluationError
from invdiff.evaluation.annotators.annotations import CANNOT_TELL
from invdiff.evaluation.annotators.labels import GivenLabels, load_labelled_images

ROWS = [
    {"file_name": "0.png", "gender": "woman", "smiles": True},
    {"file_name": "1.png", "gender": "man", "smiles": False},
    {"file_name": "2.png", "gender": "", "smiles": None},
    {"file_name": "3.png", "gender": CANNOT_TELL, "smiles": float("nan")},
    {"file_name": "4.png"},
]


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
        smiles = given("smiles").annotate(ROWS).labels("smiles", confidence)
        assert smiles == ["True", "False", *[CANNOT_TELL] * 3]


@pytest.mark.parametrize(
    ("use", "message"),
    [
        *((lambda names=names: GivenLabels(names), "Expected columns") for names in ([], [""], "gender")),
        (lambda: given("age"), "'age' of labels, found file_name, gender, smiles"),
        (lambda: given("gender", rows=[]).attributes, "found none"),
        (lambda: given("gender", rows=ROWS[:1]).attributes, "found woman"),
        (lambda: given("gender", rows=ROWS[2:4]).attributes, "found none"),
        (lambda: given("id", rows=[{"id": str(index)} for index in range(60)]), "at most 50 classes"),
        (lambda: given("gender").annotate([{"gender": "other"}]), "among man, woman, got 'other'"),
    ],
)
def test_columns_and_labels_that_do_not_fit_are_refused(use, message):
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
