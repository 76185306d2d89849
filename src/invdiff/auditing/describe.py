"""Say in words what tells hidden groups apart, as a CLIP model sees it: an aid to the eye, not a finding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ..data.captioned import CaptionedImages
from ..files import fingerprint, read_tensors, write_tensors
from ..models.encoders import BATCH_SIZE
from ..progress import progress_bar
from ..seeds import derived_seed
from ..text import one_line
from .result import AuditWords, GroupWords, Word
from .vocabulary import named_in, stem, vocabulary
from .word_effects import LEAST_IMAGES, Comparison, Part, chance_maxima, compare, p_values

if TYPE_CHECKING:
    from .result import Audit

_Array = NDArray[Any]

TEMPLATES = ("{}", "a photo of {}", "a picture of {}", "a photo with {} in it")
"""A word is the mean of these texts' unit embeddings (prompt ensembling; Radford et al., ICML 2021, 3.1.4)."""
IMAGES_PER_GROUP = 200
"""Most images of each group, under each prompt, that are looked at."""
MOST_WORDS = 6
MOST_STEPS = 24
"""Most words that are taken out, those that are told of no group included."""
LEVEL = 0.01
LEAST_EFFECT = 0.5
"""Standard deviations. With many images a difference that nobody could see would pass the test."""
SYNONYMS = 0.7
"""Words are near-synonyms where their embeddings, less the mean of all words', have a larger cosine."""
MOST_CHARACTERS = 300
"""Of a prompt, as it stands beside its words."""
NO_WORD = "no word tells it apart"
TOO_FEW = f"too few images to tell (at least {LEAST_IMAGES} of the group and of others are needed)"


