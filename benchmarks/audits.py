"""What the audit finds in worlds whose hidden attributes are known, and what it finds where nothing is hidden.

    python benchmarks/audits.py waterbirds --data SOURCE --base MODEL   # real birds on real places, place hidden
    python benchmarks/audits.py nulls --data SOURCE --base MODEL        # 100 worlds in which nothing is associated
    python benchmarks/audits.py faces --data SOURCE --base MODEL        # age, race or gender hidden in faces
    python benchmarks/audits.py two --data SOURCE --base MODEL          # place and light hidden at once
    python benchmarks/audits.py labels --data SOURCE --base MODEL       # an attribute of all images from 40 labels
    python benchmarks/audits.py own --data SOURCE --base MODEL          # no data: a biased model's own images
    python benchmarks/audits.py words --data SOURCE --base MODEL        # place, gender, age: MODEL reads the words
    python benchmarks/audits.py drawn                                   # drawn birds, one or three attributes hidden
    python benchmarks/audits.py table                                   # all figures kept so far, in Markdown

SOURCE is the folder of parquet files that benchmarks/worlds.py describes, MODEL a pipeline such as photo-sd64. `drawn`
needs the two further bases of scripts/train_benchmark_bases.py in --work.

A part is a list of cells. Each cell's figures are kept in benchmarks/results/audits/ when it ends, and a cell that is
kept is not run again; --cells takes those whose names match a pattern. The audit is given no attribute: labels judge.
"""

import argparse
import fnmatch
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import kept
import numpy as np
import torch
import worlds
from scipy.optimize import linear_sum_assignment
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import adjusted_rand_score, average_precision_score, roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict

from invdiff import (
    Audit,
    AuditConfig,
    EvaluateConfig,
    FinetuneConfig,
    GenerateConfig,
    audit,
    evaluate,
    finetune,
    generate,
    load_captioned_images,
    train,
)
from invdiff.assets import BIRDS_ANNOTATOR, BIRDS_MODEL
from invdiff.auditing.asking import read_by_model
from invdiff.auditing.evidence import collect_evidence
from invdiff.auditing.probe import DIMENSIONS, logits_of, spread_labels
from invdiff.auditing.scores import Margins
from invdiff.data.birds import SUBJECTS, BirdsWorld
from invdiff.data.captioned import CaptionedImages
from invdiff.data.encode import as_encoded
from invdiff.errors import ConfigError
from invdiff.evaluation.annotate import describe_images
from invdiff.evaluation.annotators.conv import ConvAnnotator
from invdiff.files import read_json
from invdiff.models.frozen import FrozenDenoiser
from invdiff.models.load import load_pipeline
from invdiff.sampling import own_images

SURE = 0.99
"""A posterior above which an image is certainly of the rare group, if the posteriors are right."""
COLUMNS = (
    "world",
    "attribute",
    "worlds",
    "something found",
    "prompts split",
    "AUROC",
    "AP",
    "supervised AUROC",
    "margin's AUROC",
    "words' AUROC",
    "ARI",
)
COLUMNS += ("calibration error", f"right above {SURE}", "forwards", "seconds")
LABEL_DRAWS = 20
FINETUNE = FinetuneConfig(steps=1000, batch_size=64, learning_rate=2e-4)
SHORT = replace(FINETUNE, steps=600, mixed_precision="bf16")
"""Of a model whose own images are audited: enough to be biased."""


@dataclass(frozen=True)
class Cell:
    """One audit of one world."""

    name: str
    """Its figures are kept under it. What stands before "-seed-" names a row of the table."""
    world: Callable[[Path], Path]
    """Writes the captioned images."""
    base: Path
    """The pipeline."""
    hidden: tuple[str, ...] = ()
    """Hidden attributes that the result is judged by; none in a null world."""
    subject: str = "subject"
    """The attribute that captions name."""
    tuned: bool = False
    """Whether the pipeline is first fine-tuned on the world."""
    ask: dict[str, tuple[str, str]] = field(default_factory=dict)
    """The words that hidden attributes are asked for in, by name; others are sought."""
    ceiling: bool = False
    """Whether a supervised probe of each hidden attribute is fitted too, and the margin judged in any case."""

    own: int = 0
    """Images of each caption that the model draws: they are audited instead of the world, if any."""
    judge: Callable[[Path], ConvAnnotator] | None = None
    """Names the hidden attributes of the model's own images."""
    trained: bool = False
    """Whether a module is trained on what was found, and Bias measured before and after."""

    @property
    def world_name(self) -> str:
        """The same for cells of one world."""
        return self.name.removesuffix("-tuned")


