"""Tiny pipelines of every family that invdiff supports, with random weights, built from configs."""

import copy
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file

WORDS = ("a", "photo", "of", "landbird", "waterbird", "on", "land", "water")
CAPTIONS = ("a photo of a landbird", "a photo of a waterbird")
CLASSES = {0: "landbird, bird of the land", 1: "waterbird"}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LINEAR = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
WIDTH = 16  # of text encoders and prompt embeddings
TEXT = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
TOWER = SMALL | {"intermediate_size": 32}  # of a vision transformer
CROP = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}  # of image processors
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "pad_token_id": 0}
TRANSFORMER = {"sample_size": 8, "patch_size": 2, "num_layers": 3, "attention_head_dim": 8, "num_attention_heads": 4}
"""Of a denoiser."""
UNET: dict[str, Any] = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8}
"""Of both kinds of UNet."""


def make_tokenizer() -> transformers.CLIPTokenizer:
    """A CLIP tokenizer of letters, digits and a few whole words; other words fall apart into letters."""
    characters = "abcdefghijklmnopqrstuvwxyz0123456789"
    tokens = [*characters, *(f"{character}</w>" for character in characters)]
    merges: list[tuple[str, str]] = []
    for word in WORDS:  # BPE only ever joins neighbours, so each prefix must be a token, left to right
        left, *pieces = [*word[:-1], f"{word[-1]}</w>"]
        for right in pieces:
            merges.append((left, right))
            left += right
            tokens.append(left)
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    return transformers.CLIPTokenizer(vocab=vocab, merges=list(dict.fromkeys(merges)), model_max_length=16)


def clip_config(tokenizer: transformers.CLIPTokenizer) -> transformers.CLIPTextConfig:
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 16, "projection_dim": WIDTH}
    return transformers.CLIPTextConfig(**TEXT, **sizes, **ids)


def save_clip(folder: Path) -> Path:
    """Write a whole CLIP model with random weights, its tokenizer and image processor; return the folder."""
    tokenizer = make_tokenizer()
    text = clip_config(tokenizer).to_dict()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.CLIPConfig(text_config=text, vision_config=TOWER, projection_dim=8)
        transformers.CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    transformers.CLIPImageProcessor(**CROP).save_pretrained(folder)
    return folder


def save_dinov2(folder: Path) -> Path:
    """Write a DINOv2 with random weights and an image processor that converts no colours; return the folder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.Dinov2Model(transformers.Dinov2Config(mlp_ratio=2, **SMALL)).save_pretrained(folder)
    transformers.CLIPImageProcessor(**CROP, do_convert_rgb=False).save_pretrained(folder)
    return folder


def text_encoders(*kinds: str) -> dict[str, Any]:
    """Text encoders of kinds "clip", "projected" (CLIP's pooled output as well) and "t5", with their tokenizers."""
    parts: dict[str, Any] = {}
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"\u2581{word}", -1.0) for word in WORDS)]
    t5_tokenizer = transformers.T5TokenizerFast(vocab=words, extra_ids=0, model_max_length=16)
    clip_tokenizer = make_tokenizer()
    for kind, end in zip(kinds, ("", "_2"), strict=False):
        if kind == "t5":
            encoder = transformers.T5EncoderModel(transformers.T5Config(**T5, vocab_size=len(t5_tokenizer)))
        else:
            network = transformers.CLIPTextModelWithProjection if kind == "projected" else transformers.CLIPTextModel
            encoder = network(clip_config(clip_tokenizer))
        parts[f"text_encoder{end}"] = encoder.eval()
        parts[f"tokenizer{end}"] = t5_tokenizer if kind == "t5" else clip_tokenizer
    return parts


