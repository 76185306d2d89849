"""Evidence of hidden groups: what the audited model, and perhaps a vision encoder, measure of each image.

A few denoiser forwards per image give paired losses and features of its blocks. scores.py makes scores of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from sklearn.decomposition import PCA

from ..config import AuditConfig
from ..data.captioned import CaptionedImages
from ..data.encode import EncodedImages, ShardedTensor, in_files
from ..errors import AuditError
from ..files import fingerprint, read_arrays, read_tensors, write_arrays, write_tensors
from ..models.encoders import BATCH_SIZE, VisionEncoder
from ..models.families import Condition
from ..models.features import add_noise, read_features
from ..models.frozen import Denoiser, FrozenDenoiser
from ..models.schedule import per_sample_loss
from ..models.watch import check_finite
from ..progress import progress_bar
from ..seeds import generator

WHITENED = 100  # most dimensions of whitened features
IMAGES_PER_WHITENED = 20  # images that each of them takes
FITTED = 8000  # most images that a basis of features is fitted on, evenly chosen; all are projected on it
SHARD_SIZE = 256  # images whose measurements share a file


class Whitened(NamedTuple):
    """Leading principal components of features, each of unit variance: values = features @ basis + shift."""

    values: NDArray[np.float32]  # (N, d)
    basis: NDArray[Any]  # (D, d)
    shift: NDArray[Any]  # (d,)


@dataclass(frozen=True)
class Evidence:
    """Measurements of each image. Draws and levels use independent noise, so that agreement can be judged."""

    losses: NDArray[Any]
    """(N, levels, draws, conditions): under the caption and the null caption. Only one, the null, for an unconditional
    model."""
    features: ShardedTensor
    """(N, levels, D): the middle block's mean and those of its left and right half, under the null caption."""
    upper: ShardedTensor | None = None
    """(N, levels, 2, G): the grids of the last two blocks in the same forwards; None where they were not read."""
    vision: ShardedTensor | None = None
    """(N, views, D): features of `config.vision_encoder`, if there is one."""
    _whitened: dict[int, list[Whitened]] = field(default_factory=dict, init=False, repr=False)
    contrast_only: bool = False
    """Weigh no features: those of the frozen model do not change with guidance."""

    def whitened(self, seed: int) -> list[NDArray[np.float32]]:
        """Whitened features (N, d) of each block at each noise level, and of each view of a vision encoder.

        Those of them that vary between the images; made once.
        """
        return [source.values for source in self.sources(seed) if source.values.shape[1]]

    def sources(self, seed: int) -> list[Whitened]:
        """The same, of all, with how they were made: the model's own first, as `read_features` gives them."""
        if seed not in self._whitened:
            parts: list[tuple[ShardedTensor, Any]] = []
            for level in range(self.features.shape[1]):
                parts.append((self.features, np.s_[:, level]))
                if self.upper is not None:
                    parts += [(self.upper, np.s_[:, level, block]) for block in range(self.upper.shape[2])]
            if self.vision is not None:
                parts += [(self.vision, np.s_[:, view]) for view in range(self.vision.shape[1])]
            self._whitened[seed] = [whitened(*part, seed=seed) for part in parts]
        return self._whitened[seed]


