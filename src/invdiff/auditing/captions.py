"""Captions that are one prompt, and captions that state the attribute they would otherwise hide."""

import functools
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from scipy.stats import false_discovery_control, hypergeom, mannwhitneyu, norm
from sklearn.cluster import MiniBatchKMeans
from sklearn.metrics.cluster import contingency_matrix

from ..data.encode import EncodedImages
from ..models.families import Condition
from ..models.features import add_noise
from ..models.frozen import Denoiser
from ..seeds import generator
from ..text import listed
from .asked import known_rows
from .splits import rarest

MOST_CAPTIONS = 256  # of more captions than this, as many stand for others with similar embeddings
PROBES = 16  # noisy images that every caption is tried on
LOG_SNR = -4.24  # their noise level: the image is not decided yet, so the caption decides
NEGATIONS = "no|not|without|never|non"
LIFT = 3  # by which a word that states a group makes the other groups rarer
LEVEL = 0.001  # false discovery rate of words that state a group, and of captions whose images are told apart
MOST_TOLD = 64  # captions of a prompt that are told from another by their images, at most
MOST_COMPARED = 2000  # images of either side that the probe compares at most, evenly chosen
LEAST_WORD = 100  # images with a word in their captions, and without, that it takes to part captions by it
LEAST_WORD_SHARE = 0.02  # the same, as a share of all images


def group_captions(denoiser: Denoiser, data: EncodedImages, threshold: float, seed: int) -> tuple[NDArray[Any], float]:
    """The prompt of each caption (captions,), from 0, and the denoiser forwards spent per image.

    Captions that the model predicts alike are one prompt: average linkage up to a distance of `threshold`, in units of
    the model's own squared error. Of more than `MOST_CAPTIONS`, those nearest to the centres of k-means stand for the
    others.
    """
    count = len(data.captions)
    if count == 1 or not data.conditions:
        return np.zeros(count, dtype=np.int64), 0.0
    if "class_labels" in data.conditions:
        labels = data.conditions["class_labels"][:count].numpy()
        return np.unique(labels, return_inverse=True)[1].astype(np.int64), 0.0
    compared, stands_for = np.arange(count), np.arange(count)
    if count > MOST_CAPTIONS:
        means = data.conditions["prompt_embeds"][:count].float().mean(dim=1).numpy()
        centres = MiniBatchKMeans(MOST_CAPTIONS, n_init=3, random_state=seed).fit(means)
        used, stands_for = np.unique(centres.labels_, return_inverse=True)
        compared = centres.transform(means)[:, used].argmin(axis=0)
    rng = generator("captions", seed)
    rows = torch.randint(len(data), (PROBES,), generator=rng)
    noisy_latents, timesteps, target = add_noise(denoiser, data.latents[rows], LOG_SNR, rng)

    def predict(condition: Condition) -> torch.Tensor:
        return denoiser(noisy_latents, timesteps, condition)[0].float()

    error = (predict(data.condition(data.caption_ids[rows])) - target).square().mean().item()
    conditions = (data.condition(torch.full((PROBES,), int(caption))) for caption in compared)
    predictions = torch.stack([predict(condition).flatten().cpu() for condition in conditions])
    distances = torch.cdist(predictions, predictions).square().double().numpy() / predictions.shape[1]
    np.fill_diagonal(distances, 0.0)
    tree = linkage(squareform(distances / max(error, 1e-12), checks=False), method="average")
    prompts = fcluster(tree, threshold, criterion="distance").astype(np.int64) - 1
    return prompts[stands_for], (len(compared) + 1) * PROBES / len(data)


