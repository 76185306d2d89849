"""Scores of one dimension, made from evidence: where a hidden attribute shows as two humps, if it shows.

- The which-prompt margin: in whitened features each image is compared with the mean of its own prompt and of another.
  An image that lacks what usually comes with its prompt looks like one of the other.
- Components: independent directions of a prompt's features (FastICA).
- The contrast l(y) - l(null), both at the same noise, which estimates log p(z_t) - log p(z_t | y): it is large where
  an image lacks what its caption makes the model expect.

Each score can be learned again from some of the images, so that others can be evidence.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import skew
from sklearn.decomposition import PCA, FastICA
from sklearn.exceptions import ConvergenceWarning

from ..config import AuditConfig
from ..models.load import public_name
from .decide import fit_mixture
from .evidence import FITTED, Evidence

CONFUSERS = 5  # other prompts that an image of a prompt is compared with: those whose means are nearest
FOLDS = 5
LEAST_PARTED = 40  # images that a margin's rare group must hold to be parted
NUM_COMPONENTS = (4, 8, 12)  # whitened dimensions that components are looked for in
IMAGES_PER_DIMENSION = 40  # images for each: of fewer, FastICA finds directions in which mere noise falls apart


def _tanh(x: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Tanh of x (..., n), the slope of log cosh, and the mean of its derivative, (...)."""
    slope = np.tanh(x)
    return slope, 1 - (slope**2).mean(axis=-1)


SHAPES: dict[str, dict[str, Any]] = {
    "peaked": {"fun": _tanh, "algorithm": "parallel"},
    # x^2 and its mean derivative: FastICA's contrast for skewness (Hyvarinen and Oja 2000).
    "skewed": {"fun": lambda x: (x**2, (2 * x).mean(axis=-1)), "algorithm": "deflation"},
}
"""Kinds of components, and the options with which FastICA looks for them."""
_Array = NDArray[Any]
Learn = Callable[[NDArray[np.bool_]], Sequence[_Array]]


@dataclass(frozen=True, eq=False)
class Score:
    """One score of each of a prompt's n images, in several independent versions."""

    evidence: str  # the measurement that it is made from, for people
    draws: _Array  # (draws, n): under independent noises, or from independent features
    learn: Learn  # the score, or several of which one is like it, (n,), from the images of a mask (n,) alone
    of_prompt: bool = False  # whether it follows what comes with the prompt, so that two humps do too
    is_margin: bool = False  # whether it is a which-prompt margin, which may mix several such attributes

    @property
    def mean(self) -> _Array:
        """The mean over draws, standardised robustly, (n,)."""
        return standardised(self.draws.mean(axis=0))


def standardised(values: _Array, by: _Array | None = None) -> _Array:
    """Values (n,) less their median, in their interquartile range; or in the median and range of others."""
    by = values if by is None else by
    low, middle, high = np.quantile(by, [0.25, 0.5, 0.75])
    width = high - low if high - low > 0.01 * by.std() else by.std()  # of few different values
    return (values - middle) / max(width, 1e-12)


def without(values: _Array, taken: Sequence[_Array], prompt_of: _Array | None = None) -> _Array:
    """Values (n, D) without the directions in which the groups of factors, W (n, E) each, differ within prompts."""
    for weights in taken:
        within, own = values.astype(np.float64), weights.astype(np.float64)
        for prompt in [None] if prompt_of is None else np.unique(prompt_of):
            rows = slice(None) if prompt is None else prompt_of == prompt
            within[rows] -= within[rows].mean(axis=0)
            own[rows] -= own[rows].mean(axis=0)
        _, sizes, directions = np.linalg.svd(own.T @ within, full_matrices=False)
        used = directions[: weights.shape[1] - 1][sizes[: weights.shape[1] - 1] > 1e-9]
        values = values - (values @ used.T) @ used
    return values


