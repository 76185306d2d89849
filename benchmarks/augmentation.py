"""The augmentation test: does a classifier trained on biased photographs get fairer by images that we draw?

    python benchmarks/augmentation.py --data SOURCE --base MODEL --work FOLDER --seeds 0,1,2

Birds of photographs are classified by a logistic regression on features of a pretrained encoder. The place agrees with
the bird in 95% of the training images, so a classifier that relies on it fails on birds elsewhere: the accuracy of the
worst group of subject and place, in held-out images of every combination, tells how far it does (Sagawa et al., ICLR
2020; Hou et al., "InvDiff", KDD 2025, for the test). Every way to train differs in the images and their weights alone;
its settings are those whose worst group of validation images is best, where groups are found by our audit, or true, or
all images are one. World, biased model and guidance are those of `python -m benchmarks run waterbirds` in --work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import worlds
from judges import EfficientNetLite
from kept import RESULTS, device, keep, markdown_table, parser_of
from methods import Biased
from numpy.typing import NDArray
from PIL import Image
from runner import BATCH_SIZE, Suite, kept
from sklearn.linear_model import LogisticRegression

from invdiff import GenerateConfig, generate, load_captioned_images
from invdiff.data.captioned import CaptionedImages
from invdiff.data.images import read_image
from invdiff.evaluation.annotators.audited import AuditAnnotator
from invdiff.evaluation.images import read_images
from invdiff.files import read_arrays, write_arrays

BENCHMARK, FOLDER = "waterbirds", "augmentation"
SCALES = (1.0, 3.0)
"""Classifier-free guidance scales of the images that are drawn."""
NUM_VALIDATION, VALIDATION_SEED, NUM_TEST, TEST_SEED = 4000, 77, 2000, 78
"""Held-out images: biased as the training images are, to choose settings on, and balanced ones that measure."""
PENALTIES = (30.0, 10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 3e-4, 1e-4)
"""lambda of mean loss + lambda / 2 |w|^2, to choose from."""
FACTORS, FIRST_PENALTIES = (5.0, 20.0, 100.0), (30.0, 3.0, 0.3, 0.03)
"""Of JTT: weights of errors, and penalties of the classifier that makes them."""
ROUNDS, RATE = 30, 1.0
"""Of GroupDRO: steps of the weights of groups, and their size."""
Array = NDArray[Any]
Candidates = Iterator[tuple[str, LogisticRegression]]


@dataclass(frozen=True, eq=False)
class Images:
    """What a classifier is trained on."""

    features: Array
    """(N, D), standardised."""
    subjects: Array
    """Index of the class, 0 or 1, (N,)."""
    weights: Array
    """(N,)."""

    def __add__(self, other: Images) -> Images:
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Images(*(np.concatenate(pair) for pair in pairs))


def fit(images: Images, penalty: float, weights: Array | None = None) -> LogisticRegression:
    """The classifier with the least weighted mean loss + penalty / 2 |w|^2."""
    weights = images.weights if weights is None else weights
    model = LogisticRegression(C=1 / penalty, max_iter=1000, warm_start=True)
    return model.fit(images.features, images.subjects, weights / weights.sum())


def erm(images: Images) -> Candidates:
    """Empirical risk minimisation."""
    for penalty in PENALTIES:
        yield f"penalty {penalty:g}", fit(images, penalty)


def group_dro(images: Images, groups: Array, penalty: float) -> LogisticRegression:
    """The classifier with the least loss of the worst group (Sagawa et al., ICLR 2020, algorithm 1).

    Weights of `groups`, (N,), rise with exp(RATE times their loss). The classifier is fitted anew after each such step
    where they take one gradient: linear, it has one optimum.
    """
    _, groups, counts = np.unique(groups, return_inverse=True, return_counts=True)
    shares = np.full(len(counts), 1 / len(counts))
    model = fit(images, penalty, (shares / counts)[groups])
    for _ in range(ROUNDS):
        log_odds = model.decision_function(images.features)
        losses = np.logaddexp(0, np.where(images.subjects == 1, -log_odds, log_odds))
        shares *= np.exp(RATE * np.bincount(groups, losses) / counts)
        shares /= shares.sum()
        model.fit(images.features, images.subjects, (shares / counts)[groups])
    return model


def group_dros(images: Images, groups: Array) -> Candidates:
    """`group_dro` at every penalty."""
    for penalty in PENALTIES:
        yield f"penalty {penalty:g}", group_dro(images, groups, penalty)


def jtt_weights(images: Images, penalty: float, factor: float) -> Array:
    """`factor` for images that a classifier with this penalty errs on, 1 for others, (N,) (Liu et al., ICML 2021)."""
    return np.where(fit(images, penalty).predict(images.features) == images.subjects, 1.0, factor)


def jtt(images: Images) -> Candidates:
    """Just train twice, at every combination of settings."""
    for first in FIRST_PENALTIES:
        for factor in FACTORS:
            weights = jtt_weights(images, first, factor)
            for penalty in PENALTIES:
                yield f"first {first:g}, factor {factor:g}, penalty {penalty:g}", fit(images, penalty, weights)


def even(subjects: Array, posterior: Array) -> Array:
    """Weights (N,) with a sum of N for which all groups of a subject weigh alike; `posterior` of groups is (N, E)."""
    weights = np.zeros(len(subjects))
    for subject in np.unique(subjects):
        own = posterior[subjects == subject]
        weights[subjects == subject] = (own / own.sum(axis=0)).sum(axis=1)
    return weights / weights.mean()


def group_figures(right: Array, groups: Array) -> dict[str, Any]:
    """Accuracy, that of the worst of `groups` (N,), and its 95% interval over images resampled within groups."""
    names, groups, counts = np.unique(groups, return_inverse=True, return_counts=True)
    shares = np.bincount(groups, right) / counts
    resampled = np.random.default_rng(0).binomial(counts, shares, (2000, len(counts))) / counts
    low, high = np.quantile(resampled.min(axis=1), (0.025, 0.975))
    named = dict(zip(names.tolist(), shares.tolist(), strict=True))
    return {"accuracy": float(right.mean()), "worst": float(shares.min()), "low": low, "high": high, "groups": named}


def chosen(
    candidates: Candidates,
    validation: tuple[Array, Array],
    groupings: Mapping[str, Array],
    test: tuple[Array, Array],
    groups: Array,
) -> dict[str, Any]:
    """Figures on the test images of the candidate with the best worst validation group, then accuracy, by grouping."""
    best: dict[str, tuple[tuple[float, float], str, LogisticRegression]] = {}
    for settings, model in candidates:
        right = model.predict(validation[0]) == validation[1]
        for name, grouping in groupings.items():
            figures = group_figures(right, grouping)
            quality = figures["worst"], figures["accuracy"]
            if name not in best or quality > best[name][0]:
                best[name] = quality, settings, model
    return {
        name: {"settings": settings, **group_figures(model.predict(test[0]) == test[1], groups)}
        for name, (_, settings, model) in best.items()
    }


class Study:
    """The test with one seed: of the training images, the models and the drawn images."""

    def __init__(self, source: Path, base: Path, work: Path, seed: int, per_prompt: int) -> None:
        self.suite, self.per_prompt = Suite.named(BENCHMARK), per_prompt
        self.world = self.suite.opened(source, base, work / BENCHMARK, seed)
        self.encoder, self.folder = EfficientNetLite(), self.world.work / FOLDER
        make = partial(worlds.waterbirds, source, held_out=True)
        severity, common = self.suite.world["severity"], work / BENCHMARK / FOLDER
        self.validation = load_captioned_images(
            make(common / "validation", num_images=NUM_VALIDATION, seed=VALIDATION_SEED, severity=severity)
        )
        self.test = load_captioned_images(make(common / "test", num_images=NUM_TEST, seed=TEST_SEED, severity=0.5))
        self.classes = sorted(set(self.world.prompts.values()))

    def described(self, name: str, images: Iterable[Image.Image]) -> Array:
        """Features of images, kept under a name."""
        path = self.folder / f"{name}.safetensors"
        if not path.is_file():
            write_arrays(path, {"features": self.encoder.extract(images)})
        return read_arrays(path)["features"]

    def real(self) -> dict[str, Images]:
        """The training images, as many balanced ones, validation and test images."""
        sets = {"biased": self.world.labelled, "balanced": self.world.balanced}
        sets |= {"validation": self.validation, "test": self.test}
        found = {name: self.described(name, map(data.image, range(len(data)))) for name, data in sets.items()}
        self.mean, self.scale = found["biased"].mean(axis=0), found["biased"].std(axis=0) + 1e-6
        return {name: self.images(found[name], of.attributes[self.world.subject]) for name, of in sets.items()}

    def images(self, features: Array, subjects: Sequence[str]) -> Images:
        """Images of weight 1, standardised as the training images are."""
        indices = np.array([self.classes.index(name) for name in subjects])
        return Images((features - self.mean) / self.scale, indices, np.ones(len(indices)))

    def drawn(self) -> Iterator[tuple[str, Images]]:
        """Images of every prompt by our guidance, groups spread evenly, and by the biased model: half, then all."""
        world, ours = self.world, self.suite.each()["steps-400"].fitted_by()
        for name, owner, method in (("steps-400", "ours", ours), ("plain", "the biased model's", Biased())):
            fitted = method.fit(world, world.work / name / "fitted")
            for scale in SCALES:
                config = GenerateConfig(
                    images_per_prompt=self.per_prompt,
                    guidance_scale=scale,
                    seed=2000 + world.seed,
                    batch_size=BATCH_SIZE,
                )
                folder = self.folder / f"{name}-{scale:g}"
                generate(
                    fitted.pipe, list(world.prompts), folder, module=fitted.guidance, config=config, progress=False
                )
                rows = read_images(folder)
                features = self.described(folder.name, (read_image(row.path) for row in rows))
                subjects = [world.prompts[row.prompt] for row in rows]
                for count in (self.per_prompt // 2, self.per_prompt):
                    own = [place for place in range(len(rows)) if place % self.per_prompt < count]
                    images = self.images(features[own], [subjects[place] for place in own])
                    yield f"{len(own)} of {owner}, CFG {scale:g}", images

    def audited(self) -> tuple[Array, Array]:
        """Probabilities of the audit's groups, (N, E): of the training images, and of the validation images."""
        path, world = self.folder / "audit.safetensors", self.world
        if not path.is_file():
            world.found.check_found()
            place = {name: row for row, name in enumerate(world.found.names)}
            training = world.found.group_weights[0][[place[name] for name in world.labelled.names]]
            eyes = AuditAnnotator(world.found_in, world.biased())
            seen = eyes.predict(map(self.validation.image, range(len(self.validation))))
            write_arrays(path, {"training": training, "validation": seen.probabilities[next(iter(eyes.attributes))]})
        found = read_arrays(path)
        return found["training"], found["validation"]

    def figures(self) -> dict[str, Any]:
        """Row to what it was given, and its figures by the way its settings were chosen."""
        world, (biased, balanced, validation, test) = self.world, self.real().values()
        posterior, of_validation = self.audited()
        true, groups, seen = (self.groups(data) for data in (world.labelled, self.validation, self.test))
        found = posterior.argmax(axis=1) + 10 * biased.subjects
        reweighted = replace(biased, weights=even(biased.subjects, posterior))
        names, places = np.unique(world.labelled.attributes[world.attribute], return_inverse=True)
        truly = replace(biased, weights=even(biased.subjects, np.eye(len(names))[places]))
        rows: dict[str, tuple[str, Callable[[], Candidates]]] = {
            "biased images": ("none", partial(erm, biased)),
            "JTT": ("none", partial(jtt, biased)),
            "reweighted by the audit's groups": ("none", partial(erm, reweighted)),
            "GroupDRO, the audit's groups": ("none", partial(group_dros, biased, found)),
            "reweighted by true groups": ("labels", partial(erm, truly)),
            "GroupDRO, true groups": ("labels", partial(group_dros, biased, true)),
            "balanced images": ("labels", partial(erm, balanced)),
        }
        for label, images in self.drawn():
            rows[f"biased images and {label}"] = "none", partial(erm, biased + images)
            if "ours" in label:
                rows[f"reweighted, and {label}"] = "none", partial(erm, reweighted + images)
                rows[f"{label}, alone"] = "none", partial(erm, images)
        groupings = {"audit": of_validation.argmax(axis=1) + 10 * validation.subjects, "true": groups}
        groupings["average"] = np.zeros(len(groups))
        held_out = (validation.features, validation.subjects), groupings, (test.features, test.subjects), seen
        figures = {}
        for label, (given, candidates) in rows.items():
            figures[label] = {"given": given, "chosen by": chosen(candidates(), *held_out)}
            print(label, {name: round(of["worst"], 3) for name, of in figures[label]["chosen by"].items()}, flush=True)
        return figures

    def groups(self, data: CaptionedImages) -> Array:
        """The true group of each image, such as "landbird x sea"."""
        columns = (data.attributes[name] for name in (self.world.subject, self.world.attribute))
        return np.array([" x ".join(values) for values in zip(*columns, strict=True)])


