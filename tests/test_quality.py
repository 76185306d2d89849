import sys
from itertools import combinations
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm
from scipy.spatial.distance import cdist
from scipy.stats import binomtest, bootstrap
from scipy.stats import t as student
from sklearn.metrics.pairwise import polynomial_kernel, rbf_kernel

from invdiff.errors import EvaluationError
from invdiff.evaluation.quality import kernels
from invdiff.evaluation.quality.distances import (
    clip_t,
    cmmd,
    feature_shift,
    frechet_distance,
    kernel_distance,
    kernel_distance_interval,
    lpips_diversity,
    paired_cosines,
    precision_recall_density_coverage,
    vendi_score,
)
from invdiff.evaluation.quality.intervals import mean_interval, share_interval

COMPARISONS = [
    frechet_distance,
    kernel_distance,
    kernel_distance_interval,
    cmmd,
    lambda features, reference: precision_recall_density_coverage(features, reference, k=1),
]
PAIRED = [clip_t, paired_cosines, feature_shift]


def normal(seed, shape, scale=1.0, shift=0.0):
    return np.random.default_rng(seed).normal(shift, scale, shape)


def whitened(seed, count, width):
    """Features whose sample mean is exactly 0 and whose sample covariance is exactly the identity."""
    x = normal(seed, (count, width))
    x -= x.mean(axis=0)
    return x @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T


@pytest.fixture(params=[1, 70, 2**22], ids=["row by row", "few rows", "at once"])
def block_entries(request, monkeypatch):
    """Pairs held in memory at a time."""
    monkeypatch.setattr(kernels, "BLOCK_ENTRIES", request.param)


def test_distance_has_the_closed_form_of_diagonal_gaussians():
    deviations, others = np.array([1.0, 2.0, 0.5]), np.array([3.0, 2.0, 1.5])
    first = whitened(0, 50, 3) * deviations + [1.0, 0.0, -1.0]
    second = whitened(1, 70, 3) * others
    assert frechet_distance(first, second) == pytest.approx(2 + np.sum((deviations - others) ** 2))


def test_distance_matches_the_matrix_square_root_where_covariances_do_not_commute():
    first = normal(0, (200, 6)) @ normal(1, (6, 6))
    second = normal(2, (300, 6)) @ normal(3, (6, 6)) + 0.3
    covariances = np.cov(first.T), np.cov(second.T)
    root = np.real(sqrtm(covariances[0] @ covariances[1]))
    shift = first.mean(axis=0) - second.mean(axis=0)
    expected = shift @ shift + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-9)


def test_distance_is_symmetric():
    first, second = normal(0, (40, 5)), normal(1, (30, 5), 2.0)
    assert frechet_distance(first, second) == pytest.approx(frechet_distance(second, first), rel=1e-12)


@pytest.mark.parametrize("shape", [(100, 8), (5, 20)])
def test_distance_of_a_set_to_itself_is_zero_even_with_fewer_rows_than_columns(shape):
    features = normal(0, shape, 100.0)
    assert 0 <= frechet_distance(features, features) < 1e-8


def test_constant_features_differ_by_their_squared_shift():
    assert frechet_distance(np.zeros((3, 2)), np.full((4, 2), 2.0)) == pytest.approx(8.0)


def test_float32_features_are_computed_in_float64():
    features = normal(0, (50, 4)).astype(np.float32)
    assert frechet_distance(features + np.float32(1000), features.astype(np.float64) + 1000) < 1e-6