def waterbirds(source: Path, base: Path, work: Path) -> Iterator[Cell]:
    for severity in (0.8, 0.9, 0.95, 0.98):
        for seed in range(3):
            world = partial(worlds.waterbirds, source, severity=severity, seed=seed)
            yield from both(f"{severity:g}-seed-{seed}", world, base, hidden=("place",))
    for seed in range(3):
        world = partial(worlds.waterbirds, source, severity=0.95, seed=seed, free=True)
        yield Cell(f"free-captions-seed-{seed}", world, base, hidden=("place",))


def both(name: str, world: Callable[[Path], Path], base: Path, **options: Any) -> Iterator[Cell]:
    """The base as it is, and fine-tuned on the world."""
    yield Cell(name, world, base, **options)
    yield Cell(f"{name}-tuned", world, base, tuned=True, **options)


def nulls(source: Path, base: Path, work: Path) -> Iterator[Cell]:
    for seed in range(100):
        kind = list(worlds.NULLS)[seed % len(worlds.NULLS)]
        name = kind.replace(",", "").replace(" ", "-")
        yield Cell(f"{name}-seed-{seed}", partial(worlds.null, source, kind=kind, seed=seed), base)


def faces(source: Path, base: Path, work: Path) -> Iterator[Cell]:
    for captions, hidden in (("gender", "age"), ("gender", "race"), ("age", "gender")):
        world = partial(worlds.fairface, source, captions=captions, hidden=hidden)
        yield from both(f"{hidden}-in-{captions}", world, base, hidden=(hidden,), subject=captions, ceiling=True)


def few_labels(source: Path, base: Path, work: Path) -> Iterator[Cell]:
    world = partial(worlds.waterbirds, source, severity=0.95, seed=7, num_images=1500)
    yield Cell("place-seed-7", world, base, ("place",))
    for captions, hidden in (("gender", "race"), ("age", "gender"), ("gender", "age")):
        world = partial(worlds.fairface, source, captions=captions, hidden=hidden, seed=7, num_images=1500)
        yield Cell(f"{hidden}-in-{captions}-seed-7", world, base, (hidden,), captions)


def two(source: Path, base: Path, work: Path) -> Iterator[Cell]:
    for seed in range(3):
        world = partial(worlds.waterbirds, source, severity=0.9, tint=0.9, seed=seed)
        yield from both(f"place-and-tint-seed-{seed}", world, base, hidden=("place", "tint"))


def own(source: Path, base: Path, work: Path) -> Iterator[Cell]:
    def bundled(folder: Path) -> ConvAnnotator:
        return ConvAnnotator.from_pretrained(BIRDS_ANNOTATOR)

    def of_held_out(folder: Path) -> ConvAnnotator:
        settings = {"num_images": 2000, "severity": 0.5, "seed": 1, "held_out": True}
        labelled = load_captioned_images(worlds.waterbirds(source, folder, **settings))
        return ConvAnnotator.fit(labelled, ["place", "subject"])

    birds = BirdsWorld(200, seed=0).write  # for its captions
    yield Cell("drawn-birds", birds, BIRDS_MODEL, ("background",), own=500, judge=bundled, trained=True)
    photos = partial(worlds.waterbirds, source, severity=0.95, seed=0)
    yield Cell("waterbirds", photos, base, ("place",), tuned=True, own=1000, judge=of_held_out)


def words(source: Path, base: Path, work: Path) -> Iterator[Cell]:
    """The base is its own reader, of 1,000 images or of 400."""
    birds = partial(worlds.waterbirds, source, num_images=1000, severity=0.95)
    yield Cell("place", birds, base, ("place",), ask={"place": ("forest", "sea")}, ceiling=True)
    for captions, hidden, values in (("age", "gender", ("man", "woman")), ("gender", "age", ("young", "old"))):
        people = partial(worlds.fairface, source, captions=captions, hidden=hidden, num_images=400)
        yield Cell(hidden, people, base, (hidden,), captions, ask={hidden: values}, ceiling=True)


