"""The method in a world whose scores are known: what guidance, penalty, purity, Delta and CFG do, in closed form.

    python benchmarks/theory.py mixtures   # seconds; docs/theory.png and the tables of docs/method.md

Two subjects, which prompts name, lie on the first axis of the plane; two groups of a spurious attribute, which prompts
do not name, on the second. Each cell (subject y, group e) is a Gaussian, so every mixture of cells has a closed score.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from kept import run_part
from numpy.polynomial.hermite_e import hermegauss
from numpy.typing import NDArray
from scipy.special import logsumexp, softmax

from invdiff.training.batches import purified

Array = NDArray[np.float64]
RHO = 0.95
BIASED = np.array([[RHO, 1 - RHO], [1 - RHO, RHO]])
EVEN = np.full((2, 2), 0.5)
"""Shares of groups (columns) under subjects (rows)."""
SCALES = (1.0, 2.0, 3.0, 5.0, 7.5)
WRONG = 0.17
"""What is wrong in the rare cell of the photographs' inferred groups."""


@dataclass(frozen=True)
class World:
    """Distances of subjects and of groups from the middle, and the standard deviation of each group's cells."""

    subject: float = 1.0
    attribute: float = 1.5
    deviations: tuple[float, float] = (0.3, 0.3)

    def cells(self) -> list[tuple[Array, float]]:
        """Mean (2,) and deviation of the cells (0, 0), (0, 1), (1, 0), (1, 1)."""
        signs = [(y, e) for y in (-1, 1) for e in (-1, 1)]
        return [(np.array([self.subject * y, self.attribute * e]), self.deviations[e > 0]) for y, e in signs]

    def log_densities(self, shares: Array, z: Array, sigma: float) -> tuple[Array, Array]:
        """Log of share times density (C, ...) of each noised cell at `z` (..., 2), and -d log / dz (C, ..., 2).

        Cells without a share are left out; alpha^2 + sigma^2 = 1.
        """
        alpha, logs, slopes = np.sqrt(1 - sigma**2), [], []
        for (mean, deviation), share in zip(self.cells(), shares.ravel(), strict=True):
            if share > 0:
                variance = alpha**2 * deviation**2 + sigma**2
                slopes.append((z - alpha * mean) / variance)
                logs.append(np.log(share / variance) - variance / 2 * (slopes[-1] ** 2).sum(axis=-1))
        return np.array(logs), np.array(slopes)

    def noise(self, shares: Array, z: Array, sigma: float) -> Array:
        """The exact prediction -sigma * score (..., 2) of a mixture of cells with these shares (2, 2)."""
        logs, slopes = self.log_densities(shares, z, sigma)
        return np.einsum("c...,c...k->...k", softmax(logs, axis=0), sigma * slopes)

    def loss(self, shares: Array, cell: int, sigma: float) -> float:
        """The expected denoising loss, a mean over both axes, of a mixture's prediction on the images of a cell."""
        nodes, weights = hermegauss(60)
        mean, deviation = self.cells()[cell]
        alpha, weights = np.sqrt(1 - sigma**2), np.outer(weights, weights) / weights.sum() ** 2
        variance = alpha**2 * deviation**2 + sigma**2
        normal = np.stack(np.meshgrid(nodes, nodes, indexing="ij"), axis=-1)
        gap = sigma * normal / np.sqrt(variance) - self.noise(shares, alpha * mean + np.sqrt(variance) * normal, sigma)
        return float(alpha**2 * deviation**2 / variance + (weights * (gap**2).mean(axis=-1)).sum())


def of_prompt(shares: Array, prompt: int = 0) -> Array:
    """The mixture that a prompt names."""
    return shares * (np.arange(2) == prompt)[:, None]


def penalties(deviations: tuple[float, float], prompt: int, sigma: float = 0.8) -> dict[str, list[float]]:
    """Var_e of three losses, [biased, balanced]: what the invariance penalty would see under a prompt."""
    world = World(deviations=deviations)

    def losses(shares: Array) -> Array:
        return np.array([world.loss(shares, 2 * prompt + e, sigma) for e in (0, 1)])

    caption = [losses(of_prompt(shares, prompt)) for shares in (BIASED, EVEN)]
    references = {"raw": 0.0, "frozen": losses(BIASED), "guided": losses(EVEN)}
    return {name: [float(np.var(of - reference)) for of in caption] for name, reference in references.items()}


