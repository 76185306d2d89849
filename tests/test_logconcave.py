import numpy as np
import pytest
from scipy.optimize import brentq, minimize
from scipy.special import exprel

from invdiff.auditing.logconcave import max_log_likelihood
from invdiff.errors import AuditError

SAMPLES = {
    "normal": lambda rng, n: rng.normal(size=n),
    "Laplace": lambda rng, n: rng.laplace(size=n),
    "uniform": lambda rng, n: rng.random(n),
    "exponential": lambda rng, n: rng.exponential(size=n),
    "skewed": lambda rng, n: rng.lognormal(0, 1, n),
    "heavy-tailed": lambda rng, n: rng.standard_cauchy(n),
    "ties": lambda rng, n: rng.normal(size=n).round(1),
    "two humps": lambda rng, n: rng.normal(size=n) + 5 * (rng.random(n) < 0.2),
    "outlier": lambda rng, n: np.append(rng.normal(size=n - 1), 1e3),
    "far gap": lambda rng, n: rng.normal(size=n) + 1e3 * (rng.random(n) < 0.3),
    "spike": lambda rng, n: rng.normal(size=n) * np.where(rng.random(n) < 0.5, 1e-9, 1),
}


@pytest.fixture(params=SAMPLES)
def sample(request):
    return lambda n, seed=0: SAMPLES[request.param](np.random.default_rng(seed), n)


def brute_force(x):
    """The maximum over concave phi by a general solver, with phi at every value."""
    values, counts = np.unique(x, return_counts=True)
    weights, gaps = counts / len(x), np.diff(values)
    second = np.zeros((len(values) - 2, len(values)))
    for row, (left, right) in enumerate(zip(1 / gaps[:-1], 1 / gaps[1:], strict=True)):
        second[row, row : row + 3] = -left, left + right, -right
    found = minimize(
        lambda phi: (gaps * np.exp(phi[:-1]) * exprel(np.diff(phi))).sum() - weights @ phi,
        np.full(len(values), -np.log(np.ptp(x))),
        method="SLSQP",
        constraints={"type": "ineq", "fun": lambda phi: second @ phi, "jac": lambda phi: second},
        options={"maxiter": 500, "ftol": 1e-12},
    )
    return len(x) * (1 - found.fun)


@pytest.mark.parametrize("name", ["normal", "Laplace", "uniform", "exponential", "skewed", "ties", "two humps"])
def test_it_is_the_maximum_that_a_general_solver_finds(name):
    for seed, n in enumerate((3, 6, 15, 25)):
        x = SAMPLES[name](np.random.default_rng(seed), n)
        assert max_log_likelihood(x, tol=1e-6) == pytest.approx(brute_force(x), abs=1e-4)


def test_it_is_the_maximum_where_that_is_known():
    assert max_log_likelihood(np.array([3.0, 5.0])) == pytest.approx(-2 * np.log(2), abs=1e-9)
    # Two values: the exponential density on the interval between them of the right mean.
    for zeros in (2, 9, 999, 29_999):
        mean = 1 / (zeros + 1)
        rate = brentq(lambda b, mean=mean: 1 / b + np.exp(-b) / np.expm1(-b) - mean, 0.1, 1e5)
        known = (zeros + 1) * (np.log(rate) - np.log1p(-np.exp(-rate)) - rate * mean)
        assert max_log_likelihood(np.append(np.zeros(zeros), 1.0)) == pytest.approx(known, abs=1e-3)


def test_it_is_an_upper_bound_within_tol(sample):
    for n in (2, 5, 40, 1_000):
        tight, loose = (max_log_likelihood(sample(n), tol=tol) for tol in (1e-6, 1e-3))
        assert tight - 1e-6 - 1e-9 <= loose <= tight + 1e-3
        assert max_log_likelihood(sample(n), tol=1.0) >= tight - 1e-6 - 1e-9


def test_it_follows_unit_origin_sign_order_and_copies(sample):
    x = sample(300)
    expected = max_log_likelihood(x)
    assert max_log_likelihood(-x[::-1]) == pytest.approx(expected, abs=1e-3)
    assert max_log_likelihood(np.repeat(x, 2)) == pytest.approx(2 * expected, abs=3e-3)
    assert max_log_likelihood(np.repeat(x, 2) * np.tile([1, 1 + 1e-15], 300)) == pytest.approx(2 * expected, abs=3e-3)
    assert max_log_likelihood(1e-40 * x) == pytest.approx(expected + len(x) * np.log(1e40), abs=1e-3)
    assert max_log_likelihood(2.0**20 * (x + 0.25)) == pytest.approx(expected - len(x) * np.log(2.0**20), abs=1e-3)


def test_where_the_likelihood_has_no_bound_or_the_values_no_meaning_it_says_so():
    assert max_log_likelihood(np.full(5, 2.5)) == max_log_likelihood(np.array([1.0])) == np.inf
    for wrong in ([], [1.0, np.nan], [1.0, np.inf], [[1.0, 2.0]]):
        with pytest.raises(AuditError, match=r"Expected finite scores \(n,\)"):
            max_log_likelihood(np.array(wrong))
    with pytest.raises(AuditError, match="within 1e-30 nats"):
        max_log_likelihood(np.random.default_rng(0).normal(size=100), tol=1e-30)