class Encoder(Protocol):
    """What turns images and texts into vectors of one space, such as `ClipEncoder`."""

    @property
    def name(self) -> str:
        """What it is called in reports."""

    def weights_digest(self) -> str:
        """Return what names its weights: embeddings of other weights are not read back."""

    def extract(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        """Return the features of images, (N, D)."""

    def text_features(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return the features of texts, (N, D)."""


@dataclass(frozen=True)
class _Sample:
    """The images of one prompt that are looked at, for one hidden factor."""

    prompt: int
    factor: int
    positions: _Array
    """(n,) in the audit, rising."""
    weights: _Array
    """(n, E) their rows of W."""


def describe_groups(
    found: Audit,
    data: CaptionedImages,
    rows: torch.Tensor,
    encoder: Encoder,
    *,
    words: Sequence[str] = (),
    cache_dir: Path,
    seed: int = 0,
    progress: bool = True,
) -> AuditWords:
    """Return the words that are nearer to the images of each group than to the others', prompt by prompt and over all.

    An image's score for a word is the cosine of their embeddings, less the image's mean over all words: as in CLIP's
    own softmax, only differences between words count. A word is told of a group whose scores are higher, beyond chance
    among so many words (`LEVEL`) and by enough to matter (`LEAST_EFFECT`). First comes the word of the largest
    difference. Each further one must pass in the same way once what the words before it say is taken out of it
    (matching pursuit): a group that shows the sea is also a little nearer to whatever lies near "sea", and farther
    from what lies on its other side. What the prompt says, and what all images share, is taken out from the start.

    Args:
        found: The audit, as it was inferred.
        data: The images.
        rows: (N,) where each audited image stands in `data`.
        encoder: The CLIP model.
        words: The user's own words, beside those of the captions and the common ones.
        cache_dir: Where embeddings of images are kept.
        seed: Of the sample of images, and of the test's permutations.
        progress: Show a progress bar.
    """
    chosen = vocabulary(data.captions, words)
    samples = list(_samples(found, seed))
    seen = np.unique(np.concatenate([sample.positions for sample in samples])) if samples else np.empty(0, np.int64)
    images = np.zeros((len(found.names), 1))
    if len(seen):
        embedded = _embed_images(encoder, data, rows[torch.from_numpy(seen)], cache_dir, progress=progress)
        images = np.zeros((len(found.names), embedded.shape[1]))
        images[seen] = _unit(embedded)
    teller = _Teller(found, chosen, _embed_words(encoder, chosen), images, seed)
    groups = [entry for sample in samples for entry in teller.tell([sample], sample.prompt)]
    for factor in range(len(found.group_weights)):
        of_factor = [sample for sample in samples if sample.factor == factor]
        groups += teller.tell(of_factor, None) if len(of_factor) > 1 else []
    return AuditWords(encoder.name, found.fingerprint, len(chosen), len(seen), LEVEL, tuple(groups))


class _Teller:
    """Turns embeddings of words and images into the words of groups."""

    def __init__(self, found: Audit, words: Sequence[str], texts: _Array, images: _Array, seed: int) -> None:
        self.found, self.words, self.images, self.seed = found, words, images, seed
        self.texts = texts - texts.mean(axis=0)
        self.directions = _unit(self.texts)
        self.shared = images.sum(axis=0)  # rows of images that are not looked at are zeros
        self.stems = [stem(word) for word in words]
        self.named: list[_Array] = [
            np.flatnonzero(named_in(p.prompt, words)) if p.found else np.empty(0, np.int64) for p in found.prompts
        ]

    def tell(self, samples: Sequence[_Sample], prompt: int | None) -> list[GroupWords]:
        """Return the words of each group that has images, under one prompt or, for None, over several."""
        factor, place = samples[0].factor, "all" if prompt is None else prompt
        parts = self._parts(samples, [])
        maxima = chance_maxima(parts, np.random.default_rng(derived_seed("words", self.seed, place, factor)))
        first = compare(parts)
        told = self._pursue(samples, first, maxima)
        chance = p_values(first.statistic, maxima)
        judged = np.any([part.judged for part in parts], axis=0)
        sizes = np.sum([part.weights.sum(axis=0) for part in parts], axis=0)
        caption = "" if prompt is None else one_line(self.found.prompts[prompt].prompt, MOST_CHARACTERS)
        entries = []
        for group in map(int, np.flatnonzero(sizes > 0)):
            words = [
                Word(self.words[at], round(float(first.effect[group, at]), 3), round(float(chance[group, at]), 4))
                for at in told[group]
            ]
            note = "" if words else NO_WORD if judged[group] else TOO_FEW
            entries.append(GroupWords(prompt, caption, factor, group, tuple(words), note))
        return entries

    def _pursue(self, samples: Sequence[_Sample], first: Comparison, maxima: _Array) -> list[list[int]]:
        """Return the words of each group: the one that tells most of any group, then what tells most beside it."""
        candidates = np.ones_like(first.effect, dtype=bool)
        told: list[list[int]] = [[] for _ in candidates]
        taken_out: list[int] = []
        current = first
        for _ in range(MOST_STEPS):
            candidates &= (p_values(current.statistic, maxima) <= LEVEL) & (current.effect >= LEAST_EFFECT)
            if not candidates.any():
                break
            best = int(np.where(candidates, current.difference, -np.inf).max(axis=0).argmax())
            for group in np.flatnonzero(candidates[:, best]):
                if not any(self._alike(best, other) for other in told[group]):
                    told[group].append(best)
            candidates[:, best] = False
            taken_out.append(best)
            current = compare(self._parts(samples, taken_out))
        return [words[:MOST_WORDS] for words in told]

    def _alike(self, word: int, other: int) -> bool:
        same = self.stems[word] == self.stems[other]
        return same or float(self.directions[word] @ self.directions[other]) > SYNONYMS

    def _parts(self, samples: Sequence[_Sample], taken_out: Sequence[int]) -> list[Part]:
        """Return scores beside what all images share, what the prompt says, and what some words say."""
        parts = []
        for sample in samples:
            said = np.vstack([self.directions[[*taken_out, *self.named[sample.prompt]]], _unit(self.shared)])
            texts = self.texts - self.texts @ np.linalg.pinv(said, rcond=0.01) @ said
            usable = np.linalg.norm(texts, axis=1) > 0.01 * np.linalg.norm(self.texts, axis=1)
            parts.append(Part(self.images[sample.positions] @ texts.T, sample.weights, usable))
        return parts


def _samples(found: Audit, seed: int) -> Iterator[_Sample]:
    """Yield the images to look at under each prompt that hides a group, for each factor that splits it."""
    prompt_ids = found.prompt_ids
    for prompt, entry in enumerate(found.prompts):
        rows = np.flatnonzero(prompt_ids == prompt) if entry.found else np.empty(0, np.int64)
        for factor, of_factor in enumerate(found.group_weights):
            weights = of_factor.astype(np.float64)[rows]
            kept = weights.sum(axis=1) > 0.5  # rows of images that were left out are zeros
            members, weights = rows[kept], weights[kept]
            if len(members) == 0 or np.ptp(weights, axis=0).max() < 1e-6:  # uniform: it does not split this prompt
                continue
            labels = weights.argmax(axis=1)
            rng = np.random.default_rng(derived_seed("sample of words", seed, prompt, factor))
            taken = np.sort(
                np.concatenate(
                    [
                        rng.permutation(np.flatnonzero(labels == group))[:IMAGES_PER_GROUP]
                        for group in np.unique(labels)
                    ]
                )
            )
            yield _Sample(prompt, factor, members[taken], weights[taken])


def _embed_words(encoder: Encoder, words: Sequence[str]) -> _Array:
    """Return the unit mean of each word's unit text embeddings, (V, D)."""
    texts = [template.format(word) for word in words for template in TEMPLATES]
    embedded = _unit(encoder.text_features(texts).astype(np.float64))
    return _unit(embedded.reshape(len(words), len(TEMPLATES), -1).mean(axis=1))


def _embed_images(
    encoder: Encoder, data: CaptionedImages, rows: torch.Tensor, cache_dir: Path, *, progress: bool
) -> _Array:
    """Return the features of images `rows` of `data`, (len(rows), D), cached on disk."""
    key = fingerprint(encoder.weights_digest(), data.fingerprint, rows.numpy().tobytes())
    path = cache_dir / f"{key}.safetensors"
    if not path.exists():
        features = []
        with progress_bar("looking for words", len(rows), enabled=progress) as bar:
            for batch in rows.split(BATCH_SIZE):
                features.append(encoder.extract([data.image(int(row)) for row in batch]))
                bar.advance(len(batch))
        write_tensors(path, {"features": torch.from_numpy(np.concatenate(features))})
    return read_tensors(path)["features"].numpy().astype(np.float64)


def _unit(vectors: _Array) -> _Array:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