def learned(images: Array, weights: Array, z: Array, sigma: float) -> Array:
    """The minimiser of the denoising loss over images (N, 2), for weights (N, K) of them: (K, n, 2), at z (n, 2).

    Any model that is large enough tends to it: it depends on the weighted mean of the images that fit z alone.
    """
    alpha = np.sqrt(1 - sigma**2)
    logs = (z @ images.T) * (alpha / sigma**2) - (alpha * images**2).sum(axis=1) * alpha / (2 * sigma**2)
    close = np.exp(logs - logs.max(axis=1, keepdims=True))
    means = [close @ (w[:, None] * images) / (close @ w)[:, None] for w in weights.T]
    return np.stack([(z - alpha * mean) / sigma for mean in means])


def scores(images_per_prompt: int = 100_000, seed: int = 0) -> dict[str, dict[str, float]]:
    """What is wrong in group 1, and how far what is learned for prompt 0 lies from closed forms, by kind of W.

    Evidence of the group is a number with deviation 1 about -d or d: d = 1.8 for prompt 0 (AUROC .995), 3 for 1.
    """
    world, rng = World(), np.random.default_rng(seed)
    prompts = np.repeat([0, 1], images_per_prompt)
    groups = (rng.random(len(prompts)) < BIASED[prompts, 1]).astype(int)
    centres = np.array([mean for mean, _ in world.cells()])
    images = centres[2 * prompts + groups] + world.deviations[0] * rng.standard_normal((len(prompts), 2))
    evidence, distance = rng.standard_normal(len(prompts)), np.where(prompts == 0, 1.8, 3.0)
    odds = BIASED[prompts, 1] / BIASED[prompts, 0] * np.exp(2 * distance * (evidence + distance * (2 * groups - 1)))
    true, inferred = np.eye(2)[groups], np.stack([1 / (1 + odds), odds / (1 + odds)], axis=1)
    pure = purified(torch.from_numpy(inferred), torch.from_numpy(prompts), 0.99).numpy()
    kinds = {"true": (true, true), "inferred, as they are": (inferred, inferred), "purified": (pure, inferred)}
    own = prompts == 0
    weights = np.stack([(drawn[own] / drawn[own].sum(axis=0)).mean(axis=1) for drawn, _ in kinds.values()], axis=1)
    errors = []
    for sigma in (0.5, 0.8, 0.95):
        spread = np.sqrt((1 - sigma**2) * world.deviations[0] ** 2 + sigma**2)
        z = np.sqrt(1 - sigma**2) * centres[rng.integers(2, size=300)] + spread * rng.standard_normal((300, 2))
        even, biased = (world.noise(of_prompt(of), z, sigma) for of in (EVEN, BIASED))
        own_shares = [w @ kinds[kind][1][own] for kind, w in zip(kinds, weights.T, strict=True)]
        said = [world.noise(np.stack([of, [0, 0]]), z, sigma) for of in own_shares]
        found = learned(images[own], weights, z, sigma)
        gaps = [[f - of for of in (predicted, even, biased)] for f, predicted in zip(found, said, strict=True)]
        errors.append(np.linalg.norm(gaps, axis=(2, 3)) / np.linalg.norm(even))
    rows = {}
    for (kind, (drawn, posterior)), error in zip(kinds.items(), np.max(errors, axis=0).tolist(), strict=True):
        wrong = [np.average(true[prompts == p, 0], weights=drawn[prompts == p, 1]) for p in (0, 1)]
        said = np.average(posterior[own, 0], weights=drawn[own, 1])
        rows[kind] = dict(
            zip(("wrong, prompt 0", "wrong, prompt 1", "said, prompt 0"), map(float, (*wrong, said)), strict=True)
        )
        rows[kind] |= dict(zip(("from predicted", "from balanced", "from biased"), error, strict=True))
    return rows


def drawn_share(world: World, first: Array, second: Array, weight: float, images: int = 3000) -> float:
    """The share of images of group 0 that DDIM draws with second + weight * (first - second)."""
    x, angles = np.random.default_rng(0).standard_normal((images, 2)), np.linspace(np.pi / 2 - 1e-3, 1e-3, 81)
    for now, then in pairwise(angles):
        towards, plain = (world.noise(shares, x, float(np.sin(now))) for shares in (first, second))
        predicted = plain + weight * (towards - plain)
        x = np.cos(then) * (x - np.sin(now) * predicted) / np.cos(now) + np.sin(then) * predicted
    return float((x[:, 1] < 0).mean())


