"""The search for hidden factors: which cuts are believed, which of several prompts are one factor, and what remains.

One factor is found at a time: of all cuts that are believed the one whose groups are likeliest right, with the cuts of
other prompts whose features shift alike. Its directions are then taken out of the features, and the next is sought.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.special import logsumexp
from scipy.stats import chi2, chi2_contingency
from sklearn.metrics import adjusted_rand_score

from ..config import AuditConfig
from ..progress import progress_bar
from ..seeds import derived_seed
from .decide import (
    Mixture,
    e_bh,
    fit_humps,
    fit_mixture,
    halves,
    log_e_value,
    num_modes,
    rand_low,
    share_intervals,
    smallest_share,
)
from .evidence import Evidence
from .result import Candidate
from .scores import Margins, Score, component_scores, contrasts, whitened_sources, without

MOST_TRIED = 16
"""Cuts of a prompt that are tested, those likeliest to be right; the others are refused, and count in the control."""
PERMUTATIONS = 200
"""Of images within a prompt, for the bound that the agreement of two prompts' shifts must pass."""
_Array = NDArray[Any]


@dataclass(frozen=True)
class Cut:
    """A candidate and its groups."""

    candidate: Candidate
    weights: _Array
    """W of the prompt's images, (n, E), columns rising with the score."""
    intervals: list[tuple[float, float]]
    """95% interval of each share."""
    score: Score


@dataclass(frozen=True)
class Found:
    """A hidden factor: its cut of each prompt that it splits, columns in one order."""

    cuts: dict[int, Cut]


@dataclass(frozen=True)
class Search:
    """The factors that were found, and what was weighed under each prompt."""

    factors: list[Found]
    candidates: dict[int, list[Candidate]]
    """Of each prompt, best first."""
    power: dict[int, str]


def find_factors(
    evidence: Evidence,
    members: Mapping[int, _Array],
    names: Mapping[int, str],
    distinct: NDArray[np.bool_],
    config: AuditConfig,
    *,
    progress: bool = True,
) -> Search:
    """The hidden factors of images, from what was measured of them.

    Args:
        evidence: Measurements of N images.
        members: For each prompt its images, indices into them, (n,).
        names: Of the prompts, for people.
        distinct: (N,), false for images that are nearly the same as another.
        config: Limits and the seed.
        progress: Show a progress bar.
    """
    judged = {prompt: rows for prompt, rows in members.items() if not too_few(len(rows), config)}
    sources = [source for source in whitened_sources(evidence, config) if source.shape[1]]
    prompt_of = np.full(len(distinct), -1)
    for prompt, rows in judged.items():
        prompt_of[rows] = prompt
    search = Search([], {prompt: [] for prompt in members}, {})
    taken: list[_Array] = []
    for number in range(config.max_factors):
        remaining = [without(source, taken, prompt_of) for source in sources]
        margins = Margins(remaining, prompt_of) if len(judged) > 1 and remaining else None
        cuts: dict[int, list[Cut]] = {}
        with progress_bar(f"weighing evidence of factor {number + 1}", len(judged), enabled=progress) as bar:
            for prompt, rows in judged.items():
                own = [weights[rows] for weights in taken]
                scores = margins.scores(prompt, dict(names)) if margins and not evidence.contrast_only else []
                if not evidence.contrast_only:
                    scores += component_scores(evidence, rows, config, own)
                if not taken:
                    scores += contrasts(evidence, rows, config)
                rng = np.random.default_rng(derived_seed("cuts", config.seed, number, prompt))
                cuts[prompt] = weigh(scores, distinct[rows], config, rng)
                bar.advance()
        tested = [(prompt, cut) for prompt, own in cuts.items() for cut in own if not cut.candidate.refusal]
        considered = sum(map(len, cuts.values()))
        log_e = [cut.candidate.log_e for _, cut in tested] + [-np.inf] * (considered - len(tested))
        believed = e_bh(log_e, config.level)[: len(tested)]
        needed = np.log(max(considered, 1) / config.level)
        accepted: dict[int, list[Cut]] = {prompt: [] for prompt in judged}
        for (prompt, cut), passes in zip(tested, believed, strict=True):
            if passes:
                accepted[prompt].append(cut)
            else:
                words = f"one hump is not ruled out (log e {cut.candidate.log_e:.1f}; about {needed:.1f} is needed)"
                _refuse(cuts[prompt], cut, words)
        shifts = _Shifts(remaining, judged)
        factor = None
        pairs = [(prompt, cut) for prompt, own in accepted.items() for cut in own]
        for prompt, cut in sorted(pairs, key=lambda pair: -pair[1].candidate.rand_low):
            gathered = shifts.gather(prompt, cut, accepted, config.seed)
            fault = _not_hidden_bias(prompt, gathered, shifts, judged, needed, config)
            if not fault:
                factor = Found(gathered)
                break
            _refuse(cuts[prompt], cut, fault)
        for prompt, own in cuts.items():
            if not taken:
                search.power[prompt] = power(len(judged[prompt]), considered, config)
            ordered = sorted(own, key=lambda cut: (bool(cut.candidate.refusal), -cut.candidate.log_e))
            known = {candidate.evidence for candidate in search.candidates[prompt]} if taken else set()
            search.candidates[prompt] += [c.candidate for c in ordered if c.candidate.evidence not in known]
        if factor is None:
            break
        search.factors.append(factor)
        weights = np.full((len(distinct), _size(factor)), 1 / _size(factor))
        for prompt, cut in factor.cuts.items():
            weights[judged[prompt]] = cut.weights
        taken.append(weights)
    return search


