"""The guidance module: an invariant prompt encoder Phi and a gradient estimator G_psi.

InvDiff (Hou et al., KDD 2025, arXiv 2412.08480) adds a learned stand-in for grad_z log p(Phi(y) | z_t) to a
frozen denoiser's output. Here it is a small convolutional network that reads what the denoiser has already
computed, its prediction and its middle features, instead of a second copy of the denoiser.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import get_timestep_embedding
from torch import nn

from ..errors import ConfigError, ModelError
from ..files import atomic_folder, write_text
from ..models.families import Condition, Family, family_of
from ..models.load import denoiser_of, loras_of, public_name
from ..models.loading import load_complete, loading
from ..models.schedule import NoiseSchedule
from .card import render_card, with_figures


class InvariantEncoder(nn.Module):
    """Phi: from a prompt's embeddings, any number of them, to one invariant code, by attention of learned queries."""

    def __init__(self, prompt_dim: int, code_dim: int, num_queries: int = 4) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(prompt_dim)
        self.key = nn.Linear(prompt_dim, code_dim, bias=False)
        self.value = nn.Linear(prompt_dim, code_dim)
        self.queries = nn.Parameter(torch.randn(num_queries, code_dim) / code_dim**0.5)
        self.out = nn.Sequential(nn.SiLU(), nn.Linear(num_queries * code_dim, code_dim))

    def forward(self, condition: Condition) -> torch.Tensor:
        """From `prompt_embeds` (batch, tokens, prompt_dim) and a mask (batch, tokens) if any to (batch, code_dim)."""
        tokens = self.norm(condition["prompt_embeds"])
        mask = condition.get("prompt_attention_mask")
        if mask is not None:
            mask = mask.reshape(len(tokens), 1, -1) > 0
        queries = self.queries.expand(len(tokens), -1, -1)
        pooled = F.scaled_dot_product_attention(queries, self.key(tokens), self.value(tokens), attn_mask=mask)
        return self.out(pooled.flatten(1))


class ClassEncoder(nn.Module):
    """Phi where a class label stands for the prompt: one code a class, the null class among them."""

    def __init__(self, num_classes: int, code_dim: int) -> None:
        super().__init__()
        self.codes = nn.Embedding(num_classes, code_dim)

    def forward(self, condition: Condition) -> torch.Tensor:
        """From `class_labels` (batch,) to (batch, code_dim)."""
        return self.codes(condition["class_labels"].reshape(-1))