@pytest.mark.parametrize("compare", COMPARISONS, ids=["frechet", "kernel", "interval", "cmmd", "neighbours"])
@pytest.mark.parametrize(
    ("features", "message"),
    [
        (np.array([[0.0, np.nan], [1.0, 2.0], [1.0, 1.0]]), "1 of 3 rows, first in row 0"),
        (np.array([[0.0, 1.0], [np.inf, 2.0], [1.0, 1.0]]), "first in row 1"),
        (np.ones((4, 3)), "one width, got 3 and 2"),
        (np.ones((1, 2)), r"N at least [23], got \(1, 2\)"),
        (np.ones((0, 2)), r"got \(0, 2\)"),
        (np.ones(5), r"got \(5,\)"),
        ([["a", "b"], ["c", "d"]], "array of numbers"),
    ],
)
def test_unusable_features_are_refused(compare, features, message):
    with pytest.raises(EvaluationError, match=message):
        compare(features, normal(0, (4, 2)))


@pytest.mark.parametrize("compare", COMPARISONS, ids=["frechet", "kernel", "interval", "cmmd", "neighbours"])
def test_an_unusable_reference_is_named_as_such(compare):
    with pytest.raises(EvaluationError, match="finite reference features"):
        compare(normal(0, (4, 2)), np.full((4, 2), np.nan))


def unbiased(within, within_other, across):
    """Gretton et al. (2012), equation 3, from whole kernel matrices."""
    terms = [
        (matrix.sum() - np.trace(matrix)) / (len(matrix) * (len(matrix) - 1)) for matrix in (within, within_other)
    ]
    return sum(terms) - 2 * across.mean()


def kid(first, second, **options):
    pairs = [(first, first), (second, second), (first, second)]
    return unbiased(*(polynomial_kernel(a, b, **options) for a, b in pairs))


@pytest.mark.parametrize(
    "options", [{}, {"degree": 1}, {"degree": 2, "gamma": 0.7, "coef0": 0.0}, {"degree": 4, "coef0": 2.5}], ids=str
)
def test_kernel_distance_agrees_with_whole_kernel_matrices(options, block_entries):
    first, second = normal(0, (23, 5)), normal(1, (31, 5), 1.5, 0.4)
    assert kernel_distance(first, second, **options) == pytest.approx(kid(first, second, **options), rel=1e-11)


def test_kernel_distance_agrees_with_a_loop_over_pairs():
    x, y = normal(0, (4, 3)), normal(1, (5, 3), 2.0)
    within = [np.mean([(a @ b / 3 + 1) ** 3 for a, b in combinations(rows, 2)]) for rows in (x, y)]
    across = np.mean([(a @ b / 3 + 1) ** 3 for a in x for b in y])
    assert kernel_distance(x, y) == pytest.approx(sum(within) - 2 * across, rel=1e-12)


def test_kernel_distance_has_no_bias_and_goes_below_zero_for_sets_of_one_distribution():
    values = [kernel_distance(normal(2 * seed, (20, 3)), normal(2 * seed + 1, (30, 3))) for seed in range(400)]
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(len(values))
    assert 0.3 < np.mean(np.array(values) < 0) < 0.8


def test_subsets_of_all_images_give_the_distance_over_all_pairs():
    first, second = normal(0, (20, 4)), normal(1, (20, 4), shift=0.5)
    found = kernel_distance(first, second, num_subsets=3, subset_size=20)
    assert found == pytest.approx(kernel_distance(first, second), rel=1e-11)


def test_subsets_scatter_about_the_distance_over_all_pairs():
    first, second = normal(0, (60, 4)), normal(1, (50, 4), shift=0.5)
    found = [kernel_distance(first, second, num_subsets=20, subset_size=30, seed=seed) for seed in range(30)]
    assert np.std(found) > 0
    assert abs(np.mean(found) - kernel_distance(first, second)) < 4 * np.std(found) / np.sqrt(30)


