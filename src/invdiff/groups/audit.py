"""Find hidden groups in captioned images, without labels: evidence, prompts, groups, and why."""

from __future__ import annotations

from dataclasses import dataclass, replace
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
from .inference import gradient_groups, one_hot
from .prompts import group_captions, telling_words, told_group
from .result import Audit, Candidate, PromptAudit
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

    by_size = sorted(members.items(), key=lambda item: -len(item[1]))
    columns = _Columns(evidence)
    groups = {
        prompt: columns.align(rows, _weights(split, num_groups, config))
        for prompt, rows in by_size
        if (split := _deciding(splits[prompt], num_groups, config)) is not None
    }
    words = _words_that_state_groups(data, {prompt: (members[prompt], w) for prompt, w in groups.items()})

    draft = _Draft(data, num_groups)
    for prompt, rows in by_size:
        if prompt in groups:
            split = _deciding(splits[prompt], num_groups, config)
            assert split is not None
            draft.add_found(rows, groups[prompt], split, [s.candidate for s in splits[prompt]], words)
        else:
            draft.add(rows, _reason(rows, splits[prompt], config), [s.candidate for s in splits[prompt]])
    return draft.audit()


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


def _deciding(splits: list[Split], num_groups: int, config: AuditConfig) -> Split | None:
    """Return the split that decides a prompt, None where nothing is hidden."""
    usable = [split for split in splits if split.candidate.num_groups == num_groups]
    if not usable or (config.solver == "auto" and not usable[0].candidate.accepted):
        return None
    return usable[0]


def _weights(split: Split, num_groups: int, config: AuditConfig) -> np.ndarray:
    """Return W of one prompt, (n, E), columns in the order of the score."""
    if config.solver == "gradient":
        return gradient_groups(split.score.mean, num_groups, omega=config.omega, seed=config.seed)
    return one_hot(split.labels, num_groups)


class _Columns:
    """Orders the columns of each prompt's W so that a column means the same under every prompt.

    Groups are compared by where their mean features lie from the prompt's own mean. The first prompt's groups
    are ordered from most to least frequent, and the others' follow.
    """

    def __init__(self, evidence: Evidence) -> None:
        self.features = evidence.features.flatten(1).double().numpy()
        self.reference: np.ndarray | None = None

    def align(self, rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
        by_size = np.argsort(-weights.sum(axis=0), kind="stable")
        if self.features.shape[1] == 0:
            return weights[:, by_size]
        features = self.features[rows]
        means = (weights.T @ features) / np.maximum(weights.sum(axis=0), 1e-12)[:, None]
        offsets = (means - means.mean(axis=0)) / np.maximum(features.std(axis=0), 1e-12)
        offsets /= np.maximum(np.linalg.norm(offsets, axis=1, keepdims=True), 1e-12)
        if self.reference is None:
            self.reference = offsets[by_size]
            return weights[:, by_size]
        return weights[:, linear_sum_assignment(-self.reference @ offsets.T)[1]]


@dataclass(frozen=True)
class _TellingWords:
    """Words in captions that state what would otherwise be hidden."""

    group_of: dict[str, int]
    """Words that tell a group, the same under every prompt: "water"."""
    certain: set[str]
    """Words under which the rare group of a prompt never occurs: "on", in captions that say the usual."""

    def told(self, caption: str, usual: int) -> int:
        """Return the group that `caption` states under a prompt whose frequent group is `usual`; -1 for none."""
        group = told_group(caption, self.group_of)
        if group >= 0:
            return group
        return usual if told_group(caption, dict.fromkeys(self.certain, usual)) >= 0 else -1


def _words_that_state_groups(data: EncodedImages, groups: dict[int, tuple[np.ndarray, np.ndarray]]) -> _TellingWords:
    """Return words that tell the group.

    "on land" says little more under a prompt whose images are on land anyway, but under the other prompt it says
    all: since columns mean the same under every prompt, a word found under one holds for all. And where captions
    only ever say the usual, all prompts together show that the rare group never comes with them.
    """
    caption_ids = data.caption_ids.numpy()
    told: dict[str, set[int]] = {}
    rare, used = [np.empty(0, dtype=int)], [np.empty(0, dtype=int)]
    for rows, weights in groups.values():
        labels = weights.argmax(axis=1)
        for word, group in telling_words(data.captions, caption_ids[rows], labels).items():
            told.setdefault(word, set()).add(group)
        rare.append((labels == weights.sum(axis=0).argmin()).astype(int))
        used.append(caption_ids[rows])
    pooled = telling_words(data.captions, np.concatenate(used), np.concatenate(rare), certainty=0.99)
    return _TellingWords(
        group_of={word: group for word, (group, *others) in told.items() if not others},
        certain={word for word, is_rare in pooled.items() if not is_rare},
    )


class _Draft:
    """Collects the prompts into one audit."""

    def __init__(self, data: EncodedImages, num_groups: int) -> None:
        self.data = data
        self.caption_ids = data.caption_ids.numpy()
        self.weights = np.full((len(data), num_groups), 1.0 / num_groups)
        self.scores = np.zeros(len(data))
        self.prompt_ids = np.zeros(len(data), dtype=np.int64)
        self.prompts: list[PromptAudit] = []

    def add(self, rows: np.ndarray, reason: str, candidates: list[Candidate]) -> None:
        """Take in images among which nothing is hidden: their rows of W stay uniform."""
        self._append(rows, found=False, reason=reason, candidates=candidates)

    def add_found(
        self,
        rows: np.ndarray,
        weights: np.ndarray,
        split: Split,
        candidates: list[Candidate],
        words: _TellingWords,
    ) -> None:
        """Take in images with hidden groups, but set apart those whose caption states the group."""
        labels = weights.argmax(axis=1)
        usual = int(weights.sum(axis=0).argmax())
        told = np.array([words.told(caption, usual) for caption in self.data.captions])[self.caption_ids[rows]]
        hidden = told < 0
        kept = rows[hidden]
        self.weights[kept] = weights[hidden]
        self.scores[kept] = _rarer_high(split.score.mean, labels)[hidden]
        self._append(
            kept,
            found=True,
            reason=f"split by {split.candidate.evidence}",
            evidence=split.candidate.evidence,
            shares=[round(float(share), 4) for share in weights[hidden].mean(axis=0)],
            stability=split.candidate.stability,
            separation=split.candidate.separation,
            candidates=candidates,
        )
        for group in np.unique(told[~hidden]):
            telling = {word for word, its_group in words.group_of.items() if its_group == group}
            if group == usual:
                telling |= words.certain
            reason = f"its captions state the group (words: {', '.join(sorted(telling))})"
            self._append(rows[told == group], found=False, reason=reason)

    def _append(self, rows: np.ndarray, **figures: Any) -> None:
        ids, counts = np.unique(self.caption_ids[rows], return_counts=True)
        captions = [self.data.captions[ids[i]] for i in np.argsort(-counts, kind="stable")]
        self.prompt_ids[rows] = len(self.prompts)
        self.prompts.append(PromptAudit(prompt=captions[0], captions=captions, num_images=len(rows), **figures))

    def audit(self) -> Audit:
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


def _rarer_high(score: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the score turned so that the rarest group is high."""
    present = np.unique(labels)
    rarest = min(present, key=lambda group: (labels == group).sum())
    return score if score[labels == rarest].mean() >= score.mean() else -score


def _reason(rows: np.ndarray, splits: list[Split], config: AuditConfig) -> str:
    if not splits:
        return f"too few images to judge ({len(rows)}; at least {config.min_images} are needed)"
    return f"no hidden group: {_shortfall(splits[0], config)}"


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
