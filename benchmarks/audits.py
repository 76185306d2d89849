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

import fnmatch
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import judges
import kept
import numpy as np
import worlds
from judging import SURE, judged, learned, minority, supervised_auroc
from sklearn.metrics import roc_auc_score

from invdiff import (
    Audit,
    AuditConfig,
    EvaluateConfig,
    FinetuneConfig,
    TrainConfig,
    audit,
    evaluate,
    finetune,
    load_captioned_images,
    train,
)
from invdiff.assets import BIRDS_ANNOTATOR, BIRDS_MODEL
from invdiff.auditing.asking import read_by_model
from invdiff.auditing.evidence import collect_evidence
from invdiff.auditing.scores import Margins
from invdiff.data.birds import BirdsWorld, canonical_prompts
from invdiff.data.captioned import CaptionedImages
from invdiff.data.encode import as_encoded
from invdiff.evaluation.annotate import describe_images
from invdiff.evaluation.annotators.annotations import Annotator
from invdiff.evaluation.annotators.conv import ConvAnnotator
from invdiff.files import read_json
from invdiff.models.frozen import FrozenDenoiser
from invdiff.models.load import load_pipeline
from invdiff.sampling import own_images

COLUMNS = (
    *("world", "attribute", "worlds", "something found", "prompts split", "AUROC", "AP", "supervised AUROC"),
    *("margin's AUROC", "words' AUROC", "ARI", "calibration error", f"right above {SURE}", "forwards", "seconds"),
)
FINETUNE = FinetuneConfig(steps=1000, batch_size=64, learning_rate=2e-4)
LORA = TrainConfig(backend="lora", steps=400, batch_size=32, penalty=0.0)
"""Guidance for photographs."""
MODULE = TrainConfig(backend="module")
"""Guidance for drawn birds."""


@dataclass(frozen=True)
class Cell:
    """One audit of one world."""

    name: str
    """Its figures are kept under it. What stands before "-seed-" names a row of the table."""
    world: Callable[[Path], Path]
    """Writes the captioned images."""
    base: Path | None
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
    judge: Callable[[Path], Annotator] | None = None
    """Names the hidden attributes of the model's own images."""
    trained: dict[str, TrainConfig] = field(default_factory=dict)
    """How guidance is trained on what was found, by name; then Bias is measured without and with each."""
    scales: tuple[float, ...] = (1.0, 3.0, 7.5)
    """At which guidance scales."""


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


def own(source: Path, base: Path | None, work: Path) -> Iterator[Cell]:
    def bundled(folder: Path) -> ConvAnnotator:
        return ConvAnnotator.from_pretrained(BIRDS_ANNOTATOR)

    def of_photographs(folder: Path) -> Annotator:
        return judges.judge_of({"kind": "waterbirds"}, ["subject", "place"], source, work / "judges")[0]

    birds = BirdsWorld(200, seed=0).write  # for its captions
    options = {"own": 500, "judge": bundled, "trained": {"guided": MODULE}}
    yield Cell("drawn-birds", birds, BIRDS_MODEL, ("background",), **options)
    photos = partial(worlds.waterbirds, source, severity=0.95, seed=0)
    options = {"tuned": True, "own": 1000, "judge": of_photographs, "trained": {"guided": LORA}}
    yield Cell("waterbirds", photos, base, ("place",), **options)
    yield Cell("waterbirds-3000", photos, base, ("place",), **options | {"own": 3000})
    yield Cell("waterbirds-asked", photos, base, ("place",), ask={"place": ("forest", "sea")}, **options)


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

    def of_drawn(folder: Path) -> ConvAnnotator:
        even = worlds.drawn(folder, severity=0.5, seed=90)
        return ConvAnnotator.fit(load_captioned_images(even), [*three, "subject"])

    options = {"tuned": True, "judge": of_drawn, "trained": {"module": MODULE, "lora": LORA}}
    yield Cell("guided-three-attributes", worlds.drawn, BIRDS_MODEL, three, scales=(3.0,), **options)


