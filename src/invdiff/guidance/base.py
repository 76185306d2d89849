"""What every guidance is: a small model saved in diffusers' format beside the frozen one that it was trained with."""

import json
import math
import os
import warnings
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin
from torch import nn

from ..config import TrainConfig
from ..errors import ConfigError, ModelError
from ..files import atomic_folder, fetched, write_text
from ..models.families import Condition, DenoiserCall, Family, family_of
from ..models.frozen import FrozenDenoiser, do_nothing
from ..models.load import denoiser_of, loras_of, public_name
from ..models.schedule import NoiseSchedule
from .card import render_card, with_figures

GuidanceType = TypeVar("GuidanceType", bound="Guidance")


@dataclass(frozen=True)
class Rows:
    """What guides the rows of one call of the denoiser."""

    environments: torch.Tensor  # the group of each hidden factor, (rows, factors)
    scale: float = 1.0  # Delta, the strength; never 0
    null: torch.Tensor | None = None  # (rows,) of bool: run without guidance, as rows of the null caption may

    def strength(self, like: torch.Tensor) -> float | torch.Tensor:
        """Delta of each row, to multiply a tensor `like` (rows, ...) by."""
        if self.null is None:
            return self.scale
        return self.scale * (~self.null).to(like).reshape(-1, *[1] * (like.ndim - 1))