def make_vae(**options: Any) -> diffusers.AutoencoderKL:
    """Images of 32 px have latents of 8x8."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    sizes = {"block_out_channels": (8, 8, 16), "norm_num_groups": 4, "sample_size": 32, "latent_channels": 4}
    return diffusers.AutoencoderKL(**blocks, **sizes, **options).eval()


def make_unet(**options: Any) -> diffusers.UNet2DConditionModel:
    settings: dict[str, Any] = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    settings |= {"sample_size": 8, "attention_head_dim": 8, "cross_attention_dim": WIDTH}
    return diffusers.UNet2DConditionModel(**(UNET | settings | options)).eval()


def make_stable_diffusion(prediction_type: str = "epsilon") -> diffusers.StableDiffusionPipeline:
    options = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, "prediction_type": prediction_type}
    unused: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    scheduler = diffusers.DDIMScheduler(**BETAS, **options)
    parts = text_encoders("clip") | {"vae": make_vae(), "unet": make_unet(), "scheduler": scheduler}
    return diffusers.StableDiffusionPipeline(**parts, **unused)


def make_stable_diffusion_xl() -> diffusers.StableDiffusionXLPipeline:
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    unet = make_unet(**added, projection_class_embeddings_input_dim=WIDTH + 6 * 8, cross_attention_dim=2 * WIDTH)
    scheduler = diffusers.EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1)
    parts = text_encoders("clip", "projected")
    return diffusers.StableDiffusionXLPipeline(**parts, vae=make_vae(), unet=unet, scheduler=scheduler)


def make_stable_diffusion_3() -> diffusers.StableDiffusion3Pipeline:
    widths = {"joint_attention_dim": 32, "caption_projection_dim": 32, "pooled_projection_dim": 2 * WIDTH}
    channels = {"in_channels": 4, "out_channels": 4, "pos_embed_max_size": 16}
    parts = text_encoders("projected", "projected") | {"text_encoder_3": None, "tokenizer_3": None}
    return diffusers.StableDiffusion3Pipeline(
        **parts,
        transformer=diffusers.SD3Transformer2DModel(**TRANSFORMER, **widths, **channels).eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=make_vae(shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False),
    )


def make_flux() -> diffusers.FluxPipeline:
    layers = {"num_layers": 2, "num_single_layers": 1, "axes_dims_rope": (4, 4, 8), "guidance_embeds": True}
    widths = {"attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 32}
    channels = {"patch_size": 1, "in_channels": 16, "pooled_projection_dim": WIDTH}
    return diffusers.FluxPipeline(
        **text_encoders("clip", "t5"),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=make_vae(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        transformer=diffusers.FluxTransformer2DModel(**layers, **widths, **channels).eval(),
    )


def make_pixart() -> diffusers.PixArtSigmaPipeline:
    channels = {"caption_channels": 32, "cross_attention_dim": 32, "in_channels": 4, "out_channels": 8}
    others = {"norm_type": "ada_norm_single", "use_additional_conditions": False}
    transformer = diffusers.PixArtTransformer2DModel(**TRANSFORMER, **channels, **others)
    scheduler = diffusers.DPMSolverMultistepScheduler(**LINEAR)
    parts = text_encoders("t5") | {"vae": make_vae(), "scheduler": scheduler}
    return diffusers.PixArtSigmaPipeline(**parts, transformer=transformer.eval())


def make_dit() -> diffusers.DiTPipeline:
    norm = {"norm_type": "ada_norm_zero", "norm_elementwise_affine": False, "num_embeds_ada_norm": 1000}
    others = {"in_channels": 4, "out_channels": 8, "attention_bias": True, "activation_fn": "gelu-approximate"}
    transformer = diffusers.DiTTransformer2DModel(**TRANSFORMER, **norm, **others).eval()
    scheduler = diffusers.DDIMScheduler(**LINEAR, clip_sample=False)
    pipe = diffusers.DiTPipeline(transformer=transformer, vae=make_vae(), scheduler=scheduler, id2label=CLASSES)
    pipe.register_to_config(id2label=CLASSES)  # as in published models; diffusers itself forgets it on saving
    return pipe


def make_ddpm() -> diffusers.DDPMPipeline:
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    unet = diffusers.UNet2DModel(**UNET, **blocks, sample_size=16, attention_head_dim=8)
    return diffusers.DDPMPipeline(unet=unet.eval(), scheduler=diffusers.DDPMScheduler())


FAMILIES: dict[str, Callable[[], Any]] = {
    "sd1": make_stable_diffusion,
    "sd2-v": partial(make_stable_diffusion, "v_prediction"),
    "sdxl": make_stable_diffusion_xl,
    "sd3": make_stable_diffusion_3,
    "flux": make_flux,
    "pixart": make_pixart,
    "dit": make_dit,
    "ddpm": make_ddpm,
}
"""How to make a tiny pipeline of each family, by its short name."""
RESOLUTION = {"flux": 32}  # where a pipeline does not know its own size


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


def save_lora(pipe: Any, folder: Path, **targets: list[str]) -> Path:
    """Write a LoRA of random weights for layers of a pipeline's parts, such as unet=["to_q"]; return the file."""
    layers, numbers = {}, torch.Generator().manual_seed(0)
    for part, names in targets.items():
        network = copy.deepcopy(getattr(pipe, part))
        network.add_adapter(LoraConfig(r=2, target_modules=names))
        weights = get_peft_model_state_dict(network, adapter_name="default")
        random = {name: 0.3 * torch.randn(value.shape, generator=numbers) for name, value in weights.items()}
        layers[f"{part}_lora_layers"] = random
    pipe.save_lora_weights(folder, weight_name="style.safetensors", **layers)
    return folder / "style.safetensors"


