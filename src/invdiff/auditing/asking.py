"""Attributes that a user asks for in words: how much each image looks like each of a few values, and the groups.

A CLIP model reads a value by the cosine of image and words. Without one the audited model is its own reader, as a
classifier (Li et al., ICCV 2023): by its denoising loss under the caption with the value put in, at the same noise for
all values.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, compress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.preprocessing import normalize

from ..assets import COMMON_QUESTIONS
from ..config import AuditConfig
from ..data.captioned import CaptionedImages
from ..data.encode import EncodedImages, encode_captions
from ..errors import ConfigError
from ..models.encoders import ClipEncoder
from ..models.frozen import Denoiser
from ..models.load import public_name
from ..progress import note
from ..seeds import derived_seed, generator
from ..text import e_value
from .captions import stated_group
from .cuts import Cut, too_few, weigh
from .decide import e_bh, share_intervals
from .evidence import cached_features, in_shards, paired_losses
from .factors import Search
from .result import NOT_TESTED, WORD_LIMIT, Candidate
from .scores import not_learned
from .words import embedded

TEMPLATE = "{}, {}"  # how a value is put into a caption
LEVELS, DRAWS = (1.0, -0.5, -2.0, -3.5, -5.0), 2
"""Log signal-to-noise ratios at which the audited model reads, and noises at each."""
MOST_AT_ONCE, FIRST = 8, 300
"""More attributes than these are first read in so many images of each prompt, and in all only where uneven."""
REST = "other"  # the group of images that show none of the values that are told apart
_Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Reading:
    """How much N images look like each value of one attribute, in a reader's opinion."""

    name: str
    values: tuple[str, ...]
    scores: _Array  # (draws, N, V): by independent noises, less the mean of all values; none of a few images


