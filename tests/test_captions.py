import numpy as np

from invdiff.auditing.captions import stated_group, stating_words


def captions_and_labels(counts: dict[tuple[str, int], int]) -> tuple[list[str], np.ndarray, np.ndarray]:
    captions = list(dict.fromkeys(caption for caption, _ in counts))
    ids = np.concatenate([np.full(n, captions.index(caption)) for (caption, _), n in counts.items()])
    labels = np.concatenate([np.full(n, label) for (_, label), n in counts.items()])
    return captions, ids, labels


def test_words_that_state_the_group_are_found():
    captions, ids, labels = captions_and_labels(
        {
            ("a bird", 0): 900,
            ("a bird", 1): 50,
            ("a bird on water", 1): 20,
            ("one bird", 0): 95,
            ("one bird", 1): 5,
        }
    )
    assert stating_words(captions, ids, labels) == {"on": 1, "water": 1}


def test_a_word_that_comes_with_every_group_tells_nothing():
    captions, ids, labels = captions_and_labels(
        {("a bird", 0): 900, ("a bird", 1): 100, ("a nice bird", 0): 90, ("a nice bird", 1): 10}
    )
    assert stating_words(captions, ids, labels) == {}


def test_a_few_images_are_no_evidence_that_a_word_tells_the_group():
    captions, ids, labels = captions_and_labels({("a bird", 0): 95, ("a bird", 1): 5, ("a nice bird", 0): 6})
    assert stating_words(captions, ids, labels) == {}


def test_one_caption_has_no_stating_words():
    captions, ids, labels = captions_and_labels({("a bird", 0): 90, ("a bird", 1): 10})
    assert stating_words(captions, ids, labels) == {}


def test_a_caption_tells_the_group_by_whole_words_in_any_case():
    assert stated_group("A bird on WATER", {"water": 1}) == 1
    assert stated_group("a waterbird", {"water": 1}) == -1


def test_a_caption_that_contradicts_itself_tells_nothing():
    assert stated_group("land and water", {"land": 0, "water": 1}) == -1
