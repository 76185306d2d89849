"""Captions that state the background, and paraphrases. Each part keeps its figures in benchmarks/results/.

    python benchmarks/birds.py explicit      # captions that state the background keep it
    python benchmarks/birds.py paraphrases   # captions never trained on are balanced too

What the audit finds is measured by benchmarks/audits.py, Bias by `python -m benchmarks run birds`.
Work is kept in out/benchmark (or --work), so a stopped run goes on.
"""

from pathlib import Path

from kept import drawn, headline, run_part

from invdiff import EvaluateConfig, TrainConfig, audit, evaluate, load_captioned_images, train
from invdiff.assets import BIRDS_ANNOTATOR, BIRDS_MODEL
from invdiff.data.birds import BACKGROUNDS, SUBJECTS, BirdsWorld, canonical_prompts
from invdiff.evaluation.annotators.conv import ConvAnnotator
from invdiff.models.load import load_pipeline

GUIDANCE_SCALES = (1.0, 3.0)
NUM_IMAGES = 3000
HELD_OUT_TEMPLATES = (
    "a nice picture of a {}",
    "an image of one {}",
    "a drawing of one nice {}",
    "a photo of a {} outdoors",
    "one {} outdoors",
)
"""Never used in a caption; each recombines words of the captions."""


def explicit_prompts() -> tuple[str, ...]:
    """The canonical prompts that state a background; subjects vary slowest."""
    return tuple(f"{prompt} on {background}" for prompt in canonical_prompts() for background in BACKGROUNDS)


def held_out_prompts() -> tuple[str, ...]:
    """Paraphrases that no caption uses; subjects vary slowest."""
    return tuple(template.format(subject) for subject in SUBJECTS for template in HELD_OUT_TEMPLATES)


def module(work: Path):
    """Return a module trained on the groups found without labels in the demo's data."""
    world = BirdsWorld(NUM_IMAGES, seed=0)
    pipe, data = load_pipeline(BIRDS_MODEL), load_captioned_images(world.write(work / "two-prompts-0.95-seed-0"))
    found = audit(pipe, data, cache_dir=work / "cache")
    return pipe, train(
        pipe, data, found, work / "module", config=TrainConfig(backend="module"), cache_dir=work / "cache"
    )


def judged(work: Path, name: str, prompts, count: int) -> dict:
    """The figures of `count` images of each prompt at each guidance scale, base and balanced."""
    pipe, guide = module(work)
    models, settings = {"base": None, "balanced": guide}, {"images_per_prompt": count, "seed": 1, "batch_size": 64}
    folders = drawn(work / f"images-{name}", pipe, prompts, models, GUIDANCE_SCALES, **settings)
    annotator = ConvAnnotator.from_pretrained(BIRDS_ANNOTATOR)
    reference = BirdsWorld(2000, severity=0.5, seed=424242).captioned()
    config = EvaluateConfig(subject_attribute="subject")
    return headline(evaluate(folders, annotator, "background", reference=reference, config=config))


def explicit(work: Path) -> dict:
    """How often each prompt's images show the background that it states, base and balanced."""
    prompts = explicit_prompts()
    return {
        name: {
            cfg: {
                prompt: next(measures["shares"][prompt][b] for b in BACKGROUNDS if prompt.endswith(b))
                for prompt in prompts
            }
            for cfg, measures in by_cfg.items()
        }
        for name, by_cfg in judged(work, "explicit", prompts, 128).items()
    }


def paraphrases(work: Path) -> dict:
    return judged(work, "paraphrases", held_out_prompts(), 50)


if __name__ == "__main__":
    run_part("birds", __doc__, {"explicit": explicit, "paraphrases": paraphrases}, work="out/benchmark")
