import numpy as np
import pytest
from scipy.linalg import sqrtm

from invdiff.errors import EvaluationError
from invdiff.evaluation.quality import frechet_distance


def normal(seed, shape, scale=1.0, shift=0.0):
    return np.random.default_rng(seed).normal(shift, scale, shape)


def whitened(seed, count, width):
    """Features whose sample mean is exactly 0 and whose sample covariance is exactly the identity."""
    x = normal(seed, (count, width))
    x -= x.mean(axis=0)
    return x @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T


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


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (np.array([[0.0, np.nan], [1.0, 2.0]]), "1 of 2 rows, first in row 0"),
        (np.array([[0.0, 1.0], [np.inf, 2.0]]), "first in row 1"),
        (np.zeros((4, 3)), "one width, got 3 and 2"),
        (np.zeros((1, 2)), r"N at least 2, got \(1, 2\)"),
        (np.zeros(5), r"got \(5,\)"),
    ],
)
def test_unusable_features_are_refused(features, message):
    with pytest.raises(EvaluationError, match=message):
        frechet_distance(features, np.zeros((4, 2)))