def part_by_images(
    prompt_of: NDArray[Any], data: EncodedImages, sources: Sequence[NDArray[Any]], least: int, distinct: NDArray[Any]
) -> tuple[NDArray[Any], dict[int, str]]:
    """Prompts of which captions stay together only where a probe cannot tell their images apart.

    A weak model may predict alike for captions that mean different things: where `told_apart` by whitened features,
    `sources` (N, d) each, they are of two prompts. Captions of fewer than `least` images, as free text, are parted by
    a word whose images are told from the others', the clearest first; those with it and those without are parted
    likewise. What no word parts stays with the most frequent caption of the prompt.

    From `prompt_of` (captions,), as `group_captions` finds it, to the prompt of each caption, from 0, and what was
    merged in each, in words. Images that are not `distinct` (N,), copies of others of their caption, tell nothing.
    """
    caption_ids, parted = data.caption_ids.numpy(), np.full(len(prompt_of), -1)
    by_words, notes = dict[int, str](), dict[int, str]()
    counts = np.bincount(caption_ids, minlength=len(prompt_of))
    often, having = max(LEAST_WORD, LEAST_WORD_SHARE * len(caption_ids)), captions_by_word(data.captions)
    words = {word: np.isin(caption_ids, of) for word, of in having.items() if counts[of].sum() >= often}
    for prompt in np.unique(prompt_of):
        captions = np.flatnonzero(prompt_of == prompt)
        captions = captions[np.argsort(-counts[captions], kind="stable")]
        told = [c for c in captions.tolist() if counts[c] >= least][:MOST_TOLD]
        bound = norm.isf(LEVEL / max(len(told) * (len(told) - 1) / 2, 1))
        # Each caption joins the one whose images look most alike, unless they are told from all.
        heads: list[int] = []
        for caption in told:
            rows = np.flatnonzero(distinct & (caption_ids == caption))
            apart = {h: told_apart(sources, np.flatnonzero(distinct & (caption_ids == h)), rows) for h in heads}
            nearest = min(apart, key=lambda head: apart[head], default=caption)
            parted[caption] = nearest if apart.get(nearest, bound) < bound else caption
            heads += [caption] if parted[caption] == caption else []
        rest = distinct & np.isin(caption_ids, captions[parted[captions] < 0])
        for rows, said in _parts_by_words(np.flatnonzero(rest), words, sources):
            part = captions[np.isin(captions, caption_ids[rows]) & (parted[captions] < 0)]
            head = part[0] if said or not heads else heads[0]
            parted[part] = head
            by_words |= {int(head): said} if said else {}
        if counts[captions[0]]:
            parted[captions[counts[captions] == 0]] = parted[captions[0]]
    ids, prompts = np.unique(parted, return_inverse=True)
    for prompt, head in enumerate(ids.tolist()):
        merged = [data.captions[c] for c in np.flatnonzero(prompts == prompt).tolist() if c != head and counts[c]]
        if merged:
            plural, verb = ("s", "are") if len(merged) > 1 else ("", "is")
            alike = by_words.get(head, f"{verb} the same prompt to the model")
            notes[prompt] = f"{len(merged):,} further caption{plural} {alike}: {listed(list(map(repr, merged)), 3)}"
    return prompts, notes


def _parts_by_words(
    rows: NDArray[Any], words: Mapping[str, NDArray[np.bool_]], sources: Sequence[NDArray[Any]], said: str = ""
) -> list[tuple[NDArray[Any], str]]:
    """Images `rows` in parts by `words`, (N,) each, with those that the part's captions have or lack, `said`."""
    least = max(LEAST_WORD, LEAST_WORD_SHARE * len(sources[0])) if sources else np.inf
    inside = np.array([having[rows] for having in words.values()], dtype=np.float32).reshape(len(words), len(rows))
    counts = inside.sum(axis=1)
    tried = np.flatnonzero((counts >= least) & (len(rows) - counts >= least))
    if not len(tried):
        return [(rows, said)]
    inside, ones = inside[tried], counts[tried, None]
    distance = np.zeros(len(tried))  # of the means with and without, in standard errors, squared
    for source in sources:
        features = source[rows]
        sums = inside @ features
        shift = sums / ones - (features.sum(axis=0) - sums) / (len(rows) - ones)
        distance += (shift**2).sum(axis=1) * (ones * (len(rows) - ones))[:, 0]
    best = int(distance.argmax())
    word, with_word = list(words)[tried[best]], inside[best] > 0
    if told_apart(sources, rows[with_word], rows[~with_word]) < norm.isf(LEVEL / len(tried)):
        return [(rows, said)]
    before = f"{said} and " if said else ""
    having = _parts_by_words(rows[with_word], words, sources, f"{before}with {word!r}")
    return having + _parts_by_words(rows[~with_word], words, sources, f"{before}without {word!r}")


def told_apart(sources: Sequence[NDArray[Any]], one: NDArray[Any], other: NDArray[Any]) -> float:
    """How many standard errors above chance a probe ranks images `one` (n,) and `other` (m,), out of fold."""
    one, other = (of[np.linspace(0, len(of) - 1, min(len(of), MOST_COMPARED)).astype(int)] for of in (one, other))
    margins = np.zeros(len(one)), np.zeros(len(other))
    for source in sources:
        for half in (0, 1):
            means = [source[rows[1 - half :: 2]].mean(axis=0) for rows in (one, other)]
            for margin, rows in zip(margins, (one, other), strict=True):
                margin[half::2] += (source[rows[half::2]] - (means[0] + means[1]) / 2) @ (means[1] - means[0])
    pairs = len(one) * len(other)
    above = mannwhitneyu(margins[1], margins[0]).statistic / pairs - 0.5
    return float(above / np.sqrt((len(one) + len(other) + 1) / (12 * pairs)))


