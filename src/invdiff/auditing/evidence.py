"""Evidence of hidden groups: measurements of each image, and scores of one dimension made from them.

A few denoiser forwards per image give paired losses and features. The contrast l(y) - l(null), both at the same noise,
estimates log p(z_t) - log p(z_t | y): it is large where an image lacks what its caption makes the model expect.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from scipy.stats import skew
from sklearn.decomposition import PCA, FastICA
from sklearn.exceptions import ConvergenceWarning

from ..config import AuditConfig
from ..data.captioned import CaptionedImages
from ..data.encode import EncodedImages
from ..distributed import mine, wait
from ..errors import AuditError
from ..files import fingerprint, read_arrays, write_arrays, write_tensors
from ..models.encoders import BATCH_SIZE, VisionEncoder
from ..models.families import Condition
from ..models.frozen import Denoiser
from ..models.load import public_name
from ..models.schedule import per_sample_loss
from ..models.watch import check_finite
from ..progress import progress_bar
from ..seeds import generator

SHARD_SIZE = 256
"""Images whose measurements share a file."""
NUM_COMPONENTS = (4, 8, 12)
"""Whitened dimensions that components are looked for in."""
IMAGES_PER_DIMENSION = 40
"""Images that each of these dimensions takes: of fewer, FastICA finds directions in which mere noise falls apart."""
SHAPES: dict[str, dict[str, Any]] = {
    "peaked": {"fun": "logcosh", "algorithm": "parallel"},
    # x^2 and its mean derivative: FastICA's contrast for skewness (Hyvarinen and Oja 2000).
    "skewed": {"fun": lambda x: (x**2, (2 * x).mean(axis=-1)), "algorithm": "deflation"},
}
"""Kinds of components, and the options with which FastICA looks for them."""

_Extract = Callable[[list[Image.Image]], NDArray[np.float32]]


@dataclass(frozen=True)
class Evidence:
    """Measurements of each image. Draws use independent noise, so that stability can be judged."""

    losses: NDArray[Any]
    """(N, levels, draws, conditions): under the caption, the null caption, then any other captions. Only one, the
    null, for an unconditional model."""
    features: NDArray[Any]
    """(N, levels, D): pooled middle features under the null caption at low noise."""
    vision: NDArray[Any] | None = None
    """(N, views, D): features of `config.vision_encoder`, if there is one."""
    contrast_only: bool = False
    """Weigh no features: those of the frozen model do not change with guidance."""


@dataclass(frozen=True)
class Score:
    """One score per image under two or more independent noises."""

    evidence: str
    """The measurement that it is made from, for people."""
    draws: NDArray[Any]
    """(draws, n)."""

    @property
    def mean(self) -> NDArray[Any]:
        """The mean over draws, standardised robustly, (n,)."""
        mean = self.draws.mean(axis=0)
        low, middle, high = np.quantile(mean, [0.25, 0.5, 0.75])
        return (mean - middle) / max(high - low, 1e-12)


def collect_evidence(
    denoiser: Denoiser,
    data: EncodedImages,
    config: AuditConfig,
    *,
    work_dir: Path,
    others: Condition | None = None,
    progress: bool = True,
) -> Evidence:
    """Measure every image, in shards in `work_dir` that a stopped run keeps and several processes share.

    `others` are conditions of `config.other_captions`.
    """
    key = fingerprint(
        data.model_fingerprint,
        data.data_fingerprint,
        str(data.resolution),
        denoiser.fingerprint,
        repr((config.contrast_log_snr, config.contrast_draws, config.feature_log_snr)),
        repr((config.other_captions, config.batch_size, config.seed)),
    )
    shards = torch.arange(len(data)).split(SHARD_SIZE)
    paths = [work_dir / key / f"evidence-{number:05d}.safetensors" for number in range(len(shards))]
    share = mine(list(zip(paths, shards, strict=True)))
    with progress_bar("measuring", sum(len(rows) for _, rows in share), enabled=progress) as bar:
        for path, rows in share:
            if not path.exists():
                batches = [_measure(denoiser, data, batch, config, others) for batch in rows.split(config.batch_size)]
                measured = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
                finite = torch.cat([values.flatten(1) for values in measured.values()], dim=1).isfinite().all(dim=1)
                if bad := [data.names[row] for row in rows[~finite]]:
                    raise AuditError(
                        f"Expected finite losses and features, got others for {len(bad)} images "
                        f"({', '.join(bad[:5])}). A denoiser in 16 bits may overflow: load the pipeline in float32. "
                        "Nothing of these images was kept."
                    )
                write_tensors(path, measured)
            bar.advance(len(rows))
    wait()
    parts = [read_arrays(path) for path in paths]
    losses, features = (np.concatenate([part[name] for part in parts]) for name in ("losses", "features"))
    return Evidence(losses, features)


def _measure(
    denoiser: Denoiser, data: EncodedImages, rows: torch.Tensor, config: AuditConfig, others: Condition | None
) -> dict[str, torch.Tensor]:
    latents = data.latents[rows]
    null = data.condition(torch.full((len(rows),), data.null_id))
    conditions = [data.condition(data.caption_ids[rows]), null] if data.conditions else [null]
    if others is not None:
        conditions += [repeated(others, index, len(rows)) for index in range(len(config.other_captions))]
    rng = generator("audit", config.seed, int(rows[0]))
    losses, features = [], []
    for level in config.contrast_log_snr:
        draws = []
        for _ in range(config.contrast_draws):  # the same noise under every condition
            noisy_latents, timesteps, target = add_noise(denoiser, latents, level, rng)
            predictions = (denoiser(noisy_latents, timesteps, condition)[0] for condition in conditions)
            draws.append(torch.stack([per_sample_loss(each, target).cpu() for each in predictions], dim=1))
        losses.append(torch.stack(draws, dim=1))
    for level in config.feature_log_snr:
        noisy_latents, timesteps, _ = add_noise(denoiser, latents, level, rng)
        middle = denoiser(noisy_latents, timesteps, null)[1].float()  # (batch, D, height, width)
        half = max(1, middle.shape[3] // 2)
        parts = (middle, middle[..., :half], middle[..., -half:])  # the whole, and the left and right halves
        features.append(torch.cat([part.mean(dim=(2, 3)) for part in parts], dim=1).cpu())
    return {"losses": torch.stack(losses, dim=1), "features": torch.stack(features, dim=1)}


def add_noise(
    denoiser: Denoiser, latents: torch.Tensor, log_snr: float, rng: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noisy latents, timesteps (batch,) and the denoiser's target at a log signal-to-noise ratio."""
    schedule = denoiser.schedule
    noise = torch.randn(latents.shape, generator=rng).to(denoiser.device)
    timesteps = torch.full((len(latents),), schedule.timestep_at(log_snr), device=denoiser.device)
    latents = latents.to(denoiser.device)
    return schedule.add_noise(latents, noise, timesteps), timesteps, schedule.target(latents, noise, timesteps)