def whitened(features: ShardedTensor, part: Any, *, seed: int) -> Whitened:
    """A part (N, D) of features, chosen as numpy indexes it, whitened."""
    count = len(features)
    fitted_rows = np.sort(np.random.default_rng(seed).permutation(count)[:FITTED])  # in whatever order prompts come
    sample = features.numpy(fitted_rows)[part].astype(np.float64)
    mean, scale = sample.mean(axis=0), sample.std(axis=0)
    varies = scale > 1e-6 * max(float(np.abs(sample).max()), 1e-12)
    if not varies.any():
        return Whitened(np.zeros((count, 0), dtype=np.float32), np.zeros((len(mean), 0)), np.zeros(0))

    def standard(values: NDArray[Any]) -> NDArray[Any]:
        return (values[:, varies] - mean[varies]) / scale[varies]

    size = min(WHITENED, max(count // IMAGES_PER_WHITENED, 2), int(varies.sum()), len(sample) - 1)
    pca = PCA(size, whiten=True, svd_solver="randomized", random_state=seed).fit(standard(sample))
    batches = np.array_split(np.arange(count), -(-count // FITTED))
    projected = [pca.transform(standard(features.numpy(rows)[part])).astype(np.float32) for rows in batches]
    basis, components = np.zeros((len(mean), size)), pca.components_.T / np.sqrt(pca.explained_variance_)
    basis[varies] = components / scale[varies, None]
    return Whitened(np.concatenate(projected), basis, -mean @ basis - pca.mean_ @ components)


def collect_evidence(
    denoiser: Denoiser, data: EncodedImages, config: AuditConfig, *, work_dir: Path, progress: bool = True
) -> Evidence:
    """Measure every image, in shards in `work_dir` that a stopped run keeps and several processes share."""
    settings = [
        repr((config.contrast_log_snr, config.contrast_draws, config.feature_log_snr)),
        repr((config.batch_size, config.seed)),
        *(["no upper blocks"] if isinstance(denoiser, FrozenDenoiser) and not denoiser.upper else []),
    ]

    def measure(rows: torch.Tensor) -> dict[str, torch.Tensor]:
        latents, rng = data.latents[rows], generator("audit", config.seed, int(rows[0]))
        null = data.condition(torch.full((len(rows),), data.null_id))
        conditions = [data.condition(data.caption_ids[rows]), null] if data.conditions else [null]
        losses = paired_losses(denoiser, latents, conditions, config.contrast_log_snr, config.contrast_draws, rng)
        features, upper = [], []
        for level in config.feature_log_snr:
            noisy_latents, timesteps, _ = add_noise(denoiser, latents, level, rng)
            middle, *blocks = read_features(denoiser, noisy_latents, timesteps, null)
            features.append(middle)
            upper += [torch.stack(blocks, dim=1)] if blocks else []
        measured = {"losses": losses, "features": torch.stack(features, dim=1)}
        return measured | ({"upper": torch.stack(upper, dim=1)} if upper else {})

    rows = torch.arange(len(data))
    parts = in_shards(work_dir, settings, "measuring", measure, denoiser, data, rows, config, progress=progress)
    losses = torch.cat([part["losses"] for part in parts]).numpy()
    upper = ShardedTensor([part["upper"] for part in parts]) if "upper" in parts[0] else None
    return Evidence(losses, ShardedTensor([part["features"] for part in parts]), upper)


def in_shards(
    work_dir: Path,
    settings: Sequence[str | bytes],
    label: str,
    measure: Callable[[torch.Tensor], dict[str, torch.Tensor]],
    denoiser: Denoiser,
    data: EncodedImages,
    rows: torch.Tensor,
    config: AuditConfig,
    *,
    progress: bool,
) -> list[dict[str, torch.Tensor]]:
    """What `measure` says of images `rows` (n,), a batch at a time; a part for each file of `SHARD_SIZE` images.

    Files that lie in `work_dir`, of the same data, denoiser and `settings`, are kept, and several processes share the
    work. `AuditError` where a measurement is not finite.
    """
    made_of = [data.model_fingerprint, data.data_fingerprint, *sorted(data.unreadable), str(data.resolution)]
    folder = work_dir / fingerprint(*made_of, denoiser.fingerprint, *settings)

    def make(path: Path, rows: torch.Tensor) -> None:
        if path.exists():
            return
        batches = [measure(batch) for batch in rows.split(config.batch_size)]
        measured = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
        finite = torch.cat([values.flatten(1) for values in measured.values()], dim=1).isfinite().all(dim=1)
        if bad := [data.names[row] for row in rows[~finite]]:
            raise AuditError(
                f"Expected finite losses and features, got others for {len(bad)} images ({', '.join(bad[:5])}). A "
                "denoiser in 16 bits may overflow: load the pipeline in float32. Nothing of these images was kept."
            )
        write_tensors(path, measured)

    paths = in_files(folder / "evidence", rows, make, label, progress=progress, size=SHARD_SIZE)
    return [read_tensors(path) for path in paths]


def paired_losses(
    denoiser: Denoiser,
    latents: torch.Tensor,
    conditions: Sequence[Condition],
    levels: Sequence[float],
    draws: int,
    rng: torch.Generator,
) -> torch.Tensor:
    """Losses of latents (batch, C, H, W) at log signal-to-noise ratios, (batch, levels, draws, conditions).

    The noise of a draw is the same under every condition.
    """
    losses = []
    for level in levels:
        for _ in range(draws):
            noisy_latents, timesteps, target = add_noise(denoiser, latents, level, rng)
            predictions = (denoiser(noisy_latents, timesteps, condition)[0] for condition in conditions)
            losses.append(torch.stack([per_sample_loss(each, target).cpu() for each in predictions], dim=1))
    return torch.stack(losses, dim=1).unflatten(1, (len(levels), draws))


def encode_vision(
    name_or_folder: str, data: CaptionedImages, rows: NDArray[Any], cache_dir: Path, *, progress: bool = True
) -> ShardedTensor:
    """Pooled features of images `rows` by a vision encoder such as CLIP or DINOv2, (len(rows), 2, D), kept on disk.

    Each image is shown twice, as it is and mirrored: a property that changes with that is none to group by.
    """
    encoder = VisionEncoder.load(name_or_folder)

    def extract(images: list[Image.Image]) -> NDArray[np.float32]:
        return np.stack([encoder.extract(images), encoder.extract(map(ImageOps.mirror, images))], axis=1)

    features = cached_features(cache_dir, encoder.features_digest(), data, rows, extract, progress)
    return ShardedTensor([torch.from_numpy(features)])


def cached_features(
    folder: Path, digest: str, data: CaptionedImages, rows: NDArray[Any], extract: Callable[..., Any], progress: bool
) -> NDArray[np.float32]:
    """Features of images `rows` of `data`, (len(rows), ...), by an encoder of this digest, kept in `folder`."""
    path = folder / f"{fingerprint(digest, data.fingerprint, rows.tobytes())}.safetensors"
    if not path.exists():
        features = []
        with progress_bar("image features", len(rows), enabled=progress) as bar:
            for batch in np.split(rows, range(BATCH_SIZE, len(rows), BATCH_SIZE)):
                features.append(extract([data.image(int(row)) for row in batch]))
                names = [f"image {data.names[row]}" for row in batch]
                check_finite(torch.from_numpy(features[-1]), "vision encoder", names)
                bar.advance(len(batch))
        write_arrays(path, {"features": np.concatenate(features)})
    return read_arrays(path)["features"]
