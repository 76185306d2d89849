"""Evidence of hidden groups, a few denoiser forwards per image: paired losses, contrasts, features.

The contrast l(y) - l(null), both at the same noise, estimates log p(z_t) - log p(z_t | y): it is large where
an image lacks what its caption makes the model expect.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..config import AuditConfig
from ..data.encode import EncodedImages
from ..distributed import mine, wait
from ..errors import AuditError
from ..files import fingerprint, read_tensors, write_tensors
from ..models.families import Condition
from ..models.frozen import Denoiser
from ..models.schedule import per_sample_loss
from ..progress import progress_bar
from ..seeds import generator

SHARD_SIZE = 256


@dataclass(frozen=True)
class Evidence:
    """What was measured on each image. Draws use independent noise, so that stability can be judged."""

    losses: torch.Tensor
    """(N, levels, draws, conditions): under the caption, the null caption, then any other captions. Only one, the
    null, for an unconditional model."""
    features: torch.Tensor
    """(N, levels, D): pooled middle features under the null caption at low noise."""
    forwards_per_image: int
    """Denoiser forwards spent on each image."""

    @property
    def contrast(self) -> torch.Tensor:
        """Return l(y) - l(null), (N, levels, draws)."""
        return self.losses[..., 0] - self.losses[..., 1]


def collect_evidence(
    denoiser: Denoiser,
    data: EncodedImages,
    config: AuditConfig,
    *,
    work_dir: Path,
    others: Condition | None = None,
    progress: bool = True,
) -> Evidence:
    """Measure every image, in shards that a stopped run keeps and several processes share.

    Args:
        denoiser: The frozen model, or a guided one in later rounds of the game.
        data: Latents and prompt embeddings.
        config: Levels, draws, batch size and seed.
        work_dir: Where shards are kept; those of other settings or models are not read.
        others: The conditions of `config.other_captions`.
        progress: Show a progress bar.
    """
    key = fingerprint(
        data.model_fingerprint,
        data.data_fingerprint,
        str(data.resolution),
        denoiser.fingerprint,
        repr((config.contrast_log_snr, config.contrast_draws, config.feature_log_snr)),
        repr((config.other_captions, config.batch_size, config.seed)),
    )
    folder = work_dir / key
    shards = torch.arange(len(data)).split(SHARD_SIZE)
    paths = [folder / f"evidence-{number:05d}.safetensors" for number in range(len(shards))]
    share = mine(list(zip(paths, shards, strict=True)))
    with progress_bar("measuring", sum(len(rows) for _, rows in share), enabled=progress) as bar:
        for path, rows in share:
            if not path.exists():
                batches = [_measure(denoiser, data, batch, config, others) for batch in rows.split(config.batch_size)]
                measured = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
                _check_finite(measured, [data.names[row] for row in rows])
                write_tensors(path, measured)
            bar.advance(len(rows))
    wait()
    parts = [read_tensors(path) for path in paths]
    conditions = 2 + len(config.other_captions) if data.conditions else 1
    return Evidence(
        losses=torch.cat([part["losses"] for part in parts]),
        features=torch.cat([part["features"] for part in parts]),
        forwards_per_image=len(config.contrast_log_snr) * config.contrast_draws * conditions
        + len(config.feature_log_snr),
    )


def _check_finite(measured: dict[str, torch.Tensor], names: list[str]) -> None:
    finite = torch.stack([values.flatten(1).isfinite().all(dim=1) for values in measured.values()]).all(dim=0)
    if not finite.all():
        bad = [name for name, fine in zip(names, finite.tolist(), strict=True) if not fine]
        raise AuditError(
            f"Expected finite losses and features, got others for {len(bad)} images ({', '.join(bad[:5])}). A "
            "denoiser in 16 bits may overflow: load the pipeline in float32. Nothing of these images was kept."
        )


def _measure(
    denoiser: Denoiser,
    data: EncodedImages,
    rows: torch.Tensor,
    config: AuditConfig,
    others: Condition | None,
) -> dict[str, torch.Tensor]:
    latents = data.latents[rows]
    null = data.condition(torch.full((len(rows),), data.null_id))
    conditions = [data.condition(data.caption_ids[rows]), null] if data.conditions else [null]
    if others is not None:
        conditions += [repeated(others, index, len(rows)) for index in range(len(config.other_captions))]
    rng = generator("audit", config.seed, int(rows[0]))
    losses = torch.stack(
        [
            torch.stack(
                [paired_losses(denoiser, latents, conditions, level, rng) for _ in range(config.contrast_draws)],
                dim=1,
            )
            for level in config.contrast_log_snr
        ],
        dim=1,
    )
    features = []
    for level in config.feature_log_snr:
        noisy_latents, timesteps, _ = add_noise(denoiser, latents, level, rng)
        features.append(pool(denoiser(noisy_latents, timesteps, null)[1]))
    empty = torch.zeros(len(rows), 0, 0)
    return {"losses": losses, "features": torch.stack(features, dim=1) if features else empty}


def paired_losses(
    denoiser: Denoiser,
    latents: torch.Tensor,
    conditions: Sequence[Condition],
    log_snr: float,
    rng: torch.Generator,
) -> torch.Tensor:
    """Return the denoising losses of the same noisy latents under several conditions, (B, conditions).

    Args:
        denoiser: The model.
        latents: (B, C, H, W).
        conditions: Of B rows each.
        log_snr: Noise level.
        rng: Draws the noise.
    """
    noisy_latents, timesteps, target = add_noise(denoiser, latents, log_snr, rng)
    losses = [per_sample_loss(denoiser(noisy_latents, timesteps, c)[0], target).cpu() for c in conditions]
    return torch.stack(losses, dim=1)


def add_noise(
    denoiser: Denoiser, latents: torch.Tensor, log_snr: float, rng: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return noisy latents, timesteps (B,) and the denoiser's target at a log signal-to-noise ratio."""
    schedule = denoiser.schedule
    noise = torch.randn(latents.shape, generator=rng).to(denoiser.device)
    timesteps = torch.full((len(latents),), schedule.timestep_at(log_snr), device=denoiser.device)
    latents = latents.to(denoiser.device)
    return (
        schedule.add_noise(latents, noise, timesteps),
        timesteps,
        schedule.target(latents, noise, timesteps),
    )


def repeated(condition: Condition, row: int, times: int) -> Condition:
    """Return one row of a condition, `times` times."""
    return {name: values[row].expand(times, *values.shape[1:]) for name, values in condition.items()}


def pool(features: torch.Tensor) -> torch.Tensor:
    """Average features (B, D, H, W) over the whole and over the left and right halves: (B, 3 D)."""
    features = features.float()
    half = max(1, features.shape[3] // 2)
    parts = [features, features[..., :half], features[..., -half:]]
    return torch.cat([part.mean(dim=(2, 3)) for part in parts], dim=1).cpu()
