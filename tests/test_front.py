"""Bias against quality: which points are on the Pareto front, and what quality is where."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from conftest import made_up_measures
from invdiff.evaluation.results import Measures, Results
from invdiff.report import front as front_module
from invdiff.report.comparison import choose
from invdiff.report.front import front


def measures(bias: float, *, frechet: float | None = None, accuracy: float | None = None) -> Measures:
    return made_up_measures(bias, interval=(0.0, 1.0), floor=0.03, frechet=frechet, accuracy=accuracy)


def drawn(results: Results, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, dict[str, Any]]:
    """The plot, and what was asked of the plane."""
    asked: dict[str, Any] = {}
    original = front_module.plane_chart

    def plane_chart(sheet: Any, area: Any, paths: Any, **options: Any) -> None:
        asked.update(options, paths=paths)
        original(sheet, area, paths, **options)

    monkeypatch.setattr(front_module, "plane_chart", plane_chart)
    return front(results, choose(results)), asked


def test_points_that_no_other_beats_in_both_are_filled_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    models = {
        "base": {"1.0": measures(0.8, frechet=5.0), "3.0": measures(0.9, frechet=4.0)},
        "guided": {"10.0": measures(0.3, frechet=3.0), "3.0": measures(0.1, frechet=4.5)},
    }
    plot, asked = drawn(Results(models=models, attribute="background"), monkeypatch)
    assert [[(p.x, p.y) for p in path.points] for path in asked["paths"]] == [
        [(5.0, 0.8), (4.0, 0.9)],
        [(4.5, 0.1), (3.0, 0.3)],
    ]
    assert asked["labels"] == [["1", "3"], ["3", "10"]]
    assert asked["filled"] == [[False, False], [True, True]]
    told = plot.alt.partition("Not beaten in both: ")[2]
    assert (
        told
        == "With guidance at guidance scale 3 (Bias 0.10, 4.5); With guidance at guidance scale 10 (Bias 0.30, 3)."
    )


def test_without_distances_quality_is_the_share_of_wrong_subjects(monkeypatch: pytest.MonkeyPatch) -> None:
    models = {
        "base": {"3.0": measures(0.9, frechet=4.0, accuracy=0.75)},
        "guided": {"3.0": measures(0.1, accuracy=0.5)},
    }
    plot, asked = drawn(Results(models=models, attribute="background"), monkeypatch)
    assert [[(p.x, p.y) for p in path.points] for path in asked["paths"]] == [[(0.25, 0.9)], [(0.5, 0.1)]]
    assert asked["filled"] == [[True], [True]]
    assert "subject is wrong" in plot.caption


def test_a_single_point_or_no_quality_has_no_front() -> None:
    one = Results(models={"base": {"3.0": measures(0.9, frechet=4.0)}}, attribute="background")
    assert front(one, choose(one)) is None
    guided = {"1.0": measures(0.2, frechet=2.0), "3.0": measures(0.1, frechet=1.0)}
    models = {"base": {"3.0": measures(0.9)}, "guided": guided}
    half = replace(one, models=models)
    assert front(half, choose(half)) is None