def drawn(source: Path | None, base: Path | None, work: Path) -> Iterator[Cell]:
    def birds(number: int, **settings: Any) -> Callable[[Path], Path]:
        return BirdsWorld(number, **settings).write

    for seed in (511, 512, 513):
        yield Cell(f"two-prompts-seed-{seed}", birds(3000, seed=seed), BIRDS_MODEL, ("background",))
    for seed in range(700, 710):
        yield Cell(f"fair-seed-{seed}", birds(3000, seed=seed, severity=0.5), work / "base-fair")
    for seed in (611, 612, 613):
        world = birds(3000, seed=seed, severity=0.85, world="one-prompt")
        yield Cell(f"one-prompt-seed-{seed}", world, work / "base-one-prompt", ("background",))
    for seed in range(3):
        three = ("background", "colour", "light")
        yield Cell(f"three-attributes-seed-{seed}", partial(worlds.drawn, seed=seed), BIRDS_MODEL, three)


PARTS: dict[str, Callable[..., Iterator[Cell]]] = {
    "waterbirds": waterbirds,
    "nulls": nulls,
    "faces": faces,
    "two": two,
    "labels": few_labels,
    "own": own,
    "words": words,
    "drawn": drawn,
}


def run(part: str, cell: Cell, work: Path) -> None:
    """Audit one world, judge the result and keep the figures, unless they are there."""
    if (kept.RESULTS / f"audits/{part}-{cell.name}.json").is_file():
        return
    if not cell.base.is_dir():
        raise ConfigError(f"Expected a pipeline in {cell.base}, found none. See the top of benchmarks/audits.py.")
    place = f"{part}-{cell.world_name}"
    data = load_captioned_images(cell.world(work / "worlds" / place))
    unlabelled = replace(data, attributes={})
    if cell.tuned:
        pipe = finetune(unlabelled, work / "models" / place, base=cell.base, config=SHORT if cell.own else FINETUNE)
    else:
        pipe = load_pipeline(cell.base)
    if part == "labels":
        figures = learned(audit_features(pipe, unlabelled, work / "cells" / f"{part}-{cell.name}"), data, cell)
        kept.keep(f"audits/{part}", cell.name, figures, command=f"python benchmarks/audits.py {part}")
        return
    cache = work / "cells" / f"{part}-{cell.name}"
    fresh, start = not cache.exists(), time.perf_counter()
    if cell.own:
        prompts = [f"a photo of a {subject}" for subject in SUBJECTS]
        found = audit(pipe, prompts=prompts, config=AuditConfig(images_per_prompt=cell.own), cache_dir=cache)
    else:
        found = audit(pipe, unlabelled, ask=cell.ask, cache_dir=cache)
    seconds = time.perf_counter() - start if fresh else None
    figures = {}
    if cell.own:
        judge = cell.judge(work / "worlds" / f"{place}-judge")
        data = labelled_by(judge, own_images(pipe, found.settings, cache), cell)
        figures["judge right, held out"] = judge.held_out.summary() if judge.held_out else None
        if cell.trained and found.biased:
            figures["bias"] = bias_of(pipe, found, judge, cell, cache)
    figures |= judged(found, data, cell)
    if cell.ceiling:
        sources = audit_features(pipe, unlabelled, cache)
        margins = Margins(sources, found.prompt_ids)
        read = words_read(pipe, unlabelled, cell, cache)
        for name, prompts in figures["hidden"].items():
            rare = minority(data.attributes[name], data.attributes[cell.subject])
            for index, row in enumerate(prompts):
                mine = found.prompt_ids == index
                row["ceiling"] = supervised_auroc([source[mine] for source in sources], rare[mine])
                against = margins.scores(index, {k: found.prompts[k].prompt for k in range(len(found.prompts))})
                if name in cell.ask:
                    last = np.array(data.attributes[name])[mine] == cell.ask[name][-1]
                    row["reading"] = roc_auc_score(last, read[name][mine])
                row["margin"] = roc_auc_score(rare[mine], against[0].mean) if against else None
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "one CPU core"
    figures |= {"images": len(data), "seconds": seconds, "device": device}
    command = f"python benchmarks/audits.py {part}"
    kept.keep(
        f"audits/{part}",
        cell.name,
        figures,
        command=command,
        tuned=(SHORT if cell.own else FINETUNE).to_dict() if cell.tuned else None,
    )
    shutil.rmtree(cache)


def labelled_by(judge: ConvAnnotator, images: CaptionedImages, cell: Cell) -> CaptionedImages:
    """A model's own images with the hidden attributes that a judge sees, and the subject of their prompts."""
    seen = describe_images((images.image(row) for row in range(len(images))), judge)
    labels = {name: [judge.attributes[name][at] for at in seen.classes[name]] for name in cell.hidden}
    subjects = [caption.split()[-1] for caption in images.captions]
    return replace(images, attributes=labels | {cell.subject: subjects})


