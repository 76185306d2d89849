import functools
from itertools import combinations, product

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm
from scipy.spatial.distance import cdist
from scipy.stats import t as student
from sklearn.metrics.pairwise import rbf_kernel

from invdiff.errors import EvaluationError
from invdiff.evaluation.fairness.intervals import mean_interval
from invdiff.evaluation.quality import distances
from invdiff.evaluation.quality.distances import precision_recall_density_coverage as neighbourhoods
from invdiff.evaluation.quality.extractors import lpips_diversity


def normal(seed, shape, scale=1.0, shift=0.0):
    return np.random.default_rng(seed).normal(shift, scale, shape)


@pytest.fixture(params=[2**10, 2**22], ids=["a few rows at a time", "at once"])
def block_entries(request, monkeypatch):
    """Pairs held in memory at a time."""
    monkeypatch.setattr(distances, "BLOCK_ENTRIES", request.param)


def test_distance_matches_the_matrix_square_root_where_covariances_do_not_commute():
    first = normal(0, (200, 6)) @ normal(1, (6, 6))
    second = normal(2, (300, 6)) @ normal(3, (6, 6)) + 0.3
    covariances = np.cov(first.T), np.cov(second.T)
    root = np.real(sqrtm(covariances[0] @ covariances[1]))
    shift = first.mean(axis=0) - second.mean(axis=0)
    expected = shift @ shift + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert distances.frechet_distance(first, second) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("shape", "kind"), [((100, 8), np.float64), ((5, 20), np.float64), ((50, 4), np.float32)])
def test_distance_of_a_set_to_itself_is_zero_even_with_fewer_rows_than_columns_or_in_float32(shape, kind):
    features = normal(0, shape, 100.0).astype(kind)
    assert 0 <= distances.frechet_distance(features, features.astype(np.float64)) < 1e-8


@pytest.mark.parametrize(
    "compare",
    [distances.frechet_distance, distances.kernel_distance, distances.cmmd, functools.partial(neighbourhoods, k=1)],
)
@pytest.mark.parametrize(
    ("features", "message"),
    [
        (np.array([[0.0, np.nan], [1.0, 2.0], [1.0, 1.0]]), "finite features .*NaN"),
        (np.ones((4, 3)), "one width, got 3 and 2"),
        (np.ones((1, 2)), r"N at least [23], got .*\(1, 2\)"),
        (np.ones(5), "got 1D array"),
    ],
)
def test_unusable_features_are_refused(compare, features, message):
    with pytest.raises(EvaluationError, match=message):
        compare(features, normal(0, (4, 2)))
    if "finite" in message:
        with pytest.raises(EvaluationError, match=message.replace("features", "reference features")):
            compare(normal(0, (4, 2)), features)


def kid_by_pairs(x, y):
    """The mean over pairs of different images, one pair at a time."""
    pairs = (combinations(x, 2), combinations(y, 2), product(x, y))
    xx, yy, xy = (np.mean([(a @ b / len(a) + 1) ** 3 for a, b in of]) for of in pairs)
    return xx + yy - 2 * xy


def test_kernel_distance_agrees_with_a_loop_over_pairs(block_entries):
    x, y = normal(0, (44, 3)), normal(1, (35, 3), 2.0)
    assert distances.kernel_distance(x, y).value == pytest.approx(kid_by_pairs(x, y), rel=1e-11)


def test_interval_of_the_kernel_distance_is_the_jackknifes():
    first, second = normal(0, (11, 4)), normal(1, (14, 4), 1.5, 0.4)
    left_out = [kid_by_pairs(np.delete(first, row, axis=0), second) for row in range(11)]
    right_out = [kid_by_pairs(first, np.delete(second, row, axis=0)) for row in range(14)]
    found = distances.kernel_distance(first, second, confidence=0.9)
    assert found.high - found.value == pytest.approx(found.value - found.low)
    half = 1.6448536 * np.sqrt(10 * np.var(left_out) + 13 * np.var(right_out))
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=1e-6)


@pytest.mark.parametrize("options", [{}, {"sigma": 0.5, "scale": 1.0}], ids=str)
def test_cmmd_agrees_with_whole_gaussian_kernel_matrices_of_directions(options, block_entries):
    x, y = normal(0, (43, 5)), normal(1, (31, 5), 1.5, 0.4)
    assert 0 <= distances.cmmd(x, x[::-1], **options) < 1e-9
    found = distances.cmmd(x, y, **options)
    x, y = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (x, y))
    gamma = 1 / (2 * options.get("sigma", 10.0) ** 2)
    xx, yy, xy = (rbf_kernel(a, b, gamma=gamma).mean() for a, b in ((x, x), (y, y), (x, y)))
    assert found == pytest.approx(options.get("scale", 1000.0) * (xx + yy - 2 * xy), rel=1e-9)


