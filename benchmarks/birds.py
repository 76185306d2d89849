"""The full table on the bundled world. Each part prints its figures and keeps them in benchmarks/results/.

    python benchmarks/birds.py groups        # hidden groups found, three seeds of data
    python benchmarks/birds.py no-bias       # nothing found where nothing is hidden, ten seeds
    python benchmarks/birds.py one-prompt    # a minority under a single caption
    python benchmarks/birds.py bias          # base, balanced, invariant over guidance scales, 512 images a prompt
    python benchmarks/birds.py explicit      # captions that state the background keep it
    python benchmarks/birds.py paraphrases   # captions never trained on are balanced too
    python benchmarks/birds.py strength      # Bias over scale 0, 0.5, 1

`no-bias` and `one-prompt` need a base of their own: see scripts/train_benchmark_bases.py.
Work is kept in out/benchmark (or --work), so a stopped run goes on.
"""

import argparse
import platform
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from invdiff import AuditConfig, GenerateConfig, TrainConfig, audit, evaluate, generate, load_captioned_images, train
from invdiff.assets import BIRDS_ANNOTATOR, BIRDS_MODEL
from invdiff.data.birds import (
    BACKGROUNDS,
    BirdsWorld,
    canonical_prompts,
    explicit_prompts,
    held_out_prompts,
)
from invdiff.demo import hidden_truth
from invdiff.evaluation.annotators import ConvAnnotator
from invdiff.files import write_json
from invdiff.pipelines import denoiser_of, load_pipeline

RESULTS = Path(__file__).parent / "results"
GUIDANCE_SCALES = (1.0, 3.0, 7.5)
NUM_IMAGES = 3000
INVARIANT_STEPS = 1500


def world_data(work: Path, seed: int, *, severity: float = 0.95, world: str = "two-prompts"):
    """Return a captioned set on disk, drawn apart from what the base was trained on unless seed is 0."""
    folder = work / f"{world}-{severity:g}-seed-{seed}"
    return load_captioned_images(BirdsWorld(NUM_IMAGES, severity=severity, seed=seed, world=world).write(folder))


def find(work: Path, model: Path, data, config: AuditConfig | None = None):
    return audit(load_pipeline(model), data, cache_dir=work / "cache", config=config)


def module(work: Path, mode: str, seed: int = 0):
    """Return a module trained on the groups found without labels in the demo's data."""
    pipe, data = load_pipeline(BIRDS_MODEL), world_data(work, 0)
    found = find(work, BIRDS_MODEL, data)
    config = TrainConfig(mode=mode, seed=seed, **({"steps": INVARIANT_STEPS} if mode == "invariant" else {}))
    folder = work / f"module-{mode}-seed-{seed}"
    return pipe, train(pipe, data, found, folder, config=config, cache_dir=work / "cache")


def judge(folders: dict) -> dict:
    annotator = ConvAnnotator.from_pretrained(BIRDS_ANNOTATOR)
    reference = BirdsWorld(2000, severity=0.5, seed=424242)
    features = annotator.predict(reference.row(i)["image"] for i in range(len(reference))).features
    return evaluate(
        folders, annotator, attribute="background", subject_attribute="subject", reference_features=features
    ).to_dict()


def draw(work: Path, name: str, pipe, prompts, count: int, *, scales=GUIDANCE_SCALES, guide=None, scale=1.0):
    """Generate `count` images of each prompt at each guidance scale and return the folders."""
    folders = []
    for guidance_scale in scales:
        config = GenerateConfig(
            images_per_prompt=count, guidance_scale=guidance_scale, scale=scale, seed=1, batch_size=64
        )
        folder = work / f"images-{name}-cfg-{guidance_scale:g}"
        folders.append(generate(pipe, prompts, folder, module=guide, config=config))
    return folders


