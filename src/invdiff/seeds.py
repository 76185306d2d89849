"""Random numbers that depend only on what they are for, so that any run resumes and repeats exactly."""

import torch

from .files import fingerprint


def derived_seed(*parts: int | str) -> int:
    """A 63-bit seed determined by `parts`, for example `("train", seed, step)`."""
    return int(fingerprint(*(str(part) for part in parts)), 16) >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded by `parts`: noise is drawn on the CPU and then moved, the same for every device."""
    return torch.Generator().manual_seed(derived_seed(*parts))
