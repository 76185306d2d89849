"""The cells of a sweep: one for each combination of values, with the name of each step's work."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..config import GenerateConfig
from ..errors import ConfigError
from ..files import fingerprint
from .config import ALIASES, AXES, BUNDLED, SweepConfig

BUNDLED_IMAGES = 3000
BUNDLED_SEVERITY = 0.95


@dataclass(frozen=True)
class Cell:
    """One combination of values. Steps with the same settings share their work, also between sweeps."""

    axes: dict[str, Any]
    """Varied setting to its value."""
    config: SweepConfig
    """All settings, with these values."""

    @property
    def data_name(self) -> str:
        """The folder of the data."""
        config = self.config
        return _name(
            f"{config.num_images or 'all'}-images",
            {name: getattr(config, name) for name in ("data", "num_images", "severity", "data_seed")}
            | {"of": config.hidden_attribute if config.severity is not None and config.data != BUNDLED else ""},
        )

    @property
    def model_name(self) -> str:
        """The folder of the fine-tuned model; of one that is not, its name."""
        tune = self.config.finetune
        if tune is None:
            return self.config.model
        return _name("model", {"base": self.config.model, "data": self.data_name, **tune.to_dict()})

    @property
    def audit_name(self) -> str:
        """The folder of the audit."""
        audit = self.config.audit
        settings = {name: value for name, value in audit.to_dict().items() if name not in ("words_model", "words")}
        return _name(audit.solver, {"model": self.model_name, "data": self.data_name, **settings})

    @property
    def module_name(self) -> str:
        """The folder of the module."""
        train = self.config.train
        return _name(f"{train.mode}-seed-{train.seed}", {"audit": self.audit_name, **train.to_dict()})

    def images_name(self, *, guided: bool) -> str:
        """The folder of the images."""
        drawing = self.drawing(guided=guided)
        scale = f"-scale-{drawing.scale:g}" if guided else ""
        settings = drawing.to_dict()
        settings |= {"model": self.model_name, "prompts": list(self.config.prompts)}
        settings["module"] = self.module_name if guided else None
        name = self.config.train.mode if guided else "base"
        return _name(f"{name}-cfg-{drawing.guidance_scale:g}{scale}", settings)

    def drawing(self, *, guided: bool) -> GenerateConfig:
        """Return how images are drawn; the plain model has no scale, so it is the same at all."""
        return self.config.generate if guided else replace(self.config.generate, scale=1.0)

    @property
    def base_axes(self) -> dict[str, Any]:
        """The values that the plain model's images depend on; None for the others."""
        matter: set[Any] = {"guidance_scale", "num_inference_steps"}
        if self.config.finetune is not None:
            matter |= {name for name, step in AXES.items() if not step}
        return {name: value if name in matter else None for name, value in self.axes.items()}


def cells(config: SweepConfig) -> list[Cell]:
    """Return every combination of the varied settings, the last axis varying fastest.

    Raises:
        ConfigError: A value has the wrong type or range.
    """
    _check_along(config)
    found: list[Cell] = []
    for combination in itertools.product(*config.vary.values()):
        settings: dict[str, Any] = {}
        for axis, value in zip(config.vary, combination, strict=True):
            several: dict[str, Any] = value if isinstance(value, dict) else {axis: value}
            settings |= {ALIASES.get(name) or name: setting for name, setting in several.items()}
        found.append(
            Cell(
                axes={axis: settings[axis] for axis in config.vary},
                config=_with_defaults(config.with_settings(settings)),
            )
        )
    return found


def _check_along(config: SweepConfig) -> None:
    """Refuse settings set along that would make two cells alike by their axes, or their plain models differ."""
    of_base = ("guidance_scale", "num_inference_steps", *(name for name, step in AXES.items() if not step))
    for axis, values in config.vary.items():
        named = [value[axis] if isinstance(value, dict) else value for value in values]
        twice = [value for place, value in enumerate(named) if value in named[:place]]
        if twice:
            raise ConfigError(
                f"SweepConfig.vary: expected different values of {axis}, got {twice[0]!r} twice. Vary what differs "
                "beside it as a setting of its own."
            )
        for name in {ALIASES.get(key, key) for value in values if isinstance(value, dict) for key in value} - {axis}:
            if name in config.vary or name in of_base:
                raise ConfigError(
                    f"SweepConfig.vary: expected {name} to vary on its own, got it set along with {axis}. Give it a "
                    "list of values of its own."
                )


def describe_plan(plan: Sequence[Cell]) -> str:
    """Return how much work a sweep is, in words."""
    guided = {cell.images_name(guided=True) for cell in plan}
    base = {cell.images_name(guided=False) for cell in plan}
    return (
        f"{len(plan)} cells: {len({cell.data_name for cell in plan})} data sets, "
        f"{len({cell.audit_name for cell in plan})} audits, {len({cell.module_name for cell in plan})} modules, "
        f"{len(guided | base)} sets of images"
    )


def _with_defaults(config: SweepConfig) -> SweepConfig:
    """Fill in what the bundled world stands for."""
    if config.data != BUNDLED:
        return config
    from ..data.birds import canonical_prompts

    return replace(
        config,
        num_images=config.num_images or BUNDLED_IMAGES,
        severity=BUNDLED_SEVERITY if config.severity is None else config.severity,
        prompts=config.prompts or canonical_prompts(),
    )


def _name(readable: str, settings: dict[str, Any]) -> str:
    return f"{readable}-{fingerprint(json.dumps(settings, sort_keys=True))[:10]}"
