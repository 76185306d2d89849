"""The audit: evidence, prompts, splits and groups of captioned images, without labels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config import AuditConfig
from ..data.captioned import CaptionedImages
from ..data.encode import EncodedImages, as_encoded, encode_captions
from ..distributed import from_main
from ..errors import AuditError, ConfigError
from ..files import default_cache_dir
from ..models.encoders import ClipEncoder
from ..models.frozen import Denoiser, FrozenDenoiser
from ..progress import progress_bar
from .captions import group_captions, stated_group, words_that_state_groups
from .evidence import Evidence, collect_evidence, encode_vision, scores_of
from .result import Audit, Factor, PromptAudit, PromptSplit
from .splits import Split, align_columns, deciding_splits, ranked_splits, rarest, too_few, why_not
from .words import describe_groups


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
    A caption whose own words state the group is set apart: an attribute that it states is not hidden.

    Args:
        pipe: The pipeline to audit.
        data: The captioned images, or the result of `encode`.
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
    encoded = as_encoded(pipe, data, cache_dir, resolution=config.resolution, progress=progress)
    if not encoded.conditions and (config.solver == "exact" or config.other_captions):
        raise AuditError(
            "Expected a model that reads captions for solver 'exact' and for other_captions, which compare what it "
            "predicts with and without one, got an unconditional model. Use solver 'auto' or 'gradient'."
        )
    for asked, what in ((config.words_model, "a CLIP model"), (config.vision_encoder, "a vision encoder")):
        if asked and images is None:
            raise ConfigError(f"Expected CaptionedImages for {what} to look at, got only their latents.")
    if config.words_model:
        from_main(lambda: ClipEncoder.load(config.words_model).name)  # an error in its name comes before the work
    rows, vision = encoded.source_index.numpy(), None
    if images is not None and config.vision_encoder:
        folder = cache_dir / "vision"
        vision = from_main(lambda: encode_vision(config.vision_encoder, images, rows, folder, progress=progress))
    others = encode_captions(pipe, config.other_captions) if config.other_captions else None
    with FrozenDenoiser(pipe) as frozen:
        used, folder = denoiser or frozen, cache_dir / "evidence"
        evidence = collect_evidence(used, encoded, config, work_dir=folder, others=others, progress=progress)
        prompt_of, spent = from_main(lambda: group_captions(used, encoded, config.caption_threshold, config.seed))
    measured = np.prod(evidence.losses.shape[1:]) + evidence.features.shape[1]
    evidence = replace(evidence, vision=vision, contrast_only=denoiser is not None)
    settings = config.to_dict() | {
        "model_fingerprint": encoded.model_fingerprint,
        "denoiser_fingerprint": used.fingerprint,
        "data_fingerprint": encoded.data_fingerprint,
        "resolution": encoded.resolution,
    }

    def conclude() -> Audit:
        found = infer(encoded, evidence, prompt_of, config, progress=progress)
        found = replace(found, settings=settings, unreadable=dict(encoded.unreadable))
        found = replace(found, forwards_per_image=round(float(measured + spent), 3))
        if images is None or not config.words_model or not found.biased:
            return found
        encoder, folder = ClipEncoder.load(config.words_model), cache_dir / "words"
        words = describe_groups(found, images, rows, encoder, config, cache_dir=folder, progress=progress)
        return replace(found, words=words)

    return from_main(conclude)


def infer(
    data: EncodedImages, evidence: Evidence, prompt_of: NDArray[Any], config: AuditConfig, *, progress: bool = True
) -> Audit:
    """The max phase: groups of images from their evidence; `prompt_of` (captions,) is as `group_captions` finds it."""
    caption_ids = data.caption_ids.numpy()
    members = {prompt: np.flatnonzero(prompt_of[caption_ids] == prompt) for prompt in np.unique(prompt_of).tolist()}
    members = dict(sorted(members.items(), key=lambda item: -len(item[1])))

    # Which splits of each prompt's images are separated, stable and unbalanced? The best one decides, if any.
    ranked: dict[int, list[Split]] = {}
    with progress_bar("weighing evidence", len(members), enabled=progress) as bar:
        for prompt, rows in members.items():
            scores = [] if too_few(len(rows), config) else scores_of(evidence, rows, config)
            ranked[prompt] = ranked_splits(scores, config)
            bar.advance()
    num_groups, deciding = deciding_splits(ranked, config)

    # Columns of W mean the same under every prompt; what captions state is not hidden.
    features = evidence.features.reshape(len(data), -1)
    aligned = align_columns({k: (members[k], split.weights) for k, split in deciding.items()}, num_groups, features)
    group_of, usual = words_that_state_groups(data, {prompt: (members[prompt], w) for prompt, w in aligned.items()})

    group_weights = np.full((len(data), num_groups), 1.0 / num_groups)
    final_scores, prompt_ids = np.zeros(len(data)), np.zeros(len(data), dtype=np.int64)
    prompts: list[PromptAudit] = []
    splits: list[PromptSplit] = []

    def add(rows: NDArray[Any], **result: Any) -> None:
        ids, counts = np.unique(caption_ids[rows], return_counts=True)
        captions = [data.captions[k] for k in ids[np.argsort(-counts, kind="stable")]]
        prompt_ids[rows] = len(prompts)
        prompts.append(PromptAudit(prompt=captions[0], captions=captions, num_images=len(rows), **result))

    for prompt, rows in members.items():
        candidates = [split.candidate for split in ranked[prompt]]
        if prompt not in deciding:
            add(rows, found=False, reason=why_not(len(rows), ranked[prompt], config), candidates=candidates)
            continue
        split, weights = deciding[prompt], aligned[prompt]
        score, best, labels = split.score.mean, split.candidate, weights.argmax(axis=1)
        of_usual = dict.fromkeys(usual, int(weights.sum(axis=0).argmax()))
        by_caption = np.array([stated_group(caption, group_of) for caption in data.captions])
        by_usual = np.array([stated_group(caption, of_usual) for caption in data.captions])
        stated = np.where(by_caption < 0, by_usual, by_caption)[caption_ids[rows]]
        hidden = stated < 0
        if hidden.any():
            group_weights[rows[hidden]] = weights[hidden]
            high = score[labels == rarest(np.bincount(labels))].mean() >= score.mean()
            final_scores[rows[hidden]] = (score if high else -score)[hidden]
            figures = (best.separation, best.agreement, best.rand_low, best.log_e)
            found = PromptSplit(len(prompts), best.evidence, [], [], *figures)
            splits.append(found.with_shares_of(weights[hidden]))
            add(rows[hidden], found=True, reason=f"split by {best.evidence}", candidates=candidates)
        for group in np.unique(stated[~hidden]).tolist():
            words = ", ".join(sorted({word for word, k in (*group_of.items(), *of_usual.items()) if k == group}))
            add(rows[stated == group], found=False, reason=f"its captions state the group (words: {words})")
    splits.sort(key=lambda one: -prompts[one.prompt].num_images)
    factors = [Factor("factor 1", True, splits)] if splits else []
    final_weights, all_scores = (group_weights.astype(np.float32),), final_scores.astype(np.float32)[None]
    return Audit(final_weights, all_scores, prompt_ids, prompts, factors, list(data.names), 0.0, {})
