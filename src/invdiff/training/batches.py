"""The batch of one training step: images of every group equally often, their captions, noise and timesteps."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..auditing.asked import known_rows
from ..config import TrainConfig
from ..data.encode import EncodedImages
from ..distributed import num_processes, state
from ..guidance.base import Rows
from ..models.families import Condition
from ..models.families.base import to
from ..models.frozen import Denoiser

FEWEST = 20  # images that a rare cell keeps, where as many are more likely in its group than not


class GroupBalancedSampler:
    """Draws images so that the groups of a prompt come equally often, and rare prompts more than rarely.

    From `prompt_ids` (N,) and W of each hidden factor (N, E_m): a prompt in proportion to the square root of its
    number of images, one of the factors that split it and one of its groups uniformly, then an image in proportion to
    its W_ie, `purified`, never one whose rows are zeros. Other factors' groups follow its rows of W; where those are
    uniform, the module learns to ignore the group.
    """

    def __init__(self, prompt_ids: torch.Tensor, group_weights: Sequence[torch.Tensor], purity: float = 0.0) -> None:
        self.prompt_ids = prompt_ids
        self.group_weights = [weights.double() for weights in group_weights]
        kept = torch.stack([weights.any(dim=1) for weights in self.group_weights]).all(dim=0)
        self._rows = [torch.nonzero(kept & (prompt_ids == p))[:, 0] for p in range(int(prompt_ids.max()) + 1)]
        self._prompt_shares = torch.tensor([float(len(rows)) for rows in self._rows]).sqrt()
        # Cumulative W of each prompt, factor and group: inverse-CDF sampling of its images.
        drawn = [purified(weights, prompt_ids, purity) for weights in self.group_weights]
        self._cumulative = [[weights[rows].cumsum(dim=0).T.contiguous() for weights in drawn] for rows in self._rows]
        every = list(range(len(self.group_weights)))
        of_prompts = [[weights[rows] for weights in self.group_weights] for rows in self._rows]
        self.audited = torch.tensor([any(bool((w != w[:1, :1]).any()) for w in of) for of in of_prompts])
        """(prompts,) Whether any factor says something of a prompt's images."""
        self._splitting = [[m for m in every if (of[m] != of[m][:1]).any()] or every for of in of_prompts]

    def chances(self) -> torch.Tensor:
        """How often `draw` takes each image, (N,), in sum 1."""
        found = torch.zeros(len(self.prompt_ids), dtype=torch.double)
        shares = self._prompt_shares.double() / self._prompt_shares.sum()
        for rows, of, splitting, share in zip(self._rows, self._cumulative, self._splitting, shares, strict=True):
            for factor in splitting if len(rows) else ():
                present = of[factor][of[factor][:, -1] > 0]
                each = (present / present[:, -1:]).diff(dim=1, prepend=torch.zeros(len(present), 1)).mean(dim=0)
                found[rows] += share / len(splitting) * each
        return found

    def draw(self, size: int, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows of images (size,), the factor whose group each is drawn for (size,), environments (size, factors)."""
        prompts = torch.multinomial(self._prompt_shares, size, replacement=True, generator=rng)
        # A number that any count of factors divides picks one of those of a prompt evenly.
        numbers = torch.randint(math.lcm(*map(len, self._splitting)), (size,), generator=rng).tolist()
        choices = [self._splitting[prompt] for prompt in prompts.tolist()]
        factors = torch.tensor([of[number % len(of)] for of, number in zip(choices, numbers, strict=True)])
        uniforms = torch.rand(size, 2, generator=rng, dtype=torch.double)
        rows, chosen = torch.empty(size, dtype=torch.long), torch.empty(size, dtype=torch.long)
        for index, (prompt, factor) in enumerate(zip(prompts.tolist(), factors.tolist(), strict=True)):
            cumulative = self._cumulative[prompt][factor]
            present = torch.nonzero(cumulative[:, -1] > 0)[:, 0]
            group = int(present[int(uniforms[index, 0] * len(present))])
            mass = uniforms[index, 1] * cumulative[group, -1]
            place = int(torch.searchsorted(cumulative[group], mass, right=True))
            rows[index] = self._rows[prompt][min(place, cumulative.shape[1] - 1)]
            chosen[index] = group
        drawn = [torch.multinomial(weights[rows].float(), 1, generator=rng) for weights in self.group_weights]
        environments = torch.cat(drawn, dim=1)
        environments[torch.arange(size), factors] = chosen
        return rows, factors, environments


def purified(weights: torch.Tensor, prompt_ids: torch.Tensor, purity: float) -> torch.Tensor:
    """W (N, E), posterior probabilities, as weights (N, E) that images are drawn by within each prompt and group.

    In a *rare* cell (prompt, group), of less than 1 / E of the prompt, images whose posterior is below `purity` are
    left out, all but the `FEWEST` surest of those over one half; none may be left. Then wrong images are matched:
    where those of group e' are estimated to be a share r of one prompt's cell of group e, the largest of all prompts,
    every prompt's cell is given images of its own group e' until theirs is r too: they blunt what a group means, and
    say nothing about the prompt. Hard labels pass unchanged, and so do prompts that W does not split, whose rows are
    all alike. Under the others, images of which nothing is known (`known_rows`) are neither drawn nor wrong. Rows of W
    are zeros where an image was left out; at a `purity` of 0 none is.
    """
    drawn = weights.double().clone()
    told = torch.from_numpy(known_rows(weights.numpy()))
    drawn[~told & torch.isin(prompt_ids, prompt_ids[told])] = 0
    prompts = [torch.nonzero(told & (prompt_ids == p))[:, 0] for p in prompt_ids[told].unique()]
    prompts = [rows for rows in prompts if (weights[rows] != weights[rows[:1]]).any()]
    for rows in prompts:
        drawn[rows] = torch.stack([_sure(column, purity, weights.shape[1]) for column in drawn[rows].T], dim=1)
    totals = [drawn[rows].sum(dim=0) for rows in prompts]
    # Estimated shares of other groups in each cell, (prompts, group of the cell, group); none in an empty cell.
    wrong = [
        (drawn[rows].T @ weights[rows].double() / total.clamp_min(1e-12)[:, None]).fill_diagonal_(0)
        for rows, total in zip(prompts, totals, strict=True)
    ]
    for rows, total, own in zip(prompts, totals, wrong, strict=True):
        most = torch.stack(wrong).amax(dim=0)
        share, wanted = (of + torch.diag(1 - of.sum(dim=1)) for of in (own, most))
        # A cell that takes `mix` of the images of each cell of the prompt has shares `mix @ share`.
        mix = torch.eye(len(total)) + (wanted - share) @ torch.linalg.pinv(share)
        drawn[rows] = drawn[rows] @ (mix.clamp_min(0) * total[:, None] / total.clamp_min(1e-12)).T
    return drawn


def _sure(column: torch.Tensor, purity: float, num_groups: int) -> torch.Tensor:
    """The posteriors (n,) of a group under one prompt, zeros for those left out."""
    if column.mean() >= 1 / num_groups:
        return column
    likely = column[column > 0.5].sort(descending=True).values[:FEWEST]
    least = min(purity, likely[-1].item()) if len(likely) else 1.0
    return torch.where(column >= least, column, 0.0)


@dataclass(frozen=True)
class Batch:
    """The images of one training step. Several processes share a batch; each computes its `part`."""

    prompts: torch.Tensor  # (batch,) the prompt of each image of the whole batch, on the CPU
    factors: torch.Tensor  # (batch,) the factor whose group each image of the whole batch was drawn for, on the CPU
    environments: torch.Tensor  # (batch, factors) the groups of the whole batch, on the CPU
    part: slice  # the rows that this process computes
    rows: Rows  # what guides them
    condition: Condition  # y, what the denoiser and Phi read, `part` rows, in 32 bits
    captioned: torch.Tensor  # (batch,) whether the penalty reads each image of the whole batch, on the CPU
    preserved: torch.Tensor  # (batch,) whether each image of the whole batch is held to the frozen model, on the CPU
    null_condition: Condition  # the null caption, `part` rows; empty where there is no penalty
    noisy_latents: torch.Tensor  # z_t, (part, channels, height, width)
    timesteps: torch.Tensor  # t, (part,)
    target: torch.Tensor  # what the denoiser should predict, (part, channels, height, width)


def draw_batch(
    data: EncodedImages,
    sampler: GroupBalancedSampler,
    frozen: Denoiser,
    rng: torch.Generator,
    config: TrainConfig,
    *,
    guide_null: bool = True,
) -> Batch:
    """The images of one step with their groups, captions, noise and timesteps.

    Some captions are null, unless the null row is not guided (`guide_null`): then there is nothing to learn there.
    Others are of `data.unrelated`; these, and those of prompts that no factor says anything of, are to stay as the
    frozen model draws them, whatever the group: their target is its prediction of the same noisy latents.
    """
    size, schedule, device = config.batch_size, frozen.schedule, frozen.device
    rows, factors, environments = sampler.draw(size, rng)
    captions = data.caption_ids[rows].clone()
    dropped = (torch.rand(size, generator=rng) < config.caption_dropout) & guide_null
    captions[dropped] = data.null_id
    noise = torch.randn((size, *data.latents.shape[1:]), generator=rng)
    # Content is decided at high noise: a noise level in (0, 1) is drawn in proportion to its height.
    levels = torch.rand(size, generator=rng).sqrt()
    # A square root may round up to 1, which is not a timestep.
    timesteps = (levels * schedule.num_train_timesteps).long().clamp(max=schedule.num_train_timesteps - 1)

    unrelated = torch.randint(max(map(len, data.unrelated.values()), default=1), (size,), generator=rng)
    replaced = (torch.rand(size, generator=rng) < config.preserve) & bool(data.unrelated)
    preserved = replaced | ~sampler.audited[sampler.prompt_ids[rows]]

    nulls = torch.full_like(captions, data.null_id)
    share, rank = size // num_processes(), state().process_index
    part = slice(rank * share, (rank + 1) * share)
    latents, noise, timesteps = data.latents[rows[part]].to(device), noise[part].to(device), timesteps[part].to(device)
    noisy_latents, target = schedule.add_noise(latents, noise, timesteps), schedule.target(latents, noise, timesteps)
    own = data.condition(captions[part])
    for name, values in data.unrelated.items():
        own[name][replaced[part]] = values[unrelated[part][replaced[part]]]
    condition, held = to(own, device, torch.float32), preserved[part].to(device)
    if held.any():
        some = {name: values[held] for name, values in condition.items()}
        target = target.index_put((held,), frozen(noisy_latents[held], timesteps[held], some)[0].to(target))
    return Batch(
        prompts=sampler.prompt_ids[rows],
        factors=factors,
        environments=environments,
        part=part,
        rows=Rows(environments[part].to(device)),
        condition=condition,
        captioned=(captions != data.null_id) & ~preserved,
        preserved=preserved,
        null_condition=to(data.condition(nulls[part]), device, torch.float32) if config.penalty else {},
        noisy_latents=noisy_latents,
        timesteps=timesteps,
        target=target,
    )
