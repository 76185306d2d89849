"""What a sweep varies, and what it holds fixed."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from ..config import AuditConfig, FinetuneConfig, GenerateConfig, TrainConfig
from ..errors import ConfigError
from ..options import Config

BUNDLED = "birds"
"""The name of the bundled model, world and annotator."""

AXES: dict[str, str] = {
    **dict.fromkeys(("num_images", "severity", "data_seed"), ""),
    **dict.fromkeys(("solver", "num_groups", "omega", "contrast_draws"), "audit"),
    **dict.fromkeys(("mode", "penalty", "steps", "learning_rate", "width", "rounds", "seed"), "train"),
    **dict.fromkeys(("scale", "guidance_scale", "num_inference_steps"), "generate"),
}
"""Every setting that may vary, and the step it belongs to ("" for the data)."""
ALIASES = {"lambda": "penalty", "E": "num_groups", "Delta": "scale"}
"""The paper's letters."""


@dataclass(frozen=True)
class SweepConfig(Config):
    """One experiment: settings that are varied, in every combination, and settings that are not."""

    vary: dict
    """Setting to the values it takes. A value may be a mapping that sets others along, such as
    {mode: invariant, steps: 1500}."""
    model: str = BUNDLED
    """The pipeline, by folder or hub id; `birds` is the bundled one."""
    data: str = BUNDLED
    """Captioned images to audit and train on; `birds` draws the bundled world."""
    num_images: int = 0
    """Images taken at random from the data; 0 takes all (3,000 of the bundled world)."""
    severity: float | None = None
    """Share of each caption's images in its most frequent class of `hidden_attribute`; nothing leaves the data as
    it is (0.95 in the bundled world)."""
    data_seed: int = 0
    """Seed of that choice, and of the bundled world."""
    hidden_attribute: str = ""
    """Column of the data that tells the hidden groups, to judge W by; audit and training never see it."""
    finetune: FinetuneConfig | None = None
    """Fit the model to each data set first; nothing takes the model as it is."""
    audit: AuditConfig = field(default_factory=AuditConfig)
    """Settings of the audit."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Settings of the training; its `seed` may vary."""
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    """Settings of the drawing; its `seed` is the same for all."""
    prompts: tuple[str, ...] = ()
    """What is drawn; none means the bundled world's two prompts."""
    annotator: str = BUNDLED
    """What names the classes, as for `invdiff evaluate`; `birds` is the bundled one."""
    attribute: str = "background"
    """The sensitive attribute."""
    subject_attribute: str = ""
    """The attribute that prompts name."""
    reference: str = ""
    """Images that quality is measured against; `birds` draws 2,000 balanced ones of the bundled world."""
    min_confidence: float = 0.0
    """Below it the annotator cannot tell."""

    def check(self) -> None:
        """Check names and ranges."""
        for axis, values in self.vary.items():
            if axis not in AXES:
                raise ConfigError(f"SweepConfig.vary: unknown setting {axis!r}; known are {', '.join(AXES)}.")
            if not isinstance(values, list | tuple) or not values:
                raise ConfigError(f"SweepConfig.vary: expected a list of values of {axis}, got {values!r}.")
            for value in values:
                if isinstance(value, dict) and axis not in value:
                    raise ConfigError(
                        f"SweepConfig.vary: expected {axis} among the settings {value!r} of one of its values."
                    )
        self.require("vary", len(self.vary) > 0, "at least one setting to vary")
        self.require("num_images", self.num_images >= 0, "at least 0")
        self.require("severity", self.severity is None or 0 < self.severity <= 1, "a share above 0, up to 1")
        self.require("data_seed", self.data_seed >= 0, "at least 0")
        self.require("min_confidence", 0 <= self.min_confidence < 1, "at least 0 and below 1")
        self.require("prompts", bool(self.prompts) or self.data == BUNDLED, "at least one prompt")
        of_data = self.severity is not None or "severity" in self.vary
        if of_data and self.data != BUNDLED and not self.hidden_attribute:
            raise ConfigError(
                "SweepConfig.hidden_attribute: expected the column that severity is a share of, got none."
            )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SweepConfig:
        """Build from a mapping; the steps' settings are mappings of their own.

        Raises:
            ConfigError: A name is unknown, or a value has the wrong type or range.
        """
        parts: dict[str, type[Config]] = {
            "audit": AuditConfig,
            "train": TrainConfig,
            "generate": GenerateConfig,
            "finetune": FinetuneConfig,
        }
        values = dict(values)
        for name, part in parts.items():
            if isinstance(values.get(name), dict):
                values[name] = part.from_dict(values[name])
        vary = values.get("vary")
        if not isinstance(vary, dict):
            raise ConfigError(f"{cls.__name__}.vary: expected a mapping of settings to lists of values, got {vary!r}.")
        values["vary"] = {ALIASES.get(axis, axis): taken for axis, taken in vary.items()}
        if len(values["vary"]) < len(vary):
            raise ConfigError(f"{cls.__name__}.vary: expected each setting once, got {', '.join(map(str, vary))}.")
        return super().from_dict(values)

    def with_settings(self, settings: dict[str, Any]) -> SweepConfig:
        """Return a copy in which each setting of `settings` has its value.

        Raises:
            ConfigError: A setting is unknown, or a value has the wrong type or range.
        """
        changed: dict[str, Any] = {}
        for step in ("audit", "train", "generate"):
            mine = {name: value for name, value in settings.items() if AXES.get(name) == step}
            if mine:
                changed[step] = dataclasses.replace(getattr(self, step), **mine)
        unknown = sorted(set(settings) - set(AXES))
        if unknown:
            raise ConfigError(f"SweepConfig.vary: unknown setting {unknown[0]!r}; known are {', '.join(AXES)}.")
        changed |= {name: value for name, value in settings.items() if AXES[name] == ""}
        return dataclasses.replace(self, **changed)
