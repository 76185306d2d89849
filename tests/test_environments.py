import numpy as np
import pytest
import torch

from invdiff.errors import ConfigError
from invdiff.guidance.environments import EnvironmentMix


def noise(images: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(images, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def shares(groups: torch.Tensor, count: int) -> list[float]:
    return (torch.bincount(groups, minlength=count) / len(groups)).tolist()


@pytest.mark.parametrize(
    ("environments", "expected"),
    [("uniform", [1 / 3, 1 / 3, 1 / 3]), ([0.1, 0.2, 0.7], [0.1, 0.2, 0.7]), ([0.0, 1.0, 0.0], [0, 1, 0])],
)
def test_groups_are_drawn_in_the_proportions_asked_for(environments: object, expected: list[float]):
    drawn = EnvironmentMix(environments, (3,)).rows(noise(600))
    assert shares(drawn[:, 0], 3) == pytest.approx(expected, abs=0.06)  # three standard errors


def test_factors_are_drawn_independently():
    drawn = EnvironmentMix([[0.5, 0.5], [0.25, 0.75]], (2, 2)).rows(noise(800))
    joint = shares(drawn[:, 0] * 2 + drawn[:, 1], 4)
    assert joint == pytest.approx([0.125, 0.375, 0.125, 0.375], abs=0.055)


def test_an_image_has_one_group_whatever_its_batch_its_rows_and_the_scale_of_its_noise():
    mix, batch = EnvironmentMix("uniform", (5,)), noise(12)
    together = mix.rows(batch)
    assert torch.equal(torch.cat([mix.rows(image[None]) for image in batch.flip(0)]).flip(0), together)
    assert torch.equal(mix.rows(batch.repeat(2, 1, 1, 1)), together.repeat(2, 1))
    assert torch.equal(mix.rows(batch * 14.6), together)  # schedulers scale it differently


@pytest.mark.parametrize("given", [[1, 0, 2], torch.tensor([1, 0, 2]), np.array([1, 0, 2])])
def test_given_groups_are_repeated_for_further_rows(given: object):
    rows = EnvironmentMix(given, (3,)).rows(noise(6))
    assert rows.tolist() == [[1], [0], [2], [1], [0], [2]]


def test_given_groups_are_those_of_each_image_and_must_fit_the_batch():
    assert EnvironmentMix([[1, 0], [0, 2]], (2, 3)).rows(noise(2)).tolist() == [[1, 0], [0, 2]]
    with pytest.raises(ConfigError, match=r"batch of 3 image\(s\).*4 rows"):
        EnvironmentMix([0, 1, 1], (2,)).rows(noise(4))


@pytest.mark.parametrize(
    ("environments", "num_groups", "message"),
    [
        ("random", (2,), "got 'random'"),
        (None, (2,), "got None"),
        (0.5, (2,), "got 0.5"),
        ([], (2,), r"got \[\]"),
        ([[0, 1], [1]], (2, 2), r"got \[\[0, 1\], \[1\]\]"),
        ([[[0]]], (2,), r"got \[\[\[0\]\]\]"),
        ([0.2, 0.3, 0.5], (2,), "proportions for 2 groups, got 3 groups"),
        ([0.5, 0.5], (2, 3), "proportions for 2 x 3 groups, got 2 groups"),
        ([0.5, 0.6], (2,), "sum to 1"),
        ([1.5, -0.5], (2,), "at least 0"),
        ([float("nan"), 1.0], (2,), "sum to 1"),
        ([0, 2], (2,), r"groups from 0 to \[1\]"),
        ([0, -1], (2,), r"groups from 0 to \[1\]"),
        ([0, 1], (2, 2), r"2 factor\(s\)"),
    ],
)
def test_what_fits_no_module_is_refused(environments: object, num_groups: tuple[int, ...], message: str):
    with pytest.raises(ConfigError, match=message):
        EnvironmentMix(environments, num_groups)