def test_subsets_follow_from_the_seed():
    first, second = normal(0, (20, 4)), normal(1, (20, 4), shift=0.5)
    options = {"num_subsets": 2, "subset_size": 5}
    assert kernel_distance(first, second, seed=3, **options) == kernel_distance(first, second, seed=3, **options)
    assert kernel_distance(first, second, seed=3, **options) != kernel_distance(first, second, seed=4, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"degree": 0}, "degree to be a whole number of at least 1, got 0"),
        ({"degree": 2.5}, "got 2.5"),
        ({"gamma": 0.0}, "gamma above 0"),
        ({"gamma": np.nan}, "gamma above 0"),
        ({"coef0": -1.0}, "coef0 of at least 0"),
        ({"num_subsets": -1}, "num_subsets"),
        ({"num_subsets": 2, "subset_size": 5}, "subset_size of at most 4"),
        ({"num_subsets": 2, "subset_size": 1}, "subset_size to be a whole number of at least 2"),
    ],
)
def test_settings_of_the_kernel_out_of_range_are_refused(options, message):
    with pytest.raises(EvaluationError, match=message):
        kernel_distance(normal(0, (4, 2)), normal(1, (6, 2)), **options)


def jackknife_error(first, second):
    """By computing the distance again without each image."""
    variance = 0.0
    for rows, measure in (
        (first, lambda rest: kid(rest, second)),
        (second, lambda rest: kid(first, rest)),
    ):
        values = [measure(np.delete(rows, row, axis=0)) for row in range(len(rows))]
        variance += (len(rows) - 1) * np.var(values)
    return np.sqrt(variance)


def test_interval_of_the_kernel_distance_is_the_jackknifes(block_entries):
    first, second = normal(0, (11, 4)), normal(1, (14, 4), 1.5, 0.4)
    low, high = kernel_distance_interval(first, second, confidence=0.9)
    assert (low + high) / 2 == pytest.approx(kid(first, second), rel=1e-11)
    assert (high - low) / 2 == pytest.approx(1.6448536 * jackknife_error(first, second), rel=1e-6)


def test_interval_of_the_kernel_distance_holds_the_truth_as_often_as_it_says():
    # Under the linear kernel x.y / D + 1 the squared MMD is |difference of means|^2 / D.
    covered = 0
    for seed in range(300):
        first, second = normal(2 * seed, (60, 4)), normal(2 * seed + 1, (80, 4), shift=0.8)
        low, high = kernel_distance_interval(first, second, degree=1)
        covered += low < 0.8**2 < high
    assert 0.91 < covered / 300 < 0.98


def test_interval_of_the_kernel_distance_seldom_misses_zero_for_sets_of_one_distribution():
    missed = 0
    for seed in range(300):
        low, high = kernel_distance_interval(normal(2 * seed, (60, 4)), normal(2 * seed + 1, (80, 4)))
        missed += not low < 0 < high
    assert missed / 300 < 0.05


def test_interval_of_the_kernel_distance_needs_three_images_of_each():
    with pytest.raises(EvaluationError, match="N at least 3"):
        kernel_distance_interval(normal(0, (3, 2)), normal(1, (2, 2)))


def directions(array):
    return array / np.linalg.norm(array, axis=1, keepdims=True)


@pytest.mark.parametrize("options", [{}, {"sigma": 0.5, "scale": 1.0}], ids=str)
def test_cmmd_agrees_with_whole_gaussian_kernel_matrices_of_directions(options, block_entries):
    first, second = normal(0, (23, 5)), normal(1, (31, 5), 1.5, 0.4)
    gamma = 1 / (2 * options.get("sigma", 10.0) ** 2)
    x, y = directions(first), directions(second)
    matrices = [rbf_kernel(a, b, gamma=gamma) for a, b in ((x, x), (y, y), (x, y))]
    expected = options.get("scale", 1000.0) * (matrices[0].mean() + matrices[1].mean() - 2 * matrices[2].mean())
    assert cmmd(first, second, **options) == pytest.approx(expected, rel=1e-9)


def test_cmmd_has_the_closed_form_of_two_opposite_directions():
    first, second = np.tile([3.0, 0.0], (4, 1)), np.tile([-1.0, 0.0], (5, 1))
    assert cmmd(first, second) == pytest.approx(1000 * (2 - 2 * np.exp(-4 / 200)))


