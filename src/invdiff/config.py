"""Every setting of every step, declared here and nowhere else: the defaults, the ranges, the help of its option."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from .errors import ConfigError
from .options import Config, Option, Range

MixedPrecision = Literal["auto", "no", "fp16", "bf16"]
RARE = Option(panel="Further settings")
AUTOENCODER = Option(panel="Autoencoder")
Count = Annotated[int, Range(min=1)]
Size = Annotated[int, Range(min=0)]
Positive = Annotated[float, Range(above=0)]
NotNegative = Annotated[float, Range(min=0)]
Share = Annotated[float, Range(min=0, max=1)]
Decay = Annotated[float, Range(min=0, below=1)]


@dataclass(frozen=True)
class ArchitectureConfig(Config):
    """The shape of a small latent diffusion model trained from scratch."""

    resolution: Count = 64
    """Side of the square images, in pixels."""
    latent_channels: Count = 8
    """Channels of the latents."""
    autoencoder_width: Count = 48
    """Channels of the autoencoder, the same at every level."""
    autoencoder_blocks: tuple[Size, ...] = (0, 1, 2, 3)
    """Residual blocks at each autoencoder level, finest first; each level after the first halves the side."""
    denoiser_channels: tuple[Count, ...] = (64, 96)
    """Width of each UNet level. The first has no cross-attention, the others do."""
    denoiser_layers: Count = 1
    """Residual blocks per UNet level."""
    text_width: Count = 64
    """Width of the text encoder and of the UNet's cross-attention."""
    text_layers: Count = 2
    """Layers of the text encoder."""
    vocabulary_size: Annotated[int, Range(min=514)] = 1024
    """Most byte-pair tokens to learn from the captions; 514 are all bytes, start and end."""
    max_tokens: Annotated[int, Range(min=3)] = 16
    """Longest caption, in tokens, start and end included."""

    def check(self) -> None:
        self.require("text_width", self.text_width % 16 == 0, "a multiple of 16")
        self.require("autoencoder_blocks", len(self.autoencoder_blocks) > 0, "at least one level")
        self.require("denoiser_channels", len(self.denoiser_channels) >= 2, "at least two levels")
        self.require("denoiser_channels", all(width % 8 == 0 for width in self.denoiser_channels), "multiples of 8")
        factor = 2 ** (len(self.autoencoder_blocks) + len(self.denoiser_channels) - 2)
        self.require("resolution", self.resolution % factor == 0, f"a multiple of {factor}")


@dataclass(frozen=True)
class FinetuneConfig(Config):
    """How a diffusion model is fitted to captioned images: the model whose bias is then studied."""

    steps: Count = 5000
    """Optimiser steps of the denoiser."""
    batch_size: Count = 64
    """Images per optimiser step."""
    learning_rate: NotNegative = 0.0
    """Peak learning rate of AdamW; it warms up over 2% of the steps and falls to zero on a cosine. 0 takes what fits:
    1.5e-3 for a new denoiser, and for that of a base 3e-4 (at most 2 million weights) to 1e-5 (a billion or more)."""
    weight_decay: Annotated[NotNegative, RARE] = 1e-2
    """Weight decay of AdamW."""
    caption_power: Annotated[Share, RARE] = 1.0
    """A caption is drawn in proportion to its number of images to this power. 1 draws images alike; less teaches
    rare captions better and leaves what images look like under each caption as it is."""
    caption_dropout: Annotated[Decay, RARE] = 0.1
    """Share of captions replaced by the null caption, so that classifier-free guidance works."""
    ema_decay: Annotated[Decay, RARE] = 0.998
    """Decay of the moving average of weights that is saved."""
    max_gradient_norm: Annotated[Positive, RARE] = 1.0
    """Gradients are clipped to this norm."""
    autoencoder_steps: Count = 2600
    """Optimiser steps of the autoencoder; from scratch only."""
    autoencoder_batch_size: Annotated[Count, AUTOENCODER] = 32
    """Images per optimiser step of the autoencoder; from scratch only."""
    autoencoder_learning_rate: Annotated[Positive, AUTOENCODER] = 2e-3
    """Peak learning rate of the autoencoder; from scratch only."""
    checkpoint_every: Annotated[Count, RARE] = 250
    """Steps between checkpoints."""
    mixed_precision: Annotated[MixedPrecision, Option(metavar="auto|no|fp16|bf16", panel=RARE.panel)] = "auto"
    """`auto` takes bf16 on a GPU that has it and full precision elsewhere."""
    half_precision_weights: Annotated[bool, RARE] = False
    """Save the denoiser and the autoencoder in 16 bits. diffusers reads them back in 32."""
    fresh_denoiser: bool = False
    """Train the base's denoiser from new weights; its autoencoder and text encoder are kept."""
    seed: int = 0
    """Seed of weights, batches and noise."""


