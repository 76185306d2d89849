"""The guidance module: an invariant prompt encoder Phi and a gradient estimator G_psi.

InvDiff (Hou et al., KDD 2025, arXiv 2412.08480) adds a learned stand-in for grad_z log p(Phi(y) | z_t) to a
frozen denoiser's output. Here it is a small convolutional network that reads what the denoiser has already
computed, its prediction and its middle features, instead of a second copy of the denoiser.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import get_timestep_embedding
from torch import nn

from ..errors import ModelError
from ..models.families import Condition, DenoiserCall, Family
from ..models.families.base import to
from ..models.frozen import FeatureCapture, FrozenDenoiser
from .base import Guidance, Rows


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
        if (mask := condition.get("prompt_attention_mask")) is not None:
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


class GuidanceModule(Guidance):
    """Phi and G_psi, trained beside a frozen denoiser: what they add to its prediction is `scale` times the shift.

    The output layer starts at zero, so an untrained module has no effect. Beside what `Guidance` lists, the config has
    the sizes of the denoiser's `DenoiserShape`, with a `width` that may be chosen: channels at the full latent
    resolution, twice that at half of it.
    """

    backend: ClassVar[str] = "module"
    options: ClassVar[tuple[str, ...]] = ("width",)

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
        null_adapter: str = "on",
        width: int = 32,
        denoiser_class: str = "UNet2DConditionModel",
        prediction_type: str = "epsilon",
        weight_signature: Sequence[float] = (),
        base_model: str = "",
        loras: Sequence[Sequence[str]] = (),
        mixes: Mapping[str, Any] | None = None,
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
    def fitting(cls, family: Family, denoiser: Any, *, width: int = 0) -> dict[str, Any]:  # type: ignore[override]
        """Sizes that fit a denoiser; `width`, the estimator's channels, is a multiple of 8 (GroupNorm's), or 0."""
        shape = family.shape(denoiser)
        return dataclasses.asdict(shape) | {"width": width or max(32, shape.width // 8 * 8)}

    @property
    def hooked(self) -> Sequence[str]:
        return (self.config["feature_path"],)

    def guided(self, frozen: FrozenDenoiser, call: DenoiserCall, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        # f~ = f + Delta g_psi(z_t, t, Phi(y), e)
        found = frozen(call.noisy_latents, call.timesteps, call.condition)
        model_pred, features = (values.float() for values in found)
        read = (call.noisy_latents, call.timesteps, rows.environments)
        latents, timesteps, groups = (values.to(frozen.device) for values in read)
        condition = to(call.condition, frozen.device, torch.float32)
        shift = self.forward(latents, timesteps, condition, model_pred, features, groups)
        return model_pred + rows.strength(shift) * shift, features

    def install(self, denoiser: nn.Module, family: Family) -> Callable[[], None]:
        self._family = family
        self._rows: Rows | None = None
        # Phi(y), the condition that it encodes (kept, so that no other tensor takes its place), and how to know it.
        self._phi: torch.Tensor | None = None
        self._encoded: Condition = {}
        self._seen: dict[str, tuple[int, object]] | None = None
        self._features = FeatureCapture(denoiser, family, self.config["feature_path"])
        return self._features.close

    def before(self, arguments: dict[str, Any], rows: Rows | None) -> dict[str, Any]:
        self._rows = rows  # the call is changed at its end
        return {}

    @torch.no_grad()
    def after(self, call: DenoiserCall, model_pred: torch.Tensor) -> torch.Tensor | None:
        """Delta * g_psi beside the frozen prediction, both (rows, channels, height, width)."""
        features, rows = self._features.take(), self._rows
        if rows is None:
            return None
        weight = self.conv_in.weight  # a module's own `device` and `dtype` look through all its weights
        if weight.device != model_pred.device or weight.dtype != model_pred.dtype:
            self.follow(model_pred.device, model_pred.dtype)
            self._seen = None
        latents = call.noisy_latents.to(model_pred.dtype)
        features = self._family.on_grid(features.to(model_pred), call.noisy_latents)
        environments, code = rows.environments.to(model_pred.device), self._code(call.condition, model_pred)
        read = (latents, call.timesteps, call.condition, model_pred, features, environments)
        return rows.strength(model_pred) * self.forward(*read, code=code)

    def _code(self, condition: Condition, like: torch.Tensor) -> torch.Tensor | None:
        """Phi(y), computed anew only where the pipeline passes other tensors than at the step before."""
        # Tensors of inference mode have no version: they never count as seen.
        seen = {name: (id(t), object() if t.is_inference() else t._version) for name, t in condition.items()}
        if seen != self._seen:
            self._seen, self._encoded = seen, dict(condition)
            self._phi = self.encode(to(condition, like.device, like.dtype))
        return self._phi

    def forward(
        self,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        condition: Condition,
        model_pred: torch.Tensor,
        features: torch.Tensor,
        environments: torch.Tensor | None = None,
        *,
        code: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """g_psi, the shift of the denoiser's output, (batch, channels, height, width).

        From z_t (its further channels are ignored), timesteps (batch,), the condition of Phi, `prompt_embeds` (batch,
        tokens, prompt_dim) or `class_labels` (batch,), the frozen output f(z_t, t, y), features (batch,
        feature_channels, height', width'), and in `balanced` mode groups (batch, factors). `code` is Phi(y), if known.
        """
        channels = self.config["latent_channels"]
        if code is None:
            code = self.encode(condition)
        conditions = self.conditions(timesteps, code, environments)
        inputs = [noisy_latents[:, :channels], model_pred, _coordinates(model_pred)]
        full = self.block_in(self.conv_in(torch.cat(inputs, dim=1)), conditions)
        low = self.down(F.silu(full))
        # On a CPU, torch 2.13 crashes in the backward pass of a GroupNorm of channels-last input without gradient.
        features = self.features(features.contiguous())
        low = self.block_low(low + F.interpolate(features, size=low.shape[-2:], mode="nearest"), conditions)
        full = full + F.interpolate(self.up(low), size=full.shape[-2:], mode="nearest")
        return self.conv_out(F.silu(self.block_out(full, conditions)))

    def conditions(
        self, timesteps: torch.Tensor, code: torch.Tensor | None, environments: torch.Tensor | None
    ) -> torch.Tensor:
        """What blocks are scaled and shifted by, (batch, 4 * width): of time, Phi(y) and groups; see `forward`."""
        waves = get_timestep_embedding(timesteps, 2 * self.config["width"])
        conditions = self.time(waves.to(self.conv_in.weight.dtype))
        conditions = conditions if code is None else conditions + code
        if self.sees_environment:
            if environments is None:
                raise ModelError("Expected the environments of each image in balanced mode, got none.")
            for factor, embedding in enumerate(self.environments):
                conditions = conditions + embedding(environments[:, factor])
        return self.condition(conditions)

    def encode(self, condition: Condition) -> torch.Tensor | None:
        """Phi(y), (batch, 4 * width), the same at every step; None for an unconditional model."""
        return None if self.encoder is None else self.encoder(condition)


def _coordinates(like: torch.Tensor) -> torch.Tensor:
    """Vertical and horizontal position from -1 to 1, (batch, 2, height, width): spurious attributes have a layout."""
    axes = [torch.linspace(-1, 1, side, device=like.device, dtype=like.dtype) for side in like.shape[2:]]
    return torch.stack(torch.meshgrid(axes, indexing="ij")).expand(len(like), -1, -1, -1)
