"""The LoRA backend: one low-rank adapter for each group of each hidden factor, in the frozen denoiser's own layers.

LoRA (Hu et al., ICLR 2022, arXiv 2106.09685) adds B A x to what a layer makes of x. The adapters of all groups are one
A and one B here, and each row of a batch uses the ranks of its own groups: B (m(e) * A x).
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from torch import nn

from ..errors import ModelError
from ..files import write_tensors
from ..models.families import DenoiserCall, Family
from ..models.frozen import FrozenDenoiser, Hook
from ..progress import note
from .base import ADDED_WEIGHTS, Guidance, Rows


class LowRank(nn.Module):
    """A and B of all groups for one linear or convolutional layer; B starts at zero."""

    def __init__(self, ranks: int, shape: Sequence[int]) -> None:
        """Of so many `ranks` in all; `shape` is (in, out), or (in, out, kernel, stride, padding) of a convolution."""
        super().__init__()
        inputs, outputs, *conv = shape
        self.stride, self.padding = conv[1:] or (1, 0)
        side = conv[:1] * 2
        self.down = nn.Parameter(torch.empty(ranks, inputs, *side))
        self.up = nn.Parameter(torch.zeros(outputs, ranks))
        nn.init.kaiming_uniform_(self.down, a=5**0.5)

    def forward(self, inputs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """B (m * A x) of a layer's inputs, (rows, ..., in) or (rows, in, height, width), and a mask (rows, ranks)."""
        inputs = inputs.to(self.down.dtype)
        if self.down.ndim == 4:
            hidden = F.conv2d(inputs, self.down, stride=self.stride, padding=self.padding)
            return F.conv2d(hidden * mask[:, :, None, None], self.up[:, :, None, None])
        mask = mask.reshape(len(mask), *[1] * (inputs.ndim - 2), -1)
        return F.linear(F.linear(inputs, self.down) * mask, self.up)


