"""Fair-Diffusion (Friedrich et al. 2023): semantic guidance in a direction that is drawn for each image.

Semantic guidance (SEGA, Brack et al. 2023) adds to the prediction e, at each step t and for each concept c,
    psi = e(z, c) - e(z, null), or its negative;    mu = s_e where |psi| >= its quantile lambda, else 0;
    gamma = sum of g mu psi + s_m nu;    nu <- b nu + (1 - b) gamma;    gamma is added from warm-up step delta on.
The paper's equations are of epsilon. A v-prediction's differences are epsilon's over the signal's amplitude, one
number a step: the same elements pass the threshold and the edit is the same, but momentum weighs earlier steps a
little otherwise. The released quantile is of each channel, here of the whole latent; its authors draw at s_e 4, 5
warm-up steps of 50 and CFG 7.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from methods import Fitted, World

from rivals.calls import Call, encode, hooked


@dataclass(frozen=True)
class FairDiffusion:
    """Towards the words of a class that is drawn for each image, away from those of the others."""

    supervision = "words"

    edit_guidance_scale: float = 2.0
    """s_e."""
    warmup_steps: int = 2
    """delta."""
    threshold: float = 0.95
    """lambda, the share of an image's latent elements that an edit leaves as they are."""
    momentum_scale: float = 0.5
    """s_m."""
    momentum_beta: float = 0.6
    """b."""

    def fit(self, world: World, folder: Path) -> Fitted:
        """Nothing is trained. Each further concept costs a forward pass a step."""
        pipe = world.biased()
        concepts = encode(pipe, ["", *world.words.values()])
        return Fitted(
            pipe,
            hooked=lambda seed: hooked(pipe, len(world.words), seed, after=_Edit(self, concepts)),
            sampling=1 + len(world.words) / 2,
        )


@dataclass(eq=False)
class _Edit:
    """gamma of each step."""

    config: FairDiffusion
    concepts: torch.Tensor
    """Embeddings (1 + classes, tokens, width), the null caption's first."""
    momentum: torch.Tensor | None = None

    def __call__(self, call: Call, prediction: torch.Tensor) -> torch.Tensor | None:
        null, *words = (concept.expand(call.images, -1, -1) for concept in self.concepts.to(call.latents))
        unconditional = prediction[: call.images] if len(prediction) > call.images else call.predict(null)
        drawn = torch.tensor(call.groups, device=prediction.device)
        gamma = torch.zeros_like(unconditional, dtype=torch.float32)
        for group, embeddings in enumerate(words):
            psi = (call.predict(embeddings) - unconditional).float()
            least = psi.abs().flatten(1).quantile(self.config.threshold, dim=1)[:, None, None, None]
            weight = torch.where(drawn == group, 1.0, -1.0 / (len(words) - 1))[:, None, None, None]
            gamma += self.config.edit_guidance_scale * weight * psi.where(psi.abs() >= least, 0.0)
        momentum = torch.zeros_like(gamma) if call.step == 0 or self.momentum is None else self.momentum
        gamma += self.config.momentum_scale * momentum
        self.momentum = self.config.momentum_beta * momentum + (1 - self.config.momentum_beta) * gamma
        return gamma if call.step >= self.config.warmup_steps else None
