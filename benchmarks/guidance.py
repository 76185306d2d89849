"""What guidance of each backend does to a model fine-tuned on biased photographs.

    python benchmarks/guidance.py waterbirds --data SOURCE --base MODEL     # every cell that has no figures yet
    python benchmarks/guidance.py table                                     # all figures kept so far, in Markdown

The model is fine-tuned on Waterbirds at severity .95 (see worlds.py for SOURCE), groups are those that `invdiff audit`
finds in its training images, or the true ones, and a classifier fitted on held-out images, balanced, is the judge.
Every image draws its group independently. Settings were chosen on other seeds of the world and judged by the audit.
"""

import fnmatch
import time
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import worlds
from audits import FINETUNE, LORA
from kept import RESULTS, cell_arguments, keep

from invdiff import EvaluateConfig, GenerateConfig, TrainConfig, audit, evaluate, finetune, generate, train
from invdiff import load_captioned_images as load
from invdiff.data.birds import SUBJECTS
from invdiff.evaluation.annotate import describe_images
from invdiff.evaluation.annotators.audited import AuditAnnotator
from invdiff.evaluation.annotators.conv import ConvAnnotator
from invdiff.evaluation.images import read_images
from invdiff.files import read_json

PROMPTS = [f"a photo of a {subject}" for subject in SUBJECTS]
SCALES = (1.0, 3.0, 7.5)
IMAGES = 256
"""Of each prompt and guidance scale."""


@dataclass(frozen=True)
class Cell:
    """One way to guide, trained and drawn with one seed."""

    name: str
    config: TrainConfig | None = None
    """None: the biased model alone."""
    groups: str = "audit"
    """`audit`: those inferred without labels. `true`: the labels."""
    balanced: bool = False
    """Fine-tune the base on a balanced set of as many images instead: the ceiling."""
    seed: int = 0
    changes: dict[str, Any] = field(default_factory=dict)


CELLS = (
    Cell("base"),
    Cell("lora-audit", LORA),
    Cell("lora-true", LORA, groups="true"),
    Cell("lora-audit-null-on", replace(LORA, null_adapter="on")),
    Cell("module-audit", TrainConfig(backend="module", steps=600, batch_size=32, penalty=0.0)),
    Cell("ceiling", balanced=True),
    Cell("lora-audit-no-purity", replace(LORA, purity=0.0)),
    Cell("lora-audit-1000", replace(LORA, steps=1000, learning_rate=1e-3)),
)


def run(cell: Cell, source: Path, base: Path, work: Path) -> None:
    """Train, draw, judge, and keep the figures, unless they are there."""
    if (RESULTS / f"guidance/waterbirds-{cell.name}.json").is_file():
        return
    severity = 0.5 if cell.balanced else 0.95
    world = worlds.waterbirds(source, work / "worlds" / f"{severity:g}", severity=severity, seed=0)
    data, place = load(world), work / "models" / f"{severity:g}"
    unlabelled, shared = replace(data, attributes={}), work / "cache"
    pipe = finetune(unlabelled, place, base=base, config=FINETUNE)
    judge, real = judge_of(source, work)
    module, cost = None, {}
    if cell.config is not None:
        found = audit(pipe, data, attribute="place", cache_dir=shared) if cell.groups == "true" else None
        found = found or audit(pipe, unlabelled, cache_dir=shared)
        found.save(work / "audits" / cell.groups)
        start, config = time.perf_counter(), replace(cell.config, seed=cell.seed)
        module = train(pipe, unlabelled, found, work / "trained" / cell.name, config=config, cache_dir=shared)
        cost = {"trained parameters": module.num_parameters(), "training seconds": time.perf_counter() - start}
    folders = []
    for scale in SCALES:
        config = GenerateConfig(images_per_prompt=IMAGES, guidance_scale=scale, seed=cell.seed)
        folder = work / "images" / f"{cell.name}-{scale:g}"
        folders.append(generate(pipe, PROMPTS, folder, module=module, config=config, environments="iid"))
    results = evaluate(
        {cell.name: folders}, judge, "place", reference=real, config=EvaluateConfig(subject_attribute="subject")
    )
    figures: dict[str, Any] = {
        f"CFG {scale}": {"bias": bias.value, "low": bias.low, "high": bias.high, "floor": bias.floor}
        | {"subject right": measures.accuracy, "worst cell": worst_cell(folder, judge)}
        | {name: value.value for name, value in measures.quality.items()}
        for (_, scale, measures), folder in zip(results.each(), folders, strict=True)
        for bias in [measures.bias_estimate]
    }
    if (work / "audits" / "audit").is_dir() and not cell.balanced:
        eyes = AuditAnnotator(work / "audits" / "audit", pipe)
        seen = evaluate({cell.name: folders}, eyes, next(iter(eyes.attributes)))
        for _, scale, measures in seen.each():
            figures[f"CFG {scale}"]["bias by the audit"] = measures.bias_estimate.value
    accuracy = judge.held_out.summary() if judge.held_out else None
    about = {"images": IMAGES, "seed": cell.seed, "groups": cell.groups, "judge right, held out": accuracy} | cost
    settings = cell.config and cell.config.to_dict()
    command = "python benchmarks/guidance.py waterbirds"
    keep("guidance/waterbirds", cell.name, figures | about, command=command, settings=settings)


@cache
def judge_of(source: Path, work: Path) -> tuple[ConvAnnotator, Any]:
    """The judge and the balanced real images that it was fitted on, held out from everything else."""
    settings = {"num_images": 2000, "severity": 0.5, "seed": 1, "held_out": True}
    real = load(worlds.waterbirds(source, work / "worlds" / "held-out", **settings))
    if not (work / "judge").is_dir():
        ConvAnnotator.fit(real, ["place", "subject"]).save_pretrained(work / "judge")
    return ConvAnnotator.from_pretrained(work / "judge"), real


def worst_cell(folder: Path, judge: ConvAnnotator) -> float:
    """The least share, over prompts and places, of images of the prompt that show its subject there, doubled.

    1 where half of each prompt's images show its bird in the forest and half on the sea, 0 where one of both is never.
    """
    rows = read_images(folder)
    seen = describe_images(rows, judge, progress=False)
    named = {name: np.array(judge.attributes[name])[seen.classes[name]] for name in ("place", "subject")}
    prompts = np.array([row.prompt for row in rows])
    return min(
        2 * ((named["subject"] == subject) & (named["place"] == place))[prompts == prompt].mean()
        for prompt, subject in zip(PROMPTS, SUBJECTS, strict=True)
        for place in worlds.PLACES.values()
    )


def table() -> str:
    """Rows of a Markdown table."""
    names = ("bias", "bias by the audit", "subject right", "worst cell", "Frechet distance (judge)")
    lines = ["| guidance | parameters | " + " | ".join(names) + " |", "|---" * (2 + len(names)) + "|"]
    for cell in CELLS:
        path = RESULTS / f"guidance/waterbirds-{cell.name}.json"
        if not path.is_file():
            continue
        kept = read_json(path)["figures"]
        cells = [" / ".join(f"{kept[f'CFG {scale}'][name]:.2f}" for scale in SCALES) for name in names]
        lines.append(f"| {cell.name} | {kept.get('trained parameters', 0):,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    arguments = cell_arguments(__doc__ or "", ["waterbirds"], work="out/guidance")
    if arguments.part == "table":
        print(table())
        return
    for cell in CELLS:
        if fnmatch.fnmatch(cell.name, arguments.cells):
            run(cell, arguments.data, arguments.base, arguments.work)


if __name__ == "__main__":
    main()