def test_cmmd_of_a_set_to_itself_is_zero_and_never_below():
    features = normal(0, (50, 8))
    assert 0 <= cmmd(features, features[::-1]) < 1e-9


def test_cmmd_refuses_a_row_without_direction():
    with pytest.raises(EvaluationError, match="1 of 3 rows of zeros, first row 1"):
        cmmd([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]], normal(0, (4, 2)))


@pytest.mark.parametrize("options", [{"sigma": 0.0}, {"sigma": np.nan}, {"scale": -1.0}], ids=str)
def test_settings_of_cmmd_out_of_range_are_refused(options):
    with pytest.raises(EvaluationError, match="above 0, got"):
        cmmd(normal(0, (4, 2)), normal(1, (4, 2)), **options)


def neighbourhoods_by_loops(images, references, k):
    """The definitions, one pair at a time: an edge belongs to its ball, nobody is a neighbour of itself."""

    def radius(rows, row):
        others = [np.linalg.norm(rows[row] - rows[other]) for other in range(len(rows)) if other != row]
        return sorted(others)[k - 1]

    reach = [radius(images, row) for row in range(len(images))]
    reference_reach = [radius(references, row) for row in range(len(references))]
    apart = [[np.linalg.norm(image - real) for real in references] for image in images]
    n, m = len(images), len(references)
    inside = [[apart[i][j] <= reference_reach[j] for j in range(m)] for i in range(n)]
    precision = sum(any(inside[i]) for i in range(n)) / n
    recall = sum(any(apart[i][j] <= reach[i] for i in range(n)) for j in range(m)) / m
    density = sum(map(sum, inside)) / (k * n)
    coverage = sum(any(inside[i][j] for i in range(n)) for j in range(m)) / m
    return precision, recall, density, coverage


@pytest.mark.parametrize("k", [1, 3, 5])
def test_neighbourhoods_agree_with_loops_over_all_pairs(k, block_entries):
    images, references = normal(0, (40, 3), 0.7, 0.5), normal(1, (30, 3))
    found = precision_recall_density_coverage(images, references, k=k)
    assert tuple(found) == pytest.approx(neighbourhoods_by_loops(images, references, k))


def test_neighbourhoods_agree_with_loops_where_many_images_are_equal_or_at_equal_distance():
    images, references = normal(0, (60, 2)).round(), normal(1, (50, 2)).round()
    found = precision_recall_density_coverage(images, references, k=3)
    assert tuple(found) == pytest.approx(neighbourhoods_by_loops(images, references, 3))


def test_neighbourhoods_have_their_fields_in_this_order():
    found = precision_recall_density_coverage(normal(0, (9, 2)), normal(1, (9, 2)))
    assert found._fields == ("precision", "recall", "density", "coverage")


def test_a_set_lies_in_its_own_neighbourhoods():
    features = normal(0, (80, 4))
    found = precision_recall_density_coverage(features, features, k=4)
    assert found == pytest.approx((1, 1, (4 + 1) / 4, 1))  # each ball holds its centre and k neighbours


def test_sets_far_apart_share_no_neighbourhood():
    assert precision_recall_density_coverage(normal(0, (20, 3)), normal(1, (20, 3), shift=100)) == (0, 0, 0, 0)


def test_neighbourhoods_do_not_depend_on_where_the_features_lie():
    images, references = normal(0, (40, 3), 0.7), normal(1, (30, 3))
    here = precision_recall_density_coverage(images, references)
    assert precision_recall_density_coverage(images + 1e6, references + 1e6) == here