def bias_of(pipe: Any, found: Audit, judge: ConvAnnotator, cell: Cell, work: Path) -> dict[str, Any]:
    """Bias with and without a module trained on an audit, at guidance scales 1 and 3, 96 images of each prompt."""
    module = train(pipe, None, found, work / "module", cache_dir=work)
    folders: dict[str, list[Path]] = {"base": [], "guided": []}
    for scale in (1.0, 3.0):
        config = GenerateConfig(images_per_prompt=96, guidance_scale=scale)
        for name, used in (("base", None), ("guided", module)):
            prompts = found.settings["own_images_of"]
            folders[name].append(generate(pipe, prompts, work / f"{name}-{scale:g}", module=used, config=config))
    results = evaluate(folders, judge, cell.hidden[0], config=EvaluateConfig(subject_attribute=cell.subject))
    return {
        f"{name}, CFG {scale}": {"bias": bias.value, "low": bias.low, "high": bias.high, "floor": bias.floor}
        | {"subject accuracy": measures.accuracy}
        for name, scale, measures in results.each()
        for bias in [measures.bias_estimate]
    }


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


def judged(found: Audit, data: CaptionedImages, cell: Cell) -> dict[str, Any]:
    """What was found, and its agreement with each hidden attribute under each prompt.

    An attribute is judged by the factor whose scores follow it best; no factor is taken for two attributes.
    """
    captions = [prompt.prompt for prompt in found.prompts]
    figures: dict[str, Any] = {
        "found": found.biased,
        "factors": [
            {"matched": factor.matched, "shares": {captions[split.prompt]: split.shares for split in factor.splits}}
            for factor in found.factors
        ],
        "prompts": [
            {name: getattr(prompt, name) for name in ("prompt", "captions", "num_images", "found", "reason", "power")}
            for prompt in found.prompts
        ],
        "forwards_per_image": found.forwards_per_image,
    }
    if not cell.hidden:
        return figures
    row_of = {name: row for row, name in enumerate(data.names)}
    rows = [row_of[name] for name in found.names]
    judgements = []
    for name in cell.hidden:
        rare = minority(data.attributes[name], data.attributes[cell.subject])[rows]
        judgements.append([agreement(found, factor, rare) for factor in range(len(found.scores))])
    follows = [[np.mean([row["auroc"] or 0.5 for row in one]) for one in factors] for factors in judgements]
    factor_of = dict(zip(*linear_sum_assignment(follows, maximize=True), strict=True))
    missed = [{"prompt": caption, "found": False} for caption in captions]
    return figures | {
        "hidden": {
            name: judgements[index][factor_of[index]] if index in factor_of else missed
            for index, name in enumerate(cell.hidden)
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


def audit_features(pipe: Any, data: CaptionedImages, cache: Path) -> list[np.ndarray]:
    """The whitened features, (N, d) of each block and noise level, that the audit with this cache has read."""
    encoded = as_encoded(pipe, data, cache)
    with FrozenDenoiser(pipe, upper=True) as frozen:
        evidence = collect_evidence(frozen, encoded, AuditConfig(), work_dir=cache / "evidence")
    return evidence.whitened(AuditConfig().seed)


def words_read(pipe: Any, data: CaptionedImages, cell: Cell, cache: Path) -> dict[str, np.ndarray]:
    """How much more images look like the last value than like others, (N,), as the audit with this cache read it."""
    encoded, config = as_encoded(pipe, data, cache), AuditConfig()
    with FrozenDenoiser(pipe) as frozen:
        prompts = np.zeros(len(encoded.captions), dtype=int)
        read, _ = read_by_model(pipe, frozen, encoded, prompts, cell.ask, config, work_dir=cache / "asked")
    return {reading.name: reading.scores.mean(axis=0)[:, -1] for reading in read}


def supervised_auroc(sources: Sequence[np.ndarray], truth: np.ndarray) -> float:
    """AUROC, out of fold, of the mean of a logistic regression of the truth (n,) bool on each source (n, d)."""
    probe = LogisticRegression(C=1e-2, class_weight="balanced", max_iter=1000)
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    logits = [cross_val_predict(probe, source, truth, cv=folds, method="decision_function") for source in sources]
    return float(roc_auc_score(truth, np.mean(logits, axis=0)))


def learned(sources: Sequence[np.ndarray], data: CaptionedImages, cell: Cell) -> dict[str, Any]:
    """How well 40 labels, drawn evenly over prompts and values, tell a hidden attribute of the other images.

    AUROC of one value against the others under one prompt, a mean over both; over `LABEL_DRAWS` draws the mean and
    standard deviation. Beside it, of the same images: the margin alone, turned as the truth would have it; labels
    alone, by logistic regression of the same features; and the ceiling, a probe of all labels.
    """
    (name,) = cell.hidden
    prompt = np.unique(data.attributes[cell.subject], return_inverse=True)[1]
    values, truth = np.unique(data.attributes[name], return_inverse=True)
    margins = Margins(sources, prompt).of_pairs()
    features = np.concatenate([source[:, :DIMENSIONS] for source in sources], axis=1)
    cells = [np.flatnonzero((prompt == p) & (truth == e)) for p in (0, 1) for e in range(len(values))]

    def auroc(scores: np.ndarray, rest: np.ndarray) -> float:
        of = [(rest & (prompt == p), e) for p in (0, 1) for e in range(len(values))]
        return float(np.mean([roc_auc_score(truth[rows] == e, scores[rows, e]) for rows, e in of]))

    each = [(prompt == p, e) for p in (0, 1) for e in range(len(values))]
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


def table() -> str:
    """All figures that are kept, one row for each kind of world: means, and the lowest to the highest."""
    sections = []
    for part in [name for name in PARTS if name != "labels"]:  # whose figures are of another kind
        kinds: dict[str, list[dict]] = {}
        for path in sorted((kept.RESULTS / "audits").glob(f"{part}-*.json")):
            name = path.stem.removeprefix(f"{part}-")
            kind = name.removesuffix("-tuned").partition("-seed-")[0]
            kinds.setdefault(kind + ", fine-tuned" * name.endswith("-tuned"), []).append(read_json(path)["figures"])
        if kinds:
            sections.append("\n".join([f"### {part}", "", *section(kinds)]))
    return "\n\n".join(sections)


def section(kinds: dict[str, list[dict]]) -> Iterator[str]:
    """Rows of a Markdown table."""
    yield f"| {' | '.join(COLUMNS)} |"
    yield "|---" * len(COLUMNS) + "|"
    for kind, cells in kinds.items():
        of_cells = [f"{sum(cell['found'] for cell in cells)}"]
        end = [over(cells, "forwards_per_image", 1), over(cells, "seconds", 0)]
        for attribute in cells[0].get("hidden", {"": None}):
            rows = [row for cell in cells for row in cell.get("hidden", {}).get(attribute, ())]
            splits = f"{sum(row['found'] for row in rows)} of {len(rows)}" if rows else ""
            figures = (
                "auroc",
                "average_precision",
                "ceiling",
                "margin",
                "reading",
                "adjusted_rand",
                "calibration_error",
                "sure_precision",
            )
            middle = [splits, *(over(rows, name) for name in figures)]
            yield "| " + " | ".join([kind, attribute, str(len(cells)), *of_cells, *middle, *end]) + " |"


def over(rows: list[dict], name: str, digits: int = 3) -> str:
    """Mean of a figure, and its range where it varies; empty where no row has it."""
    values = [row[name] for row in rows if row.get(name) is not None]
    if not values:
        return ""
    mean, low, high = (f"{value:.{digits}f}" for value in (np.mean(values), min(values), max(values)))
    return mean if low == high else f"{mean} ({low} to {high})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=(*PARTS, "table"))
    parser.add_argument("--data", type=Path, help="the folder of public images in parquet files")
    parser.add_argument("--base", type=Path, help="the pipeline to audit and fine-tune")
    parser.add_argument("--work", type=Path, default=Path("out/audits"))
    parser.add_argument("--cells", default="*", help="a pattern of names, such as '0.95-*-tuned'")
    arguments = parser.parse_args()
    if arguments.part == "table":
        print(table())
        return
    if arguments.part != "drawn" and not (arguments.data and arguments.base):
        parser.error(f"part {arguments.part} needs --data and --base")
    for cell in PARTS[arguments.part](arguments.data, arguments.base, arguments.work):
        if fnmatch.fnmatch(cell.name, arguments.cells):
            run(arguments.part, cell, arguments.work)


if __name__ == "__main__":
    main()
