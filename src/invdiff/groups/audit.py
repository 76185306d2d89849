"""Find hidden groups in captioned images, without labels: evidence, prompts, groups, and why."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from ..config import AuditConfig
from ..data.captioned import CaptionedImages
from ..data.encode import EncodedImages, as_encoded, encode_captions
from ..denoiser import Denoiser, FrozenDenoiser
from ..errors import ConfigError
from ..files import default_cache_dir
from ..progress import progress_bar
from .auto import Score, Split, component_scores, consider
from .inference import exact_groups, gradient_groups, group_losses, one_hot
from .prompts import group_captions, states, telling_words
from .result import Audit, PromptAudit
from .scores import Evidence, collect_evidence
from .vision import encode_vision


def audit(
    pipe: Any,
    data: CaptionedImages | EncodedImages,
    *,
    config: AuditConfig | None = None,
    cache_dir: str | Path | None = None,
    denoiser: Denoiser | None = None,
    progress: bool = True,
) -> Audit:
    """Infer the group indicator matrix W of captioned images, or say that nothing is hidden.

    Captions that mean the same to the model are one prompt. Each image is measured with a few denoiser
    forwards; each prompt's images are then split by the evidence that separates them best, if any does.
    A caption whose own words tell the group is set apart: what it states is not hidden.

    Args:
        pipe: The pipeline to audit.
        data: The captioned images, or what `encode` made of them.
        config: Solver, evidence, thresholds.
        cache_dir: Where latents and measurements are kept; a stopped run goes on from there, and another
            solver reuses them. `default_cache_dir()` unless given.
        denoiser: Audit this instead of the pipeline's own denoiser, for example a guided one.
        progress: Show a progress bar.

    Raises:
        AuditError: Groups cannot be inferred, for example because losses are not finite.
        ConfigError: A vision encoder is asked for, but only latents are given.
    """
    config = config or AuditConfig()
    cache_dir = Path(cache_dir) if cache_dir else default_cache_dir()
    images = data if isinstance(data, CaptionedImages) else None
    data = as_encoded(pipe, data, cache_dir, progress=progress)
    vision_features = None
    if config.vision_encoder:
        if images is None:
            raise ConfigError("Expected CaptionedImages for a vision encoder to look at, got only their latents.")
        vision_features = encode_vision(
            config.vision_encoder, images, data.source_index, cache_dir / "vision", progress=progress
        )
    other_embeds = encode_captions(pipe, config.other_captions) if config.other_captions else None
    with FrozenDenoiser(pipe) as frozen:
        used = denoiser or frozen
        evidence = collect_evidence(
            used,
            data,
            config,
            work_dir=cache_dir / "evidence",
            other_embeds=other_embeds,
            progress=progress,
        )
        prompt_of, spent = group_captions(used, data, threshold=config.caption_threshold, seed=config.seed)
    result = infer(data, evidence, prompt_of, config, vision_features=vision_features, progress=progress)
    settings = config.to_dict() | {
        "model_fingerprint": data.model_fingerprint,
        "denoiser_fingerprint": used.fingerprint,
        "data_fingerprint": data.data_fingerprint,
    }
    forwards = round(evidence.forwards_per_image + spent, 3)
    return replace(result, settings=settings, forwards_per_image=forwards)


def infer(
    data: EncodedImages,
    evidence: Evidence,
    prompt_of: np.ndarray,
    config: AuditConfig,
    *,
    vision_features: torch.Tensor | None = None,
    progress: bool = True,
) -> Audit:
    """Turn evidence into groups; no denoiser is run.

    Args:
        data: The images' captions and names.
        evidence: From `collect_evidence`.
        prompt_of: The prompt of each different caption, from `group_captions`.
        config: Solver and thresholds.
        vision_features: (N, views, D) or None.
        progress: Show a progress bar.
    """
    caption_ids = data.caption_ids.numpy()
    members = {p: np.flatnonzero(prompt_of[caption_ids] == p) for p in np.unique(prompt_of)}
    splits: dict[int, list[Split]] = {}
    with progress_bar("weighing evidence", len(members), enabled=progress) as bar:
        for prompt, rows in members.items():
            large_enough = len(rows) >= max(config.min_images, 4)
            scores = _scores(evidence, vision_features, rows, config) if large_enough else []
            splits[prompt] = _splits(scores, config)
            bar.advance()
    num_groups = _common_number_of_groups(splits, config)

    builder = _Builder(data, evidence, num_groups)
    for prompt, rows in sorted(members.items(), key=lambda item: -len(item[1])):
        builder.add(rows, splits[prompt], config)
    return builder.result()


def _scores(
    evidence: Evidence, vision_features: torch.Tensor | None, rows: np.ndarray, config: AuditConfig
) -> list[Score]:
    """Return every one-dimensional score of these images, each under independent noises."""
    contrast = evidence.contrast[rows].double().numpy()
    scores = [
        Score(f"contrast at {level:g}", contrast[:, index].T) for index, level in enumerate(config.contrast_levels)
    ]
    if config.solver != "auto":
        return [Score("contrast", contrast.reshape(len(rows), -1).T)]
    losses = evidence.losses[rows].double().numpy()
    for number, caption in enumerate(config.other_captions, start=2):
        scores += [
            Score(
                f"contrast with {caption!r} at {level:g}",
                (losses[:, index, :, 0] - losses[:, index, :, number]).T,
            )
            for index, level in enumerate(config.contrast_levels)
        ]
    names = [f"{level:g}" for level in config.feature_levels]
    scores += component_scores(evidence.features[rows].double().numpy(), names, seed=config.seed)
    if vision_features is not None:
        views = vision_features[rows].double().numpy()
        scores += component_scores(views, [config.vision_encoder], seed=config.seed)
    return scores


def _splits(scores: list[Score], config: AuditConfig) -> list[Split]:
    if config.solver == "auto":
        sizes = [config.num_groups] if config.num_groups else range(2, config.max_groups + 1)
        splits = [consider(score, size, config) for score in scores for size in sizes]
        return sorted(splits, key=lambda split: (-split.candidate.accepted, -split.merit))
    size = config.num_groups or 2
    return [consider(score, size, config) for score in scores]


def _common_number_of_groups(splits: dict[int, list[Split]], config: AuditConfig) -> int:
    """Return the E that the accepted splits favour, summed over prompts; the environments are shared."""
    if config.num_groups or config.solver != "auto":
        return config.num_groups or 2
    merit: dict[int, float] = {}
    for candidates in splits.values():
        best: dict[int, float] = {}
        for split in candidates:
            if split.candidate.accepted:
                size = split.candidate.num_groups
                best[size] = max(best.get(size, 0.0), split.merit)
        for size, value in best.items():
            merit[size] = merit.get(size, 0.0) + value
    return max(merit, key=lambda size: (merit[size], -size)) if merit else 2


class _Builder:
    """Collects the prompts' groups into one W whose columns mean the same under every prompt."""

    def __init__(self, data: EncodedImages, evidence: Evidence, num_groups: int) -> None:
        self.data = data
        self.num_groups = num_groups
        self.weights = np.full((len(data), num_groups), 1.0 / num_groups)
        self.scores = np.zeros(len(data))
        self.prompt_ids = np.zeros(len(data), dtype=np.int64)
        self.prompts: list[PromptAudit] = []
        self.features = evidence.features.flatten(1).double().numpy()
        self.reference: np.ndarray | None = None

    def add(self, rows: np.ndarray, splits: list[Split], config: AuditConfig) -> None:
        """Take in one prompt's images and the ways to split them, best first."""
        candidates = [split.candidate for split in splits]
        if not splits:
            reason = f"too few images to judge ({len(rows)}; at least {config.min_images} are needed)"
            self._append(rows, PromptAudit(**self._names(rows), found=False, reason=reason))
            return
        usable = [split for split in splits if split.candidate.num_groups == self.num_groups]
        split = usable[0]
        if config.solver == "auto" and not split.candidate.accepted:
            reason = f"no hidden group: {_shortfall(split, config)}"
            entry = PromptAudit(**self._names(rows), found=False, reason=reason, candidates=candidates)
            self._append(rows, entry)
            return

        labels, score = split.labels, split.score.mean
        if config.solver == "gradient":
            weights = gradient_groups(score, self.num_groups, omega=config.omega, seed=config.seed)
        elif config.solver == "exact":
            weights = one_hot(exact_groups(score, self.num_groups, min_share=config.min_share), self.num_groups)
        else:
            weights = one_hot(labels, self.num_groups)
        labels = weights.argmax(axis=1)
        order = self._align(rows, weights)

        caption_ids = self.data.caption_ids.numpy()[rows]
        words = telling_words(self.data.captions, caption_ids, labels)
        stated = np.array([states(caption, words) for caption in self.data.captions])[caption_ids]
        hidden = ~stated
        kept = weights[hidden][:, order]
        # High for the rarer side, whichever way the evidence points.
        rarer_is_high = (
            group_losses(score, one_hot(labels, self.num_groups))[
                np.bincount(labels, minlength=self.num_groups).argmin()
            ]
            >= score.mean()
        )
        entry = PromptAudit(
            **self._names(rows[hidden]),
            found=True,
            reason=f"split by {split.candidate.evidence}",
            evidence=split.candidate.evidence,
            shares=[round(float(share), 4) for share in kept.mean(axis=0)],
            stability=split.candidate.stability,
            separation=split.candidate.separation,
            candidates=candidates,
        )
        self._append(rows[hidden], entry)
        self.weights[rows[hidden]] = kept
        self.scores[rows[hidden]] = (score if rarer_is_high else -score)[hidden]
        if stated.any():
            reason = f"its captions state the group (words: {', '.join(sorted(words))})"
            self._append(rows[stated], PromptAudit(**self._names(rows[stated]), found=False, reason=reason))

    def _align(self, rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Return the order of columns in which each group resembles the same group of the first prompt.

        Groups are compared by where their mean features lie from the prompt's own mean. The first prompt's
        groups are ordered from most to least frequent.
        """
        by_size = np.argsort(-weights.sum(axis=0), kind="stable")
        if self.features.shape[1] == 0:
            return by_size
        features = self.features[rows]
        means = (weights.T @ features) / np.maximum(weights.sum(axis=0), 1e-12)[:, None]
        offsets = means - means.mean(axis=0)
        offsets = offsets / np.maximum(features.std(axis=0), 1e-12)
        offsets /= np.maximum(np.linalg.norm(offsets, axis=1, keepdims=True), 1e-12)
        if self.reference is None:
            self.reference = offsets[by_size]
            return by_size
        return linear_sum_assignment(-self.reference @ offsets.T)[1]

    def _names(self, rows: np.ndarray) -> dict[str, Any]:
        ids, counts = np.unique(self.data.caption_ids.numpy()[rows], return_counts=True)
        captions = [self.data.captions[ids[i]] for i in np.argsort(-counts, kind="stable")]
        return {"prompt": captions[0], "captions": captions, "num_images": len(rows)}

    def _append(self, rows: np.ndarray, entry: PromptAudit) -> None:
        self.prompt_ids[rows] = len(self.prompts)
        self.prompts.append(entry)

    def result(self) -> Audit:
        """Return the audit, without settings yet."""
        return Audit(
            group_weights=(torch.from_numpy(self.weights).float(),),
            scores=torch.from_numpy(self.scores).float(),
            prompt_ids=torch.from_numpy(self.prompt_ids),
            prompts=self.prompts,
            names=list(self.data.names),
            forwards_per_image=0.0,
            settings={},
        )


def _shortfall(split: Split, config: AuditConfig) -> str:
    """Say in words why the best split is not an accident."""
    best = split.candidate
    if best.separation < config.min_separation:
        return (
            f"the best split, by {best.evidence}, cuts through one hump "
            f"(separation {best.separation:.2f}, at least {config.min_separation:g} is needed)"
        )
    if best.stability < config.min_stability:
        return (
            f"the best split, by {best.evidence}, changes with the noise "
            f"(stability {best.stability:.2f}, at least {config.min_stability:g} is needed)"
        )
    return (
        f"the clearest split, by {best.evidence}, is balanced "
        f"({', '.join(f'{share:.0%}' for share in best.shares)}): a style, not an accident"
    )