@pytest.mark.parametrize("decimals", [9, 0], ids=["apart", "many equal or at equal distance"])
@pytest.mark.parametrize("k", [1, 5])
def test_neighbourhoods_agree_with_their_definitions_on_whole_tables(k, decimals, block_entries):
    """An edge belongs to its ball, nobody is a neighbour of itself."""
    images, references = normal(0, (60, 2), 0.7, 0.5).round(decimals), normal(1, (50, 2)).round(decimals)
    reach, reference_reach = (np.sort(cdist(rows, rows), axis=1)[:, k] for rows in (images, references))
    apart = cdist(images, references)
    inside, recall = apart <= reference_reach, (apart <= reach[:, None]).any(axis=0).mean()
    expected = (inside.any(axis=1).mean(), recall, inside.sum() / (k * 60), inside.any(axis=0).mean())
    assert neighbourhoods(images, references, k=k) == pytest.approx(expected)


def test_cosines_of_pairs_and_of_all_others():
    images, texts = normal(0, (12, 6)), normal(1, (12, 6))
    pairs = 1 - np.diag(cdist(images, texts, "cosine"))
    np.testing.assert_allclose(distances.paired_cosines(images, texts), pairs, rtol=1e-12)
    others = cdist(images, images, "cosine")[~np.eye(12, dtype=bool)]
    assert distances.mean_cosine_distance(images) == pytest.approx(others.mean())
    assert distances.mean_cosine_distance([[1.0, 2.0], [3.0, 6.0]]) == pytest.approx(0, abs=1e-12)


def test_features_without_a_cosine_are_refused():
    in_pairs = functools.partial(distances.paired_cosines, others=np.ones((3, 2)))
    of_one_set = [distances.vendi_score, distances.mean_cosine_distance]
    for measures, features, message in (
        ([in_pairs], np.ones((4, 2)), r"of one shape, got \(4, 2\) and \(3, 2\)"),
        ([in_pairs], np.ones((0, 2)), "N at least 1"),
        ([in_pairs, *of_one_set], np.full((3, 2), np.nan), "finite"),
        (of_one_set, np.ones((1, 2)), "N at least 2"),
        ([in_pairs, *of_one_set, lambda x: distances.cmmd(x, x)], [[1, 1], [0, 0], [1, 0]], "zeros in row 1"),
    ):
        for measure in measures:
            with pytest.raises(EvaluationError, match=message):
                measure(features)


@pytest.mark.parametrize("shape", [(30, 6), (6, 30)], ids=["more rows", "more columns"])
def test_vendi_score_agrees_with_the_eigenvalues_of_all_cosines(shape):
    features = normal(0, shape)
    eigenvalues = np.linalg.eigvals((1 - cdist(features, features, "cosine")) / len(features)).real
    eigenvalues = eigenvalues[eigenvalues > 1e-12]
    assert distances.vendi_score(features) == pytest.approx(np.exp(-np.sum(eigenvalues * np.log(eigenvalues))))
    assert distances.vendi_score(np.tile(np.eye(5), (7, 1))) == pytest.approx(5)  # however often each occurs
    assert distances.vendi_score(np.outer([1.0, 2.0, 3.0], [1.0, -2.0])) == pytest.approx(1)


def grey(*levels, size=(8, 6), mode="RGB"):
    return [Image.new("L", size, level).convert(mode) for level in levels]


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_lpips_diversity_is_the_mean_over_all_pairs_of_images_in_minus_one_to_one(mode):
    def mean_difference(first, second):
        assert first.shape == second.shape == (len(first), 3, 6, 8)
        return (first - second).abs().mean()

    levels = [0, 10, 30, 70, 150, 250, 255]  # 21 pairs: batches of 16 and 5
    expected = np.mean([abs(a - b) / 127.5 for a, b in combinations(levels, 2)])
    assert lpips_diversity(grey(*levels, mode=mode), mean_difference) == pytest.approx(expected)


@pytest.mark.parametrize("images", [[], grey(1), grey(1) + grey(1, size=(8, 8)), grey(1, 2)])
def test_images_without_a_lpips_diversity_are_refused(images):
    with pytest.raises(EvaluationError, match=r"two images or more of one size|finite LPIPS distances"):
        lpips_diversity(images, lambda first, second: torch.tensor(float("nan")))


def test_mean_interval_is_students():
    values = normal(0, 25, 2.0, 1.0)
    expected = student.interval(0.9, 24, loc=values.mean(), scale=values.std(ddof=1) / 5)
    assert mean_interval(values, confidence=0.9) == pytest.approx(expected)
