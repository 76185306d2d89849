"""The audit, captions and paraphrases on the bundled world. Each part keeps its figures in benchmarks/results/.

    python benchmarks/birds.py groups        # hidden groups found, three seeds of data
    python benchmarks/birds.py no-bias       # nothing found where nothing is hidden, ten seeds
    python benchmarks/birds.py one-prompt    # a minority under a single caption
    python benchmarks/birds.py explicit      # captions that state the background keep it
    python benchmarks/birds.py paraphrases   # captions never trained on are balanced too

Bias over guidance scale and Delta is measured by benchmarks/sweeps.py. `no-bias` and `one-prompt` need a base of
their own: see scripts/train_benchmark_bases.py.
Work is kept in out/benchmark (or --work), so a stopped run goes on.
"""

from dataclasses import asdict
from pathlib import Path

from kept import run_part

from invdiff import (
    AuditConfig,
    EvaluateConfig,
    GenerateConfig,
    TrainConfig,
    audit,
    evaluate,
    generate,
    load_captioned_images,
    train,
)
from invdiff.assets import BIRDS_ANNOTATOR, BIRDS_MODEL
from invdiff.data.birds import (
    BACKGROUNDS,
    BirdsWorld,
    explicit_prompts,
    held_out_prompts,
)
from invdiff.demo import hidden_truth
from invdiff.evaluation.annotate import describe_images
from invdiff.evaluation.annotators.conv import ConvAnnotator
from invdiff.models.load import load_pipeline

GUIDANCE_SCALES = (1.0, 3.0)
NUM_IMAGES = 3000


def world_data(work: Path, seed: int, *, severity: float = 0.95, world: str = "two-prompts"):
    """Return a captioned set on disk, drawn apart from what the base was trained on unless seed is 0."""
    folder = work / f"{world}-{severity:g}-seed-{seed}"
    return load_captioned_images(BirdsWorld(NUM_IMAGES, severity=severity, seed=seed, world=world).write(folder))


def find(work: Path, model: Path, data, config: AuditConfig | None = None):
    return audit(load_pipeline(model), data, cache_dir=work / "cache", config=config)


def module(work: Path):
    """Return a module trained on the groups found without labels in the demo's data."""
    pipe, data = load_pipeline(BIRDS_MODEL), world_data(work, 0)
    found = find(work, BIRDS_MODEL, data)
    return pipe, train(pipe, data, found, work / "module", config=TrainConfig(), cache_dir=work / "cache")


def judge(folders: dict) -> dict:
    """Return model to guidance scale to the headline figures, and the shares they are of."""
    annotator = ConvAnnotator.from_pretrained(BIRDS_ANNOTATOR)
    world = BirdsWorld(2000, severity=0.5, seed=424242)
    reference = describe_images((world.row(i)["image"] for i in range(len(world))), annotator)
    results = evaluate(
        folders, annotator, "background", reference=reference, config=EvaluateConfig(subject_attribute="subject")
    ).to_dict()["models"]
    headline = ("bias", "bias_floor", "bias_ci", "accuracy", "frechet", "images_per_prompt", "shares")
    return {
        model: {scale: {name: measures[name] for name in headline} for scale, measures in by_scale.items()}
        for model, by_scale in results.items()
    }


def draw(work: Path, name: str, pipe, prompts, count: int, *, guide=None):
    """Generate `count` images of each prompt at each guidance scale and return the folders."""
    folders = []
    for guidance_scale in GUIDANCE_SCALES:
        config = GenerateConfig(images_per_prompt=count, guidance_scale=guidance_scale, seed=1, batch_size=64)
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
            "evidence": sorted({split.evidence for factor in found.factors for split in factor.splits}),
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
            "evidence": [split.evidence for factor in found.factors for split in factor.splits],
        }
    return rows


def explicit(work: Path) -> dict:
    """How often each prompt's images show the background that it states, base and balanced."""
    pipe, guide = module(work)
    prompts = explicit_prompts()
    folders = {
        "base": draw(work, "explicit-base", pipe, prompts, 128),
        "balanced": draw(work, "explicit-balanced", pipe, prompts, 128, guide=guide),
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
    pipe, guide = module(work)
    prompts = held_out_prompts()
    return judge(
        {
            "base": draw(work, "paraphrases-base", pipe, prompts, 50),
            "balanced": draw(work, "paraphrases-balanced", pipe, prompts, 50, guide=guide),
        }
    )


PARTS = {
    "groups": groups,
    "no-bias": no_bias,
    "one-prompt": one_prompt,
    "explicit": explicit,
    "paraphrases": paraphrases,
}


if __name__ == "__main__":
    run_part("birds", __doc__, PARTS, work="out/benchmark")