def groups(work: Path) -> dict:
    rows = {}
    for seed in (511, 512, 513):
        data = world_data(work, seed)
        found = find(work, BIRDS_MODEL, data)
        rows[str(seed)] = asdict(hidden_truth(found, data)) | {
            "biased": found.biased,
            "forwards_per_image": found.forwards_per_image,
            "evidence": sorted({p.evidence for p in found.prompts if p.found}),
        }
    return rows


def no_bias(work: Path) -> dict:
    rows = {}
    for seed in range(700, 710):
        found = find(work, work / "base-fair", world_data(work, seed, severity=0.5))
        rows[str(seed)] = {"biased": found.biased, "reasons": [f"{p.prompt}: {p.reason}" for p in found.prompts]}
    return {"seeds": rows, "said_no_bias": sum(not row["biased"] for row in rows.values())}


def one_prompt(work: Path) -> dict:
    rows = {}
    for seed in (611, 612, 613):
        data = world_data(work, seed, severity=0.85, world="one-prompt")
        found = find(work, work / "base-one-prompt", data)
        rows[str(seed)] = asdict(hidden_truth(found, data)) | {
            "biased": found.biased,
            "evidence": [p.evidence for p in found.prompts],
        }
    return rows


def bias(work: Path) -> dict:
    prompts, folders = canonical_prompts(), {}
    pipe = load_pipeline(BIRDS_MODEL)
    folders["base"] = draw(work, "base", pipe, prompts, 512)
    sizes = {}
    for mode in ("balanced", "invariant"):
        pipe, guide = module(work, mode)
        folders[mode] = draw(work, mode, pipe, prompts, 512, guide=guide)
        parameters = guide.num_parameters()
        total = sum(p.numel() for p in denoiser_of(pipe).parameters())
        sizes[mode] = {"parameters": parameters, "share_of_denoiser": parameters / total}
    return judge(folders) | {"modules": sizes}


def explicit(work: Path) -> dict:
    """How often each prompt's images show the background that it states, base and balanced."""
    pipe, guide = module(work, "balanced")
    prompts = explicit_prompts()
    folders = {
        "base": draw(work, "explicit-base", pipe, prompts, 128, scales=(1.0, 3.0)),
        "balanced": draw(work, "explicit-balanced", pipe, prompts, 128, scales=(1.0, 3.0), guide=guide),
    }
    judged = judge(folders)
    return {
        name: {
            cfg: {
                prompt: next(measures["shares"][prompt][b] for b in BACKGROUNDS if prompt.endswith(b))
                for prompt in prompts
            }
            for cfg, measures in by_cfg.items()
        }
        for name, by_cfg in judged.items()
    }


def paraphrases(work: Path) -> dict:
    pipe, guide = module(work, "balanced")
    prompts = held_out_prompts()
    return judge(
        {
            "base": draw(work, "paraphrases-base", pipe, prompts, 50, scales=(1.0, 3.0)),
            "balanced": draw(work, "paraphrases-balanced", pipe, prompts, 50, scales=(1.0, 3.0), guide=guide),
        }
    )


def strength(work: Path) -> dict:
    pipe, guide = module(work, "balanced")
    prompts = canonical_prompts()
    return judge(
        {
            f"scale {scale:g}": draw(
                work, f"scale-{scale:g}", pipe, prompts, 128, guide=guide, scale=scale, scales=(1.0, 3.0)
            )
            for scale in (0.0, 0.5, 1.0)
        }
    )


PARTS = {
    "groups": groups,
    "no-bias": no_bias,
    "one-prompt": one_prompt,
    "bias": bias,
    "explicit": explicit,
    "paraphrases": paraphrases,
    "strength": strength,
}


def rounded(value):
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return round(float(value), 4) if isinstance(value, float | np.floating) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--work", type=Path, default=Path("out/benchmark"))
    arguments = parser.parse_args()
    figures = rounded(PARTS[arguments.part](arguments.work))
    document = {
        "command": f"python benchmarks/birds.py {arguments.part}",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "figures": figures,
    }
    write_json(RESULTS / f"birds-{arguments.part}.json", document)
    print(RESULTS / f"birds-{arguments.part}.json")


if __name__ == "__main__":
    main()
