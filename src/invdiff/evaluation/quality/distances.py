"""Quality and diversity of images from arrays of features, and intervals of what is measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import entr

from ...errors import EvaluationError
from .kernels import (
    FloatArray,
    checked,
    checked_pair,
    cmmd,
    kernel_distance,
    kernel_distance_interval,
    unit_rows,
)
from .neighbours import Neighbourhoods, precision_recall_density_coverage

if TYPE_CHECKING:
    import torch
    from PIL import Image

__all__ = [
    "FeatureShift",
    "Neighbourhoods",
    "clip_t",
    "cmmd",
    "feature_shift",
    "frechet_distance",
    "kernel_distance",
    "kernel_distance_interval",
    "lpips_diversity",
    "paired_cosines",
    "precision_recall_density_coverage",
    "vendi_score",
]

PAIRS_PER_BATCH = 16


def frechet_distance(features: ArrayLike, reference: ArrayLike) -> float:
    """Return the squared Fréchet distance between Gaussians fitted to two sets of features (FID's formula).

    |m1 - m2|^2 + Tr(S1 + S2 - 2 (S1 S2)^(1/2)), Dowson and Landau (1982). With S = R^T R, from the QR
    decomposition of the centred features, Tr (S1 S2)^(1/2) is the sum of the singular values of R1 R2^T: no
    matrix square root, no complex numbers, and it holds for singular covariances (N < D) too. Computed in
    float64 with unbiased covariances. The distance falls as N grows: compare only sets of equal size.

    Args:
        features: Features of the images in question, (N, D).
        reference: Features of the reference images, (M, D), from the same extractor.

    Raises:
        EvaluationError: A set has fewer than two rows, holds values that are not finite, or D differs.
    """
    first, second = checked_pair(features, reference)
    difference = first.mean(axis=0) - second.mean(axis=0)
    first_root, second_root = _covariance_root(first), _covariance_root(second)
    cross = np.linalg.svd(first_root @ second_root.T, compute_uv=False).sum()
    traces = np.square(first_root).sum() + np.square(second_root).sum()
    return max(float(difference @ difference + traces - 2 * cross), 0.0)


def paired_cosines(features: ArrayLike, others: ArrayLike) -> FloatArray:
    """Return the cosine of each row with the row beside it, (N,).

    Args:
        features: (N, D).
        others: (N, D), row by row what belongs to it: features of the same seed, or of the image's prompt.

    Raises:
        EvaluationError: N or D differs, or a row is all zeros or not finite.
    """
    first, second = checked(features, "features", minimum=1), checked(others, "paired features", minimum=1)
    if first.shape != second.shape:
        raise EvaluationError(
            f"Expected paired features of one shape, row beside row, got {first.shape} and {second.shape}. "
            "Repeat or order the rows so that each stands beside its own, and use one extractor."
        )
    return np.asarray(np.einsum("nd,nd->n", unit_rows(first, "features"), unit_rows(second, "paired features")))


def clip_t(image_features: ArrayLike, text_features: ArrayLike) -> float:
    """Return CLIP-T: how well images show their prompts, the mean cosine of paired CLIP features, in [-1, 1].

    Ruiz et al., "DreamBooth" (CVPR 2023). CLIPScore (Hessel et al., 2021) is 2.5 times the same, without what is below
    0. For an interval, take `mean_interval` of `paired_cosines`.

    Args:
        image_features: (N, D).
        text_features: (N, D), row by row those of the image's prompt.

    Raises:
        EvaluationError: As for `paired_cosines`.
    """
    return float(paired_cosines(image_features, text_features).mean())


def vendi_score(features: ArrayLike) -> float:
    """Return how many different images a set amounts to, from 1 (all alike) to N (no two alike).

    Friedman and Dieng, "The Vendi score" (TMLR 2023): exp of the entropy of the eigenvalues of K / N, where K holds
    the cosines of all pairs, (N, N). The inner products of the columns, (D, D), have the same eigenvalues other than
    0 and are used where they are fewer. The score grows with N: compare only sets of equal size.

    Args:
        features: (N, D).

    Raises:
        EvaluationError: There are fewer than two rows, or a row is all zeros or not finite.
    """
    rows = unit_rows(checked(features, "features"), "features")
    similarities = rows.T @ rows if len(rows) > rows.shape[1] else rows @ rows.T
    eigenvalues = np.linalg.eigvalsh(similarities / len(rows))
    return float(np.exp(entr(np.maximum(eigenvalues, 0)).sum()))


class FeatureShift(NamedTuple):
    """How far images moved in feature space, beside how far apart images are anyway."""

    moved: float
    """Mean cosine distance between an image before and after, in [0, 2]."""
    unrelated: float
    """Mean cosine distance between an image before and another image after: the yardstick."""


def feature_shift(features_before: ArrayLike, features_after: ArrayLike) -> FeatureShift:
    """Return how much a change of the model changes images of the same seeds and prompts.

    The yardstick is the mean over all pairs that do not match, not over a random choice of them.

    Args:
        features_before: (N, D).
        features_after: (N, D), row by row those of the image with the same seed and prompt.

    Raises:
        EvaluationError: There are fewer than two rows, N or D differs, or a row is all zeros or not finite.
    """
    matching = paired_cosines(features_before, features_after)
    before, after = (
        unit_rows(checked(array, "features"), "features").sum(axis=0) for array in (features_before, features_after)
    )
    others = (before @ after - matching.sum()) / (len(matching) * (len(matching) - 1))
    return FeatureShift(moved=float(1 - matching.mean()), unrelated=float(1 - others))


def lpips_diversity(
    images: Sequence[Image.Image], *, distance: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
) -> float:
    """Return how different images of one prompt are: the mean LPIPS distance over all pairs of them.

    Zhang et al., "The unreasonable effectiveness of deep features as a perceptual metric" (CVPR 2018), with AlexNet.
    The number of pairs grows as N^2: 50 images make 1225.

    Args:
        images: At least two, of one size.
        distance: From two batches of images in [-1, 1], each (batch, 3, height, width), to the mean distance of
            their pairs. By default that of torchmetrics, which fetches AlexNet's weights once.

    Raises:
        EvaluationError: There are fewer than two images, or their sizes differ; or the extra `metrics` is not
            installed, or the weights cannot be had.
    """
    import torch  # the rest of this module does without

    sizes = sorted({image.size for image in images})
    if len(images) < 2 or len(sizes) != 1:
        raise EvaluationError(
            f"Expected at least two images, all of one size, got {len(images)} of {len(sizes)} sizes. Give the "
            "images of one prompt."
        )
    measure = distance or lpips_network()
    pixels = torch.stack([torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) for image in images])
    pairs = torch.tensor(list(combinations(range(len(images)), 2)))
    total = 0.0
    for batch in pairs.split(PAIRS_PER_BATCH):
        first, second = (pixels[batch[:, side]].float() / 127.5 - 1 for side in (0, 1))
        with torch.no_grad():
            total += float(measure(first, second)) * len(batch)
    mean = total / len(pairs)
    if not np.isfinite(mean):
        raise EvaluationError(f"Expected finite distances, got a mean of {mean}. Look at the images.")
    return mean


def _covariance_root(features: FloatArray) -> FloatArray:
    """Return R with R^T R the covariance, (min(N, D), D)."""
    centred = features - features.mean(axis=0)
    return np.asarray(np.linalg.qr(centred / np.sqrt(len(features) - 1), mode="r"), dtype=np.float64)


def lpips_network() -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return LPIPS with AlexNet, as `lpips_diversity` takes it: load it once for many prompts.

    Raises:
        EvaluationError: The extra `metrics` is not installed, or the weights cannot be had.
    """
    from ...models.load import default_device  # imports torch

    try:
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        network = LearnedPerceptualImagePatchSimilarity(net_type="alex").to(default_device())
    except ModuleNotFoundError as error:
        raise EvaluationError(
            f"Expected torchmetrics and torchvision for LPIPS, found no {error.name or 'torchvision'}. Install them: "
            "pip install 'invdiff[metrics]'."
        ) from error
    except OSError as error:
        raise EvaluationError(
            f"Expected AlexNet's weights for LPIPS, could not fetch them ({error}). Connect to the network once: they "
            "are kept in torch.hub's folder."
        ) from error
    return lambda first, second: network(first.to(network.device), second.to(network.device))