def test_coverage_of_two_sets_of_one_distribution_has_its_closed_form():
    # Naeem et al. (2020): 1 - (N - 1) ... (N - k) / ((2N - 1) ... (2N - k)) where N = M.
    n, k = 40, 3
    steps = np.arange(1, k + 1)
    expected = 1 - np.prod((n - steps) / (2 * n - steps))
    found = [
        precision_recall_density_coverage(normal(2 * seed, (n, 2)), normal(2 * seed + 1, (n, 2)), k=k).coverage
        for seed in range(300)
    ]
    assert abs(np.mean(found) - expected) < 4 * np.std(found) / np.sqrt(len(found))


def test_images_of_one_mode_keep_precision_and_lose_recall():
    modes = np.repeat([[0.0, 0.0], [50.0, 0.0]], 40, axis=0)
    references = modes + normal(0, (80, 2))
    found = precision_recall_density_coverage(modes[:40].repeat(2, axis=0) + normal(1, (80, 2)), references)
    assert found.precision > 0.8
    assert found.recall <= 0.5
    assert found.coverage <= 0.5


def test_neighbourhoods_need_more_images_than_neighbours():
    with pytest.raises(EvaluationError, match=r"reference features of shape \(N, D\) with N at least 6, got \(5, 2\)"):
        precision_recall_density_coverage(normal(0, (9, 2)), normal(1, (5, 2)))


@pytest.mark.parametrize("k", [0, 2.5])
def test_neighbours_are_counted_in_whole_numbers(k):
    with pytest.raises(EvaluationError, match="whole number of at least 1"):
        precision_recall_density_coverage(normal(0, (9, 2)), normal(1, (9, 2)), k=k)


def test_clip_t_is_the_mean_cosine_of_pairs():
    images, texts = normal(0, (12, 6)), normal(1, (12, 6))
    cosines = 1 - np.diag(cdist(images, texts, "cosine"))
    np.testing.assert_allclose(paired_cosines(images, texts), cosines, rtol=1e-12)
    assert clip_t(images, texts) == pytest.approx(cosines.mean())


def test_clip_t_is_defined_for_one_image():
    assert clip_t([[2.0, 0.0]], [[3.0, 3.0]]) == pytest.approx(np.sqrt(0.5))


@pytest.mark.parametrize("compare", PAIRED)
@pytest.mark.parametrize(
    ("features", "message"),
    [
        (np.ones((4, 2)), r"row beside row, got \(4, 2\) and \(3, 2\)"),
        (np.ones((3, 5)), r"got \(3, 5\) and \(3, 2\)"),
        (np.array([[1.0, 1.0], [0.0, 0.0], [1.0, 0.0]]), "1 of 3 rows of zeros, first row 1"),
        (np.full((3, 2), np.nan), "finite features"),
        (np.ones((0, 2)), "N at least 1"),
    ],
)
def test_features_without_a_cosine_in_pairs_are_refused(compare, features, message):
    with pytest.raises(EvaluationError, match=message):
        compare(features, np.ones((3, 2)))


@pytest.mark.parametrize("shape", [(30, 6), (6, 30)], ids=["more rows", "more columns"])
def test_vendi_score_agrees_with_the_eigenvalues_of_all_cosines(shape):
    features = normal(0, shape)
    eigenvalues = np.linalg.eigvals((1 - cdist(features, features, "cosine")) / len(features)).real
    eigenvalues = eigenvalues[eigenvalues > 1e-12]
    assert vendi_score(features) == pytest.approx(np.exp(-np.sum(eigenvalues * np.log(eigenvalues))))


@pytest.mark.parametrize("copies", [1, 7])
def test_vendi_score_counts_kinds_of_images_however_often_they_occur(copies):
    assert vendi_score(np.tile(np.eye(5), (copies, 1))) == pytest.approx(5)


def test_vendi_score_of_images_all_alike_is_one():
    assert vendi_score(np.outer([1.0, 2.0, 3.0], [1.0, -2.0])) == pytest.approx(1)