class Guidance(ModelMixin, ConfigMixin):
    """The protocol that `train` returns and `attach` takes; each backend is a class, named in config.json.

    Make one that fits a pipeline by `for_pipeline`; untrained it leaves images bit-identical. Saving it writes a model
    card, README.md, beside the weights, from the config; it quotes captions of the training images. Every config has
    these entries, beside those of its backend:

    Args:
        num_groups: Groups (environments) of each hidden factor.
        factor_names: Their names, by which `attach` takes a mix; "factor 1" and so on where not given.
        mode: `"balanced"` takes the group as an input, `"invariant"` does not.
        null_adapter: Whether the rows of the null caption run under guidance, `"on"` or `"off"`, or one of them for
            each factor's groups, of which all must be on.
        denoiser_class, prediction_type: The denoiser it was made for, and what it predicts.
        weight_signature: A few of that denoiser's weights, to tell it from others.
        base_model: Hub id of the pipeline, or the last name of its folder, for people.
        loras: Name and fingerprint of each LoRA that was fused into it.
        mixes: By guidance scale and prompt, the mix of each factor's groups that `calibrate` found.
        record: Further statements of the model card; see `card.training_record`.
    """

    backend: ClassVar[str]  # its name in `TrainConfig`
    options: ClassVar[tuple[str, ...]]  # entries of `TrainConfig` that only it reads, and `fitting` takes
    auto_null: ClassVar[str] = "on"  # the `null_adapter` that `"auto"` means for it
    recipe: ClassVar[tuple[int, int]] = (600, 64)  # steps and batch size where `TrainConfig` leaves them open

    # What a backend does.

    @classmethod
    @abstractmethod
    def fitting(cls, family: Family, denoiser: Any, **options: Any) -> dict[str, Any]:
        """The entries of the config that fit a denoiser, from the backend's own options of `TrainConfig`."""

    @property
    def hooked(self) -> Sequence[str]:
        """Dotted paths of the blocks of a denoiser that `install` hooks."""
        return ()

    @abstractmethod
    def guided(self, frozen: FrozenDenoiser, call: DenoiserCall, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """f~, (B, C, H, W), and middle features, (B, D, H', W'); gradients reach the weights of the guidance alone."""

    def install(self, denoiser: nn.Module, family: Family) -> Callable[[], None]:
        """Put hooks on a denoiser; what is returned takes them off. One installation at a time."""
        return do_nothing

    def check_scale(self, scale: float) -> None:
        """Raise `ConfigError` where the strength of guidance, Delta, cannot be this."""
        if not (isinstance(scale, Real) and math.isfinite(scale)):
            raise ConfigError(f"Expected a finite scale, such as 1, got {scale!r}.")

    def before(self, arguments: dict[str, Any], rows: Rows | None) -> dict[str, Any]:
        """Changes to the arguments of a call of the denoiser that begins, guided by `rows` if at all."""
        return {}

    def after(self, call: DenoiserCall, model_pred: torch.Tensor) -> torch.Tensor | None:
        """What is added to the prediction of the call that ends, (rows, channels, height, width)."""
        return None

    def export(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write files that load without this package; `ModelError` unless what was learnt are weights of the model."""
        raise ModelError(
            f"Expected guidance of backend 'lora' to export, got {self.backend!r}, which no LoRA file can hold: it is "
            "no change of the model's weights. Use `attach`, or train with --backend lora."
        )

    @classmethod
    def for_pipeline(
        cls: type[GuidanceType],
        pipe: Any,
        *,
        num_groups: int | Sequence[int] = 2,
        mode: str = "balanced",
        null_adapter: str = "auto",
        seed: int = 0,
        **options: Any,
    ) -> GuidanceType:
        """An untrained guidance that fits `pipe`'s denoiser and has no effect yet.

        Args:
            pipe: A diffusers pipeline of a supported family.
            num_groups: Groups of the hidden factor, or of each of several.
            mode: `"balanced"` or `"invariant"`.
            null_adapter: `"on"`, `"off"`, or `"auto"` for what suits the backend: see the tables in docs/backends.md.
            seed: Seed of the initial weights.
            options: The backend's own, such as `width` of a `GuidanceModule` and `rank` of a `GuidanceLoRA`.

        Raises:
            ModelError: The denoiser is of a family that is not supported.
            ConfigError: `num_groups`, `mode` or an option is out of range, or not for this backend.
        """
        groups = (num_groups,) if isinstance(num_groups, int) else tuple(num_groups)
        if not groups or min(groups) < 2:
            raise ConfigError(f"Expected num_groups of at least 2 for at least one factor, got {num_groups!r}.")
        settings = options | {"backend": cls.backend, "mode": mode, "null_adapter": null_adapter}
        TrainConfig.from_dict(settings)  # which checks them
        denoiser, family = denoiser_of(pipe), family_of(pipe)
        if any(weight.is_meta for weight in denoiser.parameters()):
            raise ModelError("Expected the denoiser's weights in memory, found them offloaded. Offload later.")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            guidance = cls(
                **cls.fitting(family, denoiser, **options),
                num_groups=groups,
                mode=mode,
                null_adapter=cls.auto_null if null_adapter == "auto" else null_adapter,
                denoiser_class=type(denoiser).__name__,
                prediction_type=NoiseSchedule(pipe.scheduler).prediction_type,
                weight_signature=weight_signature(denoiser),
                base_model=public_name(str(getattr(pipe, "name_or_path", "") or "")),
                loras=loras_of(pipe),
            )
        return guidance.eval()

    def follow(self, device: torch.device, dtype: torch.dtype | None = None) -> None:
        """Move to where the denoiser computes; diffusers' own `to` warns of layers to be kept in 32 bits."""
        nn.Module.to(cast(Any, self), device, dtype)

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
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, **options: Any) -> Any:
        """Load from a folder or a hub id, as `ModelMixin.from_pretrained` does, but never from a pickle."""
        options.setdefault("use_safetensors", True)
        return super().from_pretrained(pretrained_model_name_or_path, **options)

    @classmethod
    def load_config(cls, *arguments: Any, **options: Any) -> Any:
        """Read the config in a folder or at a hub id; `ModelError` where it is of another backend than this class."""
        with warnings.catch_warnings():  # diffusers passes huggingface_hub an argument it no longer has
            warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks")
            found = super().load_config(*arguments, **options)
        kind = (found[0] if isinstance(found, tuple) else found).get("_class_name")
        if cls is not Guidance and kind != cls.__name__:
            expected = f"Expected a {cls.__name__} at {arguments[0]}, found a {kind or 'config of something else'}"
            raise ModelError(f"{expected}. Load guidance of any backend by `load_guidance`.")
        return found

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

    def calibrated(self, prompt: str, guidance_scale: float) -> list[list[float]]:
        """The mix of each factor's groups that `calibrate` found for a prompt; `ConfigError` where it did not."""
        known = self.config["mixes"] or {}
        try:
            return known[f"{guidance_scale:g}"][prompt]
        except KeyError as error:
            measured = "; ".join(f"{scale}: {', '.join(of)}" for scale, of in known.items()) or "none"
            raise ConfigError(
                f"Expected guidance calibrated for {prompt!r} at guidance scale {guidance_scale:g}, found {measured}. "
                "Calibrate it for them (--calibrate), or draw with another mix."
            ) from error

    def guides_null(self, environments: torch.Tensor) -> torch.Tensor:
        """Whether a row of the null caption in these groups, (rows, factors), runs under guidance: (rows,) of bool."""
        of = self.config["null_adapter"]
        of = [[of] * size for size in self.num_groups] if isinstance(of, str) else of
        rows = environments.tolist()
        return torch.tensor([all(of[m][group] == "on" for m, group in enumerate(row)) for row in rows])

    @property
    def sees_environment(self) -> bool:
        """Whether the group is an input (`balanced`) or not (`invariant`)."""
        return self.config["mode"] == "balanced"


class Guided(nn.Module):
    """f~ of a frozen denoiser under guidance in training: one call, whose gradients several processes average."""

    def __init__(self, frozen: FrozenDenoiser, guidance: Guidance) -> None:
        super().__init__()
        self.guidance, self._frozen = cast(Any, guidance), frozen

    def forward(
        self, noisy_latents: torch.Tensor, timesteps: torch.Tensor, condition: Condition, rows: Rows
    ) -> torch.Tensor:
        """f~, (B, C, H, W), with gradient."""
        return self.guidance.guided(self._frozen, DenoiserCall(noisy_latents, timesteps, condition), rows)[0]


ADDED_WEIGHTS = ("lora_", ".processor.", "encoder_hid_proj.", "image_proj.", "to_qkv.", "to_kv.", "to_added_qkv.")
"""Parts of the names of weights that LoRAs, IP-Adapters and fused projections add to a denoiser's own."""


def weight_signature(denoiser: nn.Module, size: int = 32) -> tuple[float, ...]:
    """A few weights of a denoiser, whatever its precision, adapters and place; NaN where there are none."""
    weights = {
        name.replace(".base_layer", ""): fetched(denoiser, name, value)
        for name, value in denoiser.named_parameters()
        if value.ndim > 1 and not any(added in name for added in ADDED_WEIGHTS)
    }
    names = sorted(weights)
    chosen = [weights[names[i * len(names) // size]] for i in range(size)] if names else []
    return tuple(math.nan if of.is_meta else of.detach().flatten()[of.numel() // 2].float().item() for of in chosen)