def table(results: Path = RESULTS) -> str:
    """The figures that are kept: means over seeds with the lowest and the highest, of one seed with its interval."""
    documents = list(kept(results / FOLDER).get(BENCHMARK, {}).values())
    if not documents:
        return "No figures are kept yet."

    def spread(row: str, by: str, name: str) -> str:
        found = [document["figures"][row]["chosen by"][by] for document in documents]
        values = [of[name] for of in found]
        ends = (found[0]["low"], found[0]["high"]) if len(found) == 1 else (min(values), max(values))
        text = f"{np.mean(values):.3f}"
        return text if name == "accuracy" else f"{text} ({ends[0]:.3f} to {ends[1]:.3f})"

    columns = [("audit", "accuracy"), ("audit", "worst"), ("true", "worst"), ("average", "worst")]
    head = ["trained on", "given", "accuracy", "worst group", "worst, chosen by true groups", "by average"]
    rows = documents[0]["figures"].items()
    return markdown_table(head, [[row, of["given"], *(spread(row, *each) for each in columns)] for row, of in rows])


def main() -> None:
    """Run the seeds that the command line names, unless their figures are kept, and print the table."""
    parser = parser_of(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="the folder of public images in parquet files")
    parser.add_argument("--base", type=Path, required=True, help="the pipeline that is fine-tuned on biased images")
    parser.add_argument("--work", type=Path, default=Path("out/benchmarks"), help="of the benchmark (%(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where figures are kept (benchmarks/results)")
    parser.add_argument("--seeds", default="0,1,2", help="(%(default)s)")
    parser.add_argument("--per-prompt", type=int, default=2000, help="images to draw of each prompt (%(default)s)")
    arguments = parser.parse_args()
    for seed in map(int, arguments.seeds.split(",")):
        path = arguments.results / FOLDER / f"{BENCHMARK}-seed-{seed}.json"
        if path.is_file():
            continue
        study = Study(arguments.data, arguments.base, arguments.work, seed, arguments.per_prompt)
        command = f"python benchmarks/augmentation.py --seeds {seed} --per-prompt {arguments.per_prompt}"
        keep(path, command, study.figures(), device=device())
    print(table(arguments.results))


if __name__ == "__main__":
    main()
