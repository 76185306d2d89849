import numpy as np
import pytest
from subsets import with_severity

from invdiff.data.captioned import CaptionedImages


def labelled(table):
    """Captions and classes, shuffled, from {caption: {class: images}}."""
    pairs = [(caption, name) for caption, counts in table.items() for name in counts for _ in range(counts[name])]
    order = np.random.default_rng(0).permutation(len(pairs))
    captions, classes = ([pairs[i][side] for i in order] for side in (0, 1))
    return CaptionedImages(captions, [f"{i}.png" for i in range(len(pairs))], {"place": classes}, 0.0, lambda row: b"")


def shares(data, caption):
    mine = [place for text, place in zip(data.captions, data.attributes["place"], strict=True) if text == caption]
    return {name: mine.count(name) for name in sorted(set(mine))}


@pytest.mark.parametrize(("severity", "land", "water"), [(0.9, 90, 10), (0.5, 40, 40), (1.0, 90, 0), (0.75, 90, 30)])
def test_severity_is_the_share_of_each_captions_usual_class_of_as_many_images_as_there_are(severity, land, water):
    data = labelled({"a": {"land": 90, "water": 40}, "b": {"land": 30, "water": 60}})
    kept = with_severity(data, "place", severity)
    assert shares(kept, "a") == {"land": land} | ({"water": water} if water else {})
    assert shares(kept, "b")["water"] == min(60, round(30 * severity / (1 - severity)) if severity < 1 else 60)
    assert kept.names == with_severity(data, "place", severity, seed=0).names
    if severity == 0.9:
        assert kept.names != with_severity(data, "place", severity, seed=1).names
