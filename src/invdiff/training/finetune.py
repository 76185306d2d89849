"""Fit a diffusion model to captioned images: the paper's first step, and how the bundled model is made."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny, DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ..auditing.result import Audit
from ..config import ArchitectureConfig, FinetuneConfig, TrainConfig
from ..data.captioned import CaptionedImages, readable_images
from ..data.encode import EncodedImages, as_encoded, model_fingerprint, pixel_values
from ..errors import ConfigError, ModelError, check_kinds
from ..files import atomic_folder, check_same_settings, fingerprint, recorded, write_json
from ..launched import one_process
from ..models.families import family_of
from ..models.families.unet import StableDiffusion
from ..models.frozen import denoiser_fingerprint
from ..models.load import default_device, load_pipeline
from ..models.schedule import NoiseSchedule, per_sample_loss
from ..progress import note
from ..seeds import derived_seed, generator
from .batches import GroupBalancedSampler
from .checkpoint import TrainingRun

SCRATCH_RATE = 1.5e-3  # peak learning rate of a denoiser that starts from new weights
LATENT_NOISE = 0.05  # standard deviation of the noise added to an autoencoder's latents, which are of about unit scale
LATENT_PULL = 1e-3  # weight of the latents' mean square in an autoencoder's loss


def finetune(
    data: CaptionedImages,
    output_dir: str | Path,
    *,
    base: str | Path | None = None,
    architecture: ArchitectureConfig | None = None,
    audit: Audit | None = None,
    config: FinetuneConfig | None = None,
    progress: bool = True,
) -> DiffusionPipeline:
    """Fit a text-to-image pipeline to captioned images and save it to `output_dir`.

    With a `base`, its denoiser is trained and everything else stays frozen, as in the paper. Without one,
    a small Stable Diffusion model is trained from nothing: its vocabulary, autoencoder, text encoder and UNet.
    With an `audit` of these images, by any model, the hidden groups that it found are drawn equally often, as by
    `train`, and prompts in proportion to the square root of their number of images.

    Work in progress is kept in `output_dir/.work`; an interrupted run continues from its last checkpoint to the same
    result, and a finished one is read back.

    Raises:
        DataError: The images cannot be used.
        AuditError: `audit` is of other images, or found nothing to balance.
        ModelError: `base` is not a pipeline that can be trained.
        ConfigError: `output_dir` holds something else, or a run with other settings or data; or settings contradict.
    """
    one_process("finetune")
    output_dir = Path(output_dir)
    finished, work = output_dir / "finetune.json", output_dir / ".work"
    if base is not None and architecture is not None:
        raise ConfigError("Expected either a base or an architecture, got both: a base has its own shape.")
    before = recorded(output_dir, "finetune")
    check_kinds(data=(data, CaptionedImages), audit=(audit, Audit | None), config=(config, FinetuneConfig | None))
    check_kinds(architecture=(architecture, ArchitectureConfig | None))
    config = config or FinetuneConfig()
    if base is None and config.fresh_denoiser:
        raise ConfigError("Expected a base for fresh_denoiser=True, got none: without one, all weights are new.")
    settings: dict[str, Any] = {"data": data.fingerprint}
    if audit is not None:
        audit.check_images(data.fingerprint)  # before hours of work; those that can be read are known later
        audit.check_found()
        if config.caption_power != FinetuneConfig.caption_power:
            raise ConfigError(
                f"Expected no caption_power with an audit, which says how often images are drawn, got "
                f"{config.caption_power:g}. Leave one of them out."
            )
        settings["audit"] = audit.fingerprint
    if base is None:
        architecture = architecture or ArchitectureConfig()
        settings |= {f"architecture.{name}": value for name, value in architecture.to_dict().items()}
        pipe: Any = build_pipeline(data.captions, architecture, seed=config.seed)
        pipe.to(default_device())
    else:
        pipe = load_pipeline(base, dtype=torch.float32)
        family = family_of(pipe)
        if type(family) is not StableDiffusion:
            raise ModelError(
                f"Expected a base of {StableDiffusion.title}, got {family.title}. Fine-tune others with diffusers' "
                "own training scripts; audit, train and generate take the result."
            )
        # The weights, since another base may lie in the same place, and the same base in another.
        settings["base"] = fingerprint(model_fingerprint(pipe), denoiser_fingerprint(pipe))
    fitting = SCRATCH_RATE if base is None or config.fresh_denoiser else fitting_rate(pipe.unet.num_parameters())
    config = dataclasses.replace(config, learning_rate=config.learning_rate or fitting)
    settings |= config.to_dict()
    if before is not None:
        check_same_settings(output_dir, before["settings"], settings)
        shutil.rmtree(work, ignore_errors=True)
        return load_pipeline(output_dir, device=pipe.device)

    if audit is not None and audit.caveats:
        note(audit.caveats)
    note(f"The peak learning rate is {config.learning_rate:.2g}.")
    if architecture is not None:
        train_autoencoder(pipe.vae, data, architecture, config, work / "autoencoder", settings, progress=progress)
    elif config.fresh_denoiser:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derived_seed("fresh denoiser", config.seed))
            pipe.unet = UNet2DConditionModel.from_config(pipe.unet.config).to(pipe.unet.device)
    encoded = as_encoded(pipe, data, work, progress=progress)
    chances = None
    if audit is not None:
        audit.check_images(encoded.data_fingerprint, encoded.names)
        weights = list(map(torch.from_numpy, audit.group_weights))
        chances = GroupBalancedSampler(torch.from_numpy(audit.prompt_ids), weights, TrainConfig.purity).chances()
    options: Any = {"train_text_encoder": base is None, "chances": chances, "progress": progress}
    train_denoiser(pipe, encoded, config, work / "denoiser", settings, **options)
    save(pipe, output_dir, half_precision=config.half_precision_weights)
    write_json(finished, {"base": None if base is None else str(base), "images": len(encoded), "settings": settings})
    shutil.rmtree(work)
    return pipe


def fitting_rate(num_weights: int) -> float:
    """The peak learning rate that suits a trained denoiser, linear in the logarithm of its size.

    3e-4 up to 2 million weights, 2e-4 at 16 million, 1e-5 from a billion on.
    """
    return float(np.interp(np.log(num_weights), np.log([2e6, 1e9]), [3e-4, 1e-5]))


def train_denoiser(
    pipe: Any,
    encoded: EncodedImages,
    config: FinetuneConfig,
    checkpoint_dir: Path,
    settings: dict[str, Any],
    *,
    train_text_encoder: bool,
    chances: torch.Tensor | None = None,
    aim: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None = None,
    progress: bool = True,
) -> None:
    """Minimise the denoising loss over images, timesteps and noise, with caption dropout; `pipe` is changed.

    Images are drawn in proportion to `chances`, (N,), where given. `aim(noisy_latents, timesteps, captions, target)`
    may give another target and each image's weight, (batch,).
    """
    device, schedule = pipe.unet.device, NoiseSchedule(pipe.scheduler)
    trained = nn.ModuleDict({"unet": pipe.unet})
    if train_text_encoder:
        trained["text_encoder"] = pipe.text_encoder
    trained.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    run = TrainingRun(trained, config, checkpoint_dir, settings)
    read: Any = {"padding": "max_length", "max_length": pipe.tokenizer.model_max_length, "truncation": True}
    tokens = pipe.tokenizer([*encoded.captions, ""], return_tensors="pt", **read).input_ids.to(device)
    embeds = encoded.conditions["prompt_embeds"].to(device)
    if chances is None:
        chances = torch.bincount(encoded.caption_ids).double()[encoded.caption_ids] ** (config.caption_power - 1)

    def loss_at(step: int) -> torch.Tensor:
        rng = generator("finetune", config.seed, step)
        rows = torch.multinomial(chances, config.batch_size, replacement=True, generator=rng)
        latents = encoded.latents[rows]
        noise = torch.randn(latents.shape, generator=rng)
        timesteps = torch.randint(schedule.num_train_timesteps, (len(rows),), generator=rng)
        captions = encoded.caption_ids[rows].clone()
        captions[torch.rand(len(rows), generator=rng) < config.caption_dropout] = encoded.null_id

        latents, noise, timesteps = latents.to(device), noise.to(device), timesteps.to(device)
        noisy_latents, target = (of(latents, noise, timesteps) for of in (schedule.add_noise, schedule.target))
        target, weights = aim(noisy_latents, timesteps, captions, target) if aim else (target, 1.0)
        with run.accelerator.autocast():
            if train_text_encoder:
                needed, inverse = captions.unique(return_inverse=True)
                prompt_embeds = pipe.text_encoder(tokens[needed.to(device)])[0][inverse.to(device)]
            else:
                prompt_embeds = embeds[captions.to(device)]
            model_pred = pipe.unet(noisy_latents, timesteps, prompt_embeds).sample
        return (weights * per_sample_loss(model_pred, target)).mean()

    run.minimise(loss_at, "denoiser", progress=progress)
    trained.to(memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]


def save(pipe: Any, output_dir: Path, *, half_precision: bool) -> None:
    """Save a pipeline, its denoiser and autoencoder in 16 bits if asked to: diffusers loads them in 32 bits again."""
    halved = [pipe.unet, pipe.vae] if half_precision else []
    for network in halved:
        network.half()
    with atomic_folder(output_dir) as folder:
        pipe.save_pretrained(folder)
    for network in halved:
        network.float()


def build_pipeline(captions: Iterable[str], architecture: ArchitectureConfig, *, seed: int) -> StableDiffusionPipeline:
    """An untrained `StableDiffusionPipeline` whose vocabulary is learnt from `captions`."""
    tokenizer = learn_vocabulary(captions, architecture.vocabulary_size, max_tokens=architecture.max_tokens)
    levels, deeper = len(architecture.autoencoder_blocks), len(architecture.denoiser_channels) - 1
    text_config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=architecture.text_width,
        intermediate_size=2 * architecture.text_width,
        projection_dim=architecture.text_width,
        num_hidden_layers=architecture.text_layers,
        num_attention_heads=max(1, architecture.text_width // 16),
        max_position_embeddings=architecture.max_tokens,
        **{name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed("scratch", seed))
        text_encoder = CLIPTextModel(text_config)
        blocks, widths = architecture.autoencoder_blocks, (architecture.autoencoder_width,) * levels
        vae = AutoencoderTiny(
            latent_channels=architecture.latent_channels,
            encoder_block_out_channels=widths,
            decoder_block_out_channels=widths,
            num_encoder_blocks=blocks,
            num_decoder_blocks=blocks[::-1],
        )
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
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    scheduler = DDIMScheduler(**betas, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    safety = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return StableDiffusionPipeline(vae, text_encoder, tokenizer, unet, scheduler, **safety)


def learn_vocabulary(captions: Iterable[str], size: int, *, max_tokens: int) -> Any:
    """A CLIP tokenizer with byte pairs learnt from `captions`, the same for the same captions."""
    # Every byte is a token, inside a word and at its end, so that no later prompt has unknown tokens; in fixed order,
    # since `tokenizers` numbers the ends of words in the order of a hash map, which a resumed run would not repeat.
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    blank: Any = CLIPTokenizer()
    learner: Any = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = blank.backend_tokenizer.normalizer
    learner.pre_tokenizer = blank.backend_tokenizer.pre_tokenizer
    options: Any = {"special_tokens": [*letters, *(f"{letter}</w>" for letter in letters)], "show_progress": False}
    trainer = trainers.BpeTrainer(vocab_size=size - 2, end_of_word_suffix="</w>", **options)  # two are added below
    learner.train_from_iterator(sorted(set(captions)), trainer)
    learnt = json.loads(learner.to_str())["model"]
    vocab = learnt["vocab"] | {blank.bos_token: len(learnt["vocab"]), blank.eos_token: len(learnt["vocab"]) + 1}
    merges: Any = [tuple(pair) for pair in learnt["merges"]]
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_tokens)


def train_autoencoder(
    vae: Any,
    data: CaptionedImages,
    architecture: ArchitectureConfig,
    config: FinetuneConfig,
    checkpoint_dir: Path,
    settings: dict[str, Any],
    *,
    progress: bool = True,
) -> None:
    """Fit `vae` to the images, as a variational autoencoder of fixed variance, and scale latents to unit variance.

    The loss is the absolute error of pixels and of their differences, which keeps outlines sharp.
    """
    device, size = vae.device, architecture.resolution
    readable = readable_images(data, "reading images", progress=progress)
    # (N, 3, size, size) as bytes: each image is seen often, and 20,000 of 64 px take 250 MB.
    pixels = torch.stack([((pixel_values(image, size) + 1) * 127.5).round().byte() for _, image in readable])
    vae.to(memory_format=torch.channels_last)
    config = dataclasses.replace(
        config, steps=config.autoencoder_steps, learning_rate=config.autoencoder_learning_rate, weight_decay=1e-2
    )
    run = TrainingRun(vae, config, checkpoint_dir, settings)

    def loss_at(step: int) -> torch.Tensor:
        rng = generator("autoencoder", config.seed, step)
        rows = torch.randint(len(pixels), (config.autoencoder_batch_size,), generator=rng)
        images = pixels[rows].to(device) / 127.5 - 1
        with run.accelerator.autocast():
            latents = vae.encode(images).latents
            noise = torch.randn(latents.shape, generator=rng).to(device)
            decoded = vae.decode(latents + LATENT_NOISE * noise).sample
        latents, decoded = latents.float(), decoded.float()
        error = F.l1_loss(decoded, images)
        for dim in (2, 3):
            error = error + F.l1_loss(decoded.diff(dim=dim), images.diff(dim=dim))
        return error + LATENT_PULL * latents.square().mean()

    run.minimise(loss_at, "autoencoder", progress=progress)
    with torch.no_grad():
        sample = pixels[:512].to(device).split(64)
        latents = torch.cat([vae.encode(images / 127.5 - 1).latents for images in sample])
    vae.to(memory_format=torch.contiguous_format)
    vae.register_to_config(scaling_factor=1.0 / latents.float().std().item())