def test_vendi_score_weighs_kinds_by_their_shares():
    features = np.eye(2)[[0, 0, 0, 1]]
    assert vendi_score(features) == pytest.approx(np.exp(-0.75 * np.log(0.75) - 0.25 * np.log(0.25)))


@pytest.mark.parametrize("features", [np.zeros((3, 2)), np.ones((1, 2)), np.full((3, 2), np.nan)])
def test_vendi_score_of_unusable_features_is_refused(features):
    with pytest.raises(EvaluationError):
        vendi_score(features)


def test_feature_shift_agrees_with_the_matrix_of_cosine_distances():
    before, after = normal(0, (15, 4)), normal(1, (15, 4), shift=0.3)
    distances = cdist(before, after, "cosine")
    found = feature_shift(before, after)
    assert found.moved == pytest.approx(np.trace(distances) / 15)
    assert found.unrelated == pytest.approx(distances[~np.eye(15, dtype=bool)].mean())


def test_images_that_stay_as_they_are_did_not_move():
    features = normal(0, (15, 4))
    found = feature_shift(features, 2 * features)
    assert found.moved == pytest.approx(0, abs=1e-12)
    assert found.unrelated > 0.5


def test_feature_shift_needs_an_unrelated_image():
    with pytest.raises(EvaluationError, match="N at least 2"):
        feature_shift(np.ones((1, 2)), np.ones((1, 2)))


def grey(*levels, size=(8, 6), mode="RGB"):
    return [Image.new("L", size, level).convert(mode) for level in levels]


def mean_difference(first, second):
    assert first.shape == second.shape == (len(first), 3, 6, 8)
    return (first - second).abs().mean()


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_lpips_diversity_is_the_mean_over_all_pairs_of_images_in_minus_one_to_one(mode):
    found = lpips_diversity(grey(0, 51, 255, mode=mode), distance=mean_difference)
    assert found == pytest.approx((0.4 + 2.0 + 1.6) / 3)


def test_lpips_diversity_weighs_pairs_alike_however_they_fall_into_batches():
    levels = [0, 10, 30, 70, 150, 250, 255]  # 21 pairs: batches of 16 and 5
    expected = np.mean([abs(a - b) / 127.5 for a, b in combinations(levels, 2)])
    assert lpips_diversity(grey(*levels), distance=mean_difference) == pytest.approx(expected)


@pytest.mark.parametrize("images", [[], grey(1), [*grey(1), *grey(1, size=(8, 8))]], ids=["none", "one", "two sizes"])
def test_images_without_pairs_of_one_size_have_no_lpips_diversity(images):
    with pytest.raises(EvaluationError, match="at least two images, all of one size"):
        lpips_diversity(images, distance=mean_difference)


def test_lpips_distances_that_are_not_finite_are_refused():
    with pytest.raises(EvaluationError, match="finite distances"):
        lpips_diversity(grey(1, 2), distance=lambda first, second: torch.tensor(float("nan")))


def test_lpips_without_the_extra_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    with pytest.raises(EvaluationError, match=r"found no torchmetrics.*pip install 'invdiff\[metrics\]'"):
        lpips_diversity(grey(1, 2))


def stand_in_for_torchmetrics(monkeypatch, network):
    module = ModuleType("torchmetrics.image.lpip")
    module.LearnedPerceptualImagePatchSimilarity = network
    for name in ("torchmetrics", "torchmetrics.image"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "torchmetrics.image.lpip", module)


def test_lpips_without_torchvision_says_what_to_install(monkeypatch):
    def network(**options):
        raise ModuleNotFoundError("LPIPS metric requires that torchvision is installed.")

    stand_in_for_torchmetrics(monkeypatch, network)
    with pytest.raises(EvaluationError, match=r"found no torchvision.*pip install 'invdiff\[metrics\]'"):
        lpips_diversity(grey(1, 2))


