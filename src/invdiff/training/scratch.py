"""A small Stable Diffusion pipeline from nothing: vocabulary, text encoder, autoencoder, UNet."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ..config import ArchitectureConfig, FinetuneConfig
from ..data.captioned import CaptionedImages, readable_images
from ..data.encode import pixel_values
from ..progress import progress_bar
from ..seeds import derived_seed, generator
from .checkpoint import TrainingRun

LATENT_NOISE = 0.05
"""Standard deviation of the noise added to latents of about unit scale."""
LATENT_PULL = 1e-3
"""Weight of the latents' mean square in the loss."""


def build_pipeline(
    captions: Iterable[str], architecture: ArchitectureConfig, *, seed: int = 0
) -> StableDiffusionPipeline:
    """An untrained `StableDiffusionPipeline` whose vocabulary is learnt from `captions`."""
    tokenizer = learn_vocabulary(captions, architecture.vocabulary_size, max_tokens=architecture.max_tokens)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed("scratch", seed))
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=architecture.text_width,
                intermediate_size=2 * architecture.text_width,
                projection_dim=architecture.text_width,
                num_hidden_layers=architecture.text_layers,
                num_attention_heads=max(1, architecture.text_width // 16),
                max_position_embeddings=architecture.max_tokens,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        levels = len(architecture.autoencoder_blocks)
        vae = AutoencoderTiny(
            latent_channels=architecture.latent_channels,
            encoder_block_out_channels=(architecture.autoencoder_width,) * levels,
            decoder_block_out_channels=(architecture.autoencoder_width,) * levels,
            num_encoder_blocks=architecture.autoencoder_blocks,
            num_decoder_blocks=architecture.autoencoder_blocks[::-1],
        )
        deeper = len(architecture.denoiser_channels) - 1
        unet = UNet2DConditionModel(
            sample_size=architecture.resolution // 2 ** (levels - 1),
            in_channels=architecture.latent_channels,
            out_channels=architecture.latent_channels,
            block_out_channels=architecture.denoiser_channels,
            layers_per_block=architecture.denoiser_layers,
            down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * deeper,
            up_block_types=("CrossAttnUpBlock2D",) * deeper + ("UpBlock2D",),
            cross_attention_dim=architecture.text_width,
            attention_head_dim=4,  # the number of heads: diffusers' historical name
            norm_num_groups=8,
        )
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def learn_vocabulary(captions: Iterable[str], size: int, *, max_tokens: int) -> Any:
    """A CLIP tokenizer with byte pairs learnt from `captions`, the same for the same captions.

    Every byte is a token, inside a word and at its end, so that no later prompt has unknown tokens. The bytes are
    given to the trainer in a fixed order: by default `tokenizers` numbers the ends of words in the order of a hash
    map, and a resumed run would read captions with other tokens than it was trained on.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    alphabet = [*letters, *(f"{letter}</w>" for letter in letters)]
    blank: Any = CLIPTokenizer()
    learner: Any = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = blank.backend_tokenizer.normalizer
    learner.pre_tokenizer = blank.backend_tokenizer.pre_tokenizer
    learner.train_from_iterator(
        sorted(set(captions)),
        trainers.BpeTrainer(
            vocab_size=size - 2,  # start and end of text are added below
            special_tokens=alphabet,
            end_of_word_suffix="</w>",
            show_progress=False,
        ),
    )
    learnt = json.loads(learner.to_str())["model"]
    vocab = learnt["vocab"] | {blank.bos_token: len(learnt["vocab"]), blank.eos_token: len(learnt["vocab"]) + 1}
    merges: Any = [tuple(pair) for pair in learnt["merges"]]
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_tokens)


def train_autoencoder(
    vae: Any,
    data: CaptionedImages,
    resolution: int,
    config: FinetuneConfig,
    *,
    checkpoint_dir: Path,
    settings: dict[str, Any],
    progress: bool = True,
) -> None:
    """Fit `vae` to the images and set its scaling factor so that latents have unit variance.

    The loss is the absolute error of the pixels and of their differences (which keeps outlines sharp). Noise
    on the latents makes nearby ones decode alike, and a slight pull to zero keeps them from outgrowing it:
    together a variational autoencoder of fixed variance.
    """
    pixels = load_pixels(data, resolution, progress=progress)
    device = vae.device
    vae.to(memory_format=torch.channels_last)
    config = dataclasses.replace(
        config, steps=config.autoencoder_steps, learning_rate=config.autoencoder_learning_rate, weight_decay=1e-2
    )
    run = TrainingRun(vae, config, checkpoint_dir, settings, device=device)
    with progress_bar("autoencoder", config.steps, start=run.start, enabled=progress) as bar:
        for step in range(run.start, config.steps):
            rng = generator("autoencoder", config.seed, step)
            rows = torch.randint(len(pixels), (config.autoencoder_batch_size,), generator=rng)
            images = from_bytes(pixels[rows.numpy()]).to(device)
            with run.accelerator.autocast():
                latents = vae.encode(images).latents
                noise = torch.randn(latents.shape, generator=rng).to(device)
                decoded = vae.decode(latents + LATENT_NOISE * noise).sample
            latents, decoded = latents.float(), decoded.float()
            loss = (
                F.l1_loss(decoded, images)
                + F.l1_loss(decoded.diff(dim=2), images.diff(dim=2))
                + F.l1_loss(decoded.diff(dim=3), images.diff(dim=3))
                + LATENT_PULL * latents.square().mean()
            )
            run.descend(loss, step)
            run.save_if_due(step)
            bar.advance(loss=loss)
    run.finish()
    with torch.no_grad():
        sample = from_bytes(pixels[:512]).split(64)
        latents = torch.cat([vae.encode(images.to(device)).latents for images in sample])
    vae.to(memory_format=torch.contiguous_format)
    vae.register_to_config(scaling_factor=1.0 / latents.float().std().item())


def load_pixels(data: CaptionedImages, resolution: int, *, progress: bool) -> np.ndarray:
    """Every readable image as bytes, (N, 3, resolution, resolution).

    An autoencoder sees each image many times; as bytes, 20,000 images of 64 px take 250 MB.
    """
    rows = [
        ((pixel_values(image, resolution) + 1) * 127.5).round().to(torch.uint8).numpy()
        for _, image in readable_images(data, "reading images", progress=progress)
    ]
    return np.stack(rows)


def from_bytes(pixels: np.ndarray) -> torch.Tensor:
    """Images in [-1, 1] from bytes, both (N, 3, height, width)."""
    return torch.from_numpy(pixels).float() / 127.5 - 1
