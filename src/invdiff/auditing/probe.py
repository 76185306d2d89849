"""A linear probe of features: an attribute of all images from the labels of a few. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax
from scipy.stats import norm
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import adjusted_rand_score
from sklearn.utils.class_weight import compute_sample_weight

from ..config import AuditConfig
from .asked import Asked

if TYPE_CHECKING:
    from .evidence import Whitened
    from .result import Audit

DIMENSIONS = 50  # leading principal components of each source of features that a probe reads
MARGIN_SCALE = 8.0
"""Of margins beside features, divided by the number of values: they are trusted more, and so regularised less, but of
many values each comes with the prompt less clearly."""
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)  # C of the regression, of which cross-validation chooses
SLOPE_PENALTY, OFFSET_PENALTY, LEAST_SCALE = 0.03, 0.004, 0.1
"""Ridge penalties of what makes probabilities of logits: their scale, never turned; and offsets of each prompt
and class."""
FOLDS = 5
DRAWS = 1000  # of guesses and errors, for an interval of shares
SURE, MOST_JUDGED, JUDGE_STRENGTH = 0.9, 8000, 1e-2  # posterior that teaches a judge; most images; C of the judge
_Array = NDArray[Any]


def spread_labels(
    name: str,
    labels: Sequence[str],
    sources: Sequence[_Array],
    margins: _Array,
    prompt_of: _Array,
    distinct: NDArray[np.bool_] | None = None,
    level: float = AuditConfig.level,
) -> Asked:
    """An attribute of N images from the labels of a few, "" for the others.

    A strongly regularised logistic regression finds the direction; scale and offsets by prompt, fitted to its logits
    of labels left out, make them probabilities. Cells of prompt and label weigh alike, so that the attribute is not
    read off the prompt; intervals of shares count how labels left out are mistaken under each. `labels` are of two
    values or more, five images or more each; `sources` whitened features, (N, d) each; `margins` (N, pairs) as
    `Margins.of_pairs` has them; `prompt_of` (N,). Labelled images that are not `distinct` (N,), copies of other
    labelled ones, keep their labels and teach and prove nothing.
    `level` is that of the test that labels left out are guessed better than by chance.
    """
    values, labelled = sorted(set(labels) - {""}), np.array([bool(label) for label in labels])
    known = labelled if distinct is None else labelled & distinct
    group = np.array([values.index(label) if label else -1 for label in labels])
    truth, own = group[known], prompt_of[known]
    features = [source[:, :DIMENSIONS] / len(sources) ** 0.5 for source in sources]
    inputs = np.concatenate([*features, MARGIN_SCALE / len(values) * margins], axis=1)
    prompts = (prompt_of[:, None] == np.unique(prompt_of)).astype(float)
    cells, cell, counts = np.unique([own, truth], axis=1, return_inverse=True, return_counts=True)
    cell = cell.reshape(-1)
    folds = _folds(truth, cell)
    tried = {strength: _left_out(inputs[known], truth, cell, folds, strength) for strength in STRENGTHS}
    judged = {strength: np.empty_like(of) for strength, of in tried.items()}
    for fold in range(FOLDS):
        fitted = folds != fold
        for strength, of in tried.items():
            scale, offsets = _calibration(of[fitted], truth[fitted], cell[fitted], prompts[known][fitted])
            judged[strength][~fitted] = log_softmax(scale * of[~fitted] + prompts[known][~fitted] @ offsets, axis=1)
    alike = compute_sample_weight("balanced", cell)
    losses = {c: -alike * of[np.arange(len(truth)), truth] for c, of in judged.items()}
    best = min(losses.values(), key=lambda of: of.mean())
    within_error = best.mean() + best.std() / len(best) ** 0.5  # the strongest within a standard error of the best
    chosen = next(c for c, of in losses.items() if of.mean() <= within_error)

    scale, offsets = _calibration(tried[chosen], truth, cell, prompts[known])
    logits = logits_of(_fit(inputs[known], truth, cell, chosen), inputs)
    posterior = softmax(scale * logits + prompts @ offsets, axis=1)
    guessed, intervals = judged[chosen].argmax(axis=1), dict[int, list[tuple[float, float]]]()
    for prompt in np.unique(prompt_of):
        own, here = prompt_of == prompt, prompt_of[known] == prompt
        guesses = np.bincount(posterior[own].argmax(axis=1), minlength=len(values))
        posterior[own] = with_own_shares(posterior[own])  # labels are drawn otherwise
        errors = np.zeros((len(values), len(values)), dtype=np.int64)  # none where nobody has labelled
        np.add.at(errors, (truth[here], guessed[here]), 1)
        intervals[int(prompt)] = _share_intervals(guesses, errors, posterior[own].mean(axis=0))
    posterior[labelled] = np.eye(len(values))[group[labelled]]

    recall = np.bincount(cell, weights=guessed == truth) / counts
    several = np.bincount(cells[0])[cells[0]]  # values that a cell's prompt has labels of
    tested, chance = several > 1, 1 / several
    error = np.sqrt((chance * (1 - chance) / counts)[tested].sum())
    above = (recall - chance)[tested].sum() / error if tested.any() else -np.inf
    accuracy = {value: round(float((guessed == truth)[truth == e].mean()), 4) for e, value in enumerate(values)}
    record: dict[str, Any] = {"images": dict(zip(values, np.bincount(truth).tolist(), strict=True)), "right": accuracy}
    at = np.flatnonzero(known)  # positions of those that are guessed right when left out, and of the others
    record |= {"hits": at[guessed == truth].tolist(), "misses": at[guessed != truth].tolist()}
    refusal = "" if tested.any() else "no prompt has labels of two values, to tell the attribute from the prompt"
    if not refusal and norm.sf(above) >= level:
        refusal = "labels left out are not guessed better than by chance within a prompt, at a level of "
        refusal += f"{level:.1g} ({recall[tested].mean():.0%} right, {chance[tested].mean():.0%} by chance)"
    agreement = round(float(adjusted_rand_score(truth, guessed)), 4)
    evidence, record = f"{len(truth)} labels", {"labels": {name: record}}
    return Asked(name, values, posterior, evidence, record, refusal, agreement, intervals)


def linear_judges(
    found: Audit, sources: Sequence[Whitened], distinct: Callable[[_Array], NDArray[np.bool_]]
) -> dict[str, _Array]:
    """For each factor m, a linear judge of its groups, and how it errs.

    A logistic regression of the groups of images whose posterior is at least `SURE`; cells of prompt and group weigh
    alike. Of copies of an image, as `distinct` tells of some (n,), there is one: another would know its group. Folded
    with the basis of features: logits = features @ "map.m" + "bias.m", of the features of all `sources` side by side.
    "probabilities.m" (n, E) are of images left out, "truth.m" (n,) their groups.
    """
    judges: dict[str, _Array] = {}
    values = np.concatenate([source.values for source in sources], axis=1)
    for m, factor in enumerate(found.factors):
        split = np.isin(found.prompt_ids, [one.prompt for one in factor.splits])
        rows = np.flatnonzero(split & (found.group_weights[m].max(axis=1) >= SURE))
        rows = np.sort(np.random.default_rng(0).permutation(rows)[:MOST_JUDGED])  # in whatever order prompts come
        rows = rows[distinct(rows)]
        truth = found.group_weights[m][rows].argmax(axis=1)
        cell = np.unique([found.prompt_ids[rows], truth], axis=1, return_inverse=True)[1].reshape(-1)
        if np.bincount(truth, minlength=found.num_groups[m]).min() < FOLDS:
            continue
        left_out = _left_out(values[rows], truth, cell, _folds(truth, cell), JUDGE_STRENGTH)
        weights, bias = _linear(_fit(values[rows], truth, cell, JUDGE_STRENGTH))
        parts = np.split(weights, np.cumsum([source.values.shape[1] for source in sources])[:-1])
        judges[f"map.{m}"] = np.concatenate([s.basis @ part for s, part in zip(sources, parts, strict=True)])
        judges[f"bias.{m}"] = bias + sum(s.shift @ part for s, part in zip(sources, parts, strict=True))
        judges[f"probabilities.{m}"] = softmax(left_out, axis=1).astype(np.float32)
        judges[f"truth.{m}"] = truth
    return judges


def with_own_shares(posterior: _Array) -> _Array:
    """Posteriors (n, E) for groups alike frequent, at the shares that these images have: Saerens et al. (2002)."""
    shares, weights = np.full(posterior.shape[1], 1 / posterior.shape[1]), posterior
    for _ in range(200):
        weights = posterior * shares
        weights = weights / weights.sum(axis=1, keepdims=True)
        shares, before = weights.mean(axis=0), shares
        if np.abs(shares - before).max() < 1e-5:
            break
    return weights


def _share_intervals(guesses: _Array, errors: _Array, found: _Array) -> list[tuple[float, float]]:
    """95% intervals of shares (E,) that are `found`, where a probe guesses (E,) and errs as `errors` (E, E) counts.

    Guesses and rows of errors are drawn anew by Jeffreys' posterior, and shares solved for ("matrix method").
    """
    rng = np.random.default_rng(0)
    rates = np.stack([rng.dirichlet(row + 0.5, size=DRAWS) for row in errors], axis=1)
    seen = rng.dirichlet(guesses + 0.5, size=DRAWS)
    shares = np.clip((seen[:, None] @ np.linalg.pinv(rates))[:, 0], 0, None)
    low, high = np.quantile(shares / shares.sum(axis=1, keepdims=True), [0.025, 0.975], axis=0)
    ends = np.minimum(low, found), np.maximum(high, found)
    return [(round(float(a), 4), round(float(b), 4)) for a, b in zip(*ends, strict=True)]


def _fit(values: _Array, truth: _Array, cell: _Array, strength: float) -> LogisticRegression:
    return LogisticRegression(C=strength, max_iter=5000).fit(values, truth, compute_sample_weight("balanced", cell))


def _calibration(logits: _Array, truth: _Array, cell: _Array, prompts: _Array) -> tuple[float, _Array]:
    """The scale of logits (n, E), above 0, and offsets (P, E) of `prompts` (n, P), of least cross-entropy."""
    weights = compute_sample_weight("balanced", cell)[:, None]
    unit, targets = logits.std(), np.eye(logits.shape[1])[truth]

    def loss(x: _Array) -> tuple[float, _Array]:
        offsets = x[1:].reshape(prompts.shape[1], -1)
        found = log_softmax(x[0] * logits / unit + prompts @ offsets, axis=1)
        slope = weights * (np.exp(found) - targets)
        penalties = np.append(SLOPE_PENALTY, np.full(offsets.size, OFFSET_PENALTY))
        gradient = np.append((slope * logits / unit).sum(), prompts.T @ slope) + penalties * x
        return float(-(weights * targets * found).sum() + (penalties * x**2).sum() / 2), gradient

    size = prompts.shape[1] * logits.shape[1]
    bounds = [(LEAST_SCALE, None), *[(None, None)] * size]
    found = minimize(loss, np.append(1.0, np.zeros(size)), jac=True, bounds=bounds, method="L-BFGS-B").x
    return float(found[0] / unit), found[1:].reshape(prompts.shape[1], -1)


def _folds(truth: _Array, cell: _Array) -> _Array:
    """The fold of each image, (n,), over which classes and then cells are spread evenly."""
    folds = np.empty(len(truth), dtype=int)
    folds[np.lexsort((cell, truth))] = np.concatenate([np.arange(count) for count in np.bincount(truth)]) % FOLDS
    return folds


def _left_out(values: _Array, truth: _Array, cell: _Array, folds: _Array, strength: float) -> _Array:
    """Logits (n, E) of each image by the probe of the other folds."""
    logits = np.empty((len(truth), truth.max() + 1))
    for fold in range(FOLDS):
        fitted = folds != fold
        probe = _fit(values[fitted], truth[fitted], cell[fitted], strength)
        logits[~fitted] = logits_of(probe, values[~fitted])
    return logits


def logits_of(probe: LogisticRegression, values: _Array) -> _Array:
    """(n, E)."""
    weights, bias = _linear(probe)
    return values @ weights + bias


def _linear(probe: LogisticRegression) -> tuple[_Array, _Array]:
    """Weights (D, E) and biases (E,) of the logits, of two classes too."""
    signs = np.array([[-0.5], [0.5]]) if len(probe.coef_) == 1 else np.eye(len(probe.coef_))
    return (signs @ probe.coef_).T, signs @ probe.intercept_
