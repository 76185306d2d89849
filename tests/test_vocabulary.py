import re

import pytest

from invdiff.assets import COMMON_WORDS
from invdiff.auditing.result import WORD_LIMIT
from invdiff.auditing.vocabulary import LEAST_CAPTIONS, MOST_CAPTION_WORDS, caption_words, named_in, stem, vocabulary


def test_words_are_the_users_the_captions_and_common_ones_each_once():
    words = vocabulary(["a heron near Water"] * 5, ["Palm  tree", "Heron"])
    assert words[:2] == ["Palm tree", "Heron"]
    assert words[2] == "water"
    assert "heron" not in words
    assert len(words) == len({word.casefold() for word in words})
    assert "sunset" in words


def test_common_words_are_a_few_hundred_plain_ones_without_comments():
    words = vocabulary([])
    assert 300 < len(words) < 800
    assert all(re.fullmatch(r"[A-Za-z][A-Za-z -]*", word) and len(word) <= WORD_LIMIT for word in words)
    lines = COMMON_WORDS.read_text(encoding="utf-8").split("\n")
    assert len(words) == sum(bool(line) and not line.startswith("#") for line in lines)  # none stands there twice


def test_rare_words_stop_words_and_numbers_of_captions_are_left_out():
    captions = ["a photo of the heron 42 no7 x"] * LEAST_CAPTIONS + ["an egret"] * (LEAST_CAPTIONS - 1)
    assert caption_words(captions) == ["heron"]


def test_a_word_counts_once_a_caption_and_the_commonest_come_first():
    captions = ["pond"] * 4 + ["heron heron heron"] * 3
    assert caption_words(captions) == ["pond", "heron"]


def test_only_the_commonest_caption_words_are_taken():
    alphabet = "abcdefghijklmnopqrst"
    captions = [f"zz{first}{second}" for first in alphabet for second in alphabet] * LEAST_CAPTIONS
    assert len(caption_words(captions)) == MOST_CAPTION_WORDS


@pytest.mark.parametrize("hostile", ["<script>alert(1)</script>", "x" * 10_000, "\u202etxet\u202c \ud800", "{0} %s"])
def test_hostile_captions_give_plain_words(hostile):
    assert all(word.isalpha() and len(word) <= 30 for word in caption_words([hostile] * 5))


def test_words_of_users_become_one_line():
    assert vocabulary([], ["a\u202eb\nc", "\u200b", " "])[0] == "ab c"


def test_what_the_prompt_says_is_named_singular_or_plural():
    words = ["bird", "birds", "bird house", "Two birds", "glass", "\U0001f426"]
    assert named_in("A photo of two Birds", words).tolist() == [True, True, False, True, False, False]
    assert not named_in("", words).any()


def test_stems():
    assert [stem(word) for word in ("Boats", "glass", "gas", "sea")] == ["boat", "glass", "gas", "sea"]
