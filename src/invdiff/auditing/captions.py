"""Which captions are one prompt, and which captions state the group they would otherwise hide."""

from __future__ import annotations

import re

import numpy as np
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from scipy.stats import false_discovery_control, hypergeom
from sklearn.cluster import MiniBatchKMeans

from ..data.encode import EncodedImages
from ..models.families import Condition
from ..models.frozen import Denoiser
from ..seeds import generator
from .evidence import add_noise, repeated

MOST_CAPTIONS = 256
"""With more different captions than this, that many of them stand for the others with similar embeddings."""
PROBES = 16
"""Noisy images that every caption is tried on."""
LOG_SNR = -4.24
"""Their noise level: what the image will show is not decided yet, so the caption decides."""


def group_captions(
    denoiser: Denoiser, data: EncodedImages, *, threshold: float, seed: int
) -> tuple[np.ndarray, float]:
    """Group captions that make the model predict the same.

    Paraphrases are one prompt: each alone may have too few images to judge. Captions are as far apart as the
    model's predictions under them (`caption_distances`), and average linkage joins them up to `threshold`.
    Of more than `MOST_CAPTIONS` different captions, those nearest to the centres of k-means on mean embeddings
    are compared, and each of the others goes where the caption at its centre goes. Where class labels stand for
    captions, each class is a prompt.

    Returns:
        The prompt of each caption (captions,), from 0, and the denoiser forwards spent per image.
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
        nearest = centres.transform(means)
        used, stands_for = np.unique(centres.labels_, return_inverse=True)
        compared = nearest[:, used].argmin(axis=0)
    distances = caption_distances(denoiser, data, compared, seed=seed)
    tree = linkage(squareform(distances, checks=False), method="average")
    prompts = fcluster(tree, threshold, criterion="distance").astype(np.int64) - 1
    return prompts[stands_for], (len(compared) + 1) * PROBES / len(data)


def caption_distances(denoiser: Denoiser, data: EncodedImages, compared: np.ndarray, *, seed: int) -> np.ndarray:
    """Return how far swapping captions moves the model's prediction, (compared, compared).

    Mean squared differences of predictions on the same noisy images, in units of the model's own squared error
    there. An absolute scale: captions that are all paraphrases of each other are all near.

    Args:
        denoiser: The model.
        data: Images and captions.
        compared: Which captions, indices (compared,).
        seed: Seed of the noisy images.
    """
    rng = generator("captions", seed)
    rows = torch.randint(len(data), (PROBES,), generator=rng)
    noisy_latents, timesteps, target = add_noise(denoiser, data.latents[rows], LOG_SNR, rng)

    def predict(condition: Condition) -> torch.Tensor:
        return denoiser(noisy_latents, timesteps, condition)[0].float()

    error = (predict(data.condition(data.caption_ids[rows])) - target).square().mean().item()
    predictions = torch.stack(
        [predict(repeated(data.conditions, int(caption), PROBES)).flatten().cpu() for caption in compared]
    )
    distances = torch.cdist(predictions, predictions).square().double().numpy() / predictions.shape[1]
    np.fill_diagonal(distances, 0.0)
    return distances / max(error, 1e-12)


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
    groups = np.unique(labels)
    counts = np.zeros((len(captions), len(groups)), dtype=np.int64)  # images of each caption in each group
    np.add.at(counts, (caption_ids, np.searchsorted(groups, labels)), 1)
    total = counts.sum(axis=0)
    saying: dict[str, list[int]] = {}
    for caption in np.flatnonzero(counts.sum(axis=1)):
        for word in set(_words(captions[caption])):
            saying.setdefault(word, []).append(int(caption))
    tests: list[tuple[str, int, float]] = []
    for word, its_captions in sorted(saying.items()):
        inside = counts[its_captions].sum(axis=0)
        outside = total - inside
        if not outside.any() or inside.max() < certainty * inside.sum():
            continue
        group = int(inside.argmax())
        # The chance of so many of this group among the word's images, were they drawn from all (Fisher's test).
        p_value = hypergeom.sf(inside[group] - 1, total.sum(), total[group], inside.sum())
        tests.append((word, int(groups[group]), float(p_value)))
    if not tests:
        return {}
    adjusted = false_discovery_control([p for _, _, p in tests])
    return {word: group for (word, group, _), p in zip(tests, adjusted, strict=True) if p < level}


def told_group(caption: str, words: dict[str, int]) -> int:
    """Return the group that a caption's words tell, -1 where they tell none or contradict each other."""
    told = {words[word] for word in _words(caption) if word in words}
    return told.pop() if len(told) == 1 else -1


def _words(caption: str) -> list[str]:
    return re.findall(r"\w+", caption.lower())
