"""The group that each image of a batch is drawn from, a function of the image's own starting noise."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch

from ..errors import ConfigError

Environments = Literal["uniform"] | Sequence[Any] | Mapping[Any, Sequence[float]] | torch.Tensor
"""See `EnvironmentMix`."""


class EnvironmentMix:
    """The target mix pi: draws one group per hidden factor for each image, or repeats those given.

    The draw follows from the signs of the image's starting noise, so from the seed alone: it is the same in any batch
    and for every row of an image. Factors are drawn independently. `environments` are "uniform"; or proportions (E,),
    floats that sum to 1, of each factor; or those of some factors, by name or number from 0, such as
    {"factor 2": [0.7, 0.3]}, the others uniform; or groups, integers (images,) or (images, factors), of the images of
    one call: [1.0, 0.0] is group 0 alone. Others are a `ConfigError`. Another `seed` gives another draw for the same
    noise. `factor_names` are "factor 1" and so on unless given.
    """

    def __init__(
        self, environments: Environments, num_groups: Sequence[int], *, factor_names: Sequence[str] = (), seed: int = 0
    ) -> None:
        self.num_groups, self.seed = tuple(num_groups), seed
        names = list(factor_names) or [f"factor {m}" for m in range(1, len(self.num_groups) + 1)]
        self.given: torch.Tensor | None = None  # the groups of each image, (images, factors), where they are not drawn
        self.proportions: list[np.ndarray] = []  # of each factor, (E,)
        if isinstance(environments, str) and environments == "uniform":
            self.proportions = [np.full(groups, 1.0 / groups) for groups in self.num_groups]
            return
        try:
            values: Any = environments.tolist() if isinstance(environments, torch.Tensor) else environments
            if isinstance(values, Mapping):
                values = _of_each_factor(values, names, self.num_groups)
            rows = [np.asarray(value) for value in values]
            flat = all(row.ndim == 0 for row in rows)
            rows = [np.stack(rows)] if flat else rows
            drawn = any(row.dtype.kind == "f" for row in rows)
            given = rows[0][:, None] if flat or drawn else np.stack(rows)
            known = all(row.ndim == 1 and row.dtype.kind in "fiub" for row in rows)
        except (TypeError, ValueError, IndexError):
            known = False
        got = f"got {environments!r:.200}."
        if not known:
            raise ConfigError(f"Expected environments 'uniform', proportions or one group per image, {got}")
        if drawn:
            wanted, found = (" x ".join(map(str, sizes)) for sizes in (self.num_groups, map(len, rows)))
            if found != wanted:
                raise ConfigError(f"Expected proportions for {wanted} groups, got {found} groups in {environments!r}.")
            if any((row < 0).any() or not math.isclose(row.sum(), 1.0, abs_tol=1e-3) for row in rows):
                raise ConfigError(f"Expected proportions of at least 0 that sum to 1, {got}")
            self.proportions = [row / row.sum() for row in rows]
            return
        if given.shape[1] != len(self.num_groups):
            raise ConfigError(f"Expected one group per image for {len(self.num_groups)} factor(s), {got}")
        if (given < 0).any() or (given >= self.num_groups).any():
            raise ConfigError(f"Expected groups from 0 to {[groups - 1 for groups in self.num_groups]}, {got}")
        self.given = torch.from_numpy(given.astype(np.int64))

    def rows(self, noisy_latents: torch.Tensor) -> torch.Tensor:
        """The groups (rows, factors), on the CPU, of noise (rows, channels, height, width), often rows of one image.

        Groups given for a number of images that does not divide the number of rows are a `ConfigError`.
        """
        if self.given is not None:
            if len(noisy_latents) % len(self.given):
                raise ConfigError(
                    f"Expected a batch of {len(self.given)} image(s), one for each environment given, "
                    f"got a denoiser call of {len(noisy_latents)} rows."
                )
            return self.given.repeat(len(noisy_latents) // len(self.given), 1)
        signs = np.packbits((noisy_latents.flatten(1)[:, :256] > 0).cpu().numpy(), axis=1)
        drawn = torch.empty(len(signs), len(self.num_groups), dtype=torch.long)
        for factor, proportions in enumerate(self.proportions):
            digests = [hashlib.sha256(row.tobytes() + f"/{factor}/{self.seed}".encode()).digest() for row in signs]
            uniform = [int.from_bytes(digest[:8], "little") / 2**64 for digest in digests]
            drawn[:, factor] = torch.from_numpy(np.searchsorted(np.cumsum(proportions), uniform, side="right"))
        return drawn.clamp(max=torch.tensor(self.num_groups) - 1)


def _of_each_factor(given: Mapping[Any, Sequence[float]], names: list[str], sizes: Sequence[int]) -> list[list[float]]:
    """The proportions of every factor, even where none are given."""
    chosen = {names.index(key) if key in names else key: [float(share) for share in of] for key, of in given.items()}
    if len(chosen) < len(given) or not chosen.keys() <= set(range(len(names))):
        known = f"each once, of {', '.join(map(repr, names))} or their numbers from 0"
        raise ConfigError(f"Expected names of the module's factors, {known}, got {list(given)!r:.200}.")
    return [chosen.get(place, [1 / size] * size) for place, size in enumerate(sizes)]
