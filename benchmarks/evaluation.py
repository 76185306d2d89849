"""The evaluation itself: what it costs, and whether its intervals hold.

    python benchmarks/evaluation.py speed      # 10,000 images of 64 pixels: seconds and peak memory
    python benchmarks/evaluation.py coverage   # 2,000 simulated evaluations each: how often 95% intervals cover

Images are kept in out/evaluation (or --work).
"""

import json
import os
import resource
import time
from pathlib import Path

import numpy as np
import torch
from kept import run_part

from invdiff import EvaluateConfig, evaluate, load_captioned_images
from invdiff.assets import BIRDS_ANNOTATOR
from invdiff.data.birds import BirdsWorld, canonical_prompts
from invdiff.evaluation.annotate import describe_images
from invdiff.evaluation.annotators.conv import ConvAnnotator
from invdiff.evaluation.fairness.intervals import interval
from invdiff.evaluation.fairness.metrics import METRICS, per_prompt
from invdiff.files import write_text

NUM_IMAGES = 10_000
SIMULATIONS = 2000
TRUTHS = {
    "fair, two classes": ([[0.5, 0.5]], 100),
    "fair, two classes, 10 prompts": ([[0.5, 0.5]] * 10, 100),
    "fair, two classes, 30 prompts": ([[0.5, 0.5]] * 30, 100),
    "fair, three classes, 10 prompts": ([[1 / 3, 1 / 3, 1 / 3]] * 10, 100),
    "fair, two classes, 20 images": ([[0.5, 0.5]] * 2, 20),
    "two classes 0.55 and 0.45, 10 prompts": ([[0.55, 0.45]] * 10, 100),
    "two classes 0.9 and 0.1, 10 prompts": ([[0.9, 0.1]] * 10, 100),
    "two classes 0.995 and 0.005, 2 prompts": ([[0.995, 0.005]] * 2, 512),
    "half the prompts fair, half 0.95": ([[0.5, 0.5], [0.95, 0.05]] * 5, 100),
    "three classes 0.5, 0.5, 0, 5 prompts": ([[0.5, 0.5, 0.0]] * 5, 100),
}


def speed(work: Path) -> dict:
    """Draw balanced birds as if a model had, and evaluate them against 10,000 others."""
    folder, reference = work / "speed", work / "speed-reference"
    world = BirdsWorld(NUM_IMAGES, severity=0.5, seed=1)
    world.write(folder, progress=True)
    BirdsWorld(NUM_IMAGES, severity=0.5, seed=2).write(reference, progress=True)
    prompts = {prompt.split()[-1]: prompt for prompt in canonical_prompts()}
    lines = [
        {"file_name": f"images/{index:05d}.png", "prompt": prompts[row["subject"]], "guidance_scale": 1, "seed": index}
        for index, row in enumerate(world.metadata())
    ]
    write_text(folder / "manifest.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    annotator = ConvAnnotator.from_pretrained(BIRDS_ANNOTATOR)
    start = time.perf_counter()
    seen = describe_images(load_captioned_images(reference), annotator)
    middle = time.perf_counter()
    config = EvaluateConfig(subject_attribute="subject")
    evaluate({"base": folder}, annotator, "background", reference=seen, config=config)
    return {
        "images": NUM_IMAGES,
        "reference_images": NUM_IMAGES,
        "reference_seconds": middle - start,
        "evaluation_seconds": time.perf_counter() - middle,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
    }


def coverage(work: Path) -> dict:
    """Simulate evaluations of known truths and count how often the interval covers the true mean over prompts."""
    figures = {}
    for name, (truth, num_images) in TRUTHS.items():
        shares = np.array(truth)
        rng = np.random.default_rng(0)
        tables = [np.array([rng.multinomial(num_images, row) for row in shares]) for _ in range(SIMULATIONS)]
        figures[name] = {"images_per_prompt": num_images, "metrics": {}}
        for metric in METRICS:
            value = float(per_prompt(metric, shares * 1e12).mean())
            ends = np.array([interval(metric, table, num_resamples=200, seed=0) for table in tables])
            inside = (ends[:, 0] <= value + 1e-9) & (value - 1e-9 <= ends[:, 1])
            figures[name]["metrics"][metric] = {
                "truth": value,
                "coverage": float(inside.mean()),
                "mean_width": float((ends[:, 1] - ends[:, 0]).mean()),
            }
            print(f"{name}: {metric}: {inside.mean():.3f}")
    return {"simulations": SIMULATIONS, "truths": figures}


if __name__ == "__main__":
    run_part("evaluation", __doc__, {"speed": speed, "coverage": coverage}, work="out/evaluation")
