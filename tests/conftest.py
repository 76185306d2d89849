"""Tiny pipelines and data sets, built from configs: no test needs the network."""

import copy
import functools
import gc
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # two threads on a busy machine are slower than one
os.environ["HF_HUB_OFFLINE"] = "1"

import jinja2
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from invdiff import GuidanceLoRA, GuidanceModule, load_captioned_images, load_pipeline
from invdiff.data.captioned import CaptionedImages
from invdiff.data.encode import EncodedImages, as_encoded
from invdiff.evaluation.results import AttributeMeasures, Estimate, Measures, Quantity
from invdiff.training import objective
from invdiff.training import train as train_module
from tiny import CAPTIONS, make_stable_diffusion, save_clip

torch.set_num_threads(1)
DIAGNOSTIC_BATCHES = 2
PROCESSES = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
"""What a launcher tells the second of two processes."""


def pytest_collection_finish() -> None:
    """Search for garbage seldom, and not among what the libraries made while they were imported."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def make_tiny_pipeline(seed: int = 0) -> StableDiffusionPipeline:
    """A Stable Diffusion pipeline with random weights: 32 px images, 4x8x8 latents, 16x16 prompt embeds."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make_stable_diffusion()


def make_guidance_module(pipe: StableDiffusionPipeline, **options: object) -> GuidanceModule:
    """A module for `pipe` that looks trained: its effect is not zero."""
    module = GuidanceModule.for_pipeline(pipe, **options)
    numbers = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.conv_out.parameters():
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=numbers))
    return module


def make_guidance_lora(pipe: StableDiffusionPipeline, **options: object) -> GuidanceLoRA:
    """Adapters for `pipe` that look trained: their effect is not zero."""
    guidance = GuidanceLoRA.for_pipeline(pipe, **{"null_adapter": "on", "rank": 2, **options})
    numbers = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for adapter in guidance.adapters.values():
            adapter.up.copy_(0.2 * torch.randn(adapter.up.shape, generator=numbers))
    return guidance


def write_tiny_folder(folder: Path, num_images: int = 12) -> Path:
    """An imagefolder of 40x36 PNGs, two captions and an attribute that agrees but in the last row."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = np.random.default_rng(0)
    rows = []
    for index in range(num_images):
        pixels = numbers.integers(0, 256, (36, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:02d}.png")
        background = ("land", "water")[(index + (index == num_images - 1)) % 2]
        rows.append(f"{index:02d}.png,{CAPTIONS[index % 2]},{background}\n")
    (folder / "metadata.csv").write_text("".join(["file_name,text,background\n", *rows]))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of all files in a folder by their paths in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def made_up_measures(bias, *, interval, floor, accuracy=None, frechet=None):
    """Measures of 512 images of one prompt that say what a test wants them to."""
    estimate = Estimate(value=bias, low=interval[0], high=interval[1], floor=floor)
    attribute = AttributeMeasures({"a photo": {"land": 461, "water": 51}}, {"bias": estimate})
    return Measures(
        images_per_prompt=512,
        attributes={"background": attribute},
        subject_accuracy=None if accuracy is None else Quantity(accuracy),
        quality={} if frechet is None else {"Frechet distance (made up)": Quantity(frechet)},
    )


@pytest.fixture(autouse=True, scope="session")
def little_beside_training() -> Iterator[None]:
    """What training measures before and after its steps is of few images, and the card is compiled once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objective, "LEVELS", 6)
        patch.setattr(objective, "IMAGES_PER_LEVEL", 3)  # unlike any batch of the tests
        patch.setattr(train_module, "DIAGNOSTIC_BATCHES", DIAGNOSTIC_BATCHES)
        patch.setattr(jinja2, "Template", functools.cache(jinja2.Template))
        yield


@pytest.fixture(scope="session")
def tiny_pipe_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a saved tiny pipeline; read it, never write to it."""
    folder = tmp_path_factory.mktemp("tiny-pipe")
    make_tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def loaded_pipe(tiny_pipe_dir: Path) -> StableDiffusionPipeline:
    """The tiny pipeline as it was loaded; never change it."""
    return load_pipeline(tiny_pipe_dir, device="cpu")


@pytest.fixture
def tiny_pipe(loaded_pipe: StableDiffusionPipeline) -> StableDiffusionPipeline:
    """The tiny pipeline, loaded on the CPU, of the test's own."""
    return copy.deepcopy(loaded_pipe)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An imagefolder of 12 small images with two captions and an attribute `background`; read only."""
    return write_tiny_folder(tmp_path_factory.mktemp("tiny-folder"))


@pytest.fixture(scope="session")
def clip_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole CLIP model with random weights; read only."""
    return save_clip(tmp_path_factory.mktemp("models") / "tiny-clip")


@pytest.fixture
def kill(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that makes a call and kills it when that calls `module.name` for the n-th time."""

    def kill(module: Any, name: str, n: int, call: Any, *arguments: Any, **keywords: Any) -> None:
        original, calls = getattr(module, name), []

        def killed(*arguments: Any, **keywords: Any) -> Any:
            calls.append(name)
            if len(calls) == n:
                raise KeyboardInterrupt
            return original(*arguments, **keywords)

        with monkeypatch.context() as patch:
            patch.setattr(module, name, killed)
            with pytest.raises(KeyboardInterrupt):
                call(*arguments, **keywords)

    return kill


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every line of text in pictures of images, and how many images each strip holds, in order."""
    from invdiff.report import grids

    parts: list[Any] = []

    def recorded(original: Any) -> Any:
        def part(first: Any, *args: Any, **options: Any) -> Any:
            parts.append(first if isinstance(first, str) else len(first))
            return original(first, *args, **options)

        return part

    for name in ("text", "strip"):
        monkeypatch.setattr(grids, name, recorded(getattr(grids, name)))
    return parts


@pytest.fixture
def plain() -> Iterator[None]:
    """Charts and pictures of reports are not drawn."""
    from runs import undrawn

    with undrawn():
        yield


@pytest.fixture(scope="session")
def data(tiny_folder: Path) -> CaptionedImages:
    """The images of the tiny folder; never change them."""
    return load_captioned_images(tiny_folder)


@pytest.fixture(scope="session")
def encoded(loaded_pipe: StableDiffusionPipeline, data: CaptionedImages, tmp_path_factory: Any) -> EncodedImages:
    """The same, encoded by the tiny pipeline; never change them."""
    return as_encoded(loaded_pipe, data, tmp_path_factory.mktemp("encoded"), progress=False)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run: audit, data, images, results and module; read only."""
    from runs import make_run

    folder = tmp_path_factory.mktemp("finished")
    make_run(folder)
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A folder of eight generated images, whose colours say what they show."""
    from test_evaluate import ROWS, write

    return write(tmp_path / "base", ROWS)


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """The same, of the test's own."""
    return shutil.copytree(finished, tmp_path / "run")
