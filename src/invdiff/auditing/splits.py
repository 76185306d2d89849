"""The max phase of the game as the paper has it: from one score per image to W, by the dispersion of group losses.

Of the group losses L_e = sum_i W_ie s_i / sum_i W_ie, with s a per-image loss, a contrast of losses, or any other
evidence of one dimension (Hou et al., KDD 2025). Images are split whether anything is hidden or not; the solver `auto`
is in factors.py.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import adjusted_rand_score

from ..config import AuditConfig
from ..errors import AuditError
from .asked import Asked
from .cuts import Cut, too_few
from .decide import fit_mixture
from .evidence import Evidence
from .factors import Search, Shifts
from .result import NOT_TESTED, Candidate
from .scores import Score, contrasts, not_learned

LEAST_IMAGES = 4  # images of a prompt that a value must have to be a group there, where it is asked for


def exact_groups(scores: NDArray[Any], num_groups: int, *, min_share: float = 0.0) -> NDArray[Any]:
    """The partition of scores (N,) of largest dispersion, as labels (N,) that rise with the score.

    Optimal groups are intervals of the sorted scores (Fisher 1958), found by dynamic programming with divide and
    conquer over cut points, O(E N log N). No group has less than `min_share` of the images.
    """
    count = len(scores)
    least = max(1, math.ceil(min_share * count))
    if (needed := least * num_groups) > count:
        raise AuditError(f"Expected at least {needed} images for {num_groups} groups, got {count}. Ask for fewer.")
    order = np.argsort(scores, kind="stable")
    ordered = scores[order].astype(np.float64)
    sums = np.concatenate([[0.0], np.cumsum(ordered - ordered.mean())])
    # best[j]: largest gain of splitting the first j scores into the groups so far. A group's gain is its part of the
    # between-group variance, times N: (sum of its scores)^2 / its size.
    best = np.where(np.arange(count + 1) == 0, 0.0, -np.inf)
    cuts = np.zeros((num_groups, count + 1), dtype=np.int64)
    for group, cut in enumerate(cuts):
        previous, best = best, np.full(count + 1, -np.inf)
        # Each task: stops low..high - 1, whose best cut lies in first..last.
        tasks = [((group + 1) * least, count + 1, group * least, count - least)]
        while tasks:
            low, high, first, last = tasks.pop()
            if low >= high:
                continue
            stop = (low + high) // 2
            starts = np.arange(first, min(last, stop - least) + 1)
            totals = previous[starts] + (sums[stop] - sums[starts]) ** 2 / (stop - starts)
            chosen = int(totals.argmax())
            best[stop], cut[stop] = totals[chosen], starts[chosen]
            tasks += [(low, stop, first, int(starts[chosen])), (stop + 1, high, int(starts[chosen]), last)]
    labels, stop = np.empty(count, dtype=np.int64), count
    for group in reversed(range(num_groups)):
        start = cuts[group, stop]
        labels[order[start:stop]] = group
        stop = start
    return labels


def gradient_groups(scores: NDArray[Any], num_groups: int, *, omega: float = 0.1, seed: int = 0) -> NDArray[Any]:
    """W (N, E) of scores (N,) by gradient ascent on its logits, as in InvDiff; columns rise with L_e.

    Maximises Var_e(L_e) + omega * H(m) of standardised scores, with m the groups' shares and H their entropy.
    """
    standard = torch.from_numpy((scores - scores.mean()) / scores.std()).float()
    start = torch.randn(len(scores), num_groups, generator=torch.Generator().manual_seed(seed))
    logits = (0.1 * start).requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for _ in range(300):
        weights = logits.softmax(dim=1)
        mass = weights.sum(dim=0)
        losses = weights.T @ standard / mass
        share = mass / len(standard)
        entropy = -(share * share.clamp_min(1e-12).log()).sum()
        objective = losses.var(unbiased=False) + omega * entropy
        optimizer.zero_grad()
        (-objective).backward()
        optimizer.step()
    final = logits.detach().softmax(dim=1).double().numpy()
    return final[:, np.argsort(final.T @ scores / final.sum(axis=0), kind="stable")]


def forced_split(score: Score, config: AuditConfig) -> Cut:
    """The groups of largest dispersion of a score, with how well those of its two halves agree; believed as asked."""
    num_groups = config.num_groups or 2

    def cut(values: NDArray[Any]) -> NDArray[Any]:
        if config.solver == "gradient":
            return gradient_groups(values, num_groups, omega=config.omega, seed=config.seed)
        return np.eye(num_groups)[exact_groups(values, num_groups, min_share=config.min_share)]

    weights, agreement = cut(score.mean), 0.0
    if len(score.draws) >= 2:
        first, second = (cut(score.draws[half::2].mean(axis=0)).argmax(axis=1) for half in (0, 1))
        agreement = float(adjusted_rand_score(first, second))
    humps = fit_mixture(score.mean, num_groups)
    shares = [round(float(share), 4) for share in weights.mean(axis=0)]
    figures = (round(agreement, 4), round(float(humps.separation), 4), round(float(humps.rand_index()), 4), NOT_TESTED)
    return Cut(Candidate(score.evidence, num_groups, shares, *figures, ""), score, weights)


def force_factors(evidence: Evidence, judged: Mapping[int, NDArray[Any]], config: AuditConfig) -> Search:
    """A split of every prompt, of images `judged` (n,), whether anything is hidden or not: a factor of those alike."""
    scored = {prompt: contrasts(evidence, rows, config) for prompt, rows in judged.items()}
    cuts = {prompt: [forced_split(scores[0], config)] for prompt, scores in scored.items() if scores}
    candidates = {prompt: [cut.candidate for cut in own] for prompt, own in cuts.items()}
    if not cuts:
        return Search([], candidates)
    factors, shifts = list[dict[int, Cut]](), Shifts(evidence.whitened(config.seed), judged)
    while cuts:
        first = next(iter(cuts))
        factors.append(shifts.gather(first, cuts[first][0], cuts[first], cuts, config.seed))
        cuts = {prompt: own for prompt, own in cuts.items() if prompt not in factors[-1]}
    return Search(factors, candidates)


def given_factors(asked: Sequence[Asked], judged: Mapping[int, NDArray[Any]], config: AuditConfig) -> Search:
    """One factor for each attribute that is asked for, of the prompts under which it has two values or more.

    A value counts under a prompt where it has `min_share` of the images of which it is known, and `LEAST_IMAGES`.
    Images of other values, or of which nothing is known, may be of any of those that count. Values that count nowhere
    have no group.
    """
    search = Search([], {prompt: [] for prompt in judged})
    for one in asked:
        mass = {prompt: one.weights[rows].sum(axis=0) for prompt, rows in judged.items()}
        counts = {p: of >= max(config.min_share * of.sum(), LEAST_IMAGES) for p, of in mass.items()}
        splits = {p: bool(of.sum() > 1) and not one.refusal for p, of in counts.items()}
        used = np.any([np.zeros(len(one.values), dtype=bool), *(of for p, of in counts.items() if splits[p])], axis=0)
        cuts = {}
        for prompt, rows in judged.items():
            columns = used if splits[prompt] else np.ones(len(used), dtype=bool)
            shares = (mass[prompt][columns] / max(mass[prompt][columns].sum(), 1)).round(4).tolist()
            few = f"fewer than two values have {config.min_share:.1%} of its images, and {LEAST_IMAGES} of them"
            refusal = "" if splits[prompt] else one.refusal or few
            candidate = Candidate(one.evidence, len(shares), shares, one.agreement, 0.0, 1.0, NOT_TESTED, refusal)
            search.candidates[prompt].append(candidate)
            if splits[prompt]:
                present = counts[prompt][used]
                known = one.weights[rows][:, used] * present
                known = np.where(known.any(axis=1, keepdims=True), known, present)
                weights = known / known.sum(axis=1, keepdims=True)
                score = not_learned(one.evidence, (weights @ np.arange(weights.shape[1]))[None])
                intervals = [of for of, kept in zip(one.intervals.get(prompt, ()), used, strict=False) if kept]
                cuts[prompt] = Cut(candidate, score, weights, intervals)
        if cuts:
            search.factors.append(cuts)
            search.names.append(one.name)
            search.values.append([value for value, of in zip(one.values, used, strict=True) if of])
        for kind, entry in one.record.items():
            search.record[kind] = search.record.get(kind, {}) | entry
    return search


def why_not(num_images: int, candidates: Sequence[Candidate], config: AuditConfig) -> str:
    """The reason, in words, why no hidden group is found under a prompt: what is wrong with its clearest cut."""
    if too_few(num_images, config):
        return f"too few images to judge ({num_images}; at least {max(config.min_images, 4)} are needed)"
    if candidates:
        return f"no hidden group: by the clearest evidence, {candidates[0].evidence}, {candidates[0].refusal}"
    lacking = f"shows {config.num_groups} humps" if config.num_groups > 2 else "varies between the images"
    return f"no hidden group: nothing that was measured {lacking}"


def rarest(mass: NDArray[Any]) -> int:
    """The group of least mass among those that have any; `mass` is (E,)."""
    return int(np.where(mass > 0, mass, np.inf).argmin())
