"""Find hidden groups in captioned images, without labels: evidence, prompts, groups, and why."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..config import AuditConfig
from ..data.captioned import CaptionedImages
from ..data.encode import EncodedImages, as_encoded, encode_captions
from ..distributed import from_main
from ..errors import AuditError, ConfigError
from ..files import default_cache_dir
from ..models.encoders import ClipEncoder
from ..models.frozen import Denoiser, FrozenDenoiser
from ..models.load import public_name
from ..progress import progress_bar
from .alignment import Columns, TellingWords, rarest, words_that_state_groups
from .captions import group_captions
from .describe import describe_groups
from .evidence import Evidence, collect_evidence
from .result import Audit, Candidate, PromptAudit
from .splits import Score, Split, component_scores, consider
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
        denoiser: Audit this instead of the pipeline's own denoiser, for example a guided one. Only contrasts are
            weighed then: the frozen features do not change with guidance.
        progress: Show a progress bar.

    Raises:
        AuditError: Groups cannot be inferred, for example because losses are not finite.
        ConfigError: A vision encoder or words are asked for, but only latents are given.
        ModelError: There is no such vision encoder or CLIP model.
    """
    config = config or AuditConfig()
    cache_dir = Path(cache_dir) if cache_dir else default_cache_dir()
    images = data if isinstance(data, CaptionedImages) else None
    data = as_encoded(pipe, data, cache_dir, resolution=config.resolution, progress=progress)
    if not data.conditions and (config.solver == "exact" or config.other_captions):
        raise AuditError(
            "Expected a model that reads captions for solver 'exact' and for other_captions, which compare what it "
            "predicts with and without one, got an unconditional model. Use solver 'auto' or 'gradient'."
        )
    if config.words_model:
        if images is None:
            raise ConfigError("Expected CaptionedImages for a CLIP model to look at, got only their latents.")
        from_main(lambda: ClipEncoder.load(config.words_model).name)  # an error in its name comes before the work
    vision_features = None
    if config.vision_encoder:
        if images is None:
            raise ConfigError("Expected CaptionedImages for a vision encoder to look at, got only their latents.")
        rows, seen = data.source_index, images
        vision_features = from_main(
            lambda: encode_vision(config.vision_encoder, seen, rows, cache_dir / "vision", progress=progress)
        )
    others = encode_captions(pipe, config.other_captions) if config.other_captions else None
    with FrozenDenoiser(pipe) as frozen:
        used = denoiser or frozen
        evidence = collect_evidence(
            used,
            data,
            config,
            work_dir=cache_dir / "evidence",
            others=others,
            progress=progress,
        )
        encoded = data
        prompt_of, spent = from_main(
            lambda: group_captions(used, encoded, threshold=config.caption_threshold, seed=config.seed)
        )
    result = from_main(
        lambda: infer(
            encoded,
            evidence,
            prompt_of,
            config,
            vision_features=vision_features,
            contrast_only=denoiser is not None,
            progress=progress,
        )
    )
    settings = config.to_dict() | {
        "model_fingerprint": data.model_fingerprint,
        "denoiser_fingerprint": used.fingerprint,
        "data_fingerprint": data.data_fingerprint,
        "resolution": data.resolution,
    }
    forwards = round(evidence.forwards_per_image + spent, 3)
    result = replace(result, settings=settings, forwards_per_image=forwards)
    if config.words_model and images is not None and result.biased:
        pictured = images
        words = from_main(
            lambda: describe_groups(
                result,
                pictured,
                encoded.source_index,
                ClipEncoder.load(config.words_model),
                words=config.words,
                cache_dir=cache_dir / "words",
                seed=config.seed,
                progress=progress,
            )
        )
        result = replace(result, words=words)
    return result


def infer(
    data: EncodedImages,
    evidence: Evidence,
    prompt_of: np.ndarray,
    config: AuditConfig,
    *,
    vision_features: torch.Tensor | None = None,
    contrast_only: bool = False,
    progress: bool = True,
) -> Audit:
    """Turn evidence into groups; no denoiser is run.

    Args:
        data: The images' captions and names.
        evidence: From `collect_evidence`.
        prompt_of: The prompt of each different caption, from `group_captions`.
        config: Solver and thresholds.
        vision_features: (N, views, D) or None.
        contrast_only: Weigh no features: those of the frozen model do not change with guidance.
        progress: Show a progress bar.
    """
    caption_ids = data.caption_ids.numpy()
    members = {p: np.flatnonzero(prompt_of[caption_ids] == p) for p in np.unique(prompt_of)}
    by_size = sorted(members.items(), key=lambda item: -len(item[1]))
    splits: dict[int, list[Split]] = {}
    with progress_bar("weighing evidence", len(members), enabled=progress) as bar:
        for prompt, rows in by_size:
            large_enough = len(rows) >= max(config.min_images, 4)
            scores = _scores(evidence, vision_features, rows, config, contrast_only) if large_enough else []
            splits[prompt] = _splits([score for score in scores if np.ptp(score.mean) > 0], config)
            bar.advance()

    found = [prompt for prompt, _ in by_size if _is_found(splits[prompt], config)]
    num_groups = _common_number_of_groups([splits[prompt] for prompt in found], config)
    deciding = {prompt: _deciding(splits[prompt], num_groups, config) for prompt in found}
    columns = Columns(evidence)
    groups = {
        prompt: columns.align(members[prompt], _widened(split.weights, num_groups))
        for prompt, split in deciding.items()
    }
    words = words_that_state_groups(data, {prompt: (members[prompt], w) for prompt, w in groups.items()})

    draft = _Draft(data, num_groups)
    for prompt, rows in by_size:
        candidates = [split.candidate for split in splits[prompt]]
        if prompt in groups:
            draft.add_found(rows, groups[prompt], deciding[prompt], candidates, words)
        else:
            draft.add(rows, _reason(rows, splits[prompt], config), candidates)
    return draft.audit()


