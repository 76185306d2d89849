"""The whole story on the bundled model: a hidden bias is found, removed and measured."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from .assets import BIRDS_ANNOTATOR, BIRDS_MODEL
from .auditing.result import Audit
from .auditing.run import audit
from .config import DemoConfig, EvaluateConfig, GenerateConfig, TrainConfig
from .data.birds import NATURAL_BACKGROUND, BirdsWorld, canonical_prompts
from .data.captioned import CaptionedImages, load_captioned_images
from .evaluation.annotate import describe_images
from .evaluation.annotators.conv import ConvAnnotator
from .evaluation.evaluate import evaluate
from .evaluation.recovery import Recovery, recovery
from .evaluation.results import Results
from .models.load import denoiser_of, load_pipeline
from .report.grids import save_audit_pictures
from .report.write import save_report
from .sampling import generate
from .seeds import derived_seed
from .training.train import train


def run_demo(output_dir: str | Path, *, config: DemoConfig | None = None, progress: bool = True) -> Results:
    """Audit, train, generate with and without guidance on the same seeds, evaluate; return the evaluation.

    Everything is written below `output_dir`: the data, `audit/` with its pictures, `module/`, `images/`,
    `results.json`, and last `report.html` with `report.md` and its pictures. A stopped run goes on where it stopped.
    The attributes of the data are read in the last step only, to judge what was found without them.

    Raises:
        InvDiffError: A step failed; what was finished is kept.
    """
    config = config or DemoConfig()
    output_dir = Path(output_dir)
    seconds: dict[str, float] = {}

    world = BirdsWorld(config.num_images, severity=config.severity, seed=config.seed)
    data = load_captioned_images(world.write(output_dir / "data", progress=progress))
    pipe = load_pipeline(BIRDS_MODEL)

    with _timed(seconds, "audit"):
        found = audit(pipe, data, cache_dir=output_dir / "cache", progress=progress)
        found.save(output_dir / "audit")
    with _timed(seconds, "train"):
        module = train(
            pipe,
            data,
            found,
            output_dir / "module",
            config=TrainConfig(steps=config.steps, seed=config.seed),
            cache_dir=output_dir / "cache",
            progress=progress,
        )
    folders: dict[str, list[Path]] = {"base": [], "guided": []}
    with _timed(seconds, "generate"):
        for guidance_scale in config.guidance_scales:
            settings = GenerateConfig(
                images_per_prompt=config.images_per_prompt,
                guidance_scale=guidance_scale,
                num_inference_steps=config.num_inference_steps,
                seed=config.seed,
            )
            for name, used in (("base", None), ("guided", module)):
                folder = output_dir / "images" / f"{name}-cfg-{guidance_scale:g}"
                generate(pipe, canonical_prompts(), folder, module=used, config=settings, progress=progress)
                folders[name].append(folder)
    with _timed(seconds, "evaluate"):
        results = measure(folders, config, progress=progress)
        truth = hidden_truth(found, data)
        parameters = module.num_parameters()
        share = parameters / sum(p.numel() for p in denoiser_of(pipe).parameters())

    facts = {
        "audit": {
            **{name: value for name, value in asdict(truth).items() if name != "adjusted_rand"},
            "biased": found.biased,
            "forwards_per_image": found.forwards_per_image,
        },
        "module": {"parameters": parameters, "share_of_denoiser": share},
        "seconds": {name: round(value, 1) for name, value in seconds.items()}
        | {"total": round(sum(seconds.values()), 1)},
        "settings": config.to_dict(),
    }
    save_audit_pictures(output_dir / "audit", data)
    results = replace(results, run=facts)
    results.save(output_dir / "results.json")
    save_report(
        output_dir,
        audit=output_dir / "audit",
        data=data,
        results=output_dir / "results.json",
        images=folders,
        module=output_dir / "module",
        run=output_dir,
    )
    return results


def measure(folders: dict[str, list[Path]], config: DemoConfig, *, progress: bool) -> Results:
    """Judge images with the bundled annotator, against a balanced set drawn apart."""
    annotator = ConvAnnotator.from_pretrained(BIRDS_ANNOTATOR)
    reference_seed = derived_seed("reference", config.seed) % 2**31
    reference = BirdsWorld(config.reference_images, severity=0.5, seed=reference_seed)
    seen = describe_images((reference.row(i)["image"] for i in range(len(reference))), annotator)
    return evaluate(
        folders,
        annotator,
        "background",
        reference=seen,
        config=EvaluateConfig(subject_attribute="subject"),
        progress=progress,
    )


def hidden_truth(found: Audit, data: CaptionedImages) -> Recovery:
    """Compare an audit with the background that captions leave unsaid: the only place where labels are read.

    An image whose caption states its background is left out: there it is not hidden.
    """
    row_of = {name: row for row, name in enumerate(data.names)}
    rows = [row_of[name] for name in found.names]
    subjects, backgrounds = data.attributes["subject"], data.attributes["background"]
    unsaid = np.array([f" on {backgrounds[row]}" not in data.captions[row] for row in rows])
    minority = np.array([NATURAL_BACKGROUND[subjects[row]] != backgrounds[row] for row in rows])
    return recovery(found.scores[unsaid], found.in_rare_group[unsaid], minority[unsaid])


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start
