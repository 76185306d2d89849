"""What the controls of tab Generate ask for, and the command that draws the same."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..config import GenerateConfig
from ..errors import ConfigError
from .studio import MOST_IMAGES, Ask

LONGEST_PROMPT = 2000
"""Characters; models read far fewer."""
NO_COMMAND = "# The mix of several hidden factors can be asked for from Python only: attach(..., environments={mix})."


@dataclass(frozen=True)
class Commands:
    """How what is drawn with is named on a command line."""

    model: str
    module: str = ""
    dtype: str = "fp32"
    reads_prompts: bool = True


def read_ask(values: Sequence[Any], num_groups: Sequence[int], *, batch_size: int, resolution: int = 0) -> Ask:
    """Return what the controls ask for.

    Args:
        values: Prompt, seed, images, guidance scale, steps, scale, then a proportion for each group of each factor.
        num_groups: Groups of each factor.
        batch_size: Images in one call of the pipeline.
        resolution: Side of the images in pixels; 0 for the model's own.

    Raises:
        ConfigError: A value is missing or outside its range.
    """
    prompt, *numbers = values
    if not isinstance(prompt, str) or any(isinstance(n, bool) or not isinstance(n, int | float) for n in numbers):
        raise ConfigError("Expected a prompt and a number in every field, got an empty one. Fill it in.")
    if len(prompt) > LONGEST_PROMPT:
        raise ConfigError(f"Expected a prompt of at most {LONGEST_PROMPT} characters, got {len(prompt)}. Shorten it.")
    if not prompt.isascii() and any("\ud800" <= character <= "\udfff" for character in prompt):
        raise ConfigError("Expected a prompt of whole characters, got half of one (a lone surrogate). Type it again.")
    if not all(map(math.isfinite, numbers)):
        raise ConfigError("Expected finite numbers in every field, got others. Move the sliders.")
    seed, images, cfg, steps, scale, *proportions = numbers
    if not 1 <= images <= MOST_IMAGES:
        raise ConfigError(f"Expected 1 to {MOST_IMAGES} images, got {images:g}.")
    if not (1 <= steps <= 1000 and 0 <= scale <= 10 and 0 <= cfg <= 100 and 0 <= seed < 2**31):
        raise ConfigError("Expected settings within their sliders' ranges, got others.")
    config = GenerateConfig(
        images_per_prompt=int(images),
        guidance_scale=float(cfg),
        scale=float(scale),
        num_inference_steps=int(steps),
        resolution=resolution,
        batch_size=batch_size,
        seed=int(seed),
    )
    mix = tuple(_normalised(row) for row in by_factor(proportions, num_groups))
    return Ask(prompt.strip(), config, mix)


def by_factor(values: Sequence[float], num_groups: Sequence[int]) -> list[list[float]]:
    """Return a flat list of proportions as one list for each factor."""
    left = list(values)
    return [[left.pop(0) for _ in range(groups)] for groups in num_groups]


def _normalised(row: Sequence[float]) -> tuple[float, ...]:
    total = sum(row)
    if total <= 0 or min(row) < 0:
        raise ConfigError("Expected a share above 0 for at least one group, got none. Move one of the mix sliders.")
    return tuple(value / total for value in row)


def command_for(ask: Ask, commands: Commands) -> str:
    """Return the command that draws these images, guided where there is a module."""
    plain = GenerateConfig()
    words = ["invdiff", "generate", commands.model]
    if commands.module:
        words += ["--module", commands.module]
        if ask.config.scale != plain.scale:
            words += ["--scale", str(ask.config.scale)]
        uneven = any(len(set(row)) > 1 for row in ask.mix)
        if uneven and len(ask.mix) > 1:
            return NO_COMMAND.format(mix=[list(row) for row in ask.mix])
        if uneven:
            words += ["--environments", ",".join(str(share) for share in ask.mix[0])]
    for flag, name in (
        ("--images-per-prompt", "images_per_prompt"),
        ("--guidance-scale", "guidance_scale"),
        ("--steps", "num_inference_steps"),
        ("--resolution", "resolution"),
        ("--seed", "seed"),
    ):
        value = getattr(ask.config, name)
        words += [flag, str(value)] if value != getattr(plain, name) else []
    words += ["--dtype", commands.dtype] if commands.dtype != "fp32" else []
    words += ["--output", "images"]
    # After "--" a prompt is no option, whatever it begins with.
    return shlex.join([*words, *(["--", ask.prompt] if commands.reads_prompts else [])])