def density_share(world: World, first: Array, second: Array, weight: float) -> float:
    """The share of group 0 under the density first^weight * second^(1 - weight), by summation over a grid."""
    axis = np.linspace(-5, 5, 400)
    z = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1)
    towards, plain = (logsumexp(world.log_densities(shares, z, 1e-6)[0], axis=0) for shares in (first, second))
    return float(softmax(weight * towards + (1 - weight) * plain)[:, axis < 0].sum())


def amplified(null: str, *, subject: float = 0.5) -> dict[str, list[float]]:
    """Wrong images of group 1 under prompt 0 at each of `SCALES`: by the formula, by density, and as drawn.

    A share `WRONG` of the cell is of group 0. `null` is what the null row holds: "on" (the group's guidance, prompt
    1's cell being pure), "matched" (the same, its cell as wrong as this one) or "off" (the frozen model).
    """
    world, other = World(subject=subject), WRONG if null == "matched" else 1e-9
    cells = np.array([[WRONG, 1 - WRONG], [other, 1 - other]])
    reference = BIASED if null == "off" else cells
    odds, marginal = (1 - WRONG) / WRONG, reference[:, 1].sum() / reference[:, 0].sum()
    path = world, of_prompt(cells), reference
    return {
        "formula": [1 / (1 + odds * (odds / marginal) ** (scale - 1)) for scale in SCALES],
        "density": [density_share(*path, scale) for scale in SCALES],
        "drawn": [drawn_share(*path, scale) for scale in SCALES],
    }


def strengths() -> dict[str, list[float]]:
    """The share of the common group under prompt 0 at each Delta, whose odds are those of the frozen^(1 - Delta)."""
    deltas, path = [0.0, 0.25, 0.5, 0.75, 1.0, 1.5], (World(), of_prompt(EVEN), of_prompt(BIASED))
    formula = [1 / (1 + ((1 - RHO) / RHO) ** (1 - delta)) for delta in deltas]
    return {"deltas": deltas, "formula": formula, "drawn": [drawn_share(*path, delta) for delta in deltas]}


def picture(cfg: dict[str, dict[str, list[float]]], path: Path) -> None:
    """The shift that guidance learns, and what CFG makes of a cell that is partly wrong."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    world, axis = World(), np.linspace(-2.4, 2.4, 97)
    z = np.stack([np.full_like(axis, -0.87), axis], axis=1)
    biased, even = (world.noise(of_prompt(shares), z, 0.5)[:, 1] for shares in (BIASED, EVEN))
    left.plot(axis, biased, color="tab:red", label="frozen: biased mixture")
    left.plot(axis, even, color="tab:blue", label="guided: balanced mixture")
    left.vlines(axis[::3], biased[::3], even[::3], color="0.6", linewidth=0.8, label="the shift that is learned")
    left.set(xlabel="attribute", title="prediction at noise 0.5")
    for (name, rows), colour in zip(cfg.items(), ("tab:red", "tab:blue", "tab:green"), strict=True):
        right.plot(SCALES, rows["formula"], "--", color=colour, linewidth=0.8)
        right.plot(SCALES, rows["drawn"], "o-", color=colour, markersize=3, label=f"null row {name}")
    right.set(xlabel="guidance scale", title="share wrong (dashed: formula)", ylim=(0, 1))
    for axes in (left, right):
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=90, metadata={"Software": None})
    plt.close(figure)


def mixtures(_: Path) -> dict[str, Any]:
    """Every figure of docs/method.md, and its picture."""
    worlds = {"equal": ((0.3, 0.3), 0), "rare is hard": ((0.3, 0.8), 0), "rare is easy": ((0.3, 0.8), 1)}
    cfg = {null: amplified(null) for null in ("on", "matched", "off")}
    picture(cfg, Path(__file__).parents[1] / "docs" / "theory.png")
    return {
        "scores": scores(),
        "penalties": {name: penalties(*of) for name, of in worlds.items()},
        "scales": SCALES,
        "cfg": cfg,
        "delta": strengths(),
    }


if __name__ == "__main__":
    run_part("theory", __doc__, {"mixtures": mixtures}, work="out/theory")
