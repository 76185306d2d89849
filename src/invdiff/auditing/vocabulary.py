"""The words that a CLIP model may choose from: of the user, of the captions, and common ones."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from ..assets import COMMON_WORDS
from ..text import one_line
from .result import WORD_LIMIT

MOST_CAPTION_WORDS = 300
LEAST_CAPTIONS = 3
"""Images whose captions must hold a word."""
LONGEST = 30
"""Characters of a word in a caption; what is longer is no word."""

_STOP_WORDS = """
about above across after against all along also among and another any are around away back been before behind being
below beneath beside between both but can does down during each either every few for from get got had has have her
here him his how into its itself just like many more most much near nor not off onto other our out over own per
same seen she some such than that the their them then there these they this those three through too toward towards
two under until upon very was were what when where which while who whose why will with within without you your
background foreground image images photo photograph photos picture pictures shot shown showing view
"""
STOP_WORDS = frozenset(_STOP_WORDS.split())
"""Words in captions that say nothing of what an image shows."""


def vocabulary(captions: Iterable[str], further: Sequence[str] = ()) -> list[str]:
    """Return the words to choose from, each once: the user's own, those of the captions, common ones.

    Args:
        captions: One per image; the commonest of their words are taken.
        further: The user's own words.
    """
    words = [one_line(word, WORD_LIMIT) for word in further]
    words += caption_words(captions)
    lines = COMMON_WORDS.read_text(encoding="utf-8").splitlines()
    words += [line.strip() for line in lines if not line.startswith("#")]
    distinct: dict[str, str] = {}
    for word in words:
        if word:
            distinct.setdefault(word.casefold(), word)
    return list(distinct.values())


def caption_words(captions: Iterable[str]) -> list[str]:
    """Return the commonest words of captions, lower case, without stop words, numbers and what is no word."""
    counts: Counter[str] = Counter()
    for caption, times in Counter(captions).items():
        for word in set(re.findall(r"\w+", caption.lower())):
            counts[word] += times
    fit = [
        (word, times)
        for word, times in counts.items()
        if times >= LEAST_CAPTIONS and 3 <= len(word) <= LONGEST and word.isalpha() and word not in STOP_WORDS
    ]
    fit.sort(key=lambda item: (-item[1], item[0]))
    return [word for word, _ in fit[:MOST_CAPTION_WORDS]]


def named_in(prompt: str, words: Sequence[str]) -> NDArray[np.bool_]:
    """Return which words a prompt already says, (len(words),): what is asked for is not hidden."""
    said = {stem(word) for word in re.findall(r"\w+", prompt.lower())}
    parts = [re.findall(r"\w+", word.lower()) for word in words]
    return np.array([bool(of_word) and all(stem(part) in said for part in of_word) for of_word in parts], dtype=bool)


def stem(word: str) -> str:
    """Return a word without its plural's s, lower case."""
    word = word.lower()
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word