def repeated(condition: Condition, row: int, times: int) -> Condition:
    """One row of a condition, `times` times."""
    return {name: values[row].expand(times, *values.shape[1:]) for name, values in condition.items()}


def encode_vision(
    name_or_folder: str, data: CaptionedImages, rows: NDArray[Any], cache_dir: Path, *, progress: bool = True
) -> NDArray[np.float32]:
    """Pooled features of images `rows` by a vision encoder such as CLIP or DINOv2, (len(rows), 2, D), kept on disk.

    Each image is shown twice, as it is and mirrored: a property that changes with that is none to group by.
    """

    def load() -> _Extract:
        extract = VisionEncoder.load(name_or_folder).extract
        return lambda images: np.stack([extract(images), extract(map(ImageOps.mirror, images))], axis=1)

    return cached_features(cache_dir, name_or_folder, data, rows, load, progress)


def cached_features(
    folder: Path, encoder: str, data: CaptionedImages, rows: NDArray[Any], load: Callable[[], _Extract], progress: bool
) -> NDArray[np.float32]:
    """Features of images `rows` of `data`, (len(rows), ...), by the `encoder` that `load` loads, kept in `folder`."""
    path = folder / f"{fingerprint(encoder, data.fingerprint, rows.tobytes())}.safetensors"
    if not path.exists():
        features, extract = [], load()
        with progress_bar("image features", len(rows), enabled=progress) as bar:
            for batch in np.split(rows, range(BATCH_SIZE, len(rows), BATCH_SIZE)):
                features.append(extract([data.image(int(row)) for row in batch]))
                names = [f"image {data.names[row]}" for row in batch]
                check_finite(torch.from_numpy(features[-1]), "vision encoder", names)
                bar.advance(len(batch))
        write_arrays(path, {"features": np.concatenate(features)})
    return read_arrays(path)["features"]


