"""W made pure before images are drawn by it: what is wrong in a group's images must not predict the prompt."""

import torch

from ..auditing.asked import known_rows

FEWEST = 20  # images that a rare cell keeps, where as many are more likely in its group than not


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