@dataclass(frozen=True)
class TrainConfig(Config):
    """How guidance is trained beside the frozen model (the min phase of the game)."""

    backend: Literal["auto", "module", "tokens", "lora"] = "auto"
    """`module`: the paper's encoder and gradient estimator, which add to the prediction. `tokens`: vectors a group
    behind the prompt embedding, a few thousand weights. `lora`: a low-rank adapter a group in the model's own layers.
    `auto`: what docs/backends.md shows to be best, `lora`."""
    mode: Literal["balanced", "invariant"] = "balanced"
    """`balanced`: the module is given the group; when sampling, groups are spread over the images.
    `invariant`: the paper's; the module never sees the group."""
    steps: Size = 0
    """Optimiser steps per round; 0 takes 800 for `lora`, 600 for the others."""
    batch_size: Size = 0
    """Images per optimiser step; 0 takes 32 for `lora`, 64 for the others."""
    learning_rate: Positive = 2e-3
    """Peak learning rate of AdamW."""
    weight_decay: Annotated[NotNegative, RARE] = 1e-2
    """Weight decay of AdamW."""
    penalty: NotNegative = 0.0
    """lambda, the weight of the invariance penalty: the variance over groups of what the caption contributes to their
    loss. The paper's is 1. Above 0 a step costs a second forward pass."""
    caption_dropout: Annotated[Decay, RARE] = 0.1
    """Share of captions replaced by the null caption, so that guidance works under classifier-free guidance; none
    where the null row is not guided."""
    preserve: Annotated[Decay, RARE] = 0.1
    """Share of images that are given an unrelated caption and trained to the frozen model's own prediction, so that
    captions that nobody audited stay as they are."""
    rounds: Count = 1
    """Rounds of the max-min game. After each but the last the guided model is audited; factors that are new are added,
    and guidance is trained anew on all."""
    width: Size = 0
    """`module`: channels of the gradient estimator, a multiple of 8; 0 fits it to the denoiser."""
    tokens: Count = 4
    """`tokens`: vectors of each group."""
    rank: Count = 8
    """`lora`: rank of each group's adapter."""
    null_adapter: Literal["auto", "on", "off"] = "auto"
    """Whether the null row of classifier-free guidance, the one without a caption, runs under the group's guidance;
    `auto` is `off` for `lora` and `on` for others, unless --calibrate finds better; `tokens` takes no `off`."""
    distilled_guidance: Annotated[NotNegative, RARE] = 3.5
    """The guidance input of a guidance-distilled model (Flux.1 dev) in training: what images will be drawn at. Others
    do not read it; the audit is at 1."""
    ema_decay: Annotated[Decay, RARE] = 0.99
    """Decay of the moving average of weights that is kept."""
    loss_momentum: Annotated[Decay, RARE] = 0.95
    """Decay of the moving means of group losses that the penalty is taken on."""
    purity: Annotated[Share, RARE] = 0.99
    """Images that are less likely to be in a prompt's rare group than this are not drawn for it, but for the 20
    surest; 0 leaves none out. Errors that remain are copied in the same proportion into the other prompts' groups, so
    that guidance does not learn them."""
    max_gradient_norm: Annotated[Positive, RARE] = 1.0
    """Gradients are clipped to this norm."""
    checkpoint_every: Annotated[Count, RARE] = 100
    """Steps between checkpoints."""
    mixed_precision: Annotated[MixedPrecision, Option(metavar="auto|no|fp16|bf16", panel=RARE.panel)] = "auto"
    """`auto` takes bf16 on a GPU that has it and full precision elsewhere."""
    seed: int = 0
    """Seed of weights, batches and noise."""

    def check(self) -> None:
        self.require("width", self.width % 8 == 0, "0 or a multiple of 8")
        fits = self.backend != "tokens" or self.null_adapter != "off"
        expected = "'on' or 'auto' with backend 'tokens', whose rows all have as many tokens (with 'lora', also 'off')"
        self.require("null_adapter", fits, expected)
        for name, backend in (("width", "module"), ("tokens", "tokens"), ("rank", "lora")):
            default = getattr(TrainConfig, name)
            unread = f"nothing with backend {self.backend!r}, but with {backend!r} alone, which reads it"
            self.require(name, backend == self.chosen_backend or getattr(self, name) == default, unread)

    @property
    def chosen_backend(self) -> str:
        """The backend, where `auto` is the best in docs/backends.md."""
        return "lora" if self.backend == "auto" else self.backend