class ModulatedBlock(nn.Module):
    """A residual block of two convolutions, scaled and shifted by a condition vector (FiLM)."""

    def __init__(self, channels: int, condition_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(8, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(8, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.modulation = nn.Linear(condition_dim, 2 * channels)

    def forward(self, hidden_states: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """A (batch, channels, height, width) residual step under condition (batch, condition_dim)."""
        scale, shift = self.modulation(condition)[:, :, None, None].chunk(2, dim=1)
        hidden = self.conv1(F.silu(self.norm1(hidden_states)))
        hidden = self.norm2(hidden) * (1 + scale) + shift
        return hidden_states + self.conv2(F.silu(hidden))


class GuidanceModule(ModelMixin, ConfigMixin):
    """Phi and G_psi, trained beside a frozen denoiser and saved like any diffusers model.

    Make one that fits a pipeline by `GuidanceModule.for_pipeline`. The output layer starts at zero, so an untrained
    module leaves images bit-identical. `save_pretrained(folder)` and `push_to_hub("org/name")` write a model card,
    README.md, beside the weights, from the module's config; it quotes captions of the training images.

    Args:
        latent_channels: Channels of the denoiser's prediction.
        prompt_dim: Width of the prompt embeddings; 0 where the denoiser reads none.
        num_classes: Class labels, the null class included; 0 where the denoiser reads none.
        feature_channels: Channels of the block whose output is read.
        feature_path: Dotted path of that block in the denoiser.
        num_groups: Groups (environments) of each hidden factor.
        factor_names: Their names, by which `attach` takes a mix; "factor 1" and so on where not given.
        mode: `"balanced"` takes the group as an input, `"invariant"` does not.
        width: Channels at the full latent resolution; twice that at half of it.
        denoiser_class, prediction_type: The denoiser it was made for, and what it predicts.
        weight_signature: A few of that denoiser's weights, to tell it from others.
        base_model: Hub id of the pipeline, or the last name of its folder, for people.
        loras: Name and fingerprint of each LoRA that was fused into it.
        record: Further statements of the model card; see `card.training_record`.
    """

    @register_to_config
    def __init__(
        self,
        *,
        latent_channels: int = 4,
        prompt_dim: int = 768,
        num_classes: int = 0,
        feature_channels: int = 1280,
        feature_path: str = "mid_block",
        num_groups: Sequence[int] = (2,),
        factor_names: Sequence[str] = (),
        mode: str = "balanced",
        width: int = 32,
        denoiser_class: str = "UNet2DConditionModel",
        prediction_type: str = "epsilon",
        weight_signature: Sequence[float] = (),
        base_model: str = "",
        loras: Sequence[Sequence[str]] = (),
        record: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        condition_dim = 4 * width
        self.encoder: nn.Module | None = None  # an unconditional model has nothing to encode
        if prompt_dim:
            self.encoder = InvariantEncoder(prompt_dim, condition_dim)
        elif num_classes:
            self.encoder = ClassEncoder(num_classes, condition_dim)
        layers = nn.Linear(2 * width, condition_dim), nn.SiLU(), nn.Linear(condition_dim, condition_dim)
        self.time = nn.Sequential(*layers)
        seen = num_groups if mode == "balanced" else ()
        self.environments = nn.ModuleList(nn.Embedding(groups, condition_dim) for groups in seen)
        self.condition = nn.Sequential(nn.SiLU(), nn.Linear(condition_dim, condition_dim), nn.SiLU())

        self.conv_in = nn.Conv2d(2 * latent_channels + 2, width, 3, padding=1)
        self.block_in = ModulatedBlock(width, condition_dim)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.features = nn.Sequential(nn.GroupNorm(1, feature_channels), nn.Conv2d(feature_channels, 2 * width, 1))
        self.block_low = ModulatedBlock(2 * width, condition_dim)
        self.up = nn.Conv2d(2 * width, width, 3, padding=1)
        self.block_out = ModulatedBlock(width, condition_dim)
        self.conv_out = nn.Conv2d(width, latent_channels, 3, padding=1)
        for parameter in self.conv_out.parameters():
            nn.init.zeros_(parameter)

    @classmethod
    def for_pipeline(
        cls, pipe: Any, *, num_groups: int | Sequence[int] = 2, mode: str = "balanced", width: int = 0, seed: int = 0
    ) -> GuidanceModule:
        """An untrained module that fits `pipe`'s denoiser and has no effect yet.

        Args:
            pipe: A diffusers pipeline of a supported family.
            num_groups: Groups of the hidden factor, or of each of several.
            mode: `"balanced"` or `"invariant"`.
            width: Channels of the gradient estimator, a multiple of 8; 0 fits it to the denoiser.
            seed: Seed of the initial weights.

        Raises:
            ModelError: The denoiser is of a family that is not supported.
            ConfigError: `num_groups`, `mode` or `width` is out of range.
        """
        groups = (num_groups,) if isinstance(num_groups, int) else tuple(num_groups)
        for fits, expected, found in (
            (groups and min(groups) >= 2, "num_groups of at least 2 for at least one factor", num_groups),
            (mode in ("balanced", "invariant"), "mode 'balanced' or 'invariant'", mode),
            (width >= 0 and width % 8 == 0, "width 0 or a multiple of 8", width),
        ):
            if not fits:
                raise ConfigError(f"Expected {expected}, got {found!r}.")
        denoiser, family = denoiser_of(pipe), family_of(pipe)
        signature = weight_signature(denoiser)
        if any(map(math.isnan, signature)):
            raise ModelError("Expected the denoiser's weights in memory, found them offloaded. Offload later.")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = cls(
                **dataclasses.asdict(family.shape(denoiser)),
                num_groups=groups,
                mode=mode,
                width=width or fitting_width(family, denoiser),
                denoiser_class=type(denoiser).__name__,
                prediction_type=NoiseSchedule(pipe.scheduler).prediction_type,
                weight_signature=signature,
                base_model=public_name(str(getattr(pipe, "name_or_path", "") or "")),
                loras=loras_of(pipe),
            )
        return module.eval()

    def model_card(self, source: str = "path/to/this/folder") -> str:
        """The model card; `source` is the hub id or folder that its example loads the module from."""
        return render_card(self.config, num_parameters=self.num_parameters(), source=source)

    def add_figures(self, results: Any) -> None:
        """Let the model card state the figures of generated images; save or push the module afterwards.

        `results` are what `evaluate` returned, or `Results.load` of the file that `invdiff evaluate` wrote, else a
        `ConfigError` is raised. Figures of other attributes are kept, those of the same attribute replaced.
        """
        self.register_to_config(record=with_figures(self.config["record"], results))

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], is_main_process: bool = True, **options: Any
    ) -> None:
        """Save weights, config and model card, as `ModelMixin.save_pretrained` does weights and config."""
        options["is_main_process"] = is_main_process
        if not is_main_process:
            return
        with atomic_folder(Path(save_directory)) as folder:
            super().save_pretrained(str(folder), **options)  # type: ignore[misc]  # diffusers' stand-in without torch
            write_text(folder / "README.md", self.model_card())

    def _upload_folder(self, working_dir: str | os.PathLike[str], repo_id: str, **options: Any) -> Any:
        # Every way to the hub ends here, after diffusers has put a generic card, or the hub's, into the folder.
        write_text(Path(working_dir) / "README.md", self.model_card(repo_id))
        return super()._upload_folder(working_dir, repo_id, **options)  # type: ignore[misc]  # as above

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, **options: Any
    ) -> GuidanceModule:
        """Load from a folder or a hub id, as `ModelMixin.from_pretrained` does, but never from a pickle."""
        options.setdefault("use_safetensors", True)
        return super().from_pretrained(pretrained_model_name_or_path, **options)

    @classmethod
    def load_config(cls, *arguments: Any, **options: Any) -> Any:
        """Read the config in a folder or at a hub id."""
        with warnings.catch_warnings():  # diffusers passes huggingface_hub an argument it no longer has
            warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks")
            return super().load_config(*arguments, **options)

    def to_json_string(self) -> str:
        """The config as JSON, without the place that this module was itself loaded from."""
        config = json.loads(super().to_json_string())
        config.pop("_name_or_path", None)
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    @property
    def num_groups(self) -> tuple[int, ...]:
        """Groups of each hidden factor."""
        return tuple(self.config["num_groups"])

    @property
    def factor_names(self) -> tuple[str, ...]:
        """The name of each hidden factor, such as "factor 1"."""
        return tuple(self.config["factor_names"]) or tuple(f"factor {m}" for m in range(1, len(self.num_groups) + 1))

    @property
    def sees_environment(self) -> bool:
        """Whether the group is an input (`balanced`) or not (`invariant`)."""
        return len(self.environments) > 0

    def forward(
        self,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        condition: Condition,
        model_pred: torch.Tensor,
        features: torch.Tensor,
        environments: torch.Tensor | None = None,
        *,
        projected: bool = False,
        code: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """g_psi, the shift of the denoiser's output, (batch, channels, height, width).

        From z_t (its further channels are ignored), timesteps (batch,), the condition of Phi, `prompt_embeds` (batch,
        tokens, prompt_dim) or `class_labels` (batch,), the frozen output f(z_t, t, y), features (batch,
        feature_channels, height', width') that are `projected` or not, and in `balanced` mode groups (batch, factors).
        `code` is Phi(y), where known.
        """
        width, channels = self.config["width"], self.config["latent_channels"]
        conditions = self.time(get_timestep_embedding(timesteps, 2 * width).to(model_pred.dtype))
        if code is None:
            code = self.encode(condition)
        conditions = conditions if code is None else conditions + code
        if self.sees_environment:
            if environments is None:
                raise ModelError("Expected the environments of each image in balanced mode, got none.")
            for factor, embedding in enumerate(self.environments):
                conditions = conditions + embedding(environments[:, factor])
        conditions = self.condition(conditions)

        inputs = [noisy_latents[:, :channels], model_pred, _coordinates(model_pred)]
        full = self.block_in(self.conv_in(torch.cat(inputs, dim=1)), conditions)
        low = self.down(F.silu(full))
        features = features if projected else self.project(features)
        low = self.block_low(low + F.interpolate(features, size=low.shape[-2:], mode="nearest"), conditions)
        full = full + F.interpolate(self.up(low), size=full.shape[-2:], mode="nearest")
        return self.conv_out(F.silu(self.block_out(full, conditions)))

    def encode(self, condition: Condition) -> torch.Tensor | None:
        """Phi(y), (batch, 4 * width), the same at every step; None for an unconditional model."""
        return None if self.encoder is None else self.encoder(condition)

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """Map features (batch, feature_channels, height, width) to the few channels that the estimator reads."""
        # On a CPU, torch 2.13 crashes in the backward pass of a GroupNorm of channels-last input without gradient.
        return self.features(features.contiguous())


def fitting_width(family: Family, denoiser: Any) -> int:
    """Channels of a gradient estimator of fitting size: a multiple of 8, as GroupNorm needs."""
    return max(32, family.base_width(denoiser) // 8 * 8)


def _coordinates(like: torch.Tensor) -> torch.Tensor:
    """Vertical and horizontal position from -1 to 1, (batch, 2, height, width): spurious attributes have a layout."""
    axes = [torch.linspace(-1, 1, side, device=like.device, dtype=like.dtype) for side in like.shape[2:]]
    return torch.stack(torch.meshgrid(axes, indexing="ij")).expand(len(like), -1, -1, -1)


_ADDED_WEIGHTS = ("lora_", ".processor.", "encoder_hid_proj.", "image_proj.", "to_qkv.", "to_kv.", "to_added_qkv.")
"""Parts of the names of weights that LoRAs, IP-Adapters and fused projections add to a denoiser's own."""


def weight_signature(denoiser: nn.Module, size: int = 32) -> tuple[float, ...]:
    """A few weights of a denoiser, whatever its precision and adapters; NaN where sequential offload took them."""
    weights = {
        name.replace(".base_layer", ""): value
        for name, value in denoiser.named_parameters()
        if value.ndim > 1 and not any(added in name for added in _ADDED_WEIGHTS)
    }
    names = sorted(weights)
    chosen = [weights[names[i * len(names) // size]] for i in range(size)] if names else []
    return tuple(
        math.nan if value.is_meta else value.detach().flatten()[value.numel() // 2].float().item() for value in chosen
    )


def load_module(name_or_folder: str | Path) -> GuidanceModule:
    """Load a guidance module from a folder or a hub id, ready to attach; `ModelError` where none can be read."""
    source = str(name_or_folder)
    with loading("a guidance module", source, "Give the folder that `invdiff train` wrote."):
        found: Any = GuidanceModule.load_config(source)
        if found.get("_class_name") != GuidanceModule.__name__:
            raise ValueError(f"it is a {found.get('_class_name', 'config of something else')}")
        return load_complete(GuidanceModule, source).eval()
