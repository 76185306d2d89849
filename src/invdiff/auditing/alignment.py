"""What columns of W mean across prompts, and which words in captions state it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from ..data.encode import EncodedImages
from .captions import telling_words, told_group
from .evidence import Evidence


class Columns:
    """Orders the columns of each prompt's W so that a column means the same under every prompt.

    Groups are compared by where their mean features lie from the prompt's own mean. The first prompt's groups
    are ordered from most to least frequent, and the others' follow.
    """

    def __init__(self, evidence: Evidence) -> None:
        self.features = evidence.features.flatten(1).numpy()
        self.reference: np.ndarray | None = None

    def align(self, rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Return W (n, E) of images `rows` with its columns in order; some may be empty."""
        mass = weights.sum(axis=0)
        by_size = np.argsort(-mass, kind="stable")
        features = self.features[rows].astype(np.float64)
        means = (weights.T @ features) / np.maximum(mass, 1e-12)[:, None]
        present = mass > 0
        offsets = np.where(present[:, None], means - means[present].mean(axis=0), 0.0)
        offsets = offsets / np.maximum(features.std(axis=0), 1e-12)
        offsets /= np.maximum(np.linalg.norm(offsets, axis=1, keepdims=True), 1e-12)
        if self.reference is None:
            self.reference = offsets[by_size]
            return weights[:, by_size]
        return weights[:, linear_sum_assignment(-self.reference @ offsets.T)[1]]


def rarest(mass: np.ndarray) -> int:
    """Return the group of least mass among those that have any."""
    return int(np.where(mass > 0, mass, np.inf).argmin())


@dataclass(frozen=True)
class TellingWords:
    """Words in captions that state what would otherwise be hidden."""

    group_of: dict[str, int]
    """Words that tell a group, the same under every prompt: "water"."""
    certain: set[str]
    """Words under which the rare group of a prompt never occurs: "on", in captions that say the usual."""

    def told(self, caption: str, usual: int) -> int:
        """Return the group that `caption` states under a prompt whose frequent group is `usual`; -1 for none."""
        group = told_group(caption, self.group_of)
        if group >= 0:
            return group
        return usual if told_group(caption, dict.fromkeys(self.certain, usual)) >= 0 else -1


def words_that_state_groups(data: EncodedImages, groups: dict[int, tuple[np.ndarray, np.ndarray]]) -> TellingWords:
    """Return words that tell the group.

    "on land" says little more under a prompt whose images are on land anyway, but under the other prompt it says
    all: since columns mean the same under every prompt, a word found under one holds for all. And where captions
    only ever say the usual, all prompts together show that the rare group never comes with them.
    """
    caption_ids = data.caption_ids.numpy()
    told: dict[str, set[int]] = {}
    rare, used = [np.empty(0, dtype=int)], [np.empty(0, dtype=int)]
    for rows, weights in groups.values():
        labels = weights.argmax(axis=1)
        for word, group in telling_words(data.captions, caption_ids[rows], labels).items():
            told.setdefault(word, set()).add(group)
        rare.append((labels == rarest(weights.sum(axis=0))).astype(int))
        used.append(caption_ids[rows])
    pooled = telling_words(data.captions, np.concatenate(used), np.concatenate(rare), certainty=0.99)
    return TellingWords(
        group_of={word: group for word, (group, *others) in told.items() if not others},
        certain={word for word, is_rare in pooled.items() if not is_rare},
    )