def questions(asked: Mapping[str, Sequence[str]] | Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Attributes and values, of a mapping or a line or lines like "place: forest, sea"; "common" is a bundled list.

    `ConfigError` where a line is no question, or an attribute is asked for twice.
    """
    common = [line for line in COMMON_QUESTIONS.read_text(encoding="utf-8").splitlines() if line[:1] != "#"]
    asked = [asked] if isinstance(asked, str) else asked
    lines = chain.from_iterable(common if line.strip() == "common" else [line] for line in asked)
    pairs = asked.items() if isinstance(asked, Mapping) else [line.partition(":")[::2] for line in lines]
    found: dict[str, tuple[str, ...]] = {}
    for name, of in ((name.strip(), of) for name, of in pairs):
        values = [str(value).strip() for value in (of.split(",") if isinstance(of, str) else of)]
        fit = name not in found and len({value.lower() for value in values}) == len(values) > 1
        if not fit or not all(0 < len(one) <= WORD_LIMIT for one in (name, *values)):
            raise ConfigError(
                "Expected attributes to ask for such as 'place: forest, sea, city', each once, with at least two "
                f"different values of 1 to {WORD_LIMIT} characters, got {name!r} with {of!r}."
            )
        found[name] = tuple(values)
    return found


def read_by_clip(
    encoder: ClipEncoder,
    data: CaptionedImages,
    rows: _Array,
    asked: Mapping[str, tuple[str, ...]],
    *,
    cache_dir: Path,
    progress: bool = True,
) -> list[Reading]:
    """A CLIP model's reading of images `rows` (N,) of `data`, from features that are kept in `cache_dir`."""
    features = cached_features(cache_dir, encoder.features_digest(), data, rows, encoder.extract, progress)
    cosines = [normalize(features.astype(np.float64)) @ embedded(encoder, values).T for values in asked.values()]
    scores = [(own - own.mean(axis=1, keepdims=True))[None] for own in cosines]
    return [Reading(*question, own) for question, own in zip(asked.items(), scores, strict=True)]


def read_by_model(
    pipe: Any,
    denoiser: Denoiser,
    data: EncodedImages,
    prompt_of: _Array,
    asked: Mapping[str, tuple[str, ...]],
    config: AuditConfig,
    *,
    work_dir: Path,
    progress: bool = True,
) -> tuple[list[Reading], float]:
    """The audited model's own reading, kept in shards in `work_dir`, and the forwards that it took per image.

    Of more than `MOST_AT_ONCE` attributes, the first `FIRST` images of each prompt are read first; the others only
    where under some prompt at most `config.max_balance` of these, for two values, look most like one of the values.
    `prompt_of` (captions,) is the prompt of each caption; a prompt's images are all read under one of its captions, as
    their losses differ by wording too.
    """
    prompts, every = prompt_of[data.caption_ids.numpy()], np.arange(len(data))
    some = np.sort(np.concatenate([np.flatnonzero(prompts == prompt)[:FIRST] for prompt in np.unique(prompts)]))
    stages = [some, every] if len(asked) > MOST_AT_ONCE and len(some) < len(every) else [every]
    each, count = len(LEVELS) * DRAWS * sum(map(len, asked.values())), len(stages[0])
    more = f"; {len(every):,} images where they look uneven" if len(stages) > 1 else ""
    what = f"{len(asked)} attribute{'s' * (len(asked) > 1)} in words"
    note(f"Reading {what} takes {each * count:,} forwards, {each} for each of {count:,} images{more}.")

    def measure(values: Sequence[str], captions: Mapping[int, str], batch: torch.Tensor) -> dict[str, torch.Tensor]:
        different, place = np.unique(prompts[batch], return_inverse=True)
        texts = ([TEMPLATE.format(captions[prompt], value) for prompt in different.tolist()] for value in values)
        conditions = [{key: of[place] for key, of in encode_captions(pipe, own).items()} for own in texts]
        rng = generator("ask", config.seed, int(batch[0]))
        return {"losses": paired_losses(denoiser, data.latents[batch], conditions, LEVELS, DRAWS, rng)}

    readings, spent = list[Reading](), 0
    for name, values in asked.items():
        captions = _usual_captions(data, prompt_of, values)
        for rows in stages:
            label, read, asked_rows = f"reading {name}", partial(measure, values, captions), torch.from_numpy(rows)
            settings = repr((TEMPLATE, values, captions, LEVELS, DRAWS, config.batch_size, config.seed))
            made_of = (settings, prompts.tobytes(), rows.tobytes())
            parts = in_shards(work_dir, made_of, label, read, denoiser, data, asked_rows, config, progress=progress)
            scores = _likelier(torch.cat([part["losses"] for part in parts]).double().numpy())
            spent += len(rows) * len(LEVELS) * DRAWS * len(values)
            if len(rows) < len(data):
                most = np.eye(len(values))[scores.mean(axis=0).argmax(axis=1)]
                shares = [most[prompts[rows] == prompt].mean(axis=0) for prompt in np.unique(prompts)]
                if np.min(shares) * len(values) / 2 > config.max_balance:
                    scores = scores[:0]
                    break
        readings.append(Reading(name, values, scores))
    return readings, spent / len(data)


def _usual_captions(data: EncodedImages, prompt_of: _Array, values: Sequence[str]) -> dict[int, str]:
    """Of each prompt, of those captions that state no value the most frequent, or the shortest of several."""
    words = {value.lower(): place for place, value in enumerate(values)}
    counts = np.bincount(data.caption_ids.numpy(), minlength=len(prompt_of))

    def fitness(caption: int) -> tuple[bool, int, int]:
        text = data.captions[caption]
        return stated_group(text, words) < 0, int(counts[caption]), -len(text)

    return {int(prompt_of[k]): data.captions[k] for k in sorted(range(len(prompt_of)), key=fitness)}  # fittest last


def _likelier(losses: _Array) -> _Array:
    """Scores (draws, n, V) of losses (n, levels, draws, V)."""
    # Each level counts by its signal over the variance of its noise, as the correlation of its draws tells them.
    less = losses.mean(axis=3, keepdims=True) - losses
    centred = less - less.mean(axis=(0, 2), keepdims=True)
    size = np.maximum(centred.std(axis=(0, 2, 3)), 1e-12)
    pairs = (centred.sum(axis=2) ** 2).mean(axis=(0, 2)) / (DRAWS * size**2) - 1
    agreement = (pairs / (DRAWS - 1)).clip(0.01, 0.99)
    return np.einsum("nldv,l->dnv", less, np.sqrt(agreement) / (1 - agreement) / size)


def asked_factors(
    search: Search,
    readings: Sequence[Reading],
    data: EncodedImages,
    distinct: NDArray[np.bool_],
    config: AuditConfig,
    judged: Mapping[int, _Array],
) -> Search:
    """A search with a factor, after those it has, for each attribute of which a value is told apart under a prompt.

    Of two values there is one score; of more, one for each against the mean of all, cut as other evidence is (see
    decide.py). Images whose captions state a value are set apart, and groups that are even under every prompt are
    refused. `distinct` (N,) is false for images that are nearly the same as another; `judged` has each prompt's.
    """
    reader, two = public_name(config.words_model) or "the audited model", replace(config, num_groups=2)
    for reading in readings:
        values, weighed = reading.values, dict[tuple[int, int], Cut]()  # by prompt and value
        search.record.setdefault("ask", {})[reading.name] = {"values": list(values), "reader": reader}
        both = " and ".join(map(repr, values))
        words = {value.lower(): place for place, value in enumerate(values)}
        stated = np.array([stated_group(caption, words) for caption in data.captions])[data.caption_ids]
        silent_of = {prompt: rows[stated[rows] < 0] for prompt, rows in judged.items()}
        for prompt, silent in silent_of.items() if len(reading.scores) else ():
            for value in () if too_few(len(silent), config) else range(len(values) == 2, len(values)):
                evidence = both if len(values) == 2 else repr(values[value])
                score = not_learned(evidence, reading.scores[:, silent, value])
                rng = np.random.default_rng(derived_seed("asked", config.seed, reading.name, value, prompt))
                for cut in weigh([score], distinct[silent], two, rng):
                    weighed[prompt, value] = cut
        log_e = [-np.inf if cut.candidate.refusal else cut.candidate.log_e for cut in weighed.values()]
        told: dict[int, dict[int, Cut]] = {}
        for (prompt, value), cut in compress(weighed.items(), e_bh(log_e, config.level / len(readings))):
            told.setdefault(prompt, {})[value] = cut
        if len(values) > 2:
            looks = {prompt: reading.scores.mean(axis=0)[silent_of[prompt]] for prompt in told}
            kept = {prompt: _contested(of, looks[prompt], config.min_share) for prompt, of in told.items()}
            told = {prompt: of for prompt, of in kept.items() if of}
        columns = sorted({value for of in told.values() for value in of}) if len(values) > 2 else [0, 1]
        names = [values[column] for column in columns]
        factor = {prompt: next(iter(of.values())) for prompt, of in told.items()}
        if len(values) > 2:
            weights = {prompt: _joined(of, columns, looks[prompt], config.min_share) for prompt, of in told.items()}
            # Images are left over, or captions state a value that is told apart nowhere.
            if any(of[:, -1].any() for of in weights.values()) or not set(stated) <= {-1, *columns}:
                names.append(REST if REST not in words else f"{REST} than these")
            factor = {prompt: _cut(told[prompt], of[:, : len(names)]) for prompt, of in weights.items()}
        uneven = False
        for cut in factor.values():
            shares = [of for k, of in enumerate(cut.candidate.shares) if of or k < len(columns)]
            uneven |= min(shares) * len(shares) / 2 <= config.max_balance
        for prompt, rows in judged.items():
            own = [cut.candidate for (at, _), cut in weighed.items() if at == prompt]
            if prompt in factor:
                best = replace(factor[prompt].candidate, refusal="" if uneven else "the groups are even")
            elif own:
                best = max(own, key=lambda one: one.log_e)
                refusal = best.refusal or f"one hump is not ruled out (e-value {e_value(best.log_e)})"
                look = np.bincount(reading.scores.mean(axis=0)[rows].argmax(axis=1)) / len(rows)
                usual = f"nearly all look more like {values[look.argmax()]!r}"
                best = replace(best, refusal=usual if look.max() > 1 - config.min_share else refusal)
            else:
                few = "of which its captions state one, or too few do not"
                refusal = few if len(reading.scores) else f"which look even in the first {FIRST} images"
                best = Candidate(both, len(values), [], 0.0, 0.0, 0.0, NOT_TESTED, refusal)
            search.candidates[prompt].append(best)
        if uneven:
            column_of = np.array([columns.index(v) if v in columns else len(names) - 1 for v in range(len(values))])
            search.words[len(search.factors)] = {word: int(column_of[place]) for word, place in words.items()}
            groups = np.where(stated < 0, -1, column_of[stated])
            search.factors.append({prompt: _whole(cut, groups[judged[prompt]]) for prompt, cut in factor.items()})
            search.names.append(reading.name)
            search.values.append(names)
    return search


def _contested(told: Mapping[int, Cut], looks: _Array, least: float) -> dict[int, Cut]:
    """The cuts by each value, where an image (n,) that several claim is of the one that it looks most like.

    A value that has less than a share `least` left claims none: `looks` (n, V) is how much images look like each.
    """
    claims = np.stack([cut.weights[:, 1] for cut in told.values()], axis=1)
    most = np.where(claims > 0.5, looks[:, list(told)], -np.inf).argmax(axis=1)
    several = (claims > 0.5).sum(axis=1) > 1
    claims[several] *= np.eye(len(told))[most[several]]
    kept = {value: np.stack([1 - of, of], axis=1) for value, of in zip(told, claims.T, strict=True)}
    return {value: replace(told[value], weights=of) for value, of in kept.items() if of[:, 1].mean() >= least}


def _joined(told: Mapping[int, Cut], columns: Sequence[int], looks: _Array, least: float) -> _Array:
    """W (n, columns and the rest) of one prompt, of how much its images look like each value, `looks` (n, V).

    What no value claims is of the likeliest of the other values where that has a column, as under another prompt, else
    of the rest, if that is a share `least` at all.
    """
    weights = np.zeros((len(looks), len(columns) + 1))
    weights[:, [columns.index(value) for value in told]] = np.transpose([cut.weights[:, 1] for cut in told.values()])
    column_of = np.array([columns.index(value) if value in columns else -1 for value in range(looks.shape[1])])
    others = np.setdiff1d(np.arange(looks.shape[1]), list(told))
    likeliest = column_of[others[looks[:, others].argmax(axis=1)]] if len(others) else np.full(len(looks), -1)
    weights[np.arange(len(looks)), likeliest] += (1 - weights.sum(axis=1)).clip(0)
    if (weights / weights.sum(axis=1, keepdims=True))[:, -1].mean() < least:
        weights[:, -1] = 0
        weights[:, [columns.index(value) for value in told]] += 1e-9  # of an image that none claims, any
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


def _cut(told: Mapping[int, Cut], weights: _Array) -> Cut:
    """The groups of one prompt by several values, from the cut by each."""
    weakest = min(told.values(), key=lambda cut: cut.candidate.rand_low)
    evidence, shares = " and ".join(cut.candidate.evidence for cut in told.values()), weights.mean(axis=0).round(4)
    candidate = replace(weakest.candidate, evidence=evidence, num_groups=len(shares), shares=shares.tolist())
    score = not_learned(evidence, (weights @ np.arange(len(shares)))[None])
    return Cut(candidate, score, weights, share_intervals(weights))


def _whole(cut: Cut, stated: _Array) -> Cut:
    """A cut of those of a prompt's images of which no group is stated, of all: `stated` (n,) is the group, or -1."""
    own, weights = stated < 0, np.eye(cut.weights.shape[1])[stated.clip(0)]
    draws = np.repeat(np.median(cut.score.draws, axis=1, keepdims=True), len(own), axis=1)
    weights[own], draws[:, own] = cut.weights, cut.score.draws
    return replace(cut, score=replace(cut.score, draws=draws), weights=weights)