class Margins:
    """Which-prompt margins of images from several sources of features, such as blocks and noise levels.

    The strongly regularised limit of logistic regression, with prompts weighted alike; weaker ones memorise.
    """

    def __init__(self, sources: Sequence[_Array], prompt_of: _Array) -> None:
        """`sources` are whitened features, (N, d) each; `prompt_of` (N,), -1 for images of no prompt."""
        self.sources, self.prompt_of = sources, prompt_of
        prompts = np.unique(prompt_of[prompt_of >= 0])
        self._means = {int(p): [source[prompt_of == p].mean(axis=0) for source in sources] for p in prompts}

    def scores(self, prompt: int, names: Mapping[int, str]) -> list[Score]:
        """The margins of a prompt's images against the prompts they are most like, out of fold."""
        rows, scores = np.flatnonzero(self.prompt_of == prompt), []
        for other in self._confusers(prompt):
            draws = self._margins(rows, self._means[other], np.ones(len(rows), dtype=bool))
            learn = partial(self._learn, rows, self._means[other])
            name = "which-prompt margin" + (f" against {names.get(other)!r}" if len(self._means) > 2 else "")
            scores.append(Score(name, draws, learn, of_prompt=True, is_margin=True))
        return scores

    def of_pairs(self) -> _Array:
        """Margins of images between each pair of prompts that are compared, (N, pairs); 0 for images of others.

        They rise towards the later prompt, so that a value means the same under both.
        """
        pairs: dict[tuple[int, int], _Array] = {}
        for prompt in self._means:
            for score, other in zip(self.scores(prompt, {}), self._confusers(prompt), strict=True):
                values = pairs.setdefault((min(prompt, other), max(prompt, other)), np.zeros(len(self.prompt_of)))
                values[self.prompt_of == prompt] = score.mean if prompt < other else -score.mean
        return np.stack(list(pairs.values()), axis=1) if pairs else np.zeros((len(self.prompt_of), 0))

    def _confusers(self, prompt: int) -> list[int]:
        """The prompts whose means are nearest, the nearest first."""
        own, others = np.concatenate(self._means[prompt]), [other for other in self._means if other != prompt]
        return sorted(others, key=lambda one: np.linalg.norm(np.concatenate(self._means[one]) - own))[:CONFUSERS]

    def _learn(self, rows: _Array, other_means: list[_Array], known: NDArray[np.bool_]) -> list[_Array]:
        return [self._margins(rows, other_means, known).mean(axis=0)]

    def _margins(self, rows: _Array, other_means: list[_Array], known: NDArray[np.bool_]) -> _Array:
        """The margin by each source, (sources, n): out of fold for known images, else by all known ones."""
        margins = []
        for source, other_mean in zip(self.sources, other_means, strict=True):
            own, inside = source[rows], np.flatnonzero(known)
            values = _margin(own, own[known].mean(axis=0), other_mean).astype(np.float64)
            for fold in range(min(FOLDS, len(inside))) if len(inside) > 1 else ():
                left_out = np.arange(len(inside)) % FOLDS == fold
                mean = own[inside[~left_out]].mean(axis=0)
                values[inside[left_out]] = _margin(own[inside[left_out]], mean, other_mean)
            margins.append(standardised(values, values[known]))
        return np.array(margins)


def _margin(values: _Array, own: _Array, other: _Array) -> _Array:
    """How much nearer values (n, d) are to another prompt's mean than to their own, (n,)."""
    return (values - (own + other) / 2) @ (other - own)


def first_axis(features: _Array) -> _Array:
    """The first principal axis of features (n, d), a unit vector (d,)."""
    return np.linalg.svd(features - features.mean(axis=0), full_matrices=False)[2][0]


def parts_of(score: Score, features: _Array) -> list[Score]:
    """The two attributes that a margin mixes, each as a score; none where its rare group cannot be parted in two.

    The rare group lacks either. It is parted along its first principal axis of the prompt's features (n, d), white;
    each image is then placed in the plane of the shifts from the usual images to the two parts, out of fold.
    """
    n, whole = len(features), _parts(features, score.mean, np.ones(len(features), dtype=bool))
    if not whole:
        return []
    placed, folds = np.array(whole), np.arange(n) % FOLDS
    for fold in range(FOLDS):
        inside = folds == fold
        if again := _parts(features, score.mean, ~inside):
            swapped = np.corrcoef(again[0], whole[0])[0, 1] < np.corrcoef(again[1], whole[0])[0, 1]
            placed[:, inside] = np.array(again[::-1] if swapped else again)[:, inside]

    def learn(known: NDArray[np.bool_]) -> list[_Array]:
        return _parts(features, score.learn(known)[0], known)

    name = f"part of {score.evidence}"
    return [Score(name, standardised(values)[None], learn, of_prompt=True) for values in placed]


def _parts(features: _Array, margin: _Array, known: NDArray[np.bool_]) -> list[_Array]:
    posterior = fit_mixture(margin[known], 2).posterior(margin)
    rare = posterior[:, int(posterior.mean(axis=0).argmin())] > 0.5
    inside, usual = known & rare, known & ~rare
    if inside.sum() < LEAST_PARTED or not usual.any():
        return []
    along = features[inside] @ first_axis(features[inside])
    second = fit_mixture(along, 2).posterior(along).argmax(axis=1) == 1
    if not 0 < second.mean() < 1:
        return []
    origin = features[usual].mean(axis=0)
    shifts = np.stack([features[inside][part].mean(axis=0) - origin for part in (~second, second)])
    return list(((features - origin) @ np.linalg.pinv(shifts)).T)


