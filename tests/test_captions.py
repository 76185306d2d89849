import numpy as np
import pytest

from invdiff.auditing.captions import part_by_images, stated_group, stating_words
from runs import made_up_data

BIRDS = {("a bird", 0): 900, ("a bird", 1): 50}
LAND = {"on": 0, "land": 0}


def test_words_that_state_the_group_are_found():
    for counts, expected in (
        ({**BIRDS, ("a bird on water", 1): 20, ("one bird", 0): 95, ("one bird", 1): 5}, {"on": 1, "water": 1}),
        ({**BIRDS, ("a nice bird", 0): 90, ("a nice bird", 1): 10}, {}),  # it comes with either group
        ({("a bird", 0): 95, ("a bird", 1): 5, ("a nice bird", 0): 6}, {}),  # a few images are no evidence
        (BIRDS, {}),  # one caption
        # Of a world that is 95% one way a word may come with 97.5% of it.
        ({("a bird", 0): 950, ("a bird", 1): 50, ("a shy bird", 0): 1950, ("a shy bird", 1): 50}, {}),
        ({("a bird", 0): 950, ("a bird", 1): 50, ("a bird on land", 0): 1990, ("a bird on land", 1): 10}, LAND),
    ):
        captions = list(dict.fromkeys(caption for caption, _ in counts))
        ids = np.concatenate([np.full(n, captions.index(caption)) for (caption, _), n in counts.items()])
        labels = np.concatenate([np.full(n, label) for (_, label), n in counts.items()])
        assert stating_words(captions, ids, labels) == expected


@pytest.mark.parametrize(
    ("caption", "group"), [("A bird on WATER", 1), ("a waterbird", -1), ("land and water", -1), ("a bird", -1)]
)
def test_a_caption_states_a_group_by_whole_words_in_any_case_that_agree(caption, group):
    assert stated_group(caption, {"land": 0, "water": 1}) == group


@pytest.mark.parametrize(
    ("caption", "group"),
    [("glasses", 0), ("with no glasses", 1), ("without his glasses", -1), ("clean-shaven", 1), ("a clean man", -1)],
)
def test_phrases_state_a_group_and_what_is_negated_states_none(caption, group):
    assert stated_group(caption, {"glasses": 0, "no glasses": 1, "clean-shaven": 1}) == group


def parted(prompt_of, data, features, distinct=True):
    return part_by_images(prompt_of, data, [features], 20, np.full(len(data), True) & distinct)


def test_captions_predicted_alike_are_one_prompt_only_where_their_images_look_alike():
    captions, ids = ["a bird", "one bird", "a fish", "a seldom fish"], np.repeat(np.arange(4), [200, 150, 100, 5])
    features = np.random.default_rng(0).normal(size=(455, 20))
    features[ids >= 2, 0] += 2
    prompts, notes = parted(np.zeros(4, dtype=int), made_up_data(captions, ids), features)
    assert prompts.tolist() == [0, 0, 1, 0]  # too few images to tell: with the most frequent
    assert notes == {0: "2 further captions are the same prompt to the model: 'one bird', 'a seldom fish'"}
    apart, notes = parted(np.arange(4), made_up_data(captions, ids), features)
    assert (apart.tolist(), notes) == ([0, 1, 2, 3], {})


def test_free_captions_are_parted_by_words_whose_images_look_unlike():
    rng = np.random.default_rng(0)
    kind = rng.integers(3, size=1200)
    captions = [f"{rng.choice(['a', 'my'])} {('dog', 'cat', 'white cat')[k]}, no. {i}" for i, k in enumerate(kind)]
    features = rng.normal(size=(1200, 20))
    features[kind == 0, 0] += 3
    features[kind == 2, 1] += 1
    data = made_up_data(captions, np.arange(1200))
    prompts, notes = parted(np.zeros(1200, dtype=int), data, features)
    assert len(set(zip(kind.tolist(), prompts.tolist(), strict=True))) == len(set(prompts)) == 3
    assert sum("with 'white'" in note for note in notes.values()) == 1
    assert sum("without 'white'" in note for note in notes.values()) == 1
    prompts, _ = parted(np.zeros(1200, dtype=int), data, rng.normal(size=(1200, 20)))
    assert not prompts.any()


def test_copies_of_images_tell_no_captions_apart_and_a_caption_joins_the_nearest():
    rng = np.random.default_rng(0)
    features, ids = np.repeat(rng.normal(size=(150, 20)), 2, axis=0), np.repeat([0, 1], 150)
    data, once = made_up_data(["a dog", "a hound"], ids), np.arange(300) % 2 == 0
    assert parted(np.zeros(2, dtype=int), data, features, once)[0].tolist() == [0, 0]
    kinds = np.repeat([0, 1, 1], [200, 150, 40])
    apart = rng.normal(size=(390, 20)) + 0.8 * kinds[:, None] * (np.arange(20) < 2)
    three = made_up_data(["a landbird", "a waterbird", "a waterbrid"], np.repeat([0, 1, 2], [200, 150, 40]))
    assert parted(np.zeros(3, dtype=int), three, apart)[0].tolist() == [0, 1, 1]
