"""The search for hidden factors: which cuts are believed, which of several prompts are one factor, and what remains.

One factor is found at a time: of all cuts that are believed the one whose groups are likeliest right, of those as
likely the clearest, with the cuts of other prompts whose features shift alike. Its directions are then taken out of
the features, and the next is sought.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.stats import chi2_contingency
from sklearn.metrics import roc_auc_score
from threadpoolctl import threadpool_limits

from ..config import AuditConfig
from ..progress import progress_bar
from ..seeds import derived_seed
from ..text import e_value
from .cuts import LEAST_DIFFERENCE, Cut, is_mixed, weigh
from .decide import MOST_JUDGED, e_bh, power
from .evidence import Evidence
from .result import Candidate
from .scores import Margins, Score, component_scores, contrasts, parts_of, without

NEARLY = 0.8  # of the largest agreement of two prompts' shifts: cuts that reach it may be of one attribute
TELLS = 0.8  # least AUROC of a group's images along its shift under another prompt, where the two are one factor
PERMUTATIONS = 100  # of images within a prompt, for the bound that the agreement of two prompts' shifts must pass
_Array = NDArray[Any]


@dataclass(frozen=True)
class Search:
    """What was found, and what was weighed under each prompt; and of factors that were asked for, what was asked."""

    factors: list[dict[int, Cut]]  # of each hidden factor, its cut of each prompt that it splits, columns in one order
    candidates: dict[int, list[Candidate]]  # of each prompt, best first
    power: dict[int, str] = field(default_factory=dict)  # the minority that each prompt could have shown, in words
    names: list[str] = field(default_factory=list)  # of the factors that were asked for; none where they were sought
    values: list[list[str]] = field(default_factory=list)  # names of the groups of each
    record: dict[str, Any] = field(default_factory=dict)  # what was asked for, as `Audit.settings["asked"]` keeps it
    words: dict[int, dict[str, int]] = field(default_factory=dict)  # of captions, that state a group of a factor


@threadpool_limits.wrap(limits=1, user_api="blas")  # of small matrices, which several threads slow down
def find_factors(
    evidence: Evidence,
    judged: Mapping[int, _Array],
    names: Mapping[int, str],
    distinct: NDArray[np.bool_],
    config: AuditConfig,
    *,
    progress: bool = True,
) -> Search:
    """The hidden factors of N images, from what was measured of them.

    `judged` has the images of each prompt that has enough, indices (n,); `names` are the prompts' for people;
    `distinct` (N,) is false for images that are nearly the same as another.
    """
    prompt_of = np.full(len(distinct), -1)
    for prompt, rows in judged.items():
        prompt_of[rows] = prompt
    search = Search([], {})
    taken: list[_Array] = []
    most = config.max_factors or (4 if len(judged) > 1 else 1)
    for number in range(most if judged else 0):
        remaining = [without(source, taken, prompt_of) for source in evidence.whitened(config.seed)]
        margins = Margins(remaining, prompt_of) if len(judged) > 1 and remaining else None
        cuts: dict[int, list[Cut]] = {}
        with progress_bar(f"weighing evidence of factor {number + 1}", len(judged), enabled=progress) as bar:
            for prompt, rows in judged.items():
                scores = list[Score]()
                if not evidence.contrast_only:
                    scores += margins.scores(prompt, names) if margins else []
                    scores += component_scores(evidence, rows, config, [weights[rows] for weights in taken])
                if not any(prompt in factor for factor in search.factors):  # a factor cannot be taken out of them
                    scores += contrasts(evidence, rows, config)
                rng = np.random.default_rng(derived_seed("cuts", config.seed, number, prompt))
                cuts[prompt] = weigh(scores, distinct[rows], config, rng)
                bar.advance()
        considered = [(prompt, cut) for prompt, own in cuts.items() for cut in own]
        log_e = [-np.inf if cut.candidate.refusal else cut.candidate.log_e for _, cut in considered]
        needed, enough = np.log(max(len(considered), 1) / config.level), np.log(len(judged) / config.level)
        accepted: dict[int, list[Cut]] = {prompt: [] for prompt in judged}
        for (prompt, cut), passes in zip(considered, e_bh(log_e, config.level), strict=True):
            if passes:
                accepted[prompt].append(cut)
            elif not cut.candidate.refusal:
                found = f"e-value {e_value(cut.candidate.log_e)}; about {e_value(needed)} is needed"
                _refuse(cuts[prompt], cut, f"one hump is not ruled out ({found})")
        shifts = Shifts(remaining, judged)
        for prompt, passing in accepted.items():
            rng = np.random.default_rng(derived_seed("parts", config.seed, number, prompt))
            features, unlike = shifts.features[prompt], distinct[judged[prompt]]
            for cut in [one for one in cuts[prompt] if one.score.is_margin and one.weights.size]:
                if is_mixed(cut, features, unlike, enough, rng):
                    passing[:] = [one for one in passing if one is not cut]
                    _refuse(cuts[prompt], cut, "its rare group is of two kinds: it mixes two attributes")
                    parts = weigh(parts_of(cut.score, features), unlike, config, rng)
                    cuts[prompt] += parts
                    passing += [one for one in parts if not one.candidate.refusal and one.candidate.log_e >= needed]
        factor, rivals = None, {prompt: [one for one in own if one.weights.size] for prompt, own in cuts.items()}
        pairs = [(prompt, cut) for prompt, own in accepted.items() for cut in own]
        for prompt, cut in sorted(pairs, key=lambda pair: _clarity(pair[1]), reverse=True):
            gathered = shifts.gather(prompt, cut, rivals[prompt], accepted, config.seed)
            for other in (missing := sorted(judged.keys() - gathered.keys())):
                rng = np.random.default_rng(derived_seed("transfer", config.seed, number, prompt, other))
                new = weigh([shifts.transferred(prompt, cut, other, names)], distinct[judged[other]], config, rng)
                accepted[other] += [one for one in new if not one.candidate.refusal and one.candidate.log_e >= enough]
                rivals[other] += [one for one in new if one.weights.size]
            if missing:
                gathered = shifts.gather(prompt, cut, rivals[prompt], accepted, config.seed)
            counted = {p: distinct[judged[p]] for p in gathered}
            fault = no_bias(gathered[prompt], gathered, counted, len(judged), needed, config)
            if not fault:
                factor = gathered
                break
            _refuse(cuts[prompt], cut, fault)
            accepted[prompt].remove(cut)
        for prompt, weighed in cuts.items() if not taken else ():
            search.power[prompt] = power(int(distinct[judged[prompt]].sum()), len(considered), config)
            ordered = sorted(weighed, key=lambda cut: (bool(cut.candidate.refusal), -cut.candidate.log_e))
            search.candidates[prompt] = [cut.candidate for cut in ordered]
        if factor is None:
            break
        size = next(iter(factor.values())).candidate.num_groups
        taken.append(np.full((len(distinct), size), 1 / size))
        for prompt, cut in factor.items():
            taken[-1][judged[prompt]] = cut.weights
            told = search.candidates[prompt]
            known = any(not one.refusal and one.evidence == cut.candidate.evidence for one in told)
            told[:0] = [] if known else [cut.candidate]  # of a later round, or sought along another prompt's shift
        search.factors.append(factor)
    return search


def _clarity(cut: Cut) -> tuple[float, float]:
    """The order in which cuts are tried: the likeliest right, and of those alike in that the clearest of two humps."""
    return round(cut.candidate.rand_low, 1), cut.candidate.log_e


def _refuse(cuts: list[Cut], cut: Cut, words: str) -> None:
    cuts[cuts.index(cut)] = replace(cut, candidate=replace(cut.candidate, refusal=words))


class Shifts:
    """How the features of groups differ within prompts, to see which cuts of several prompts are one factor."""

    def __init__(self, sources: Sequence[_Array], members: Mapping[int, _Array]) -> None:
        self._members, self._ends = members, np.cumsum([source.shape[1] for source in sources])[:-1]
        parts = {prompt: [np.zeros((len(rows), 0), dtype=np.float32)] for prompt, rows in members.items()}
        for source in sources:
            within = np.concatenate([source[rows] - source[rows].mean(axis=0) for rows in members.values()])
            # Attributes that come with the prompt are correlated over all images, not within prompts.
            sizes, directions = np.linalg.eigh(np.cov(within, rowvar=False).reshape(within.shape[1], -1))
            directions = (directions / np.sqrt(sizes.clip(1e-3 * sizes.max()))).astype(np.float32)
            for prompt, rows in members.items():
                white = source[rows] @ directions
                parts[prompt].append(white - white.mean(axis=0))
        self.features = {prompt: np.concatenate(of, axis=1) for prompt, of in parts.items()}
        """Of each prompt, features (n, d) of its images less their mean, white within prompts."""

    def of(self, features: _Array, weights: _Array) -> _Array:
        """Unit directions from the mean of all to each group's, (..., E, d), of weights (..., n, E)."""
        sums = np.tensordot(weights.astype(features.dtype), features, axes=(-2, 0))
        offsets = sums / np.maximum(weights.sum(axis=-2), 1e-9)[..., None]
        offsets = offsets - offsets.mean(axis=-2, keepdims=True)
        return offsets / np.maximum(np.linalg.norm(offsets, axis=-1, keepdims=True), 1e-12)

    def gather(
        self, prompt: int, cut: Cut, rivals: Sequence[Cut], others: Mapping[int, Sequence[Cut]], seed: int
    ) -> dict[int, Cut]:
        """A cut, and for each other prompt the cut whose shifts agree with its own, columns in the same order.

        Agreement is the mean cosine of matched groups' shifts; it must pass that of every shuffling of the images (at
        most `MOST_JUDGED`) within the prompt, and the shifts of either must tell the groups of the other (AUROC of at
        least `TELLS`). It must nearly be the largest that the other's cut has with any of the prompt's, `rivals`: a
        cut of half of the images that look left would else be one with the cut of those that look left. A prompt whose
        cuts do not pass is left out. The largest prompt comes first, its columns ordered by frequency.
        """
        gathered, own = {prompt: cut}, self.features[prompt]
        reference, shifts = self.of(own, cut.weights), [self.of(own, one.weights) for one in rivals]

        def is_one(other: int, agreement: float, columns: _Array, match: Cut) -> bool:
            features = self.features[other]
            back = self.of(features, match.weights)
            most = max((_matched(one, back)[0] for one in shifts if len(one) == len(back)), default=0.0)
            if agreement < NEARLY * most or not self._tells(prompt, cut, other, match, columns):
                return False
            rng = np.random.default_rng(derived_seed("shifts", seed, prompt, other))
            some = np.linspace(0, len(features) - 1, min(len(features), MOST_JUDGED)).astype(int)
            orders = [rng.permutation(match.weights[some]) for _ in range(PERMUTATIONS)]
            shuffled = self.of(features[some], np.stack(orders))
            return agreement > max(_matched(reference, one)[0] for one in shuffled)

        for other, cuts in others.items():
            alike = [one for one in cuts if one.candidate.num_groups == cut.candidate.num_groups]
            if other == prompt or not alike:
                continue
            matches = [(*_matched(reference, self.of(self.features[other], one.weights)), one) for one in alike]
            most = max(agreement for agreement, *_ in matches)
            near = [match for match in matches if match[0] >= NEARLY * most]
            for agreement, columns, match in sorted(near, key=lambda match: _clarity(match[2]), reverse=True):
                if is_one(other, agreement, columns, match):
                    gathered[other] = _ordered(match, columns)
                    break
        ranked = sorted(gathered, key=lambda one: -len(self._members[one]))
        order = np.argsort(-gathered[ranked[0]].weights.sum(axis=0), kind="stable")
        return {one: _ordered(gathered[one], order) for one in ranked}

    def transferred(self, prompt: int, cut: Cut, other: int, names: Mapping[int, str]) -> Score:
        """The images of another prompt along the shift of a cut's rarest group: nothing of it is learned from them."""
        shift = self.of(self.features[prompt], cut.weights)[cut.weights.sum(axis=0).argmin()]
        parts = zip(np.split(self.features[other], self._ends, axis=1), np.split(shift, self._ends), strict=True)
        draws = np.stack([features @ part for features, part in parts])  # along each source's part of the shift
        values = draws.sum(axis=0)
        name = f"shift of {cut.score.evidence} of {names[prompt]!r}"
        return Score(name, draws, lambda known: [values], of_prompt=cut.score.of_prompt)

    def _tells(self, prompt: int, cut: Cut, other: int, match: Cut, columns: _Array) -> bool:
        """Whether each group's shift under one prompt ranks the images of that group first under the other."""
        one = self.features[prompt], cut.weights
        two = self.features[other], match.weights[:, columns]
        return all(
            roc_auc_score(weights.argmax(axis=1) == group, features @ shift) >= TELLS
            for (features, weights), shifts in ((one, self.of(*two)), (two, self.of(*one)))
            for group, shift in enumerate(shifts)
            if 0 < (weights.argmax(axis=1) == group).sum() < len(weights)
        )