RANKS = "auroc", "average_precision", "ceiling", "margin", "reading"
FIGURES = *RANKS, "adjusted_rand", "calibration_error", "sure_precision"
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
    if (path := kept.RESULTS / f"audits/{part}-{cell.name}.json").is_file():
        print(f"kept already, delete it to run anew: {path}")
        return
    if cell.base is None or not cell.base.is_dir():
        script = "scripts/train_benchmark_bases.py writes that of drawn birds"
        raise SystemExit(
            f"Expected a pipeline for {part} {cell.name}, got {cell.base}. Give --data and --base; {script}."
        )
    place, command = f"{part}-{cell.name.removesuffix('-tuned')}", f"python benchmarks/audits.py {part}"
    data = load_captioned_images(cell.world(work / "worlds" / place))
    unlabelled = replace(data, attributes={})
    if cell.tuned:
        pipe = finetune(unlabelled, work / "models" / place, base=cell.base, config=FINETUNE)
    else:
        pipe = load_pipeline(cell.base)
    cache = work / "cells" / f"{part}-{cell.name}"
    if part == "labels":
        sources = audit_features(pipe, unlabelled, cache)
        kept.keep(path, command, learned(sources, data, cell.hidden[0], cell.subject))
        return
    fresh, start, given = not cache.exists(), time.perf_counter(), {"data": unlabelled}
    if cell.own:
        given = {"prompts": canonical_prompts(), "config": AuditConfig(images_per_prompt=cell.own)}
    found = audit(pipe, **given, ask=cell.ask, cache_dir=cache)
    seconds = time.perf_counter() - start if fresh else None
    figures = {}
    if cell.judge:
        judge, audited = cell.judge(work / "worlds" / f"{place}-judge"), unlabelled
        if cell.own:
            audited = own_images(pipe, found.settings, cache)
            data = labelled_by(judge, audited, cell)
        figures["judge right, held out"] = judge.held_out.summary() if judge.held_out else None
        if cell.trained and found.biased:
            figures["bias"] = bias_of(pipe, audited, found, judge, cell, cache)
    figures |= judged(found, data, cell.hidden, cell.subject)
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
    figures |= {"images": len(data), "seconds": seconds, "device": kept.device()}
    kept.keep(path, command, figures, tuned=FINETUNE.to_dict() if cell.tuned else None)
    shutil.rmtree(cache)


def labelled_by(judge: Annotator, images: CaptionedImages, cell: Cell) -> CaptionedImages:
    """A model's own images with the hidden attributes that a judge sees, and the subject of their prompts."""
    seen = describe_images((images.image(row) for row in range(len(images))), judge)
    labels = {name: [judge.attributes[name][at] for at in seen.classes[name]] for name in cell.hidden}
    subjects = [caption.split()[-1] for caption in images.captions]
    return replace(images, attributes=labels | {cell.subject: subjects})


def bias_of(
    pipe: Any, data: CaptionedImages, found: Audit, judge: Annotator, cell: Cell, work: Path
) -> dict[str, Any]:
    """Bias with and without guidance trained on an audit, 256 images of each prompt and guidance scale."""
    models: dict[str, Any] = {"base": None}
    for name, config in cell.trained.items():
        models[name] = train(pipe, data, found, work / name, config=config, cache_dir=work)
    prompts, figures = [prompt.prompt for prompt in found.prompts], {}
    folders = kept.drawn(work, pipe, prompts, models, cell.scales, images_per_prompt=256)
    for hidden in cell.hidden:
        results = evaluate(folders, judge, hidden, config=EvaluateConfig(subject_attribute=cell.subject))
        for name, scale, measures in results.each():
            bias = measures.bias_estimate
            key = f"{name}, CFG {scale}" if len(cell.hidden) == 1 else f"{hidden}: {name}, CFG {scale}"
            figures[key] = {"bias": bias.value, "low": bias.low, "high": bias.high, "floor": bias.floor}
            figures[key]["subject accuracy"] = measures.accuracy
    return figures


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
            sections.append(f"### {part}\n\n{kept.markdown_table(COLUMNS, rows_of(kinds))}")
    return "\n\n".join(sections)


def rows_of(kinds: dict[str, list[dict]]) -> Iterator[list[str]]:
    """A row of `COLUMNS` for each hidden attribute of each kind of world."""
    for kind, cells in kinds.items():
        end = [over(cells, "forwards_per_image", 1), over(cells, "seconds", 0)]
        for attribute in cells[0].get("hidden", {"": None}):
            rows = [row for cell in cells for row in cell.get("hidden", {}).get(attribute, ())]
            splits = f"{sum(row['found'] for row in rows)} of {len(rows)}" if rows else ""
            begin = [kind, attribute, str(len(cells)), str(sum(cell["found"] for cell in cells)), splits]
            yield [*begin, *(over(rows, name) for name in FIGURES), *end]


def over(rows: list[dict], name: str, digits: int = 3) -> str:
    """Mean of a figure, and its range where it varies; empty where no row has it."""
    values = [row[name] for row in rows if row.get(name) is not None]
    if not values:
        return ""
    mean, low, high = (f"{value:.{digits}f}" for value in (np.mean(values), min(values), max(values)))
    return mean if low == high else f"{mean} ({low} to {high})"


def main() -> None:
    parser = kept.parser_of(__doc__)
    parser.add_argument("part", choices=(*PARTS, "table"))
    parser.add_argument("--data", type=Path, help="the folder of public images in parquet files")
    parser.add_argument("--base", type=Path, help="the pipeline to audit and fine-tune")
    parser.add_argument("--work", type=Path, default=Path("out/audits"))
    parser.add_argument("--cells", default="*", help="a pattern of names, such as '0.95-*-tuned'")
    arguments = parser.parse_args()
    if arguments.base and not arguments.data:
        raise SystemExit("Expected --data beside --base, got none.")
    if arguments.part == "table":
        print(table())
        return
    for cell in PARTS[arguments.part](arguments.data, arguments.base, arguments.work):
        if fnmatch.fnmatch(cell.name, arguments.cells):
            run(arguments.part, cell, arguments.work)


if __name__ == "__main__":
    main()
