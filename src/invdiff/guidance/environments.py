"""Which group each image of a batch is drawn from, decided by the image's own starting noise."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from ..errors import ConfigError

Environments = Literal["uniform"] | Sequence[float] | Sequence[Sequence[float]] | Sequence[int] | torch.Tensor


class EnvironmentMix:
    """The target mix pi: draws one group per hidden factor for each image, or repeats those given.

    The draw is a function of the signs of the image's starting noise. So it follows from the seed that the
    caller gave the pipeline, is independent between images, does not depend on batch size or scheduler, and
    every row of an image (conditional, unconditional, or any further one) gets the same group.

    Args:
        environments: `"uniform"`; or proportions (E,), floats that sum to 1, for a module of one factor; or a
            list of such proportions, one for each factor; or groups given per image, integers (images,) or
            (images, factors).
        num_groups: Groups of each factor.
        seed: Another seed gives another draw for the same noise.

    Raises:
        ConfigError: Proportions or groups do not fit `num_groups`.
    """

    def __init__(self, environments: Environments, num_groups: Sequence[int], *, seed: int = 0) -> None:
        self.num_groups = tuple(num_groups)
        self.seed = seed
        self.given: torch.Tensor | None = None
        self.proportions: list[np.ndarray] = []
        if isinstance(environments, str):
            if environments != "uniform":
                raise ConfigError(
                    f"Expected environments 'uniform', proportions or groups, got {environments!r}."
                )
            self.proportions = [np.full(groups, 1.0 / groups) for groups in self.num_groups]
            return
        if not isinstance(environments, torch.Tensor) and any(isinstance(row, Sequence) for row in environments):
            nested = [list(row) for row in environments]  # type: ignore[arg-type]
            is_proportions = any(isinstance(value, float) for row in nested for value in row)
            if is_proportions:
                self.proportions = [np.asarray(row, dtype=float) for row in nested]
                self._check_proportions()
                return
            environments = torch.tensor(nested)
        values = torch.as_tensor(environments)
        if values.is_floating_point():
            self.proportions = [np.asarray(row, dtype=float) for row in torch.atleast_2d(values).numpy()]
            self._check_proportions()
        else:
            self.given = values[:, None] if values.ndim == 1 else values
            self._check_given()

    def _check_proportions(self) -> None:
        shape = tuple(len(row) for row in self.proportions)
        if shape != self.num_groups:
            raise ConfigError(
                f"Expected proportions for {_groups(self.num_groups)}, got {_groups(shape)}: "
                f"{[row.tolist() for row in self.proportions]}."
            )
        for row in self.proportions:
            if (row < 0).any() or not math.isclose(row.sum(), 1.0, abs_tol=1e-3):
                raise ConfigError(f"Expected proportions of at least 0 that sum to 1, got {row.tolist()}.")
        self.proportions = [row / row.sum() for row in self.proportions]

    def _check_given(self) -> None:
        assert self.given is not None
        if self.given.ndim != 2 or self.given.shape[1] != len(self.num_groups):
            raise ConfigError(
                f"Expected one group per image for {len(self.num_groups)} factor(s), "
                f"got an array of shape {tuple(self.given.shape)}."
            )
        highest = torch.tensor(self.num_groups)
        if len(self.given) == 0 or (self.given < 0).any() or (self.given >= highest).any():
            raise ConfigError(
                f"Expected groups from 0 to {[groups - 1 for groups in self.num_groups]}, "
                f"got {self.given.tolist()[:8]}."
            )

    def rows(self, noisy_latents: torch.Tensor) -> torch.Tensor:
        """Return the groups of each row of a denoiser call at the first step, (rows, factors), on the CPU.

        Args:
            noisy_latents: The denoiser's first input, (rows, channels, height, width); several rows may belong
                to one image.

        Raises:
            ConfigError: Groups were given for a number of images that does not divide the number of rows.
        """
        if self.given is not None:
            if len(noisy_latents) % len(self.given):
                raise ConfigError(
                    f"Expected a batch of {len(self.given)} image(s), one for each environment given, "
                    f"got a denoiser call of {len(noisy_latents)} rows."
                )
            return self.given.repeat(len(noisy_latents) // len(self.given), 1)
        signs = (noisy_latents.flatten(1)[:, :256] > 0).cpu().numpy()
        drawn = [[self._draw(row, factor) for factor in range(len(self.num_groups))] for row in signs]
        return torch.tensor(drawn, dtype=torch.long)

    def _draw(self, signs: np.ndarray, factor: int) -> int:
        digest = hashlib.sha256(np.packbits(signs).tobytes() + f"/{factor}/{self.seed}".encode()).digest()
        uniform = int.from_bytes(digest[:8], "little") / 2**64
        cumulative = np.cumsum(self.proportions[factor])
        return min(int(np.searchsorted(cumulative, uniform, side="right")), self.num_groups[factor] - 1)


def _groups(sizes: Sequence[int]) -> str:
    return " x ".join(str(size) for size in sizes) + " groups"
