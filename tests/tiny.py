"""Tiny pipelines of every family that invdiff supports, with random weights, built from configs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

WORDS = ("a", "photo", "of", "landbird", "waterbird", "on", "land", "water")
CAPTIONS = ("a photo of a landbird", "a photo of a waterbird")
CLASSES = {0: "landbird, bird of the land", 1: "waterbird"}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
WIDTH = 16
"""Of text encoders and prompt embeddings."""


def make_tokenizer() -> transformers.CLIPTokenizer:
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
    return transformers.CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)}, merges=merges, model_max_length=16
    )


def make_t5_tokenizer() -> transformers.T5TokenizerFast:
    """A T5 tokenizer of a few whole words; others are unknown."""
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"\u2581{word}", -1.0) for word in WORDS)]
    return transformers.T5TokenizerFast(vocab=words, extra_ids=0, model_max_length=16)


def clip_config(tokenizer: transformers.CLIPTokenizer) -> transformers.CLIPTextConfig:
    return transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
TOWER = SMALL | {"intermediate_size": 32}
"""Of a vision transformer."""
TRANSFORMER = {"sample_size": 8, "patch_size": 2, "num_layers": 3, "attention_head_dim": 8, "num_attention_heads": 4}
"""Of a denoiser."""


def save_clip(folder: Path) -> Path:
    """Write a whole CLIP model with random weights, its tokenizer and image processor; return the folder."""
    tokenizer = make_tokenizer()
    config = transformers.CLIPConfig(
        text_config=clip_config(tokenizer).to_dict(), vision_config=TOWER, projection_dim=8
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    transformers.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(
        folder
    )
    return folder


def clip_encoder(tokenizer: transformers.CLIPTokenizer, *, projected: bool = False) -> Any:
    kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    return kind(clip_config(tokenizer)).eval()


def make_t5(tokenizer: transformers.T5TokenizerFast) -> transformers.T5EncoderModel:
    return transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, pad_token_id=0
        )
    ).eval()


def make_vae(latent_channels: int = 4, **options: Any) -> diffusers.AutoencoderKL:
    """Images of 32 px have latents of 8x8."""
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16),
        norm_num_groups=4,
        sample_size=32,
        latent_channels=latent_channels,
        **options,
    ).eval()


UNET: dict[str, Any] = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8}
"""Of both kinds of UNet."""


def make_unet(**options: Any) -> diffusers.UNet2DConditionModel:
    settings: dict[str, Any] = {
        "sample_size": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 8,
        "cross_attention_dim": WIDTH,
    }
    return diffusers.UNet2DConditionModel(**(UNET | settings | options)).eval()


def make_stable_diffusion(prediction_type: str = "epsilon") -> diffusers.StableDiffusionPipeline:
    tokenizer = make_tokenizer()
    text_encoder = clip_encoder(tokenizer)
    return diffusers.StableDiffusionPipeline(
        vae=make_vae(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=make_unet(),
        scheduler=diffusers.DDIMScheduler(
            **BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type=prediction_type
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def make_stable_diffusion_xl() -> diffusers.StableDiffusionXLPipeline:
    tokenizer = make_tokenizer()
    return diffusers.StableDiffusionXLPipeline(
        vae=make_vae(),
        text_encoder=clip_encoder(tokenizer),
        text_encoder_2=clip_encoder(tokenizer, projected=True),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=make_unet(
            cross_attention_dim=2 * WIDTH,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=WIDTH + 6 * 8,
        ),
        scheduler=diffusers.EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1),
    )


def make_stable_diffusion_3() -> diffusers.StableDiffusion3Pipeline:
    tokenizer = make_tokenizer()
    transformer = diffusers.SD3Transformer2DModel(
        **TRANSFORMER,
        in_channels=4,
        out_channels=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=16,
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=make_vae(shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip_encoder(tokenizer, projected=True),
        tokenizer=tokenizer,
        text_encoder_2=clip_encoder(tokenizer, projected=True),
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def make_flux() -> diffusers.FluxPipeline:
    tokenizer, t5_tokenizer = make_tokenizer(), make_t5_tokenizer()
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=make_vae(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip_encoder(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=make_t5(t5_tokenizer),
        tokenizer_2=t5_tokenizer,
        transformer=transformer.eval(),
    )


def make_pixart() -> diffusers.PixArtSigmaPipeline:
    t5_tokenizer = make_t5_tokenizer()
    transformer = diffusers.PixArtTransformer2DModel(
        **TRANSFORMER,
        caption_channels=32,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=32,
        norm_type="ada_norm_single",
        use_additional_conditions=False,
    )
    return diffusers.PixArtSigmaPipeline(
        tokenizer=t5_tokenizer,
        text_encoder=make_t5(t5_tokenizer),
        vae=make_vae(),
        transformer=transformer.eval(),
        scheduler=diffusers.DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear"),
    )


def make_dit() -> diffusers.DiTPipeline:
    transformer = diffusers.DiTTransformer2DModel(
        **TRANSFORMER,
        in_channels=4,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
    )
    pipe = diffusers.DiTPipeline(
        transformer=transformer.eval(),
        vae=make_vae(),
        scheduler=diffusers.DDIMScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear", clip_sample=False),
        id2label=CLASSES,
    )
    pipe.register_to_config(id2label=CLASSES)  # as in published models; diffusers itself forgets it on saving
    return pipe


def make_ddpm() -> diffusers.DDPMPipeline:
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    unet = diffusers.UNet2DModel(**UNET, **blocks, sample_size=16, attention_head_dim=8)
    return diffusers.DDPMPipeline(unet=unet.eval(), scheduler=diffusers.DDPMScheduler())


FAMILIES: dict[str, Callable[[], Any]] = {
    "sd1": make_stable_diffusion,
    "sd2-v": lambda: make_stable_diffusion("v_prediction"),
    "sdxl": make_stable_diffusion_xl,
    "sd3": make_stable_diffusion_3,
    "flux": make_flux,
    "pixart": make_pixart,
    "dit": make_dit,
    "ddpm": make_ddpm,
}
"""How to make a tiny pipeline of each family, by its short name."""
RESOLUTION = {"flux": 32}
"""Where a pipeline does not know its own size."""


def make_tiny(family: str, seed: int = 0) -> Any:
    """A tiny pipeline of a family; what models start at zero is given small weights, so that it matters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = FAMILIES[family]()
        denoiser = getattr(pipe, "unet", None) or pipe.transformer
        with torch.no_grad():
            for parameter in denoiser.parameters():
                if not parameter.any():
                    parameter.normal_(0, 0.02)
    pipe.set_progress_bar_config(disable=True)
    return pipe
