import numpy as np
import pytest

from invdiff.data.captioned import CaptionedImages
from invdiff.data.subsets import random_subset, with_severity
from invdiff.errors import DataError


def labelled(table):
    """Captions and classes from {caption: {class: images}}."""
    captions, classes = [], []
    for caption, counts in table.items():
        for name, count in counts.items():
            captions += [caption] * count
            classes += [name] * count
    order = np.random.default_rng(0).permutation(len(captions))
    captions, classes = [captions[i] for i in order], [classes[i] for i in order]
    names = [f"{i}.png" for i in range(len(captions))]
    return CaptionedImages(captions, names, {"place": classes}, 0.0, [b""] * len(captions))


def shares(data, caption):
    mine = [place for text, place in zip(data.captions, data.attributes["place"], strict=True) if text == caption]
    return {name: mine.count(name) for name in sorted(set(mine))}


def test_a_smaller_subset_is_part_of_a_larger_one_in_the_same_order():
    data = labelled({"a": {"land": 50}})
    small, large = random_subset(data, 10, seed=3), random_subset(data, 30, seed=3)
    assert set(small.names) < set(large.names)
    assert [data.names.index(name) for name in large.names] == sorted(data.names.index(name) for name in large.names)
    assert random_subset(data, 10, seed=4).names != small.names


@pytest.mark.parametrize("number", [0, 51])
def test_a_subset_is_no_larger_than_the_set(number):
    with pytest.raises(DataError, match=f"1 to the 50 there are, got {number}"):
        random_subset(labelled({"a": {"land": 50}}), number)


@pytest.mark.parametrize(
    ("severity", "expected"),
    [
        (0.9, {"land": 90, "water": 10}),
        (0.5, {"land": 40, "water": 40}),
        (1.0, {"land": 90}),
        (0.75, {"land": 90, "water": 30}),
    ],
)
def test_severity_is_the_share_of_the_usual_class_with_as_many_images_as_there_are(severity, expected):
    data = with_severity(labelled({"a": {"land": 90, "water": 40}}), "place", severity)
    assert shares(data, "a") == expected


def test_each_caption_has_its_own_usual_class():
    data = with_severity(labelled({"a": {"land": 90, "water": 40}, "b": {"land": 30, "water": 60}}), "place", 0.9)
    assert shares(data, "a") == {"land": 90, "water": 10}
    assert shares(data, "b") == {"land": 7, "water": 60}


def test_what_is_left_out_depends_on_the_seed():
    data = labelled({"a": {"land": 90, "water": 40}})
    first, second = (with_severity(data, "place", 0.9, seed=seed).names for seed in (0, 1))
    assert first != second
    assert first == with_severity(data, "place", 0.9, seed=0).names


def test_settings_that_cannot_be_met_are_refused():
    data = labelled({"a": {"land": 90}})
    with pytest.raises(DataError, match=r"share of 0.9 'land' .place., found 90 and 0 others"):
        with_severity(data, "place", 0.9)
    with pytest.raises(DataError, match=r"attribute 'age' in the data, found place"):
        with_severity(data, "age", 0.9)
    with pytest.raises(DataError, match="above 0, up to 1, got 0"):
        with_severity(data, "place", 0.0)
