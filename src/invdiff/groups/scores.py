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
from ..denoiser import Denoiser
from ..diffusion import per_sample_loss
from ..errors import AuditError
from ..files import fingerprint, read_tensors, write_tensors
from ..progress import progress_bar
from ..seeds import generator

SHARD_SIZE = 256


@dataclass(frozen=True)
class Evidence:
    """What was measured on each image. Draws use independent noise, so that stability can be judged."""

    losses: torch.Tensor
    """(N, levels, draws, conditions): under the caption, the null caption, then any other captions."""
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
    other_embeds: torch.Tensor | None = None,
    progress: bool = True,
) -> Evidence:
    """Measure every image, in shards that a stopped run keeps.

    Args:
        denoiser: The frozen model, or a guided one in later rounds of the game.
        data: Latents and prompt embeddings.
        config: Levels, draws, batch size and seed.
        work_dir: Where shards are kept; those of other settings or models are not read.
        other_embeds: Embeddings of `config.other_captions`, (captions, tokens, D).
        progress: Show a progress bar.
    """
    key = fingerprint(
        data.model_fingerprint,
        data.data_fingerprint,
        denoiser.fingerprint,
        repr((config.contrast_levels, config.contrast_draws, config.feature_levels)),
        repr((config.other_captions, config.batch_size, config.seed)),
    )
    folder = work_dir / key
    parts: list[dict[str, torch.Tensor]] = []
    with progress_bar("measuring", len(data), enabled=progress) as bar:
        for shard, start in enumerate(range(0, len(data), SHARD_SIZE)):
            path = folder / f"evidence-{shard:05d}.safetensors"
            rows = torch.arange(start, min(start + SHARD_SIZE, len(data)))
            if not path.exists():
                batches = [
                    _measure(denoiser, data, batch, config, other_embeds) for batch in rows.split(config.batch_size)
                ]
                measured = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
                _check_finite(measured, [data.names[row] for row in rows])
                write_tensors(path, measured)
            parts.append(read_tensors(path))
            bar.advance(len(rows))
    conditions = 2 + len(config.other_captions)
    return Evidence(
        losses=torch.cat([part["losses"] for part in parts]),
        features=torch.cat([part["features"] for part in parts]),
        forwards_per_image=len(config.contrast_levels) * config.contrast_draws * conditions
        + len(config.feature_levels),
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
    other_embeds: torch.Tensor | None,
) -> dict[str, torch.Tensor]:
    latents = data.latents[rows]
    null = data.null_embeds.expand(len(rows), -1, -1)
    conditions = [data.prompt_embeds[data.caption_ids[rows]], null]
    if other_embeds is not None:
        conditions += [embeds.expand(len(rows), -1, -1) for embeds in other_embeds]
    rng = generator("audit", config.seed, int(rows[0]))
    losses = torch.stack(
        [
            torch.stack(
                [paired_losses(denoiser, latents, conditions, level, rng) for _ in range(config.contrast_draws)],
                dim=1,
            )
            for level in config.contrast_levels
        ],
        dim=1,
    )
    features = []
    for level in config.feature_levels:
        noisy_latents, timesteps, _ = add_noise(denoiser, latents, level, rng)
        features.append(pool(denoiser(noisy_latents, timesteps, null)[1]))
    empty = torch.zeros(len(rows), 0, 0)
    return {"losses": losses, "features": torch.stack(features, dim=1) if features else empty}


def paired_losses(
    denoiser: Denoiser,
    latents: torch.Tensor,
    conditions: Sequence[torch.Tensor],
    level: float,
    rng: torch.Generator,
) -> torch.Tensor:
    """Return the denoising losses of the same noisy latents under several conditions, (B, conditions).

    Args:
        denoiser: The model.
        latents: (B, C, H, W).
        conditions: Prompt embeddings, (B, tokens, D) each.
        level: Noise level as a share of the schedule.
        rng: Draws the noise.
    """
    noisy_latents, timesteps, target = add_noise(denoiser, latents, level, rng)
    losses = [per_sample_loss(denoiser(noisy_latents, timesteps, c)[0], target).cpu() for c in conditions]
    return torch.stack(losses, dim=1)


def add_noise(
    denoiser: Denoiser, latents: torch.Tensor, level: float, rng: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return noisy latents, timesteps (B,) and the denoiser's target at a noise level in [0, 1)."""
    schedule = denoiser.schedule
    noise = torch.randn(latents.shape, generator=rng).to(denoiser.device)
    timesteps = torch.full((len(latents),), int(level * schedule.num_train_timesteps), device=denoiser.device)
    latents = latents.to(denoiser.device)
    return (
        schedule.add_noise(latents, noise, timesteps),
        timesteps,
        schedule.target(latents, noise, timesteps),
    )


def pool(features: torch.Tensor) -> torch.Tensor:
    """Average features (B, D, H, W) over the whole and over the left and right halves: (B, 3 D)."""
    features = features.float()
    half = max(1, features.shape[3] // 2)
    parts = [features, features[..., :half], features[..., -half:]]
    return torch.cat([part.mean(dim=(2, 3)) for part in parts], dim=1).cpu()