@dataclass(frozen=True)
class AuditConfig(Config):
    """How hidden groups are looked for (the max phase of the game)."""

    solver: Literal["auto", "exact", "gradient"] = "auto"
    """`auto` weighs all evidence and may find nothing. The others always split each prompt's images: `exact` by
    the contrast of losses, with dynamic programming; `gradient` by the denoising loss, as the paper does."""
    num_groups: Size = 0
    """E, groups per prompt; 0 lets `auto` choose up to `max_groups`, and means 2 for the other solvers."""
    max_groups: Annotated[int, Range(min=2), RARE] = 3
    """Most groups that `auto` considers."""
    min_share: Annotated[NotNegative, RARE] = 0.02
    """Smallest share of a prompt's images that a group may have; `gradient` does not read it, but `omega`."""
    omega: Annotated[NotNegative, RARE] = 0.5
    """The dispersion degree of the `gradient` solver: the larger, the more equal the groups."""
    contrast_log_snr: Annotated[tuple[float, ...], RARE] = (-4.79,)
    """Noise levels at which caption and null caption are compared, as log signal-to-noise ratios, which mean the
    same in every schedule; -4.79 is timestep 950 of Stable Diffusion. `exact` and `gradient` take one: the sign of
    the contrast changes with the level."""
    contrast_draws: Count = 2
    """Independent noises per level; with fewer than two, agreement cannot be judged."""
    feature_log_snr: Annotated[tuple[float, ...], RARE] = (2.98, 1.57)
    """Noise levels at which features of the denoiser's middle and last two blocks are read, under the null caption, as
    log signal-to-noise ratios (timesteps 50 and 150 of Stable Diffusion); at least two, since each is checked against
    the other. The features also show which groups of different prompts are alike."""
    vision_encoder: Annotated[str, Option(metavar="MODEL")] = ""
    """With solver `auto`, a transformers vision model (CLIP, DINOv2), by folder or hub id: its features are weighed
    too."""
    words_model: Annotated[str, Option(metavar="MODEL")] = ""
    """A CLIP model, by folder or hub id, that says in words what separates the groups once they are found."""
    words: Annotated[tuple[str, ...], Option(flag="--word")] = ()
    """A word for `words_model` to choose from, beside those of the captions and a list of common ones; repeat for
    more, or give a file to --words."""
    caption_threshold: Annotated[NotNegative, RARE] = 0.05
    """Captions are one prompt where swapping them moves the model's prediction by less than this share of its own
    squared error."""
    min_images: Count = 50
    """Prompts with fewer images are left undecided."""
    level: Annotated[float, Range(above=0, below=1), RARE] = 0.05
    """With solver `auto`, the false discovery rate of cuts that part two humps, over all that are considered; and the
    level of the test that a few labels tell the others better than chance."""
    min_rand: Annotated[Share, RARE] = 0.5
    """With solver `auto`, a cut is worth it where the lower bound of its expected agreement with the truth (adjusted
    Rand index) is at least this."""
    max_factors: Annotated[Size, RARE] = 0
    """With solver `auto`, most hidden factors that are looked for; 0 means 4, but 1 where there is one prompt, of
    which every uneven style would be another factor."""
    max_balance: Annotated[Share, RARE] = 0.35
    """With solver `auto` and one prompt, a split whose smaller side has a larger share is taken for style, not for a
    spurious attribute. Under several prompts shares must differ between them."""
    resolution: Size = 0
    """Side of the square that images are cropped to, in pixels, for audit and training; 0 takes the model's own."""
    images_per_prompt: Count = 500
    """Without data: images that the model draws of each prompt, to be audited."""
    guidance_scale: NotNegative = 1.0
    """Without data: strength of classifier-free guidance when they are drawn; at 1 and below there is none."""
    batch_size: Count = 64
    """Images per forward."""
    seed: int = 0
    """Seed of the noise."""

    def check(self) -> None:
        self.require("num_groups", self.num_groups != 1, "0 or at least 2")
        most = max(self.num_groups or (self.max_groups if self.solver == "auto" else 2), 2)
        self.require("min_share", self.min_share <= 1 / most, f"at least 0 and at most 1 / {most} groups")
        self.require("contrast_log_snr", len(self.contrast_log_snr) > 0, "at least one level")
        self.require("feature_log_snr", len(self.feature_log_snr) >= 2, "at least two levels")
        expected = "nothing without words_model, the CLIP model that chooses from them"
        self.require("words", bool(self.words_model or not self.words), expected)
        if unfit := [word for word in self.words if not word.strip() or len(word) > 60]:
            raise ConfigError(f"AuditConfig.words: expected words of 1 to 60 characters, got {unfit[0][:80]!r}.")
        if self.solver == "auto":
            self.require("contrast_draws", self.contrast_draws >= 2, "at least 2 for solver auto")
        else:
            expected = f"nothing with solver {self.solver!r}, which does not read it"
            self.require("vision_encoder", not self.vision_encoder, expected)
            self.require("contrast_log_snr", len(self.contrast_log_snr) == 1, f"one level for solver {self.solver!r}")


