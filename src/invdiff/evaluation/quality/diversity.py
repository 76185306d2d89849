"""How different images are, and how well they show their prompts: cosines, the Vendi score and LPIPS."""

from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np
import torch
from numpy.typing import ArrayLike
from PIL import Image
from scipy.special import entr

from ...errors import EvaluationError
from .distances import FloatArray, checked, unit_rows

LPIPS = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""From two batches of images in [-1, 1], each (batch, 3, height, width), to the mean distance of their pairs."""
PAIRS_PER_BATCH = 16


def paired_cosines(features: ArrayLike, others: ArrayLike) -> FloatArray:
    """Cosine of each row of (N, D) with the row beside it, of the image's prompt or the image of the same seed, (N,).

    The mean of those of images with their prompts is CLIP-T (Ruiz et al., "DreamBooth", CVPR 2023); CLIPScore (Hessel
    et al., 2021) is 2.5 times the same, without what is below 0.
    """
    first, second = checked(features, minimum=1), checked(others, name="paired features", minimum=1)
    if first.shape != second.shape:
        raise EvaluationError(f"Expected paired features of one shape, got {first.shape} and {second.shape}.")
    return np.asarray(np.einsum("nd,nd->n", unit_rows(first), unit_rows(second)))


def mean_cosine_distance(features: ArrayLike) -> float:
    """Mean cosine distance over all pairs of different rows of (N, D), in [0, 2]."""
    rows = unit_rows(checked(features))
    total = rows.sum(axis=0)  # its square is the sum of all N^2 cosines
    return float(1 - (total @ total - len(rows)) / (len(rows) * (len(rows) - 1)))


def vendi_score(features: ArrayLike) -> float:
    """How many different images a set of features, (N, D), amounts to, from 1 (all alike) to N (no two alike).

    Friedman and Dieng, "The Vendi score" (TMLR 2023): exp of the entropy of the eigenvalues of K / N, where K holds
    the cosines of all pairs, (N, N). The inner products of the columns, (D, D), have the same eigenvalues other than
    0 and are used where they are fewer. The score grows with N: compare only sets of equal size.
    """
    rows = unit_rows(checked(features))
    similarities = rows.T @ rows if len(rows) > rows.shape[1] else rows @ rows.T
    eigenvalues = np.linalg.eigvalsh(similarities / len(rows))
    return float(np.exp(entr(np.maximum(eigenvalues, 0)).sum()))


@torch.no_grad()
def lpips_diversity(images: Sequence[Image.Image], distance: LPIPS) -> float:
    """How different images of one prompt are: the mean of `distance`, as of `lpips_network`, over all their pairs.

    Zhang et al., "The unreasonable effectiveness of deep features as a perceptual metric" (CVPR 2018), with AlexNet.
    """
    sizes = {image.size for image in images}
    if len(images) < 2 or len(sizes) != 1:
        raise EvaluationError(f"Expected two images or more of one size, got {len(images)} of {len(sizes)} sizes.")
    pixels = torch.stack([torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) for image in images])
    pairs = torch.tensor(list(combinations(range(len(images)), 2)))
    total = 0.0
    for batch in pairs.split(PAIRS_PER_BATCH):
        first, second = (pixels[batch[:, side]].float() / 127.5 - 1 for side in (0, 1))
        total += float(distance(first, second)) * len(batch)
    if not np.isfinite(total):
        raise EvaluationError(f"Expected finite LPIPS distances, got a sum of {total}. Look at the images.")
    return total / len(pairs)