def _size(factor: Found) -> int:
    return next(iter(factor.cuts.values())).candidate.num_groups


def _refuse(cuts: list[Cut], cut: Cut, words: str) -> None:
    """Mark one of a prompt's cuts as refused."""
    place = next(index for index, one in enumerate(cuts) if one is cut)
    cuts[place] = replace(cut, candidate=replace(cut.candidate, refusal=words))


def too_few(num_images: int, config: AuditConfig) -> bool:
    """Whether a prompt has too few images to judge any split of them."""
    return num_images < max(config.min_images, 4)


def power(num_images: int, candidates: int, config: AuditConfig) -> str:
    """What size of minority could have been seen among a prompt's images, in words."""
    share = max(smallest_share(num_images, max(candidates, 1), config.level), config.min_share)
    if share >= 1:
        return f"{num_images} images are too few to see a group of any size 4 standard deviations away"
    return f"a group of {share:.1%} or more, 4 standard deviations away, would have been seen in {num_images} images"


def weigh(
    scores: Sequence[Score], distinct: NDArray[np.bool_], config: AuditConfig, rng: np.random.Generator
) -> list[Cut]:
    """Every cut of one prompt's images by a score, with what it is worth; those worth it with their e-values."""
    sizes = [config.num_groups] if config.num_groups else range(2, config.max_groups + 1)
    drafts = []
    for score in scores:
        values = score.mean
        for size in sizes if np.ptp(values) > 0 else ():
            mixture = fit_mixture(values, size)
            if size == 2 or num_modes(mixture) == size:  # else neighbours only describe the slope of one hump
                drafts.append((float(mixture.rand_index()), score, values, mixture))
    drafts.sort(key=lambda draft: -draft[0])
    rotations, tried, cuts = halves(len(distinct), rng, distinct), 0, []
    for worth, score, values, mixture in drafts:
        size = len(mixture.means)
        cut = Cut(Candidate(score.evidence, size, [], 0.0, 0.0, round(worth, 4), -np.inf, ""), np.empty(0), [], score)
        if worth < config.min_rand or tried == MOST_TRIED or mixture.shares.min() < config.min_share / 2:
            humps: Mixture | Humps = mixture
        else:
            humps = fit_humps(values, mixture) or mixture
        posterior = humps.posterior(values)
        shares, separation = posterior.mean(axis=0), mixture.separation
        lowest, log_e, refusal, agreement = worth, -np.inf, "", 0.0
        intervals = share_intervals(posterior, rng)
def _agreement(score: Score, num_groups: int) -> float:
    """The mean adjusted Rand index of the groups that the versions of a score give, each cut on its own."""
    labels = [fit_mixture(draw, num_groups, quick=True).posterior(draw).argmax(axis=1) for draw in score.draws]
    pairs = [adjusted_rand_score(a, b) for a, b in combinations(labels, 2)]
    return float(np.mean(pairs)) if pairs else 0.0