def _scores(
    evidence: Evidence,
    vision_features: torch.Tensor | None,
    rows: np.ndarray,
    config: AuditConfig,
    contrast_only: bool,
) -> list[Score]:
    """Return every one-dimensional score of these images, each under independent noises."""
    losses = evidence.losses[rows].double().numpy()  # (n, levels, draws, conditions)
    if config.solver == "gradient":
        return [Score(f"loss at log-SNR {config.contrast_log_snr[0]:g}", losses[:, 0, :, 0].T)]
    scores = []
    others = [(1, "contrast")] if losses.shape[3] > 1 else []  # an unconditional model has no captions to contrast
    others += [(k, f"contrast with {caption!r}") for k, caption in enumerate(config.other_captions, start=2)]
    for condition, name in others:
        for index, level in enumerate(config.contrast_log_snr):
            scores.append(
                Score(f"{name} at log-SNR {level:g}", (losses[:, index, :, 0] - losses[:, index, :, condition]).T)
            )
    if config.solver == "exact" or contrast_only:
        return scores
    levels = " and ".join(f"{level:g}" for level in config.feature_log_snr)
    scores += component_scores(
        evidence.features[rows].double().numpy(), f"features at log-SNR {levels}", seed=config.seed
    )
    if vision_features is not None:
        views = vision_features[rows].double().numpy()
        scores += component_scores(views, f"features of {public_name(config.vision_encoder)}", seed=config.seed)
    return scores


def _splits(scores: list[Score], config: AuditConfig) -> list[Split]:
    """Return ways to split one prompt's images, best first."""
    if config.solver == "auto":
        sizes = [config.num_groups] if config.num_groups else range(2, config.max_groups + 1)
        splits = [consider(score, size, config) for score in scores for size in sizes]
        return sorted(splits, key=lambda split: (-split.candidate.accepted, -split.merit))
    return [consider(score, config.num_groups or 2, config) for score in scores]


def _is_found(splits: list[Split], config: AuditConfig) -> bool:
    return bool(splits) and (config.solver != "auto" or splits[0].candidate.accepted)


def _common_number_of_groups(found: list[list[Split]], config: AuditConfig) -> int:
    """Return the E that serves most prompts, and of these the one of most merit: environments are shared."""
    if config.num_groups or config.solver != "auto" or not found:
        return config.num_groups or 2
    served: dict[int, list[float]] = {}
    for splits in found:
        best: dict[int, float] = {}
        for split in splits:
            if split.candidate.accepted:
                size = split.candidate.num_groups
                best[size] = max(best.get(size, 0.0), split.merit)
        for size, merit in best.items():
            served.setdefault(size, []).append(merit)
    return max(served, key=lambda size: (len(served[size]), sum(served[size]), -size))


def _deciding(splits: list[Split], num_groups: int, config: AuditConfig) -> Split:
    """Return the split that decides a prompt where something is hidden.

    The best of the common number of groups; where none of that number is accepted, the best of fewer; else the
    evidence of the best is cut again into the common number, so that what was found is never dropped.
    """
    usable = [split for split in splits if split.candidate.accepted or config.solver != "auto"]
    for fits in (lambda size: size == num_groups, lambda size: size < num_groups):
        for split in usable:
            if fits(split.candidate.num_groups):
                return split
    return consider(usable[0].score, num_groups, config)


def _widened(weights: np.ndarray, num_groups: int) -> np.ndarray:
    """Return W (n, E) with empty columns for the groups that this prompt lacks."""
    return np.pad(weights, ((0, 0), (0, num_groups - weights.shape[1])))


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
        words: TellingWords,
    ) -> None:
        """Take in images with hidden groups, but set apart those whose caption states the group."""
        labels = weights.argmax(axis=1)
        usual = int(weights.sum(axis=0).argmax())
        told = np.array([words.told(caption, usual) for caption in self.data.captions])[self.caption_ids[rows]]
        hidden = told < 0
        if hidden.any():
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
            group_weights=(self.weights.astype(np.float32),),
            scores=self.scores.astype(np.float32),
            prompt_ids=self.prompt_ids,
            prompts=self.prompts,
            names=list(self.data.names),
            forwards_per_image=0.0,
            settings={},
        )


def _rarer_high(score: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the score turned so that the rarest group is high."""
    rare = labels == rarest(np.bincount(labels))
    return score if score[rare].mean() >= score.mean() else -score


def _reason(rows: np.ndarray, splits: list[Split], config: AuditConfig) -> str:
    if len(rows) < max(config.min_images, 4):
        return f"too few images to judge ({len(rows)}; at least {config.min_images} are needed)"
    if not splits:
        return "no hidden group: nothing that was measured varies between the images"
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