def contrasts(evidence: Evidence, rows: _Array, config: AuditConfig) -> list[Score]:
    """The contrasts of images `rows`; for the solver `gradient` the losses, as in InvDiff."""
    losses = evidence.losses[rows].astype(np.float64)  # (n, levels, draws, conditions)
    named = [
        (f"contrast at log-SNR {level:g}", (losses[:, index, :, 0] - losses[:, index, :, 1]).T)
        for index, level in enumerate(config.contrast_log_snr if losses.shape[3] > 1 else ())
    ]
    if config.solver == "gradient":
        named = [(f"loss at log-SNR {config.contrast_log_snr[0]:g}", losses[:, 0, :, 0].T)]
    return [not_learned(name, draws, of_prompt=True) for name, draws in named if np.ptp(draws.mean(axis=0)) > 0]


def not_learned(evidence: str, draws: _Array, *, of_prompt: bool = False) -> Score:
    """A score that is the mean of its draws, whatever the images that are known."""
    mean = draws.mean(axis=0)
    return Score(evidence, draws, lambda known: [mean], of_prompt)


def components(features: _Array, source: str, *, seed: int, taken: Sequence[_Array]) -> list[Score]:
    """Independent components of features (n, draws, D) from a named source, as scores.

    A hidden factor is close to one direction of the features, but seldom among the largest. With too few whitened
    dimensions it is absent, with too many it falls apart, so several numbers are tried. Directions of factors already
    `taken`, W (n, E) each, are left out.
    """
    n, draws, _ = features.shape
    sizes = [size for size in NUM_COMPONENTS if size * IMAGES_PER_DIMENSION <= n]
    centred = features - features.mean(axis=0)
    scale = centred.std(axis=(0, 1))
    varies = scale > 1e-9 * max(float(np.abs(features).max()), 1e-12)
    if draws < 2 or not sizes or not varies.any():
        return []
    centred = (centred[:, :, varies] / scale[varies]).reshape(n * draws, -1)
    centred = without(centred, [np.repeat(weights, draws, axis=0) for weights in taken]).reshape(n, draws, -1)
    most = min(max(sizes), centred.shape[2])
    used = np.linspace(0, n - 1, min(n, FITTED)).astype(int)
    pca = PCA(most, whiten=True, random_state=seed).fit(centred[used].mean(axis=1))
    fitted = pca.transform(centred.mean(axis=1))
    whitened = pca.transform(centred.reshape(n * draws, -1))
    scores = []
    for size in sorted({min(size, most) for size in sizes}):
        for shape in SHAPES:
            fit = cache(partial(_independent, fitted[:, :size], shape, seed))  # one fit serves all its components
            if (ica := fit(np.isin(np.arange(n), used).tobytes())) is None:
                continue
            projected = ica.transform(whitened[:, :size]).reshape(n, draws, -1)
            learn = partial(_learned, fit, fitted[:, :size])
            for component, values in enumerate(projected.transpose(2, 1, 0), start=1):
                sign = 1.0 if skew(values.mean(axis=0)) >= 0 else -1.0  # the rarer group scores high
                name = f"{source}, {shape} component {component} of {size}"
                scores.append(Score(name, sign * values, learn))
    return scores


def _independent(whitened: _Array, shape: str, seed: int, known: bytes) -> FastICA | None:
    """FastICA of whitened features (n, size) of rows `known`, a mask's bytes; None where no direction is left."""
    ica = FastICA(whiten="unit-variance", max_iter=100, tol=1e-3, random_state=seed, **SHAPES[shape])
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore", ConvergenceWarning)  # a component that does not settle refutes nothing
        warnings.simplefilter("ignore", RuntimeWarning)
        try:
            return ica.fit(whitened[np.frombuffer(known, dtype=bool)])
        except ValueError:  # no direction of this shape is left: its update is 0 / 0
            return None


def _learned(fit: Callable[[bytes], FastICA | None], whitened: _Array, known: NDArray[np.bool_]) -> list[_Array]:
    ica = fit(known.tobytes())
    return [] if ica is None else list(ica.transform(whitened).T)


def component_scores(evidence: Evidence, rows: _Array, config: AuditConfig, taken: Sequence[_Array]) -> list[Score]:
    """The components of the middle features of images `rows`, and of a vision encoder's."""
    levels = " and ".join(f"{level:g}" for level in config.feature_log_snr)
    scores = components(evidence.features.numpy(rows), f"features at log-SNR {levels}", seed=config.seed, taken=taken)
    if evidence.vision is not None:
        source = f"features of {public_name(config.vision_encoder)}"
        scores += components(evidence.vision.numpy(rows).astype(np.float64), source, seed=config.seed, taken=taken)
    return scores
