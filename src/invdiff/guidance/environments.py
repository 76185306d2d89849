"""The group that each image is drawn from: spread evenly over the images of a call or a prompt, or independent."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch

from ..errors import ConfigError
from ..files import fingerprint

Environments = Literal["uniform", "iid"] | Sequence[Any] | Mapping[Any, Sequence[float]] | torch.Tensor
"""See `EnvironmentMix`."""

WORDS = ("uniform", "iid")

MOST = 2**62  # images after which combinations of groups need not come back
LEVELS = 16  # digits of the numbers of `strata`: proportions are met to 2^-16 and finer


class EnvironmentMix:
    """The target mix pi: draws one group per hidden factor for each image, or repeats those given.

    Groups are spread over the images drawn together, in order, so that few images show all of them (`strata`).
    `environments` are "uniform"; or proportions (E,), floats that sum to 1, of each factor; or those of some factors,
    by name or number from 0, such as {"factor 2": [0.7, 0.3]}, the others uniform; or "iid": uniform, and each image
    independent of all others, as floors and intervals of Bias assume; or groups, integers (images,) or
    (images, factors), of the images of one call: [1.0, 0.0] is group 0 alone. Others are a `ConfigError`, and so are
    integers of no tensor or array that could be either, as [1, 0]. Another `seed` gives another draw for the same
    images. `factor_names` are "factor 1" and so on unless given.
    """

    def __init__(
        self, environments: Environments, num_groups: Sequence[int], *, factor_names: Sequence[str] = (), seed: int = 0
    ) -> None:
        self.num_groups, self.seed = tuple(num_groups), seed
        names = list(factor_names) or [f"factor {m}" for m in range(1, len(self.num_groups) + 1)]
        self.given: torch.Tensor | None = None  # the groups of each image, (images, factors), where they are not drawn
        self.proportions: list[np.ndarray] = []  # of each factor, (E,)
        self.iid = isinstance(environments, str) and environments == "iid"
        if isinstance(environments, str) and environments in WORDS:
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
            raise ConfigError(f"Expected environments 'uniform', 'iid', proportions or one group per image, {got}")
        if drawn:
            wanted, found = (" x ".join(map(str, sizes)) for sizes in (self.num_groups, map(len, rows)))
            if found != wanted:
                raise ConfigError(f"Expected proportions for {wanted} groups, got {found} groups in {environments!r}.")
            if any((row < 0).any() or not math.isclose(row.sum(), 1.0, abs_tol=1e-3) for row in rows):
                raise ConfigError(f"Expected proportions of at least 0 that sum to 1, {got}")
            self.proportions = [row / row.sum() for row in rows]
            return
        a_mix = self.num_groups == (*map(len, rows),) and all(row.min() >= 0 and row.sum() == 1 for row in rows)
        if a_mix and not hasattr(environments, "dtype"):
            mix = [row.astype(float).tolist() for row in rows]
            raise ConfigError(
                f"Expected either a mix or the group of each image, got environments {values!r}, which may be both. "
                f"Write {mix[0] if flat else mix} for the mix, or torch.tensor({values!r}) for groups."
            )
        if given.shape[1] != len(self.num_groups):
            raise ConfigError(f"Expected one group per image for {len(self.num_groups)} factor(s), {got}")
        if (given < 0).any() or (given >= self.num_groups).any():
            most = " and ".join(str(groups - 1) for groups in self.num_groups)
            raise ConfigError(f"Expected groups from 0 to {most}, {got}")
        self.given = torch.from_numpy(given.astype(np.int64))

    def rows(self, noisy_latents: torch.Tensor, copies: int | None = None) -> torch.Tensor:
        """The groups (rows, factors), on the CPU, of the starting noise (rows, channels, height, width) of one call.

        `copies` are the rows of each image, where it is known: 2 under classifier-free guidance (see `images_of`). The
        draw follows from the noise of the call, so from its seeds; of "iid", from each image's own noise, whatever its
        call. Groups given for a number of images that does not divide that of the call are a `ConfigError`.
        """
        names = [fingerprint(row.tobytes()) for row in (noisy_latents.flatten(1) > 0).cpu().numpy()]
        images = images_of(noisy_latents, names, copies)
        if self.given is None:
            return self.draw([names[images.index(image)] for image in range(max(images) + 1)])[images]
        if copies is None and (max(images) + 1) % len(self.given):
            images = list(range(len(names)))  # images of one noise, perhaps, each in one row
        if (max(images) + 1) % len(self.given):
            raise ConfigError(f"Expected a batch of {len(self.given)} image(s), got {max(images) + 1}.")
        return self.given[[image % len(self.given) for image in images]]

    def draw(self, images: Sequence[str]) -> torch.Tensor:
        """The groups (images, factors), on the CPU, of images with these names that are drawn together.

        That of image k follows from k and the first one's name, whatever their number; of "iid", from its own name.
        """
        if self.iid:
            parts = [f"{factor}/{self.seed}" for factor in range(len(self.num_groups))]
            uniform = np.array([[int(fingerprint(name, part), 16) / 2**64 for part in parts] for name in images])
        else:
            uniform = strata(len(images), f"{images[0]}/{self.seed}", self.num_groups)
        bounds = map(np.cumsum, self.proportions)
        found = [np.searchsorted(of, u, side="right") for of, u in zip(bounds, uniform.T, strict=True)]
        return torch.from_numpy(np.stack(found, axis=1)).clamp(max=torch.tensor(self.num_groups) - 1)


def images_of(noisy_latents: torch.Tensor, names: Sequence[str], copies: int | None = None) -> list[int]:
    """The number of the image that each row of a call is of: a call repeats its images for the rows of guidance.

    Where it is not known how often, or rows do not repeat, those with the same name are one image.
    """
    first, *others = noisy_latents.chunk(copies or 1)
    if copies and len(names) % copies == 0 and all(torch.equal(other, first) for other in others):
        return [row % len(first) for row in range(len(names))]
    places = {name: place for place, name in enumerate(dict.fromkeys(names))}
    return [places[name] for name in names]


def strata(count: int, key: str, sizes: Sequence[int]) -> np.ndarray:
    """Numbers in (0, 1), (count, factors), each uniform over keys, that lie evenly within a key.

    Of a factor with E = sizes[factor] groups, any E in a row from a multiple of E lie one in each E-th of (0, 1), any
    E^2 one in each E^2-th, and so on; of all factors, any prod(sizes) show every combination of E-ths once. It is the
    radical inverse (van der Corput) in base E, with digits permuted at random by blocks of prod(sizes).
    """
    uniform = np.zeros((count, len(sizes)))
    every = min(math.prod(sizes), MOST)
    for factor, size in enumerate(sizes):
        rest, width, period = np.arange(count), 1.0, min(math.prod(sizes[: factor + 1]), MOST)
        for level in range(LEVELS):
            width /= size
            blocks, of_image = np.unique(rest // every, return_inverse=True)
            names = [[f"{factor}/{level}/{block}/{digit}" for digit in range(size)] for block in blocks]
            order = np.argsort([[fingerprint(key, name) for name in of_block] for of_block in names], axis=1)
            shift = rest % period // math.lcm(period // size, size)  # keeps it from going in step with earlier factors
            uniform[:, factor] += width * order[of_image, (rest + shift) % size]
            rest = rest // size
        uniform[:, factor] += width / 2
    return uniform


def _of_each_factor(given: Mapping[Any, Sequence[float]], names: list[str], sizes: Sequence[int]) -> list[list[float]]:
    """The proportions of every factor, even where none are given."""
    chosen = {names.index(key) if key in names else key: [float(share) for share in of] for key, of in given.items()}
    if len(chosen) < len(given) or not chosen.keys() <= set(range(len(names))):
        known = f"each once, of {', '.join(map(repr, names))} or their numbers from 0"
        raise ConfigError(f"Expected names of the module's factors, {known}, got {list(given)!r:.200}.")
    return [chosen.get(place, [1 / size] * size) for place, size in enumerate(sizes)]
