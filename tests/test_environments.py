import math

import numpy as np
import pytest
import torch

from invdiff.errors import ConfigError
from invdiff.guidance.environments import EnvironmentMix, strata


def noise(images, seed=0):
    return torch.randn(images, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("sizes", [(3,), (2, 2), (4, 2, 3), (6, 4)])
def test_strata_lie_evenly_over_each_factor_and_over_all_combinations(sizes):
    cells = np.floor(strata(3 * math.prod(sizes), "key", sizes) * sizes).astype(int)
    for block in np.split(cells, 3):
        assert len(np.unique(block, axis=0)) == math.prod(sizes)
    for factor, size in enumerate(sizes):
        assert (np.sort(cells[:, factor].reshape(-1, size)) == np.arange(size)).all()
        fine = np.floor(strata(size**3, "key", sizes)[:, factor] * size**3)
        assert np.array_equal(np.sort(fine), np.arange(size**3))


def test_each_number_is_uniform_and_factors_are_independent_over_keys():
    numbers = np.stack([strata(5, f"{key}", (2, 3)) for key in range(600)])
    for image in np.moveaxis(numbers, 1, 0):
        cells = np.histogram2d(*image.T, bins=(4, 3), range=[(0, 1), (0, 1)])[0] / 600
        assert np.abs(cells - 1 / 12).max() < 0.045  # four standard errors


@pytest.mark.parametrize("proportions", [[0.1, 0.2, 0.7], [0.0, 1.0, 0.0]])
def test_groups_meet_the_proportions_asked_for_whatever_the_number_of_images(proportions):
    drawn = EnvironmentMix(proportions, (3,)).draw([str(image) for image in range(81)])[:, 0]
    assert np.abs(np.bincount(drawn, minlength=3) - 81 * np.array(proportions)).max() <= 1
    assert torch.equal(EnvironmentMix(proportions, (3,)).draw(["0", "1", "2", "3", "4"])[:, 0], drawn[:5])


def test_the_images_of_a_call_show_all_groups_alike_in_all_rows_at_any_scale_of_noise():
    batch = noise(12)
    together = EnvironmentMix("uniform", (4,)).rows(batch)
    assert torch.bincount(together[:, 0]).tolist() == [3, 3, 3, 3]
    assert torch.equal(EnvironmentMix("uniform", (4,)).rows(batch.repeat(2, 1, 1, 1) * 14.6), together.repeat(2, 1))
    assert not torch.equal(EnvironmentMix("uniform", (4,), seed=1).rows(batch), together)


def test_an_independent_draw_follows_from_the_image_alone():
    mix, batch = EnvironmentMix("iid", (2, 2)), noise(800)
    together = mix.rows(batch)
    assert torch.equal(torch.cat([mix.rows(image[None]) for image in batch[:9].flip(0)]).flip(0), together[:9])
    joint = torch.bincount(together[:, 0] * 2 + together[:, 1]) / 800
    assert joint.tolist() == pytest.approx([0.25] * 4, abs=0.062)  # four standard errors


def test_given_groups_are_those_of_each_image_repeated_for_further_rows_and_must_fit_the_batch():
    for given in ([1, 0, 2], torch.tensor([1, 0, 2]), np.array([1, 0, 2])):
        assert EnvironmentMix(given, (3,)).rows(noise(6)).tolist() == [[1], [0], [2], [1], [0], [2]]
    assert EnvironmentMix([[1, 0], [0, 2]], (2, 3)).rows(noise(2)).tolist() == [[1, 0], [0, 2]]
    with pytest.raises(ConfigError, match=r"batch of 3 image\(s\), got 4"):
        EnvironmentMix([0, 1, 1], (2,)).rows(noise(4))
    twice = noise(2).repeat(2, 1, 1, 1)  # two images, or four of which two and two have one noise
    assert EnvironmentMix(np.array([0, 1]), (2,)).rows(twice).tolist() == [[0], [1], [0], [1]]
    assert EnvironmentMix([0, 0, 1, 1], (2,)).rows(twice).tolist() == [[0], [0], [1], [1]]
    with pytest.raises(ConfigError, match=r"batch of 4 image\(s\), got 2"):
        EnvironmentMix([0, 0, 1, 1], (2,)).rows(twice, copies=2)


def test_images_of_one_noise_are_spread_and_those_of_a_picture_alike_in_part_are_told_apart():
    same = noise(1).repeat(8, 1, 1, 1)
    assert len(EnvironmentMix("uniform", (4,)).rows(same, copies=2)[:4].unique()) == 4
    assert len(EnvironmentMix("uniform", (8,)).rows(same, copies=1).unique()) == 8
    assert len(EnvironmentMix("uniform", (8,)).rows(same).unique()) == 1  # one image, for all that is known
    plain = torch.randn(20, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    plain.flatten(1)[:, :1000] = 1.0
    assert len(EnvironmentMix("iid", (1000,)).rows(plain, copies=1).unique()) > 10


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
        ([1, 0], (2,), r"\[1, 0\], which may be both\. Write \[1\.0, 0\.0\] for .*, or torch\.tensor\(\[1, 0\]\)"),
        ([[1, 0], [0, 1]], (2, 2), r"Write \[\[1\.0, 0\.0\], \[0\.0, 1\.0\]\] for the mix"),
        ([0, 2], (2,), "groups from 0 to 1"),
        ([0, -1], (2,), "groups from 0 to 1"),
        ([0, 1], (2, 2), r"2 factor\(s\)"),
    ],
)
def test_what_fits_no_module_is_refused(environments, num_groups, message):
    with pytest.raises(ConfigError, match=message):
        EnvironmentMix(environments, num_groups)
