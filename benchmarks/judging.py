"""How well an audit agrees with the truth that it was not shown: AUROC, agreement, calibration; and a few labels."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import adjusted_rand_score, average_precision_score, roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict

from invdiff import Audit
from invdiff.auditing.probe import DIMENSIONS, logits_of, spread_labels
from invdiff.auditing.scores import Margins
from invdiff.data.captioned import CaptionedImages

SURE = 0.99
"""A posterior above which an image is certainly of the rare group, if the posteriors are right."""
LABEL_DRAWS = 20
"""Of the labels of one world."""


def minority(values: Sequence[str], subjects: Sequence[str]) -> np.ndarray:
    """Whether each image has a value that is rarer with its subject than with the others; with one subject, than even.

    (N,) bool; the truth that an audit is judged by.
    """
    kinds, of = sorted(set(values)), {}
    for subject in set(subjects):
        counts = Counter(value for value, other in zip(values, subjects, strict=True) if other == subject)
        of[subject] = {kind: counts[kind] / counts.total() for kind in kinds}

    def usual(subject: str, kind: str) -> float:
        others = [shares[kind] for other, shares in of.items() if other != subject]
        return sum(others) / len(others) if others else 1 / len(kinds)

    return np.array([of[s][value] < usual(s, value) for value, s in zip(values, subjects, strict=True)])


def judged(found: Audit, data: CaptionedImages, hidden: Sequence[str], subject: str) -> dict[str, Any]:
    """What was found, and its agreement with each hidden attribute under each prompt.

    An attribute is judged by the factor whose scores follow it best; no factor is taken for two attributes.
    """
    captions = [prompt.prompt for prompt in found.prompts]
    figures: dict[str, Any] = {
        "found": found.biased,
        "factors": [
            {"shares": {captions[split.prompt]: split.shares for split in factor.splits}} for factor in found.factors
        ],
        "prompts": [
            {name: getattr(prompt, name) for name in ("prompt", "captions", "num_images", "found", "reason", "power")}
            for prompt in found.prompts
        ],
        "forwards_per_image": found.forwards_per_image,
    }
    if not hidden:
        return figures
    row_of = {name: row for row, name in enumerate(data.names)}
    rows = [row_of[name] for name in found.names]
    judgements = []
    for name in hidden:
        rare = minority(data.attributes[name], data.attributes[subject])[rows]
        judgements.append([agreement(found, factor, rare) for factor in range(len(found.scores))])
    follows = [[np.mean([row["auroc"] or 0.5 for row in one]) for one in factors] for factors in judgements]
    factor_of = dict(zip(*linear_sum_assignment(follows, maximize=True), strict=True))
    missed = [{"prompt": caption, "found": False} for caption in captions]
    return figures | {
        "hidden": {
            name: judgements[index][factor_of[index]] if index in factor_of else missed
            for index, name in enumerate(hidden)
        }
    }


def agreement(found: Audit, factor: int, rare: np.ndarray) -> list[dict[str, Any]]:
    """How scores, groups and posteriors of a factor agree with the true minority (N,) bool, under each prompt."""
    rows = []
    for index, prompt in enumerate(found.prompts):
        mine, split = found.prompt_ids == index, found.split(factor, index)
        truth, scores, weights = rare[mine], found.scores[factor, mine], found.group_weights[factor][mine]
        row: dict[str, Any] = {"prompt": prompt.prompt, "images": len(truth), "minority": truth.mean()}
        row |= {"factor": factor, "found": split is not None, "auroc": None}
        rows.append(row)
        if not 0 < truth.mean() < 1:
            continue
        if np.ptp(scores) > 0:
            row["auroc"] = roc_auc_score(truth, scores)
            row["average_precision"] = average_precision_score(truth, scores)
        if split is not None:
            posterior = weights[:, int(np.argmin(split.shares))]
            sure = posterior > SURE
            row["adjusted_rand"] = adjusted_rand_score(truth, weights.argmax(axis=1))
            row["calibration_error"] = calibration_error(posterior, truth)
            row |= {"sure": int(sure.sum()), "sure_precision": truth[sure].mean() if sure.any() else None}
            names = ("evidence", "shares", "separation", "agreement", "rand_low", "log_e")
            row |= {name: getattr(split, name) for name in names}
    return rows


def calibration_error(posterior: np.ndarray, truth: np.ndarray, bins: int = 10) -> float:
    """Expected calibration error: the mean gap, over images, of share and mean posterior in bins of equal width."""
    bin_of = np.minimum((posterior * bins).astype(int), bins - 1)
    gaps = (abs(np.sum(posterior[bin_of == b] - truth[bin_of == b])) for b in range(bins))
    return float(sum(gaps) / len(truth))


def supervised_auroc(sources: Sequence[np.ndarray], truth: np.ndarray) -> float:
    """AUROC, out of fold, of the mean of a logistic regression of the truth (n,) bool on each source (n, d)."""
    probe = LogisticRegression(C=1e-2, class_weight="balanced", max_iter=1000)
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    logits = [cross_val_predict(probe, source, truth, cv=folds, method="decision_function") for source in sources]
    return float(roc_auc_score(truth, np.mean(logits, axis=0)))


def learned(sources: Sequence[np.ndarray], data: CaptionedImages, name: str, subject: str) -> dict[str, Any]:
    """How well 40 labels, drawn evenly over prompts and values, tell a hidden attribute of the other images.

    AUROC of one value against the others under one prompt, a mean over both; over `LABEL_DRAWS` draws the mean and
    standard deviation. Beside it, of the same images: the margin alone, turned as the truth would have it; labels
    alone, by logistic regression of the same features; and the ceiling, a probe of all labels.
    """
    prompt = np.unique(data.attributes[subject], return_inverse=True)[1]
    values, truth = np.unique(data.attributes[name], return_inverse=True)
    margins = Margins(sources, prompt).of_pairs()
    features = np.concatenate([source[:, :DIMENSIONS] for source in sources], axis=1)
    each = [(prompt == p, e) for p in (0, 1) for e in range(len(values))]
    cells = [np.flatnonzero(rows & (truth == e)) for rows, e in each]

    def auroc(scores: np.ndarray, rest: np.ndarray) -> float:
        found = [roc_auc_score(truth[rows & rest] == e, scores[rows & rest, e]) for rows, e in each]
        return float(np.mean(found))

    alone = [roc_auc_score(truth[rows] == e, margins[rows, 0]) for rows, e in each]
    ceiling = [supervised_auroc([source[rows] for source in sources], truth[rows] == e) for rows, e in each]
    draws: dict[str, list[float]] = {"both": [], "labels alone": [], "refused": []}
    shares = []
    for seed in range(LABEL_DRAWS):
        rng = np.random.default_rng(seed)
        chosen = np.concatenate([rng.permutation(rows)[: 40 // len(cells)] for rows in cells])
        labels = ["" for _ in truth]
        for row in chosen:
            labels[row] = values[truth[row]]
        rest = ~np.isin(np.arange(len(truth)), chosen)
        asked = spread_labels(name, labels, sources, margins, prompt)
        probe = LogisticRegression(C=1e-2, class_weight="balanced", max_iter=5000)
        plain = logits_of(probe.fit(features[chosen], truth[chosen]), features)
        draws["both"].append(auroc(asked.weights, rest))
        draws["labels alone"].append(auroc(plain, rest))
        draws["refused"].append(float(bool(asked.refusal)))
        shares.append([asked.weights[prompt == p].mean(axis=0) for p in (0, 1)])
    return {
        "images": len(truth),
        "labels": 40 // len(cells) * len(cells),
        "values": values.tolist(),
        "margin alone": np.mean([max(one, 1 - one) for one in alone]),
        "ceiling": np.mean(ceiling),
        "auroc": {kind: {"mean": np.mean(of), "deviation": np.std(of)} for kind, of in draws.items()},
        "shares": [[np.mean(truth[prompt == p] == e) for e in range(len(values))] for p in (0, 1)],
        "estimated shares": {"mean": np.mean(shares, axis=0).tolist(), "deviation": np.std(shares, axis=0).tolist()},
    }
