"""Groups by other audits than ours, and fine-tuning that draws all groups of a caption equally often.

All read what our audit reads: whitened features of the audited model's own blocks. With c the caption of an image:

* "kmeans", after George (Sohoni et al., NeurIPS 2020): clusters of each caption's images, as many as have the largest
  silhouette. George clusters what a network that classifies c has learned, reduced by UMAP; here it is the leading
  components of what the audited model has learned.
* "jtt" (Liu et al., ICML 2021): what a regularised classifier of c errs on. Its weight is tuned on group labels there;
  here errors and the rest count equally.
* "eiil" (Creager et al., ICML 2021): the two environments q that maximise the IRM penalty of that classifier,
  sum_e (sum_i q_ie g_i)^2 with g_i the derivative of image i's cross-entropy in a factor of its logits. It is convex
  in sum_i q_i g_i, hence largest where q parts the images by the sign of g_i. Of two captions g_i > 0 just where the
  classifier errs: there EIIL and JTT find the same groups.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from audits import audit_features
from methods import GIVEN, Fitted, World, fine_tuned
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import silhouette_score

from invdiff import Audit, AuditConfig
from invdiff.errors import ConfigError
from invdiff.seeds import derived_seed

STRENGTH = 1e-3
"""C of the classifier of captions: without a strong penalty it remembers the images, and errs on none."""
FEW_LABELS = 40
MOST_CLUSTERS, LEADING = 5, 10
"""Clusters of a caption, and components of each block that they are sought in."""


def kmeans(features: np.ndarray, captions: np.ndarray, seed: int = 0) -> np.ndarray:
    """Cluster of each image, (N,) from 0 under each caption; of features (N, d) and captions (N,)."""
    groups = np.zeros(len(captions), dtype=int)
    for caption in np.unique(captions):
        own = features[captions == caption]
        numbers = range(2, min(MOST_CLUSTERS, len(own) - 1) + 1)
        fits = [KMeans(k, n_init=10, random_state=seed).fit(own) for k in numbers]
        groups[captions == caption] = max(fits, key=lambda fit: silhouette_score(own, fit.labels_)).labels_
    return groups


def jtt(features: np.ndarray, captions: np.ndarray, seed: int = 0) -> np.ndarray:
    """1 for images whose caption the classifier errs on, else 0, (N,)."""
    return (np.unique(captions)[caption_odds(features, captions).argmax(axis=1)] != captions).astype(int)


def eiil(features: np.ndarray, captions: np.ndarray, seed: int = 0) -> np.ndarray:
    """Environment of each image, (N,): 1 where its loss rises with the classifier's logits."""
    logs = caption_odds(features, captions)
    own = np.unique(captions) == captions[:, None]
    return (((np.exp(logs) - own) * logs).sum(axis=1) > 0).astype(int)


def caption_odds(features: np.ndarray, captions: np.ndarray) -> np.ndarray:
    """Log probability of every caption, (N, captions), by logistic regression on all images."""
    if len(np.unique(captions)) < 2:
        raise ConfigError("Expected two captions or more, whose classifier's errors are groups, got one. Take kmeans.")
    return LogisticRegression(C=STRENGTH, max_iter=1000).fit(features, captions).predict_log_proba(features)


INFERRED: dict[str, Callable[..., np.ndarray]] = {"kmeans": kmeans, "jtt": jtt, "eiil": eiil}


def groups_of(world: World, groups: str, settings: Mapping[str, Any] | None = None) -> Audit:
    """Groups by name, kept in the world's folder.

    "audit" seeks them, with `settings` of `AuditConfig`; "true" reads them; "words" asks the model for the classes of
    the hidden attribute; "few-labels" spreads 40 true labels, as many of each subject and class; "random" throws a
    coin; the others are `INFERRED`. Values of a caption that few images have are no groups, as where the attribute is
    given: see `given_factors`.
    """
    config = AuditConfig.from_dict(dict(settings or {}))
    if groups in ("audit", "true"):
        name = "-".join(["audit", *(f"{key}-{value}" for key, value in (settings or {}).items())])
        return world.true if groups == "true" else world.audited(name, world.data, config=config)
    if groups == "words":
        return world.audited(groups, world.data, ask={world.attribute: tuple(world.words)})
    if groups == "few-labels":
        return world.audited(groups, world.data, labels={world.attribute: few_labels(world)})
    if groups not in ("random", *INFERRED):
        known = ("audit", "true", "words", "few-labels", "random", *INFERRED)
        raise ConfigError(f"Expected groups of {', '.join(known)}, got {groups!r}.")
    if (world.work / groups / "audit.json").is_file():
        return Audit.load(world.work / groups)
    seed = derived_seed(groups, world.seed) % 2**32
    if groups == "random":
        inferred = np.random.default_rng(seed).integers(2, size=len(world.data))
    else:
        sources = audit_features(world.biased(), world.data, world.cache)
        features = np.concatenate([of[:, :LEADING] if groups == "kmeans" else of for of in sources], axis=1)
        captions = np.array([world.prompts.get(caption, caption) for caption in world.data.captions])
        inferred = INFERRED[groups](features, captions, seed)
    named = replace(world.data, attributes={groups: [f"{groups} {group}" for group in inferred]})
    return world.audited(groups, named, attribute=groups)


def few_labels(world: World) -> dict[str, str]:
    """Name of an image to its class of the hidden attribute, of 40 images: as many of each subject and class."""
    truth = list(
        zip(world.labelled.attributes[world.subject], world.labelled.attributes[world.attribute], strict=True)
    )
    each, rng = FEW_LABELS // len(set(truth)), np.random.default_rng(derived_seed("few-labels", world.seed))
    rows = [
        row
        for cell in sorted(set(truth))
        for row in rng.permutation(np.flatnonzero([kind == cell for kind in truth]))[:each]
    ]
    return {world.data.names[row]: truth[row][1] for row in rows}


@dataclass(frozen=True)
class GroupBalanced:
    """The base fine-tuned as the biased model was, with groups drawn equally often: `invdiff finetune --audit`."""

    groups: str = "audit"
    """As of `groups_of`."""

    @property
    def supervision(self) -> str:
        """None, unless groups are told of."""
        return GIVEN.get(self.groups, "none")

    def fit(self, world: World, folder: Path) -> Fitted:
        """Fine-tune."""
        found = groups_of(world, self.groups)
        search = found.forwards_per_image * len(world.data) if self.groups != "true" else 0.0
        if not found.biased:
            return Fitted(world.biased(), forwards=search, about={"groups found": 0})
        fitted = fine_tuned(world, world.data, folder, found)
        return replace(fitted, forwards=search + fitted.forwards)
