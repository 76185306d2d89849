import numpy as np
import pytest

from invdiff.auditing.captions import stated_group, stating_words

BIRDS = {("a bird", 0): 900, ("a bird", 1): 50}


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ({**BIRDS, ("a bird on water", 1): 20, ("one bird", 0): 95, ("one bird", 1): 5}, {"on": 1, "water": 1}),
        ({**BIRDS, ("a nice bird", 0): 90, ("a nice bird", 1): 10}, {}),  # it comes with either group
        ({("a bird", 0): 95, ("a bird", 1): 5, ("a nice bird", 0): 6}, {}),  # a few images are no evidence
        (BIRDS, {}),  # one caption
    ],
)
def test_words_that_state_the_group_are_found(counts, expected):
    captions = list(dict.fromkeys(caption for caption, _ in counts))
    ids = np.concatenate([np.full(n, captions.index(caption)) for (caption, _), n in counts.items()])
    labels = np.concatenate([np.full(n, label) for (_, label), n in counts.items()])
    assert stating_words(captions, ids, labels) == expected


@pytest.mark.parametrize(
    ("caption", "group"), [("A bird on WATER", 1), ("a waterbird", -1), ("land and water", -1), ("a bird", -1)]
)
def test_a_caption_states_a_group_by_whole_words_in_any_case_that_agree(caption, group):
    assert stated_group(caption, {"land": 0, "water": 1}) == group