@dataclass(frozen=True)
class GenerateConfig(Config):
    """How images are drawn."""

    images_per_prompt: Count = 16
    """Images of each prompt."""
    guidance_scale: NotNegative = 3.0
    """Strength of classifier-free guidance, or the guidance input of a guidance-distilled model; at 1 and below there
    is none. An unconditional model, and a Flux without that input, take 1 only."""
    scale: NotNegative = 1.0
    """Delta, the strength of the guidance module; without a module it has no meaning."""
    num_inference_steps: Annotated[Count, Option(flag="--steps")] = 20
    """Steps of the pipeline's scheduler."""
    resolution: Size = 0
    """Side of the square images, in pixels; 0 takes the model's own."""
    batch_size: Count = 32
    """Images in one call of the pipeline. Another batch size changes images in the last bits only."""
    seed: int = 0
    """Seed of the starting noise. It is the same with and without a module."""


@dataclass(frozen=True)
class EvaluateConfig(Config):
    """What is measured on generated images, and how."""

    subject_attribute: str = ""
    """Attribute that prompts name, to measure accuracy on."""
    target: Annotated[dict[str, Positive], Option(metavar="CLASS=SHARE,...")] = field(default_factory=dict)
    """Desired mix of the first attribute, such as land=0.3,water=0.7. Without it, uniform."""
    baseline: str = ""
    """Model that others are compared with, seed by seed. Without it, `base` if there is one."""
    min_confidence: Decay = 0.0
    """Images whose likeliest class is less probable are counted as `cannot tell`."""
    features: Annotated[tuple[str, ...], Option(metavar="MODEL")] = ()
    """Further features to measure quality on: `inception` (extra `metrics`), or a vision model such as DINOv2, by
    folder or hub id; repeat for more."""
    clip: Annotated[str, Option(metavar="MODEL")] = ""
    """CLIP model, to measure how well images show their prompts (CLIP-T)."""
    lpips: bool = False
    """Measure the diversity of each prompt's images by LPIPS (extra `metrics`)."""
    num_resamples: Annotated[int, Range(min=20), RARE] = 1000
    """Most resamples of an interval; of many prompts, and of each alone, they are fewer."""
    batch_size: Annotated[Count, RARE] = 64
    """Images in memory at a time."""
    seed: Annotated[int, RARE] = 0
    """Seed of the resamples."""

    def check(self) -> None:
        mix = not self.target or abs(sum(self.target.values()) - 1) <= 1e-6
        self.require("target", mix, "shares that sum to 1")


@dataclass(frozen=True)
class DemoConfig(Config):
    """Every step on the bundled model: audit, train, generate, evaluate."""

    num_images: Annotated[int, Range(min=200)] = 2000
    """Captioned images to audit and train on."""
    severity: Share = 0.95
    """Share of images whose background agrees with the bird."""
    steps: Count = 300
    """Training steps of guidance."""
    images_per_prompt: Annotated[int, Range(min=2)] = 48
    """Images of each prompt, for each model and guidance scale."""
    guidance_scales: tuple[float, ...] = (1.0, 3.0, 7.5)
    """Strengths of classifier-free guidance."""
    num_inference_steps: Annotated[Count, RARE] = 20
    """Steps of the scheduler."""
    reference_images: Annotated[int, Range(min=2), RARE] = 512
    """Balanced images that quality is measured against."""
    seed: int = 0
    """Seed of data, training and images."""

    def check(self) -> None:
        self.require("guidance_scales", len(self.guidance_scales) > 0, "at least one")