def draw(pipe: Any, *seeds: int, **options: Any) -> torch.Tensor:
    """Latents of one image per seed, or pixels of pipelines without; an option that is None is left out."""
    asked: dict[str, Any] = {
        "prompt": [CAPTIONS[seed % 2] for seed in seeds],
        "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
        "num_inference_steps": 2,
        "guidance_scale": 5.0,
        "output_type": "latent",
    }
    must: dict[str, dict[str, Any]] = {
        "Flux": {"height": RESOLUTION["flux"], "width": RESOLUTION["flux"]},
        "PixArt": {"clean_caption": False, "use_resolution_binning": False},
        "DiT": {"prompt": None, "class_labels": [seed % 2 for seed in seeds], "output_type": "np"},
        "DD": {"prompt": None, "guidance_scale": None, "batch_size": len(seeds), "output_type": "np"},
    }
    asked |= options | next((of for start, of in must.items() if type(pipe).__name__.startswith(start)), {})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # pipelines hand some schedulers no generator
        return torch.as_tensor(pipe(**{name: value for name, value in asked.items() if value is not None}).images)


def inputs(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents and prompt embeddings of three rows for the UNet of a tiny Stable Diffusion."""
    numbers = torch.Generator().manual_seed(seed)
    return torch.randn(3, 4, 8, 8, generator=numbers), torch.randn(3, 16, WIDTH, generator=numbers)


def denoise(pipe: Any, timestep: Any = 500, *, seed: int = 0, embeds: torch.Tensor | None = None) -> torch.Tensor:
    """One call of the UNet on `inputs`, with other embeddings if given."""
    latents, made_up = inputs(seed)
    with torch.no_grad():
        return pipe.unet(latents, timestep, made_up if embeds is None else embeds).sample


ORIGINAL_UNET = (
    (r"^time_embedding\.linear_(\d)", lambda found: f"time_embed.{2 * int(found[1]) - 2}"),
    (r"^conv_in", "input_blocks.0.0"),
    (r"^conv_norm_out", "out.0"),
    (r"^conv_out", "out.2"),
    (r"resnets\.(\d)", r"\1.0"),
    (r"attentions\.(\d)", r"\1.1"),
    (r"^mid_block\.(\d)\.(\d)", lambda found: f"middle_block.{2 * int(found[1]) + int(found[2])}"),
    (r"^down_blocks\.(\d)\.downsamplers\.0\.conv", lambda found: f"input_blocks.{2 * int(found[1]) + 2}.0.op"),
    (r"^up_blocks\.(\d)\.upsamplers\.0", r"up_blocks.\1.1.1"),
    (r"^down_blocks\.(\d)\.0", lambda found: f"input_blocks.{2 * int(found[1]) + 1}"),
    (r"^up_blocks\.(\d)\.(\d)", lambda found: f"output_blocks.{2 * int(found[1]) + int(found[2])}"),
    (r"norm1(?=\.\w+$)(?<!transformer_blocks\.0\.norm1)", "in_layers.0"),
    (r"conv1", "in_layers.2"),
    (r"norm2(?=\.\w+$)(?<!transformer_blocks\.0\.norm2)", "out_layers.0"),
    (r"conv2", "out_layers.3"),
    (r"time_emb_proj", "emb_layers.1"),
    (r"conv_shortcut", "skip_connection"),
)
"""Names of weights of a UNet with one residual block a level to those of the original Stable Diffusion."""
ORIGINAL_VAE = (
    (r"down_blocks\.(\d)\.resnets", r"down.\1.block"),
    (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.(\d)\.resnets", lambda found: f"up.{2 - int(found[1])}.block"),
    (r"up_blocks\.(\d)\.upsamplers\.0", lambda found: f"up.{2 - int(found[1])}.upsample"),
    (r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}"),
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    (r"mid_block\.attentions\.0\.to_(\w)", r"mid.attn_1.\1"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"conv_norm_out", "norm_out"),
)


def save_single_file(pipe: diffusers.StableDiffusionPipeline, path: Path) -> Path:
    """Write all weights of a tiny Stable Diffusion to one file, under the names of the original code."""
    clip = {f"text_model.{name.removeprefix('text_model.')}": v for name, v in pipe.text_encoder.state_dict().items()}
    weights = {f"cond_stage_model.transformer.{name}": value for name, value in clip.items()}
    for part, names, prefix in (
        (pipe.unet, ORIGINAL_UNET, "model.diffusion_model."),
        (pipe.vae, ORIGINAL_VAE, "first_stage_model."),
    ):
        for name, value in part.state_dict().items():
            original = name
            for pattern, other in names:
                original = re.sub(pattern, other, original)
            linear = ".attn_1." in original and value.ndim == 2  # a convolution there
            weights[prefix + original] = value[..., None, None] if linear else value
    save_file({name: value.contiguous() for name, value in weights.items()}, path)
    return path
