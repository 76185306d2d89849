"""The audit: evidence, prompts, splits and groups of captioned images, without labels unless they are asked for."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..config import AuditConfig
from ..data.captioned import CaptionedImages
from ..data.encode import EncodedImages, as_encoded
from ..distributed import from_main
from ..errors import AuditError, ConfigError, DataError, check_kinds
from ..files import check_same_settings, default_cache_dir, read_json
from ..models.encoders import ClipEncoder
from ..models.frozen import Denoiser, FrozenDenoiser
from ..models.load import DTYPES, denoiser_of, loras_of
from ..sampling import own_images
from ..seeds import generator
from .asked import Labels, columns_asked, known_rows, labels_asked
from .asking import Reading, asked_factors, questions, read_by_clip, read_by_model
from .captions import group_captions, part_by_images, stated_group, words_in, words_that_state_groups
from .cuts import too_few
from .evidence import Evidence, collect_evidence, encode_vision
from .factors import Search, find_factors
from .probe import linear_judges, spread_labels
from .result import Audit, Factor, PromptAudit, PromptSplit
from .scores import Margins
from .splits import force_factors, given_factors, rarest, why_not
from .words import describe_groups

ALMOST, AT_ONCE = 0.05, 1024
"""Latents nearer than this share of their usual size are of nearly the same image; rows that are compared at once."""


def audit(
    pipe: Any,
    data: CaptionedImages | EncodedImages | None = None,
    *,
    prompts: Sequence[str] = (),
    attribute: str | Sequence[str] = (),
    labels: Labels | None = None,
    ask: Mapping[str, Sequence[str]] | Sequence[str] = (),
    config: AuditConfig | None = None,
    cache_dir: str | Path | None = None,
    denoiser: Denoiser | None = None,
    progress: bool = True,
) -> Audit:
    """Infer the group indicator matrix W of captioned images, or say that nothing is hidden.

    Captions that mean the same to the model, and whose images look alike to it, are one prompt. Each image is measured
    with a few denoiser forwards; hidden factors are then sought one after the other: see factors.py. A caption whose
    own words state the group is set apart: an attribute that it states is not hidden.

    Args:
        pipe: The pipeline to audit.
        data: The captioned images, or what `as_encoded` gives; without them, the model draws its own of the prompts.
        prompts: Different prompts, of each of which the model draws `config.images_per_prompt` images.
        attribute: A column of the data, or several: its values are groups, and no other factor is sought. Without
            it, no column but the captions is read.
        labels: A CSV or JSONL file with `file_name` and the values of an attribute for some images, five or more of
            each, or the same as attribute to name to value. Groups of the others are inferred: see probe.py.
        ask: Attributes and values to look for, {"place": ("forest", "sea")} or lines such as "place: forest, sea", of
            which "common" is a bundled list, and no others. Read by `config.words_model`, or the audited model itself.
        config: Solver, evidence, thresholds.
        cache_dir: Where latents and measurements are kept; a stopped run goes on from there, and another
            solver reuses them. `default_cache_dir()` unless given.
        denoiser: Audit this instead of the pipeline's own denoiser, for example a guided one. Only contrasts are
            weighed then: the frozen features do not change with guidance.
        progress: Show a progress bar.

    Raises:
        AuditError: Groups cannot be inferred, for example because losses are not finite.
        ConfigError: A vision encoder, words or an attribute are asked for, but only latents are given.
        DataError: There is no such attribute, or there are too few labels, or labels of other images.
        ModelError: There is no such vision encoder or CLIP model.
    """
    check_kinds(data=(data, CaptionedImages | EncodedImages | None), config=(config, AuditConfig | None))
    if isinstance(prompts, str):
        raise ConfigError(f"Expected a list of prompts, got {prompts!r}.")
    config, wanted = config or AuditConfig(), questions(ask)
    columns = [attribute] if isinstance(attribute, str) else list(attribute)
    cache_dir = Path(cache_dir) if cache_dir else default_cache_dir()
    basis = config.to_dict() | ({"own_images_of": list(prompts)} if data is None else {})
    # Errors in what is asked for come before the work.
    if (columns or wanted or labels is not None) and config.solver != "auto":
        raise ConfigError(f"Expected solver 'auto' where groups are asked for, got {config.solver!r}. Leave it out.")
    if data is None:
        data = own_images(pipe, basis, cache_dir, progress=progress)
    elif prompts:
        raise ConfigError("Expected either data or prompts for the model to draw its own, got both.")
    images = data if isinstance(data, CaptionedImages) else None
    if images is not None:
        columns_asked(images, np.arange(len(images)), columns)
    few = labels_asked(labels, data.names)
    if twice := [name for name, times in Counter([*columns, *few, *wanted]).items() if times > 1]:
        raise ConfigError(f"Expected each attribute to be asked for in one way, once, got {twice[0]!r} again.")
    encoded = as_encoded(pipe, data, cache_dir, resolution=config.resolution, progress=progress)
    if not encoded.conditions and config.solver == "exact":
        raise AuditError("Expected a model of captions for solver 'exact', got one of none. Use 'auto' or 'gradient'.")
    if wanted and "prompt_embeds" not in encoded.conditions and not config.words_model:
        raise AuditError("Expected a model that reads captions, or words_model, a CLIP model, to read words by.")
    uses = {"a CLIP model to look at": config.words_model, "a vision encoder to look at": config.vision_encoder}
    asked_of_images = [use for use, asked in (uses | {"their attributes": columns}).items() if asked]
    if asked_of_images and images is None:
        raise ConfigError(f"Expected CaptionedImages for {asked_of_images[0]}, got only their latents.")
    rows, vision, readings = encoded.source_index.numpy(), None, list[Reading]()
    if config.words_model:
        from_main(lambda: ClipEncoder.load(config.words_model).name)  # an error in its name comes before the work
    given = columns_asked(images, rows, columns) if images is not None else []
    few = labels_asked(labels, encoded.names, encoded.unreadable)
    if images is not None and config.vision_encoder:
        folder = cache_dir / "vision"
        vision = from_main(lambda: encode_vision(config.vision_encoder, images, rows, folder, progress=progress))
    with FrozenDenoiser(pipe, upper=denoiser is None) as frozen:
        used, folder = denoiser or frozen, cache_dir / "evidence"
        evidence = collect_evidence(used, encoded, config, work_dir=folder, progress=progress)
        evidence = replace(evidence, vision=vision, contrast_only=denoiser is not None)
        prompt_of, spent = from_main(lambda: group_captions(used, encoded, config.caption_threshold, config.seed))

        def part() -> tuple[NDArray[Any], dict[int, str]]:
            sources, once = evidence.whitened(config.seed), distinct(encoded, encoded.caption_ids)
            return part_by_images(prompt_of, encoded, sources, config.min_images, once)

        parts, notes = from_main(part)
        if wanted and not config.words_model:
            options: dict[str, Any] = {"work_dir": cache_dir / "asked", "progress": progress}
            readings, read = read_by_model(pipe, used, encoded, parts, wanted, config, **options)
            spent += read
    measured = np.prod(evidence.losses.shape[1:]) + evidence.features.shape[1]
    settings = basis | {
        "model_fingerprint": encoded.model_fingerprint,
        "denoiser_fingerprint": used.fingerprint,
        "data_fingerprint": encoded.data_fingerprint,
        "resolution": encoded.resolution,
    }
    if loras := loras_of(pipe):
        settings["loras"] = dict(loras)
    if half := [name for name, of in DTYPES.items() if name != "fp32" and of == denoiser_of(pipe).dtype]:
        settings["dtype"] = half[0]

    def conclude() -> Audit:
        sources, of_image = evidence.whitened(config.seed), parts[encoded.caption_ids.numpy()]
        by_words, unlike = readings, distinct(encoded, of_image)
        look: dict[str, Any] = {"cache_dir": cache_dir / "words", "progress": progress}
        if wanted and images is not None and config.words_model:
            by_words = read_by_clip(ClipEncoder.load(config.words_model), images, rows, wanted, **look)

        def once_each(chosen: NDArray[Any]) -> NDArray[np.bool_]:
            """Of images `chosen` (n,), whether each is none of a copy, whatever their prompts."""
            together = np.full(len(encoded), -1)
            together[chosen] = 0
            return distinct(encoded, together)[chosen]

        def asked(judged: Mapping[int, NDArray[Any]]) -> Search:
            margins = Margins(sources, of_image).of_pairs() if few else np.zeros((len(of_image), 0))
            learned = []
            for name, of in few.items():
                once = distinct(encoded, np.where([bool(label) for label in of], of_image, -1))
                learned.append(spread_labels(name, of, sources, margins, of_image, once, config.level))
            search = given_factors([*given, *learned], judged, config)
            return asked_factors(search, by_words, encoded, unlike, config, judged)

        how = asked if given or few or by_words else None
        found = infer(encoded, evidence, parts, config, notes=notes, distinct=unlike, asked=how, progress=progress)
        if not evidence.contrast_only:
            own = evidence.sources(config.seed)
            own = own[: len(own) - (0 if vision is None else vision.shape[1])]  # all but a vision encoder's
            found = replace(found, judges=linear_judges(found, own, once_each))
        found = replace(found, settings=settings | found.settings, unreadable=dict(encoded.unreadable))
        found = replace(found, forwards_per_image=round(float(measured + spent), 3))
        if images is None or not config.words_model or not found.biased:
            return found
        words = describe_groups(found, images, rows, ClipEncoder.load(config.words_model), config, unlike, **look)
        return replace(found, words=words)

    return from_main(conclude)


def check_replaced(folder: Path, settings: dict[str, Any]) -> None:
    """Raise `ConfigError` where an audit in `folder` had others of these settings: its images, or its model."""
    with suppress(DataError, KeyError, TypeError):  # there is none, or it is damaged and may be replaced
        before = read_json(folder / "audit.json")["settings"]
        remedy = "That audit would be lost: choose another --output, or delete this one."
        check_same_settings(folder, {name: before[name] for name in settings if name in before}, settings, remedy)


def infer(
    data: EncodedImages,
    evidence: Evidence,
    prompt_of: NDArray[Any],
    config: AuditConfig,
    *,
    notes: Mapping[int, str] | None = None,
    distinct: NDArray[np.bool_] | None = None,
    asked: Callable[[Mapping[int, NDArray[Any]]], Search] | None = None,
    progress: bool = True,
) -> Audit:
    """The max phase: groups of N images from their evidence.

    `prompt_of` (captions,) and `notes` are as `part_by_images` finds them; `distinct` (N,) is false for images nearly
    the same as another. `asked` makes the factors that are asked for of the images of each prompt, indices (n,);
    without it, factors are sought.
    """
    caption_ids = data.caption_ids.numpy()
    members = {prompt: np.flatnonzero(prompt_of[caption_ids] == prompt) for prompt in np.unique(prompt_of).tolist()}
    members = dict(sorted(members.items(), key=lambda item: -len(item[1])))
    names = {prompt: _captions_of(data, rows)[0] for prompt, rows in members.items()}
    judged = {prompt: rows for prompt, rows in members.items() if not too_few(len(rows), config)}
    if asked:
        search = asked(judged)
    elif config.solver == "auto":
        distinct = np.ones(len(data), dtype=bool) if distinct is None else distinct
        search = find_factors(evidence, judged, names, distinct, config, progress=progress)
    else:
        search = force_factors(evidence, judged, config)

    # What captions state is not hidden: of each factor, the group that an image's caption states, or -1.
    stated = np.full((len(data), len(search.factors)), -1)
    words: dict[tuple[int, int], dict[str, int]] = {}  # by factor and prompt
    for m, cuts in enumerate(search.factors):
        group_of, usual = words_that_state_groups(data, {p: (members[p], cut.weights) for p, cut in cuts.items()})
        group_of |= search.words.get(m, {})
        for prompt, cut in cuts.items():
            named = set.intersection(*(set(words_in(text)) for text in _captions_of(data, members[prompt])))
            of_usual = dict.fromkeys(usual - named, int(cut.weights.sum(axis=0).argmax()))  # not the prompt's own name
            by_caption = np.array([stated_group(caption, group_of) for caption in data.captions])
            by_usual = np.array([stated_group(caption, of_usual) for caption in data.captions])
            stated[members[prompt], m] = np.where(by_caption < 0, by_usual, by_caption)[caption_ids[members[prompt]]]
            words[m, prompt] = of_usual | group_of

    prompt_ids, prompts = np.zeros(len(data), dtype=np.int64), list[PromptAudit]()
    sizes = [next(iter(cuts.values())).candidate.num_groups for cuts in search.factors] or [2]
    weights = [np.full((len(data), size), 1 / size) for size in sizes]
    scores = np.zeros((len(sizes), len(data)))
    splits: list[list[PromptSplit]] = [[] for _ in search.factors]
    for prompt, rows in members.items():
        told = {m: known_rows(cuts[prompt].weights) for m, cuts in enumerate(search.factors) if prompt in cuts}
        for key in sorted({tuple(row) for row in stated[rows].tolist()}):
            here = (stated[rows] == key).all(axis=1)
            own = rows[here]
            prompt_ids[own] = len(prompts)
            known = {m: of[here] for m, of in told.items() if key[m] < 0}
            splitting = [m for m in known if known[m].any()]
            for m in splitting:
                cut = search.factors[m][prompt]
                best = cut.candidate
                figures = (best.separation, best.agreement, best.rand_low, best.log_e)
                split = PromptSplit(len(prompts), best.evidence, best.shares, cut.intervals, *figures)
                whole = here.all() and cut.intervals
                splits[m].append(split if whole else split.with_shares_of(cut.weights[here]))
                score, labels = cut.score.mean, cut.weights[told[m]].argmax(axis=1)
                rare = labels == rarest(np.bincount(labels, minlength=cut.weights.shape[1]))
                sign = 1 if score[told[m]][rare].mean() >= score[told[m]].mean() else -1  # the rare group's are high
                scores[m, own], weights[m][own] = sign * score[here], cut.weights[here]
            captions = _captions_of(data, own)
            candidates, why = search.candidates.get(prompt, []), dict[str, list[str]]()
            for one in candidates if asked else ():
                why.setdefault(one.refusal, []).append(one.evidence)
            refused = [f"by {', '.join(of)}, {refusal}" for refusal, of in why.items() if refusal]
            unsplit = f"not split: {'; '.join(refused) or 'nothing is known of its images'}"
            if splitting:
                reason = "split by " + " and ".join(search.factors[m][prompt].candidate.evidence for m in splitting)
            elif max(key, default=-1) >= 0:
                stating = [(words[m, prompt], group) for m, group in enumerate(key) if group >= 0]
                here_said = set(words_in(" ".join(captions)))
                saying = {word for of, group in stating for word, k in of.items() if k == group and word in here_said}
                reason, candidates = f"its captions state the group (words: {', '.join(sorted(saying))})", []
            else:
                reason = unsplit if why else why_not(len(rows), candidates, config)
            said = [notes[prompt]] if notes and prompt in notes else []
            said += [unsplit] if splitting and refused else []
            for m in known if asked else ():
                if few := np.count_nonzero(~known[m]):
                    lacking = f"{few:,} of {len(own):,} images, which count in no share"
                    said.append(f"no group of {search.names[m]!r} is known of {lacking}")
            found, power = bool(splitting), search.power.get(prompt, "")
            prompts.append(PromptAudit(captions[0], captions, len(own), found, reason, power, said, candidates))
    factors: list[Factor] = []
    used = [m for m, of in enumerate(splits) if of]  # what captions state under every prompt is not hidden
    for m in used:
        name, values = (search.names[m], search.values[m]) if asked else (f"factor {len(factors) + 1}", [])
        factors.append(Factor(name, sorted(splits[m], key=lambda one: -prompts[one.prompt].num_images), values))
    settings = {"asked": search.record} if asked else {}
    final = tuple(weights[m].astype(np.float32) for m in used or [0])
    of_used = scores[used or [0]].astype(np.float32)
    return Audit(final, of_used, prompt_ids, prompts, factors, list(data.names), 0.0, settings)


def _captions_of(data: EncodedImages, rows: NDArray[Any]) -> list[str]:
    """The captions of images, the most frequent first."""
    ids, counts = np.unique(data.caption_ids.numpy()[rows], return_counts=True)
    return [data.captions[k] for k in ids[np.argsort(-counts, kind="stable")]]


def distinct(data: EncodedImages, prompt_of: torch.Tensor | NDArray[Any]) -> NDArray[np.bool_]:
    """Whether each image is the first of its prompt, `prompt_of` (N,), of those that are nearly the same, (N,).

    Images of prompt -1 are not compared, and count as such.
    """
    count, size, prompt_of = len(data), data.latents.shape[1:].numel(), torch.as_tensor(prompt_of)
    basis = torch.randn(size, 64, generator=generator("near-duplicates")) / size**0.5
    sketch = torch.cat([data.latents[rows].float().flatten(1) @ basis for rows in torch.arange(count).split(AT_ONCE)])
    near, first = ALMOST * (sketch - sketch.mean(dim=0)).norm(dim=1).median(), torch.ones(count, dtype=torch.bool)
    for prompt in prompt_of[prompt_of >= 0].unique():
        own = torch.nonzero(prompt_of == prompt)[:, 0]
        for rows in torch.arange(len(own)).split(AT_ONCE):
            same = torch.cdist(sketch[own[rows]], sketch[own[: rows[-1]]]) < near
            first[own[rows]] = ~same.tril(int(rows[0]) - 1).any(dim=1)  # of images before it
    return first.numpy()