class GuidanceLoRA(Guidance):
    """A low-rank adapter a group, which makes the frozen model draw the group itself; those of several factors add.

    B starts at zero, so untrained adapters have no effect. In `invariant` mode one adapter serves all groups. Beside
    what `Guidance` lists, the config has the `rank` of each adapter, and `layers`: the shape of each layer that is
    adapted, by its dotted path; see `LowRank`.
    """

    backend: ClassVar[str] = "lora"
    options: ClassVar[tuple[str, ...]] = ("rank",)
    auto_null: ClassVar[str] = "off"
    recipe: ClassVar[tuple[int, int]] = (800, 32)

    @register_to_config
    def __init__(
        self,
        *,
        rank: int = 8,
        layers: Mapping[str, Sequence[int]] | None = None,
        num_groups: Sequence[int] = (2,),
        factor_names: Sequence[str] = (),
        mode: str = "balanced",
        null_adapter: str = "off",
        denoiser_class: str = "UNet2DConditionModel",
        prediction_type: str = "epsilon",
        weight_signature: Sequence[float] = (),
        base_model: str = "",
        loras: Sequence[Sequence[str]] = (),
        mixes: Mapping[str, Any] | None = None,
        record: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        number = sum(num_groups) if mode == "balanced" else 1
        # A dot may not stand in the name of a module.
        self.adapters = nn.ModuleDict(
            {path.replace(".", "/"): LowRank(rank * number, shape) for path, shape in (layers or {}).items()}
        )
        self._mask: torch.Tensor | None = None
        self._first = self._ran = 0

    @classmethod
    def fitting(cls, family: Family, denoiser: Any, *, rank: int = 8) -> dict[str, Any]:  # type: ignore[override]
        """The layers of attention, and of a UNet the convolutions of its blocks."""
        layers: dict[str, list[int]] = {}
        names = tuple(f".{name}" for name in family.adapted)
        for path, layer in denoiser.named_modules():
            if not path.endswith(names) or any(added in f"{path}." for added in ADDED_WEIGHTS):
                continue  # the latter of an IP-Adapter's own attention
            layer = getattr(layer, "base_layer", layer)  # of a LoRA that a user has loaded
            if isinstance(layer, nn.Linear):
                layers[path] = [layer.in_features, layer.out_features]
            elif isinstance(layer, nn.Conv2d):
                sizes = (layer.kernel_size[0], layer.stride[0], int(layer.padding[0]))
                layers[path] = [layer.in_channels, layer.out_channels, *sizes]
        if not layers:
            wanted = ", ".join(family.adapted)
            raise ModelError(f"Expected layers named {wanted} in {type(denoiser).__name__}, found none.")
        return {"rank": rank, "layers": dict(sorted(layers.items()))}  # as JSON keeps them

    @property
    def hooked(self) -> Sequence[str]:
        return tuple(self.config["layers"])

    def guided(self, frozen: FrozenDenoiser, call: DenoiserCall, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        if torch.is_grad_enabled() and getattr(frozen.module, "is_gradient_checkpointing", False):
            raise ModelError(
                "Expected a denoiser without gradient checkpointing, which runs layers again without their adapters. "
                "Call disable_gradient_checkpointing() on it, and take a smaller batch or backend 'module'."
            )
        close = self.install(frozen.module, frozen.family)
        try:
            self.before({}, rows)
            found = frozen.predict(call.noisy_latents, call.timesteps, call.condition)
            self.after(call, found[0])
            return found
        finally:
            close()

    def install(self, denoiser: nn.Module, family: Family) -> Callable[[], None]:
        handles = [
            denoiser.get_submodule(name.replace("/", ".")).register_forward_hook(Hook(partial(self._add, adapter)))
            for name, adapter in self.adapters.items()
        ]

        def close() -> None:
            self._mask = None
            for handle in handles:
                handle.remove()

        return close

    @torch.compiler.disable
    def _add(self, adapter: Any, layer: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> Any:
        """A layer's output with what `adapter` adds to it; None, which leaves it as it is, without guidance."""
        self._ran += 1
        if self._mask is None:
            return None
        if adapter.up.device != output.device:
            self.follow(output.device)
        if len(self._mask) != len(output):
            raise ModelError(
                f"Expected {len(self._mask)} rows in each layer, found {len(output)}. Pipelines that split them, "
                "those of perturbed-attention guidance (PAG), take backend 'module' or 'tokens'."
            )
        self._mask, guided = self._mask.to(adapter.up), slice(self._first, None)
        changed = output[guided] + adapter(inputs[0][guided], self._mask[guided]).to(output.dtype)
        return torch.cat([output[: self._first], changed]) if self._first else changed

    def before(self, arguments: dict[str, Any], rows: Rows | None) -> dict[str, Any]:
        self._ran, self._mask = 0, None
        if rows is not None:
            # m(e): 1 for the ranks of each row's groups.
            mask = torch.ones(len(rows.environments), self.config["rank"])
            if self.sees_environment:
                groups = zip(rows.environments.cpu().T, self.num_groups, strict=True)
                chosen = torch.cat([F.one_hot(of, size) for of, size in groups], dim=1)
                mask = chosen.float().repeat_interleave(self.config["rank"], dim=1)
            self._mask = mask * rows.strength(mask)
            self._first = int(self._mask.any(dim=1).int().argmax())  # null rows come first, and cost nothing
        return {}

    def after(self, call: DenoiserCall, model_pred: torch.Tensor) -> None:
        if self._ran < len(self.adapters):
            raise ModelError(
                f"Expected {len(self.adapters)} adapted layers to run, {self._ran} did. A wrapper that skips or fuses "
                "layers (caching, fused projections) bypasses them: disable it while guidance is attached."
            )

    def export(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write the adapter of each factor and group as a LoRA that `pipe.load_lora_weights` takes; return the files.

        Of a UNet a second file each, `-kohya`, has the names of keys that ComfyUI and WebUI read. A LoRA acts on all
        rows, so `null_adapter` is lost; those of several factors add. One adapter, `invariant`, is for all groups.

        Raises:
            ModelError: diffusers loads no LoRA into this kind of denoiser.
            DataError: The folder cannot be written.
        """
        kind, rank = self.config["denoiser_class"], self.config["rank"]
        if not hasattr(getattr(diffusers, kind, None), "load_lora_adapter"):
            raise ModelError(f"Expected a denoiser that diffusers loads LoRAs into, got {kind}. Use `attach` instead.")
        if self.config["null_adapter"] != "on":
            note("a LoRA acts on the null row too, where this guidance is off: images differ from those of `attach`")
        part = "unet" if kind.startswith("UNet") else "transformer"
        files = []
        for number, (stem, about) in enumerate(self._exports().items()):
            ranks, weights = slice(number * rank, (number + 1) * rank), {}
            for path in self.config["layers"]:
                adapter: Any = self.adapters[path.replace(".", "/")]
                up = adapter.up[:, ranks]
                weights[f"{part}.{path}.lora_A.weight"] = adapter.down[ranks]
                weights[f"{part}.{path}.lora_B.weight"] = up[..., None, None] if adapter.down.ndim == 4 else up
            files.append(Path(folder) / f"{stem}.safetensors")
            write_tensors(files[-1], weights, metadata=about)
            if part == "unet":
                files.append(Path(folder) / f"{stem}-kohya.safetensors")
                write_tensors(files[-1], convert_state_dict_to_kohya(weights), metadata=about)
        return files

    def _exports(self) -> dict[str, dict[str, str]]:
        """The name of each adapter's file and its metadata, in the order of ranks."""
        about, null = {"base_model": self.config["base_model"]}, self.config["null_adapter"]
        if not self.sees_environment:
            return {"invariant": about | {"null_adapter": null}}
        names = (self.config["record"] or {}).get("group_names")
        found = [
            about
            | {"factor": factor, "group": (names and names[m][group]) or f"group {group}"}
            | {"null_adapter": null if isinstance(null, str) else null[m][group]}
            for m, factor in enumerate(self.factor_names)
            for group in range(self.num_groups[m])
        ]
        # Short, and safe for any file system.
        safe = [[re.sub(r"[^\w.]+", "-", each[of]).strip("-.")[:24] for of in ("factor", "group")] for each in found]
        stems = list(map("-".join, safe))
        if len({stem.casefold() for stem in stems}) < len(stems):
            stems = [f"{number}-{stem}" for number, stem in enumerate(stems)]
        return dict(zip(stems, found, strict=True))
