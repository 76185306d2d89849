"""Which images a training step sees, and in which environment."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class GroupBalancedSampler:
    """Draws images so that the groups of a prompt come equally often, and rare prompts more than rarely.

    A prompt is drawn in proportion to the square root of its number of images, one of the hidden factors and
    one of its groups uniformly, then an image of the prompt in proportion to its W_ie. The other factors'
    groups follow the image's own rows of W. Where W says nothing (uniform rows: no group was found, or the
    caption states it), the environment is independent of the image, so the module learns to ignore it. An image
    that people left out, whose rows of W are zeros, is as if it were not there.

    Args:
        prompt_ids: (N,) the prompt of each image, from 0.
        group_weights: W of each hidden factor, (N, E_m).
    """

    def __init__(self, prompt_ids: torch.Tensor, group_weights: Sequence[torch.Tensor]) -> None:
        self.prompt_ids = prompt_ids
        self.group_weights = [weights.double() for weights in group_weights]
        kept = torch.stack([weights.any(dim=1) for weights in self.group_weights]).all(dim=0)
        self._rows = [torch.nonzero(kept & (prompt_ids == p))[:, 0] for p in range(int(prompt_ids.max()) + 1)]
        self._prompt_shares = torch.tensor([float(len(rows)) for rows in self._rows]).sqrt()
        # Cumulative W of each prompt, factor and group: inverse-CDF sampling of its images.
        self._cumulative = [
            [weights[rows].cumsum(dim=0).T.contiguous() for weights in self.group_weights] for rows in self._rows
        ]

    def draw(self, size: int, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Return rows (size,) and environments (size, factors)."""
        prompts = torch.multinomial(self._prompt_shares, size, replacement=True, generator=rng)
        factors = torch.randint(len(self.group_weights), (size,), generator=rng)
        uniforms = torch.rand(size, 2, generator=rng, dtype=torch.double)
        rows = torch.empty(size, dtype=torch.long)
        chosen = torch.empty(size, dtype=torch.long)
        for index, (prompt, factor) in enumerate(zip(prompts.tolist(), factors.tolist(), strict=True)):
            cumulative = self._cumulative[prompt][factor]
            alive = torch.nonzero(cumulative[:, -1] > 0)[:, 0]
            group = int(alive[int(uniforms[index, 0] * len(alive))])
            mass = uniforms[index, 1] * cumulative[group, -1]
            place = int(torch.searchsorted(cumulative[group], mass, right=True))
            rows[index] = self._rows[prompt][min(place, cumulative.shape[1] - 1)]
            chosen[index] = group
        environments = torch.stack(
            [torch.multinomial(weights[rows].float(), 1, generator=rng)[:, 0] for weights in self.group_weights],
            dim=1,
        )
        environments[torch.arange(size), factors] = chosen
        return rows, environments
