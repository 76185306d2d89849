"""Which captions are one prompt, and which captions state the group they would otherwise hide."""

from __future__ import annotations

import re

import numpy as np
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from scipy.stats import false_discovery_control, fisher_exact
from sklearn.cluster import KMeans

from ..data.encode import EncodedImages
from ..denoiser import Denoiser
from ..seeds import generator
from .scores import add_noise

MOST_CAPTIONS = 256
"""With more different captions than this, they are grouped by their embeddings instead."""
PROBES = 16
"""Noisy images that every caption is tried on."""
LEVEL = 0.9
"""Their noise level: what the image will show is not decided yet, so the caption decides."""


def group_captions(
    denoiser: Denoiser, data: EncodedImages, *, threshold: float, seed: int
) -> tuple[np.ndarray, float]:
    """Group captions that make the model predict the same.

    Paraphrases are one prompt: each alone may have too few images to judge. Two captions are as far apart as
    the model's predictions under them, relative to how far apart captions are from each other at large;
    average linkage joins them up to `threshold`. With more than `MOST_CAPTIONS` different captions,
    k-means on their mean embeddings takes its place.

    Returns:
        The prompt of each caption (captions,), from 0, and the denoiser forwards spent per image.
    """
    count = len(data.captions)
    if count == 1:
        return np.zeros(1, dtype=np.int64), 0.0
    if count > MOST_CAPTIONS:
        clusters = max(2, min(32, len(data) // 1000))
        means = data.prompt_embeds.float().mean(dim=1).numpy()
        return KMeans(clusters, n_init=4, random_state=seed).fit_predict(means).astype(np.int64), 0.0
    distances = caption_distances(denoiser, data, seed=seed)
    tree = linkage(squareform(distances, checks=False), method="average")
    return fcluster(tree, threshold, criterion="distance").astype(np.int64) - 1, count * PROBES / len(data)


def caption_distances(denoiser: Denoiser, data: EncodedImages, *, seed: int) -> np.ndarray:
    """Return squared distances between the predictions under each caption, (captions, captions).

    In units of their mean over pairs of images' captions, so that 1 is the distance of two captions at random.
    """
    rng = generator("captions", seed)
    rows = torch.randint(len(data), (PROBES,), generator=rng)
    noisy_latents, timesteps, _ = add_noise(denoiser, data.latents[rows], LEVEL, rng)
    predictions = torch.stack(
        [
            denoiser(noisy_latents, timesteps, embeds.expand(PROBES, -1, -1))[0].float().flatten().cpu()
            for embeds in data.prompt_embeds
        ]
    )
    distances = torch.cdist(predictions, predictions).square().double().numpy()
    np.fill_diagonal(distances, 0.0)
    share = np.bincount(data.caption_ids.numpy(), minlength=len(data.captions)) / len(data)
    typical = share @ distances @ share
    return distances / typical if typical > 0 else distances


def telling_words(
    captions: list[str],
    caption_ids: np.ndarray,
    labels: np.ndarray,
    *,
    level: float = 0.001,
    certainty: float = 0.95,
) -> dict[str, int]:
    """Return the words whose presence in a caption tells the group of its image, and that group.

    What a caption says is not hidden: under "on water", water is asked for. Each word is tested for association
    with each group against the others (Fisher's exact test, Benjamini-Hochberg over words), and kept where
    it says the group nearly for certain.

    Args:
        captions: The different captions.
        caption_ids: (n,) the caption of each image.
        labels: (n,) the group of each image.
        level: False discovery rate.
        certainty: Least share of a word's images that must be of the group it tells.
    """
    words_of = [set(re.findall(r"\w+", caption.lower())) for caption in captions]
    words = sorted(set().union(*words_of))
    present = np.array([[word in own for word in words] for own in words_of], dtype=bool)[caption_ids]
    tests: list[tuple[str, int, float]] = []
    for column, word in enumerate(words):
        having = present[:, column]
        if not 0 < having.sum() < len(having):
            continue
        inside, outside = labels[having], labels[~having]
        for group in np.unique(labels):
            table = [
                [(inside == group).sum(), (inside != group).sum()],
                [(outside == group).sum(), (outside != group).sum()],
            ]
            if table[0][0] >= certainty * len(inside):
                tests.append((word, int(group), float(fisher_exact(table, alternative="greater").pvalue)))
    if not tests:
        return {}
    adjusted = false_discovery_control([p for _, _, p in tests])
    return {word: group for (word, group, _), p in zip(tests, adjusted, strict=True) if p < level}


def told_group(caption: str, words: dict[str, int]) -> int:
    """Return the group that a caption's words tell, -1 where they tell none or contradict each other."""
    told = {words[word] for word in re.findall(r"\w+", caption.lower()) if word in words}
    return told.pop() if len(told) == 1 else -1