def words_that_state_groups(
    data: EncodedImages, groups: dict[int, tuple[NDArray[Any], NDArray[Any]]]
) -> tuple[dict[str, int], set[str]]:
    """The words of captions that state a group, such as "water", and words that only come with the usual one.

    A word found under one prompt holds for all, as columns do. `groups` holds each prompt's images (n,), and their W
    (n, E), columns aligned; images of which nothing is known state nothing.
    """
    caption_ids = data.caption_ids.numpy()
    stated: dict[str, set[int]] = defaultdict(set)
    rare, used = list[NDArray[Any]](), list[NDArray[Any]]()
    for members, every in groups.values():
        told = known_rows(every)
        rows, weights = members[told], every[told]
        labels = weights.argmax(axis=1)
        for word, group in stating_words(data.captions, caption_ids[rows], labels).items():
            stated[word].add(group)
        rare.append((labels == rarest(weights.sum(axis=0))).astype(int))
        used.append(caption_ids[rows])
    pooled = stating_words(data.captions, np.concatenate(used), np.concatenate(rare), certainty=0.99)
    of_one_group = {word: group for word, (group, *others) in stated.items() if not others}
    return of_one_group, {word for word, is_rare in pooled.items() if not is_rare}


def stating_words(
    captions: list[str], caption_ids: NDArray[Any], labels: NDArray[Any], *, certainty: float = 0.95
) -> dict[str, int]:
    """The words of captions that state the group, `labels` (n,), of images with `caption_ids` (n,), and that group.

    By Fisher's exact test with Benjamini-Hochberg over words; a share `certainty` of a word's images is of its group,
    and the others are rarer among them by `LIFT` than among images without the word: where a group is 95% of all, a
    word that only comes with it a little more often states nothing.
    """
    groups, counts = np.unique(labels), contingency_matrix(caption_ids, labels)  # images of each caption and group
    having = captions_by_word([captions[caption] for caption in np.unique(caption_ids)])
    inside = np.array([counts[of].sum(axis=0) for of in having.values()]).reshape(len(having), len(groups))
    drawn, most, group = inside.sum(axis=1), inside.max(axis=1), inside.argmax(axis=1)
    elsewhere, total = len(labels) - drawn, counts.sum(axis=0)[group]
    rarer = LIFT * (drawn - most) * elsewhere <= drawn * (elsewhere - total + most)
    states = (elsewhere > 0) & (most >= certainty * drawn) & rarer
    # The chance of so many of this group among the word's images, were they drawn from all (Fisher's test).
    chances = hypergeom.sf(most - 1, len(labels), total, drawn)
    states[states] = false_discovery_control(chances[states]) < LEVEL
    return {word: int(groups[g]) for word, g, stated in zip(having, group, states, strict=True) if stated}


def stated_group(caption: str, words: Mapping[str, int]) -> int:
    """The group that a caption's words state, -1 where they state none or contradict each other.

    Of several words, as "no glasses", all in this order state it, and then none of them alone; a word that is negated,
    as in "without glasses", states nothing.
    """
    said, stated = words_in(caption), set[int]()
    phrases = {phrase: _phrase(phrase) for phrase in words}
    text = " ".join(said)
    for phrase in sorted((of for of, parts in phrases.items() if parts and set(parts) <= set(said)), key=len)[::-1]:
        pattern = rf"\b((?:{NEGATIONS}) (?:\w+ )?)?{' '.join(phrases[phrase])}\b"
        if not all(re.findall(pattern, text)):
            stated.add(words[phrase])
        text = re.sub(pattern, "", text)
    return stated.pop() if len(stated) == 1 else -1


@functools.cache
def _phrase(text: str) -> list[str]:
    return words_in(text)


def words_in(text: str) -> list[str]:
    """The words of a text, lower case."""
    return re.findall(r"\w+", text.lower())


def captions_by_word(captions: Sequence[str]) -> dict[str, list[int]]:
    """Which captions have each word, by index, words sorted."""
    having: dict[str, list[int]] = defaultdict(list)
    for caption, text in enumerate(captions):
        for word in set(words_in(text)):
            having[word].append(caption)
    return dict(sorted(having.items()))
