"""What guidance costs: its size, the time it adds to sampling, and training beside the reference recipe.

    python benchmarks/cost.py count      # parameters and FLOPs a denoiser call, on the meta device
    python benchmarks/cost.py sampling   # with and without guidance: bundled model, Stable Diffusion 1.5 shape
    python benchmarks/cost.py training   # one step of ours and of the reference recipe, Stable Diffusion 1.5 shape
    python benchmarks/cost.py backends --base MODEL    # each backend on a pipeline, such as photo-sd64

Each part keeps its figures in benchmarks/results/cost-PART.json and exits with 1 where a requirement is missed.
Weights of the large shapes are random, which costs as much as trained ones; nothing is downloaded. `training`
needs about 20 GB of free memory on a CPU, for the reference recipe.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from itertools import chain
from operator import methodcaller
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import psutil
import torch
import transformers
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from kept import RESULTS, keep, parser_of, rounded
from recipes import RECIPES, SD15, sd15_pipeline, spread, synchronised_clock
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from invdiff import GuidanceModule, attach
from invdiff.assets import BIRDS_MODEL
from invdiff.data.birds import canonical_prompts
from invdiff.guidance.backends import BACKENDS
from invdiff.guidance.base import Guidance
from invdiff.models.families import Condition, family_of
from invdiff.models.frozen import FeatureCapture
from invdiff.models.load import load_pipeline

GIB = 2**30

MAX_PARAMETERS, MAX_FLOPS = 0.02, 0.05
MAX_RATIO_BUNDLED, MAX_RATIO_GPU = 1.25, 1.10
MIN_SPEEDUP, MAX_MEMORY = 3.0, 1 / 3
MAX_RATIOS = {"module": 1.1, "tokens": 1.05, "lora": 1.1, "lora, merged": 1.05}  # 1.05: 1.0 to the digits given
HELD_TO_REQUIREMENT = ("SD 1.5", "SDXL")
NEEDED_GIB = {"ours": 6, "reference": 20}

SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD3 = {
    "sample_size": 128,
    "num_layers": 24,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}
FLUX = {"guidance_embeds": True}  # the rest is diffusers' default
PIXART = {"sample_size": 128, "caption_channels": 4096, "interpolation_scale": 2, "use_additional_conditions": False}
DIT = {"sample_size": 32}  # the rest is diffusers' default

# Class, config, latents (channels, height, width), condition of one row; configs as published with the models.
SHAPES: dict[str, tuple[Any, dict[str, Any], tuple[int, int, int], dict[str, tuple[int, ...]]]] = {
    "SD 1.5": (UNet2DConditionModel, SD15, (4, 64, 64), {"prompt_embeds": (77, 768)}),
    "SDXL": (
        UNet2DConditionModel,
        SDXL,
        (4, 128, 128),
        {"prompt_embeds": (77, 2048), "pooled_prompt_embeds": (1280,)},
    ),
    "SD 3 medium": (
        SD3Transformer2DModel,
        SD3,
        (16, 128, 128),
        {"prompt_embeds": (333, 4096), "pooled_prompt_embeds": (2048,)},
    ),
    "Flux.1 dev": (
        FluxTransformer2DModel,
        FLUX,
        (16, 128, 128),
        {"prompt_embeds": (512, 4096), "pooled_prompt_embeds": (768,)},
    ),
    "PixArt-Sigma XL/2": (
        PixArtTransformer2DModel,
        PIXART,
        (4, 128, 128),
        {"prompt_embeds": (300, 4096), "prompt_attention_mask": (300,)},
    ),
    "DiT XL/2 256": (DiTTransformer2DModel, DIT, (4, 32, 32), {"class_labels": ()}),
}


# Size: parameters and FLOPs.


def holder(denoiser: nn.Module) -> SimpleNamespace:
    """Return what `family_of` reads of a pipeline."""
    return SimpleNamespace(**{"unet" if isinstance(denoiser, UNet2DConditionModel) else "transformer": denoiser})


def fitting_module(denoiser: nn.Module) -> GuidanceModule:
    """Return what `GuidanceModule.for_pipeline` makes, which refuses weights that are not in memory."""
    return GuidanceModule(**GuidanceModule.fitting(family_of(holder(denoiser)), denoiser)).eval()


@torch.no_grad()
def size(name: str) -> dict[str, Any]:
    """Count parameters, and FLOPs of one call with one row (a multiplication and an addition are two)."""
    network, config, latent_shape, condition_shapes = SHAPES[name]
    with torch.device("meta"):
        denoiser = network(**config).eval()
        module = fitting_module(denoiser)
        latents, timesteps = torch.empty(1, *latent_shape), torch.empty(1, dtype=torch.long)
        environments = torch.empty(1, 1, dtype=torch.long)
        condition: Condition = {
            key: torch.empty(1, *shape, dtype=torch.long if key == "class_labels" else None)
            for key, shape in condition_shapes.items()
        }
    family = family_of(holder(denoiser))
    capture = FeatureCapture(denoiser, family, family.shape(denoiser).feature_path)
    with FlopCounterMode(display=False) as frozen:
        model_pred = family.predict(denoiser, latents, timesteps, condition)
    features = family.on_grid(capture.take(), latents)
    with FlopCounterMode(display=False) as added:
        module(latents, timesteps, condition, model_pred, features, environments)
    parameters = sum(parameter.numel() for parameter in denoiser.parameters())
    return {
        "parameters": parameters,
        "flops": frozen.get_total_flops(),
        "module_width": module.config["width"],
        "module_parameters": module.num_parameters(),
        "module_flops": added.get_total_flops(),
        "parameter_share": module.num_parameters() / parameters,
        "flop_share": added.get_total_flops() / frozen.get_total_flops(),
    }


def count(_: argparse.Namespace) -> dict[str, Any]:
    shapes = {name: size(name) for name in SHAPES}
    requirements = {}
    for name in HELD_TO_REQUIREMENT:
        requirements[f"{name}: parameters"] = at_most(MAX_PARAMETERS, shapes[name]["parameter_share"])
        requirements[f"{name}: FLOPs"] = at_most(MAX_FLOPS, shapes[name]["flop_share"])
    return {"shapes": shapes, "requirements": requirements}


# Sampling, with and without guidance.


def compare(run: Callable[[Any], object], pipe: Any, guided: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Time `run(pipe)` plain and in each way that it is guided, in turn, so that drift of the machine cancels.

    A way is what is attached, or another pipeline. CPU seconds are kept beside the wall clock: on a busy machine they
    tell more, if there is one thread.
    """
    ways = {"plain": pipe, **guided}

    def seconds(way: str) -> tuple[float, float]:
        module = isinstance(ways[way], Guidance)
        with attach(pipe, ways[way]) if module else nullcontext():
            wall, cpu = synchronised_clock(), time.process_time()
            run(pipe if module else ways[way])
            return synchronised_clock() - wall, time.process_time() - cpu

    for way in ways:
        seconds(way)  # the first run of each kind pays for caches
    times: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for repeat in range(repeats):
        for way in reversed(ways) if repeat % 2 else ways:
            times[way].append(seconds(way))
    taken = {way: np.array(of) for way, of in times.items()}
    figures: dict[str, Any] = {"plain_seconds": spread(taken["plain"][:, 0])}
    for way in guided:
        ratio, cpu_ratio = map(spread, (taken[way] / taken["plain"]).T)
        figures[way] = {"guided_seconds": spread(taken[way][:, 0]), "ratio": ratio, "cpu_ratio": cpu_ratio}
    return figures | {"repeats": repeats, "load_average": os.getloadavg()[0]}