def test_lpips_without_its_weights_says_so(monkeypatch):
    def network(**options):
        raise OSError("no route to host")

    stand_in_for_torchmetrics(monkeypatch, network)
    with pytest.raises(EvaluationError, match=r"AlexNet's weights.*no route to host"):
        lpips_diversity(grey(1, 2))


def test_mean_interval_is_students():
    values = normal(0, 25, 2.0, 1.0)
    expected = student.interval(0.9, 24, loc=values.mean(), scale=values.std(ddof=1) / 5)
    assert mean_interval(values, confidence=0.9) == pytest.approx(expected)


def test_mean_interval_is_near_the_bootstraps():
    values = normal(0, 400)
    resampled = bootstrap((values,), np.mean, rng=np.random.default_rng(0), method="percentile").confidence_interval
    assert mean_interval(values) == pytest.approx(tuple(resampled), abs=0.015)


@pytest.mark.parametrize("values", [[], [1.0], [1.0, np.nan], [[1.0, 2.0]]], ids=str)
def test_a_mean_without_an_interval_is_refused(values):
    with pytest.raises(EvaluationError, match="at least two finite values"):
        mean_interval(values)


@pytest.mark.parametrize("confidence", [0.8, 0.95])
@pytest.mark.parametrize(("successes", "total"), [(0, 1), (0, 10), (10, 10), (3, 10), (420, 1000)])
def test_share_interval_is_wilsons(successes, total, confidence):
    expected = binomtest(successes, total).proportion_ci(confidence, method="wilson")
    assert share_interval(successes, total, confidence=confidence) == pytest.approx(tuple(expected), abs=1e-12)


def test_share_interval_takes_numpys_whole_numbers():
    assert share_interval(np.int64(3), np.int64(10)) == share_interval(3, 10)


@pytest.mark.parametrize(("successes", "total"), [(0, 0), (3, 2), (-1, 2), (0.5, 2), (1, 2.0)])
def test_a_share_of_impossible_counts_is_refused(successes, total):
    with pytest.raises(EvaluationError, match="whole numbers of successes"):
        share_interval(successes, total)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95, np.nan])
@pytest.mark.parametrize(
    "interval",
    [
        lambda confidence: mean_interval([1.0, 2.0], confidence=confidence),
        lambda confidence: share_interval(1, 2, confidence=confidence),
        lambda confidence: kernel_distance_interval(np.ones((3, 2)), np.ones((3, 2)), confidence=confidence),
    ],
    ids=["mean", "share", "kernel"],
)
def test_a_confidence_out_of_range_is_refused(interval, confidence):
    with pytest.raises(EvaluationError, match="above 0 and below 1"):
        interval(confidence)


class Flat(torch.nn.Module):
    """Takes features for images, so that torchmetrics compares them as they are."""

    num_features = 5

    def forward(self, images):
        return images


@pytest.mark.filterwarnings("ignore")  # of torchmetrics, at import and about its memory
def test_kernel_distance_agrees_with_torchmetrics():
    module = pytest.importorskip("torchmetrics.image.kid")
    first, second = normal(0, (40, 5)), normal(1, (40, 5), 1.5, 0.4)
    metric = module.KernelInceptionDistance(feature=Flat(), subsets=1, subset_size=40)
    metric.update(torch.from_numpy(first), real=False)
    metric.update(torch.from_numpy(second), real=True)
    assert kernel_distance(first, second) == pytest.approx(float(metric.compute()[0]), rel=1e-9)


@pytest.mark.filterwarnings("ignore")
def test_distance_agrees_with_torchmetrics():
    module = pytest.importorskip("torchmetrics.image.fid")
    first, second = normal(0, (40, 5)), normal(1, (50, 5), 1.5, 0.4)
    metric = module.FrechetInceptionDistance(feature=Flat())
    metric.update(torch.from_numpy(first), real=False)
    metric.update(torch.from_numpy(second), real=True)
    assert frechet_distance(first, second) == pytest.approx(float(metric.compute()), rel=1e-6)
