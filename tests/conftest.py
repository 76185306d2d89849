"""Tiny pipelines and data sets, built from configs: no test needs the network."""

from __future__ import annotations

import csv
import os
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # two threads on a busy machine are slower than one
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from invdiff.guidance.module import GuidanceModule
from invdiff.pipelines import load_pipeline

torch.set_num_threads(1)

WORDS = ("a", "photo", "of", "landbird", "waterbird", "on", "land", "water")
CAPTIONS = ("a photo of a landbird", "a photo of a waterbird")


def make_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer of letters, digits and a few whole words; other words fall apart into letters."""
    characters = "abcdefghijklmnopqrstuvwxyz0123456789"
    tokens = [*characters, *(f"{character}</w>" for character in characters)]
    merges: list[tuple[str, str]] = []
    for word in WORDS:  # BPE only ever joins neighbours, so each prefix must be a token, left to right
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        left = pieces[0]
        for right in pieces[1:]:
            if (left, right) not in merges:
                merges.append((left, right))
                tokens.append(left + right)
            left += right
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)}, merges=merges, model_max_length=16
    )


def make_tiny_pipeline(seed: int = 0) -> StableDiffusionPipeline:
    """A Stable Diffusion pipeline with random weights: 32 px images, 4x8x8 latents, 16x16 prompt embeds."""
    tokenizer = make_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=16,
                projection_dim=16,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 8, 16),
            norm_num_groups=4,
            sample_size=32,
        )
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            norm_num_groups=8,
            attention_head_dim=8,
            cross_attention_dim=16,
        )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def make_guidance_module(pipe: StableDiffusionPipeline, **options: object) -> GuidanceModule:
    """A module for `pipe` that looks trained: its effect is not zero."""
    module = GuidanceModule.for_pipeline(pipe, **options)
    numbers = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.conv_out.parameters():
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=numbers))
    return module


def write_tiny_folder(folder: Path, num_images: int = 12) -> Path:
    """An imagefolder of 40x36 PNGs, two captions and an attribute that agrees but in the last row."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = np.random.default_rng(0)
    rows = []
    for index in range(num_images):
        pixels = numbers.integers(0, 256, (36, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:02d}.png")
        background = ("land", "water")[(index + (index == num_images - 1)) % 2]
        rows.append({"file_name": f"{index:02d}.png", "text": CAPTIONS[index % 2], "background": background})
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder


@pytest.fixture(scope="session")
def tiny_pipe_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a saved tiny pipeline; read it, never write to it."""
    folder = tmp_path_factory.mktemp("tiny-pipe")
    make_tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_pipe(tiny_pipe_dir: Path) -> StableDiffusionPipeline:
    """The tiny pipeline, freshly loaded, on the CPU."""
    return load_pipeline(tiny_pipe_dir, device="cpu")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An imagefolder of 12 small images with two captions and an attribute `background`; read only."""
    return write_tiny_folder(tmp_path_factory.mktemp("tiny-folder"))