def guided(pipe: Any, run: Callable[[Any], object], repeats: int) -> dict[str, Any]:
    figures = compare(run, pipe, {"module": GuidanceModule.for_pipeline(pipe)}, repeats)
    return figures | figures.pop("module")


def sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    settings = {"guidance_scale": 3.0, "num_inference_steps": 20}
    figures: dict[str, Any] = {"settings": settings, "bundled": {}}
    requirements = {}
    pipe = load_pipeline(BIRDS_MODEL, device="cpu")
    for images in (1, 8, 32):
        prompts = list(canonical_prompts() * images)[:images]
        measured = guided(pipe, methodcaller("__call__", prompt=prompts, **settings), arguments.repeats)
        figures["bundled"][str(images)] = measured
        requirements[f"bundled model, CPU, batch {images}"] = at_most(MAX_RATIO_BUNDLED, measured["ratio"]["median"])
    few = max(5, arguments.repeats // 4)
    if torch.cuda.is_available():
        figures["sd15"] = {"what": "sampling in bf16, decoding included", "batches": {}}
        pipe = sd15_pipeline(torch.bfloat16)
        for images in (1, 4):
            embeds = torch.randn(images, 77, 768, dtype=torch.bfloat16, device=pipe.device)
            given = {"prompt_embeds": embeds, "negative_prompt_embeds": torch.zeros_like(embeds)}
            measured = guided(pipe, methodcaller("__call__", **given, **settings, output_type="pt"), few)
            figures["sd15"]["batches"][str(images)] = measured
            requirements[f"SD 1.5, GPU, batch {images}"] = at_most(MAX_RATIO_GPU, measured["ratio"]["median"])
    else:
        requirements["SD 1.5, GPU"] = at_most(MAX_RATIO_GPU, None) | {"reason": "not measured here: no GPU"}
        pipe = sd15_pipeline()
        pipe.unet.requires_grad_(False)
        latents, embeds = torch.randn(1, 4, 64, 64), torch.randn(1, 77, 768)
        measured = guided(pipe, lambda pipe: pipe.unet(latents, 500, encoder_hidden_states=embeds), few)
        figures["sd15"] = {"what": "one forward of the UNet, float32, one row", "batches": {"1": measured}}
    return figures | {"requirements": requirements}


# One training step, ours and the reference recipe.


def steps_of(recipe: str, **options: Any) -> dict[str, Any]:
    """Run a recipe of benchmarks/recipes.py in a process of its own."""
    load, script = os.getloadavg()[0], str(Path(__file__).with_name("recipes.py"))
    command = [sys.executable, script, recipe, *(f"--{name}={value}" for name, value in options.items())]
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(finished.stdout.splitlines()[-1]) | {"load_average_before": load}


def training(arguments: argparse.Namespace) -> dict[str, Any]:
    options = {"steps": arguments.repeats, "batch-size": arguments.batch_size, "resolution": arguments.resolution}
    measured = {}
    for recipe in RECIPES:
        needed, free = NEEDED_GIB[recipe], psutil.virtual_memory().available / GIB
        if not torch.cuda.is_available() and free < needed:
            sys.exit(f"Expected {needed} GiB of free memory for the {recipe} recipe, found {free:.1f}. Free some.")
        measured[recipe] = steps_of(recipe, **options)
    ours, reference = measured["ours"], measured["reference"]
    speedup = reference["step_seconds"]["median"] / ours["step_seconds"]["median"]
    return {
        "options": options,
        "arithmetic": "bf16 autocast over float32 weights" if torch.cuda.is_available() else "float32",
        "recipes": measured,
        "sdxl": "not measured: the reference recipe keeps over 50 GB of weights, gradients and moments; count only",
        "requirements": {
            "speed-up of a step": {"at_least": MIN_SPEEDUP, "measured": speedup, "met": speedup >= MIN_SPEEDUP},
            "share of peak memory": at_most(MAX_MEMORY, ours["peak_bytes"] / reference["peak_bytes"]),
        },
    }


# Training and drawing by each backend, on a pipeline.


def backends(arguments: argparse.Namespace) -> dict[str, Any]:
    """Steps of batch 32, and drawing of images at once, with weights that are random: what they hold costs nothing."""
    trained: dict[str, list[dict[str, Any]]] = {name: [] for name in BACKENDS}
    for _ in range(3):  # in turn, and before this process grows, since a child's peak of memory begins at its parent's
        for name, of in trained.items():
            of.append(
                steps_of("ours", backend=name, base=arguments.base, steps=arguments.repeats, **{"batch-size": 32})
            )
    pipe, merged = load_pipeline(arguments.base), load_pipeline(arguments.base)
    ways = {name: backend.for_pipeline(pipe) for name, backend in BACKENDS.items()}
    for weights in chain.from_iterable(guidance.parameters() for guidance in ways.values()):
        nn.init.normal_(weights, std=0.01)
    with tempfile.TemporaryDirectory() as folder:
        merged.load_lora_weights(ways["lora"].export(folder)[0])
    merged.fuse_lora()
    merged.unload_lora_weights()
    ways["lora, merged"] = merged
    settings, drawing = {"guidance_scale": 3.0, "num_inference_steps": 20}, {}
    for images in (1, 8):
        prompts = list(canonical_prompts() * images)[:images]
        run = methodcaller("__call__", prompt=prompts, **settings)
        drawing[str(images)] = compare(run, pipe, ways, arguments.repeats)
    training = {}
    for name, of in trained.items():
        seconds = {key: np.median([each["step_seconds"][key] for each in of]) for key in of[0]["step_seconds"]}
        training[name] = of[0] | {"step_seconds": seconds, "peak_bytes": max(each["peak_bytes"] for each in of)}
    requirements = {
        f"{way}, {images} at once": at_most(limit, of[way]["ratio"]["median"])
        for images, of in drawing.items()
        for way, limit in MAX_RATIOS.items()
    }
    return {"model": Path(arguments.base).name, "training": training, "drawing": drawing, "requirements": requirements}


# What every part shares.


def at_most(limit: float, measured: float | None) -> dict[str, Any]:
    return {"at_most": limit, "measured": measured, "met": None if measured is None else measured <= limit}


def five_digits(number: float) -> float:
    return float(f"{number:.5g}")


def machine() -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        cpu = next((line.split(":")[1].strip() for line in info.open() if line.startswith("model name")), cpu)
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "openmp": {name: value for name, value in os.environ.items() if name.startswith("OMP_")},
        "memory_gib": round(psutil.virtual_memory().total / GIB, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


PARTS = {"count": count, "sampling": sampling, "training": training, "backends": backends}


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--repeats", type=int, default=0, help="samplings of each (12 unless given) or steps (4)")
    parser.add_argument("--batch-size", type=int, default=1, help="of training")
    parser.add_argument("--resolution", type=int, default=512, help="of training, in pixels")
    parser.add_argument("--base", help="of backends: a pipeline")
    arguments = parser.parse_args()
    arguments.repeats = arguments.repeats or (4 if arguments.part == "training" else 12)
    if arguments.part == "backends" and not arguments.base:
        parser.error("part backends needs --base")
    figures = PARTS[arguments.part](arguments)
    command = " ".join(["python", "benchmarks/cost.py", *(Path(word).name for word in sys.argv[1:])])
    versions = {library.__name__: library.__version__ for library in (torch, diffusers, transformers)}
    about = {"device": machine(), "versions": {"python": platform.python_version()} | versions}
    keep(RESULTS / f"cost-{arguments.part}.json", command, figures, shorten=five_digits, **about)
    missed = [name for name, row in figures["requirements"].items() if row["met"] is False]
    for name in missed:
        print("missed:", name, rounded(figures["requirements"][name], five_digits))
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
