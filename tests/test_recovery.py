import numpy as np
import pytest

from invdiff.errors import EvaluationError
from invdiff.evaluation.recovery import recovery


def test_recovery_by_hand():
    minority = np.array([True, True, False, False, False])
    found = recovery([0.9, 0.4, 0.5, 0.1, 0.2], [True, False, True, False, False], minority)
    assert found.auroc == pytest.approx(5 / 6)
    assert (found.precision, found.recall) == (0.5, 0.5)
    with pytest.raises(EvaluationError, match="minority and of a majority, got 5 of 5"):
        recovery(np.arange(5), minority, np.ones(5))
