"""Every setting of every step, as frozen dataclasses that read and write JSON or YAML."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from .errors import ConfigError

ConfigType = TypeVar("ConfigType", bound="Config")


class _Loader(yaml.SafeLoader):
    """The scalars of YAML 1.2: PyYAML's 1.1 takes 1e-3 for text and `no` for false."""

    yaml_implicit_resolvers = {  # noqa: RUF012  # as in the base class
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":bool")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


@dataclass(frozen=True)
class Config:
    """Base of all settings: checked on construction, read from and written to JSON or YAML."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not _fits(value, hints[field.name]):
                raise ConfigError(
                    f"{type(self).__name__}.{field.name}: expected {_describe(hints[field.name])}, got {value!r}."
                )
            if hints[field.name] in (float, float | None) and value is not None:
                # 3 and 3.0 are one setting, to compare and to name work by.
                object.__setattr__(self, field.name, float(value))
        self.check()

    def check(self) -> None:
        """Raise `ConfigError` where a value is of the right type but out of range."""

    def require(self, name: str, condition: bool, expected: str) -> None:
        """Raise `ConfigError` for field `name` unless `condition` holds."""
        if not condition:
            raise ConfigError(f"{type(self).__name__}.{name}: expected {expected}, got {getattr(self, name)!r}.")

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain JSON types."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls: type[ConfigType], values: dict[str, Any]) -> ConfigType:
        """Build from a mapping.

        Raises:
            ConfigError: A name is unknown, or a value has the wrong type or range.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(str(name) for name in set(values) - set(names))
        if unknown:
            raise ConfigError(f"{cls.__name__}: unknown setting {', '.join(unknown)}; known are {', '.join(names)}.")
        lists_as_tuples = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
        return cls(**lists_as_tuples)

    @classmethod
    def from_file(cls: type[ConfigType], path: str | Path) -> ConfigType:
        """Read a .json, .yaml or .yml file.

        Raises:
            ConfigError: The file is absent, is not a mapping, or holds unknown or ill-typed settings.
        """
        path = Path(path)
        try:
            # JSON is a subset of YAML.
            values = yaml.load(path.read_text(encoding="utf-8-sig"), Loader=_Loader)  # noqa: S506  # a SafeLoader
        except OSError as error:
            raise ConfigError(f"Could not read the settings in {path}: {error.strerror}.") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"Expected JSON or YAML in {path}, found something else: {error}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"Expected a mapping of settings in {path}, found {type(values).__name__}.")
        try:
            return cls.from_dict(values)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is Literal:
        return value in arguments
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(item, arguments[0]) for item in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _describe(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(repr(argument) for argument in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(argument) for argument in arguments)
    if origin is tuple:
        return f"a list, each item {_describe(arguments[0])}"
    words = {
        float: "a finite number",
        int: "a whole number",
        bool: "true or false",
        dict: "a mapping",
        str: "text",
        type(None): "nothing",
    }
    return words.get(hint) or f"the settings of {hint.__name__}"


MixedPrecision = Literal["auto", "no", "fp16", "bf16"]


@dataclass(frozen=True)
class ArchitectureConfig(Config):
    """The shape of a small latent diffusion model built from nothing."""

    resolution: int = 64
    """Side of the square images, in pixels."""
    latent_channels: int = 8
    """Channels of the latents."""
    autoencoder_width: int = 48
    """Channels of the autoencoder, the same at every level."""
    autoencoder_blocks: tuple[int, ...] = (0, 1, 2, 3)
    """Residual blocks at each autoencoder level, finest first; each level after the first halves the side."""
    denoiser_channels: tuple[int, ...] = (64, 96)
    """Width of each UNet level. The first has no cross-attention, the others do."""
    denoiser_layers: int = 1
    """Residual blocks per UNet level."""
    text_width: int = 64
    """Width of the text encoder and of the UNet's cross-attention."""
    text_layers: int = 2
    """Layers of the text encoder."""
    vocabulary_size: int = 1024
    """Most byte-pair tokens to learn from the captions."""
    max_tokens: int = 16
    """Longest caption, in tokens, start and end included."""

    def check(self) -> None:
        """Check ranges."""
        for name in ("resolution", "latent_channels", "autoencoder_width", "denoiser_layers", "text_layers"):
            self.require(name, getattr(self, name) >= 1, "at least 1")
        self.require("vocabulary_size", self.vocabulary_size >= 514, "at least 514: all bytes, start and end")
        self.require("max_tokens", self.max_tokens >= 3, "at least 3")
        self.require("text_width", self.text_width >= 16 and self.text_width % 16 == 0, "a multiple of 16")
        blocks = len(self.autoencoder_blocks) > 0 and min(self.autoencoder_blocks) >= 0
        self.require("autoencoder_blocks", blocks, "at least one level of at least 0 blocks")
        self.require("denoiser_channels", len(self.denoiser_channels) >= 2, "at least two levels")
        widths = all(width > 0 and width % 8 == 0 for width in self.denoiser_channels)
        self.require("denoiser_channels", widths, "multiples of 8")
        factor = 2 ** (len(self.autoencoder_blocks) + len(self.denoiser_channels) - 2)
        self.require("resolution", self.resolution % factor == 0, f"a multiple of {factor}")


@dataclass(frozen=True)
class FinetuneConfig(Config):
    """How a diffusion model is fitted to captioned images: the model whose bias is then studied."""

    steps: int = 5000
    """Optimiser steps of the denoiser."""
    batch_size: int = 64
    """Images per optimiser step."""
    learning_rate: float = 1.5e-3
    """Peak learning rate of AdamW; it warms up over 2% of the steps and falls to zero on a cosine."""
    weight_decay: float = 1e-2
    """Weight decay of AdamW."""
    caption_power: float = 1.0
    """A caption is drawn in proportion to its number of images to this power. 1 draws images alike; less teaches
    rare captions better and leaves what images look like under each caption as it is."""
    caption_dropout: float = 0.1
    """Share of captions replaced by the null caption, so that classifier-free guidance works."""
    ema_decay: float = 0.998
    """Decay of the moving average of weights that is saved."""
    max_gradient_norm: float = 1.0
    """Gradients are clipped to this norm."""
    autoencoder_steps: int = 2600
    """Optimiser steps of the autoencoder; from scratch only."""
    autoencoder_batch_size: int = 32
    """Images per optimiser step of the autoencoder; from scratch only."""
    autoencoder_learning_rate: float = 2e-3
    """Peak learning rate of the autoencoder; from scratch only."""
    checkpoint_every: int = 250
    """Steps between checkpoints."""
    mixed_precision: MixedPrecision = "auto"
    """`auto` takes bf16 on a GPU that has it and full precision elsewhere."""
    half_precision_weights: bool = False
    """Save the denoiser and the autoencoder in 16 bits. diffusers reads them back in 32."""
    fresh_denoiser: bool = False
    """Train the base's denoiser from new weights: its autoencoder and text encoder are kept."""
    seed: int = 0
    """Seed of weights, batches and noise."""

    def check(self) -> None:
        """Check ranges."""
        for name in (
            "steps",
            "batch_size",
            "autoencoder_steps",
            "autoencoder_batch_size",
            "checkpoint_every",
        ):
            self.require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("learning_rate", "autoencoder_learning_rate", "max_gradient_norm"):
            self.require(name, getattr(self, name) > 0, "more than 0")
        self.require("weight_decay", self.weight_decay >= 0, "at least 0")
        for name in ("caption_dropout", "ema_decay"):
            self.require(name, 0 <= getattr(self, name) < 1, "at least 0 and below 1")
        self.require("caption_power", 0 <= self.caption_power <= 1, "between 0 and 1")


@dataclass(frozen=True)
class TrainConfig(Config):
    """How the guidance module is trained beside the frozen model (the min phase of the game)."""

    mode: Literal["balanced", "invariant"] = "balanced"
    """`balanced`: the module is told the group and the group is drawn when sampling.
    `invariant`: the paper's; it never sees the group."""
    steps: int = 600
    """Optimiser steps per round."""
    batch_size: int = 64
    """Images per optimiser step."""
    learning_rate: float = 2e-3
    """Peak learning rate of AdamW."""
    weight_decay: float = 1e-2
    """Weight decay of AdamW."""
    penalty: float = 1.0
    """lambda, the weight of the invariance penalty: the variance of the group losses."""
    caption_dropout: float = 0.1
    """Share of captions replaced by the null caption, so that guidance works under classifier-free guidance."""
    rounds: int = 1
    """Rounds of the max-min game. After each but the last, groups are inferred again with the guided model."""
    width: int = 0
    """Channels of the gradient estimator; 0 fits it to the denoiser."""
    ema_decay: float = 0.99
    """Decay of the moving average of weights that is kept."""
    loss_momentum: float = 0.95
    """Decay of the moving means of group losses that the penalty is taken on."""
    max_gradient_norm: float = 1.0
    """Gradients are clipped to this norm."""
    checkpoint_every: int = 100
    """Steps between checkpoints."""
    mixed_precision: MixedPrecision = "auto"
    """`auto` takes bf16 on a GPU that has it and full precision elsewhere."""
    seed: int = 0
    """Seed of weights, batches and noise."""

    def check(self) -> None:
        """Check ranges."""
        for name in ("steps", "batch_size", "rounds", "checkpoint_every"):
            self.require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("learning_rate", "max_gradient_norm"):
            self.require(name, getattr(self, name) > 0, "more than 0")
        for name in ("penalty", "weight_decay"):
            self.require(name, getattr(self, name) >= 0, "at least 0")
        self.require("width", self.width >= 0 and self.width % 8 == 0, "0 or a multiple of 8")
        for name in ("caption_dropout", "ema_decay", "loss_momentum"):
            self.require(name, 0 <= getattr(self, name) < 1, "at least 0 and below 1")


@dataclass(frozen=True)
class AuditConfig(Config):
    """How hidden groups are looked for (the max phase of the game)."""

    solver: Literal["auto", "exact", "gradient"] = "auto"
    """`auto` weighs all evidence and may find nothing. The others always cut each prompt's images: `exact` by
    the contrast of losses, with dynamic programming; `gradient` by the denoising loss, as the paper does."""
    num_groups: int = 0
    """E, groups per prompt; 0 lets `auto` choose up to `max_groups`, and means 2 for the other solvers."""
    max_groups: int = 3
    """Most groups that `auto` considers."""
    min_share: float = 0.02
    """Smallest share of a prompt's images that a group may have."""
    omega: float = 0.5
    """The dispersion degree of the `gradient` solver: the larger, the more equal the groups."""
    contrast_log_snr: tuple[float, ...] = (-4.79,)
    """Noise levels at which caption and null caption are compared, as log signal-to-noise ratios, which mean the
    same in every schedule; -4.79 is timestep 950 of Stable Diffusion. `exact` and `gradient` take one: the sign of
    the contrast changes with the level."""
    contrast_draws: int = 2
    """Independent noises per level; with fewer than two, stability cannot be judged."""
    feature_log_snr: tuple[float, ...] = (2.98, 1.57)
    """Noise levels at which the denoiser's middle features are read, under the null caption, as log signal-to-noise
    ratios (timesteps 50 and 150 of Stable Diffusion); at least two, since each judges the other. They also tell
    which groups of different prompts are alike."""
    other_captions: tuple[str, ...] = ()
    """`auto`: further captions whose losses are compared with the caption's own, at the same noise."""
    vision_encoder: str = ""
    """`auto`: a transformers vision model (CLIP, DINOv2), by folder or hub id, whose features are weighed too."""
    words_model: str = ""
    """A CLIP model, by folder or hub id, that says in words what tells the groups apart once they are found."""
    words: tuple[str, ...] = ()
    """Words for it to choose from, beside those of the captions and a list of common ones."""
    caption_threshold: float = 0.05
    """Captions are one prompt where swapping them moves the model's prediction by less than this share of its own
    squared error."""
    min_images: int = 50
    """Prompts with fewer images are left undecided."""
    min_stability: float = 0.8
    """`auto`: least agreement (adjusted Rand index) of the groups found from independent noises."""
    min_separation: float = 0.5
    """`auto`: least depth of the valley between neighbouring groups, in [0, 1]."""
    max_balance: float = 0.35
    """`auto`: a split whose smaller side has a larger share is taken for style, not for an accident."""
    resolution: int = 0
    """Side of the square that images are cut to, in pixels, for audit and training; 0 takes the model's own."""
    batch_size: int = 64
    """Images per forward."""
    seed: int = 0
    """Seed of the noise."""

    def check(self) -> None:
        """Check ranges."""
        self.require("num_groups", self.num_groups == 0 or self.num_groups >= 2, "0 or at least 2")
        self.require("max_groups", self.max_groups >= 2, "at least 2")
        most = max(self.num_groups or (self.max_groups if self.solver == "auto" else 2), 2)
        self.require("min_share", 0 <= self.min_share <= 1 / most, f"at least 0 and at most 1 / {most} groups")
        self.require("contrast_log_snr", len(self.contrast_log_snr) > 0, "at least one level")
        self.require("resolution", self.resolution >= 0, "at least 0")
        for name in ("contrast_draws", "batch_size", "min_images"):
            self.require(name, getattr(self, name) >= 1, "at least 1")
        self.require("omega", self.omega >= 0, "at least 0")
        self.require("feature_log_snr", len(self.feature_log_snr) >= 2, "at least two levels")
        expected = "nothing without words_model, the CLIP model that chooses from them"
        self.require("words", bool(self.words_model or not self.words), expected)
        unfit = [word for word in self.words if not word.strip() or len(word) > 60]
        if unfit:
            raise ConfigError(f"AuditConfig.words: expected words of 1 to 60 characters, got {unfit[0][:80]!r}.")
        if self.solver == "auto":
            self.require("contrast_draws", self.contrast_draws >= 2, "at least 2 for solver auto")
        else:
            expected = f"nothing with solver {self.solver!r}, which does not read it"
            self.require("other_captions", not self.other_captions, expected)
            self.require("vision_encoder", not self.vision_encoder, expected)
            self.require("contrast_log_snr", len(self.contrast_log_snr) == 1, f"one level for solver {self.solver!r}")


@dataclass(frozen=True)
class GenerateConfig(Config):
    """How images are drawn."""

    images_per_prompt: int = 16
    """Images of each prompt."""
    guidance_scale: float = 3.0
    """Strength of classifier-free guidance, or what a guidance-distilled model is told; at 1 and below there is
    none. An unconditional model takes 1 only."""
    scale: float = 1.0
    """Delta, the strength of the guidance module; without a module it has no meaning."""
    num_inference_steps: int = 20
    """Steps of the pipeline's scheduler."""
    resolution: int = 0
    """Side of the square images, in pixels; 0 takes the model's own."""
    batch_size: int = 32
    """Images in one call of the pipeline. Another batch size changes images in the last bits only."""
    seed: int = 0
    """Seed of the starting noise. It is the same with and without a module."""

    def check(self) -> None:
        """Check ranges."""
        for name in ("images_per_prompt", "num_inference_steps", "batch_size"):
            self.require(name, getattr(self, name) >= 1, "at least 1")
        self.require("resolution", self.resolution >= 0, "at least 0")
        for name in ("guidance_scale", "scale"):
            self.require(name, 0 <= getattr(self, name) < math.inf, "a finite number of at least 0")


@dataclass(frozen=True)
class AugmentationConfig(Config):
    """How the classifier is trained: the annotators' small conv net, on subjects alone, all images drawn alike."""

    steps: int = 400
    """Optimiser steps, the same for every classifier."""
    batch_size: int = 64
    """Images per step."""
    learning_rate: float = 3e-3
    """Peak of the one-cycle schedule."""
    resolution: int = 64
    """Side in pixels that images are resized to."""

    def check(self) -> None:
        """Check ranges."""
        for name in ("steps", "batch_size"):
            self.require(name, getattr(self, name) >= 1, "at least 1")
        self.require("learning_rate", self.learning_rate > 0, "more than 0")
        self.require("resolution", self.resolution >= 8, "at least 8")


@dataclass(frozen=True)
class DemoConfig(Config):
    """The whole story on the bundled model: audit, train, generate, evaluate."""

    num_images: int = 3000
    """Captioned images to audit and train on."""
    severity: float = 0.95
    """Share of images whose background agrees with the bird."""
    steps: int = 600
    """Training steps of the guidance module."""
    images_per_prompt: int = 48
    """Images of each prompt, for each model and guidance scale."""
    guidance_scales: tuple[float, ...] = (1.0, 3.0, 7.5)
    """Strengths of classifier-free guidance."""
    num_inference_steps: int = 20
    """Steps of the scheduler."""
    reference_images: int = 512
    """Balanced images that quality is measured against."""
    seed: int = 0
    """Seed of data, training and images."""

    def check(self) -> None:
        """Check ranges."""
        for name in ("steps", "num_inference_steps"):
            self.require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("images_per_prompt", "reference_images"):
            self.require(name, getattr(self, name) >= 2, "at least 2")
        self.require("num_images", self.num_images >= 200, "at least 200")
        self.require("severity", 0 <= self.severity <= 1, "a share between 0 and 1")
        self.require("guidance_scales", len(self.guidance_scales) > 0, "at least one")