class _Shifts:
    """How the features of groups differ within prompts, to see which cuts of several prompts are one factor."""

    def __init__(self, sources: Sequence[_Array], members: Mapping[int, _Array]) -> None:
        self._sources, self._members = sources, members

    def features(self, prompt: int) -> _Array:
        """Features of a prompt's images less their mean, (n, d)."""
        rows = self._members[prompt]
        return np.concatenate([source[rows] - source[rows].mean(axis=0) for source in self._sources], axis=1)

    def of(self, features: _Array, weights: _Array) -> _Array:
        """Unit directions from the mean of all to each group's, (E, d)."""
        offsets = (weights.T @ features) / np.maximum(weights.sum(axis=0), 1e-9)[:, None]
        offsets = offsets - offsets.mean(axis=0)
        return offsets / np.maximum(np.linalg.norm(offsets, axis=1, keepdims=True), 1e-12)

    def gather(self, prompt: int, cut: Cut, accepted: Mapping[int, Sequence[Cut]], seed: int) -> dict[int, Cut]:
        """A cut, and for each other prompt the cut whose shifts agree best, its columns in the same order.

        The columns of the first, largest prompt are ordered by frequency.
        """
        order = np.argsort(-cut.weights.sum(axis=0), kind="stable")
        gathered = {prompt: _ordered(cut, order)}
        if not self._sources:
            return gathered
        reference = self.of(self.features(prompt), gathered[prompt].weights)
        for other, cuts in accepted.items():
            alike = [one for one in cuts if one.candidate.num_groups == cut.candidate.num_groups]
            if other == prompt or not alike:
                continue
            features, found = self.features(other), []
            rng = np.random.default_rng(derived_seed("shifts", seed, prompt, other))
            for one in alike:
                agreement, columns = _matched(reference, self.of(features, one.weights))
                shuffled = [
                    _matched(reference, self.of(features, rng.permutation(one.weights)))[0]
                    for _ in range(PERMUTATIONS if agreement > 0.1 else 0)
                ]
                if shuffled and agreement > max(shuffled):
                    found.append((one.candidate.rand_low, agreement, _ordered(one, columns)))
            if found:
                gathered[other] = max(found, key=lambda entry: entry[:2])[2]
        return gathered

    def share_away(self, prompt: int, cut: Cut, other: int) -> tuple[_Array, _Array]:
        """Log likelihoods of the share of a two-group cut's second group under another prompt, at shares from 0 to 1.

        Along the direction of the cut, of two Gaussians as far apart as the cut's, wherever they lie.
        """
        features = self.features(prompt)
        direction = np.diff(self.of(features, cut.weights), axis=0)[0]
        own, away = features @ direction, self.features(other) @ direction
        mass = cut.weights.sum(axis=0)
        means = cut.weights.T @ own / mass
        spread = np.sqrt((cut.weights * (own[:, None] - means) ** 2).sum() / mass.sum())
        shares = np.linspace(0.005, 0.995, 100)
        best = np.full(len(shares), -np.inf)
        for offset in np.linspace(away.min(), away.max(), 60):
            shifted = Mixture(means - means.mean() + offset, np.full(2, 0.5), np.array(spread))
            parts = shifted.log_parts(away)[:, None, :] + np.log(np.stack([1 - shares, shares], axis=1) / 0.5)
            best = np.maximum(best, logsumexp(parts, axis=2).sum(axis=0))
        return shares, best


def _matched(reference: _Array, offsets: _Array) -> tuple[float, _Array]:
    """Mean cosine of matched directions (E, d), and the order of the second's that matches the first's."""
    cosines = reference @ offsets.T
    order = linear_sum_assignment(-cosines)[1]
    return float(cosines[np.arange(len(order)), order].mean()), order


def _ordered(cut: Cut, order: _Array) -> Cut:
    """A cut with its columns in another order."""
    shares = [cut.candidate.shares[column] for column in order]
    intervals = [cut.intervals[column] for column in order]
    return Cut(replace(cut.candidate, shares=shares), cut.weights[:, order], intervals, cut.score)


def _not_hidden_bias(
    prompt: int,
    gathered: Mapping[int, Cut],
    shifts: _Shifts,
    judged: Mapping[int, _Array],
    needed: float,
    config: AuditConfig,
) -> str:
    """Why a cut that parts two humps is no bias of its prompt, in words; "" where it is one.

    A margin or contrast is made of what comes with the prompt. Of components the shares must differ between prompts;
    where there is one prompt only, they must be far from even.
    """
    cut = gathered[prompt]
    if cut.score.of_prompt:
        return ""
    shares = " / ".join(f"{share:.0%}" for share in cut.candidate.shares)
    if len(judged) == 1:
        uneven = min(cut.candidate.shares) * len(cut.candidate.shares) / 2 <= config.max_balance
        return "" if uneven else f"the groups are even ({shares}): a style, not a spurious attribute"
    if len(gathered) > 1:
        table = np.array(
            [np.bincount(one.weights.argmax(axis=1), minlength=len(cut.candidate.shares)) for one in gathered.values()]
        )
        p = float(chi2_contingency(table[:, table.any(axis=0)])[1]) if (table.any(axis=0)).sum() > 1 else 1.0
    elif len(cut.candidate.shares) == 2:
        ps = []
        for other in judged:
            if other != prompt:
                grid, likelihood = shifts.share_away(prompt, cut, other)
                here = likelihood[np.abs(grid - cut.candidate.shares[1]).argmin()]
                ps.append(float(chi2.sf(2 * (likelihood.max() - here), 1)))
        p = min(1.0, min(ps) * len(ps))
    else:
        p = 1.0
    if np.log(0.5) - 0.5 * np.log(max(p, 1e-300)) >= needed:  # the p-value as an e-value (Vovk and Wang 2021)
        return ""
    return f"uneven ({shares}), but not more under one prompt than another: not associated with the prompt"