def _matched(reference: _Array, offsets: _Array) -> tuple[float, _Array]:
    """Mean cosine of matched directions (E, d), and the order of the second's that matches the first's."""
    cosines = reference @ offsets.T
    order = linear_sum_assignment(-cosines)[1]
    return float(cosines[np.arange(len(order)), order].mean()), order


def _ordered(cut: Cut, order: _Array) -> Cut:
    shares = [cut.candidate.shares[column] for column in order]
    intervals = [cut.intervals[column] for column in order] if cut.intervals else []
    return Cut(replace(cut.candidate, shares=shares), cut.score, cut.weights[:, order], intervals)


def no_bias(
    cut: Cut,
    gathered: Mapping[int, Cut],
    counted: Mapping[int, NDArray[np.bool_]],
    num_judged: int,
    needed: float,
    config: AuditConfig,
) -> str:
    """Why a cut that parts two humps is no bias of its prompt, in words; "" where it is one.

    A margin or contrast is made of what comes with the prompt. A component must part the images of several prompts, in
    shares that differ; where there is one prompt only, in shares far from even.
    """
    if cut.score.of_prompt:
        return ""
    own = cut.candidate.shares
    uneven = min(own) * len(own) / 2 <= config.max_balance
    p_value = 1.0
    if len(gathered) > 1:
        groups = [one.weights[counted[prompt]].argmax(axis=1) for prompt, one in gathered.items()]
        table = np.array([np.bincount(of_prompt, minlength=len(own)) for of_prompt in groups])
        shares = table / table.sum(axis=1, keepdims=True)
        if np.ptp(shares, axis=0).max() >= LEAST_DIFFERENCE:
            p_value = float(chi2_contingency(table[:, table.any(axis=0)])[1])
    associated = np.log(0.5) - 0.5 * np.log(max(p_value, 1e-300)) >= needed  # as an e-value (Vovk and Wang 2021)
    if associated or (uneven and num_judged == 1):
        return ""
    kind, said = "uneven" if uneven else "even", " / ".join(f"{share:.0%}" for share in own)
    unseen = ", not seen to differ between prompts" if num_judged > 1 else ""
    return f"the groups are {kind} ({said}){unseen}: a style"