def scores_of(evidence: Evidence, rows: NDArray[Any], config: AuditConfig) -> list[Score]:
    """Every one-dimensional score of images `rows` that varies: losses for `gradient`, else contrasts and features."""
    losses = evidence.losses[rows].astype(np.float64)  # (n, levels, draws, conditions)
    names = ["contrast", *(f"contrast with {caption!r}" for caption in config.other_captions)]
    scores = [
        Score(f"{name} at log-SNR {level:g}", (losses[:, index, :, 0] - losses[:, index, :, condition]).T)
        for condition, name in enumerate(names[: losses.shape[3] - 1], start=1)
        for index, level in enumerate(config.contrast_log_snr)
    ]
    if config.solver == "gradient":
        scores = [Score(f"loss at log-SNR {config.contrast_log_snr[0]:g}", losses[:, 0, :, 0].T)]
    if config.solver == "auto" and not evidence.contrast_only:
        levels = " and ".join(f"{level:g}" for level in config.feature_log_snr)
        vision = f"features of {public_name(config.vision_encoder)}"
        for source, values in ((f"features at log-SNR {levels}", evidence.features), (vision, evidence.vision)):
            if values is not None:
                scores += component_scores(values[rows].astype(np.float64), source, seed=config.seed)
    return [score for score in scores if np.ptp(score.mean) > 0]


def component_scores(features: NDArray[Any], source: str, *, seed: int) -> list[Score]:
    """Independent components of features (n, draws, D) from a named source, as scores.

    A hidden factor is close to one direction of the features, but seldom among the largest: FastICA finds it by its
    shape, peaked or flat (logcosh) or skewed. With too few whitened dimensions it is absent, with too many it falls
    apart, so several numbers are tried. Fitted on the mean over draws.
    """
    n, draws, _ = features.shape
    sizes = [size for size in NUM_COMPONENTS if size * IMAGES_PER_DIMENSION <= n]
    centred = features - features.mean(axis=0)
    scale = centred.std(axis=(0, 1))
    varies = scale > 1e-9 * max(float(np.abs(features).max()), 1e-12)
    if draws < 2 or not sizes or not varies.any():
        return []
    centred = centred[:, :, varies] / scale[varies]
    most = min(max(sizes), centred.shape[2])
    pca = PCA(most, whiten=True, random_state=seed).fit(centred.mean(axis=1))
    fitted = pca.transform(centred.mean(axis=1))
    whitened = pca.transform(centred.reshape(n * draws, -1))
    scores = []
    for size in sorted({min(size, most) for size in sizes}):
        for shape, options in SHAPES.items():
            ica = FastICA(whiten="unit-variance", max_iter=300, tol=1e-3, random_state=seed, **options)
            with warnings.catch_warnings(), np.errstate(all="ignore"):
                warnings.simplefilter("ignore", ConvergenceWarning)  # a component that does not settle is not stable
                warnings.simplefilter("ignore", RuntimeWarning)
                try:
                    ica.fit(fitted[:, :size])
                except ValueError:  # no direction of this shape is left: its update is 0 / 0
                    continue
            projected = ica.transform(whitened[:, :size]).reshape(n, draws, -1)
            for component, values in enumerate(projected.transpose(2, 1, 0), start=1):
                sign = 1.0 if skew(values.mean(axis=0)) >= 0 else -1.0  # the rarer group scores high
                scores.append(Score(f"{source}, {shape} component {component} of {size}", sign * values))
    return scores
