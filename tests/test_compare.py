"""The models that a report compares, and their lines over the guidance scale and over the module's."""

from dataclasses import replace

import pytest

from conftest import made_up_measures
from invdiff.cli.print import print_results
from invdiff.evaluation.results import Results
from invdiff.report.compare import Comparison, charts_of, compare, modules_by_scale, over_guidance
from invdiff.report.read import Generated, Run


def measures(bias, **more):
    return made_up_measures(bias, interval=(bias - 0.1, bias + 0.1), floor=0.05, **more)


def compared(measured):
    chosen = compare(Run(results=measured))
    return chosen.before, chosen.after, chosen.key, chosen.keys, list(chosen.measures)


def test_the_guided_model_is_compared_at_the_middle_guidance_scale():
    by_scale = {key: measures(0.5) for key in ("1.0", "10.0", "3.0", "unstated")}
    models = {"other": by_scale, "guided": by_scale, "base": by_scale}
    found = compared(Results(models))
    assert found == ("base", "guided", "3.0", ["1.0", "3.0", "10.0", "unstated"], ["base", "guided", "other"])
    assert compared(Results(models, baseline="other"))[:2] == ("other", "guided")
    apart = Results({"base": {"1.0": measures(0.5)}, "guided": {"3.0": measures(0.5)}})
    assert compared(apart) == ("base", "base", "1.0", ["1.0"], ["base"])
    assert compare(Run(images={"base": Generated([], ["base"], [{}])})) is None


def test_modules_at_two_strengths_are_lines():
    for models, expected in (
        (
            {"base": (0.9, 0), "guided-1": (0.1, 1), "guided-0.5": (0.4, 0.5)},
            {"With guidance": {0.0: 0.9, 0.5: 0.4, 1.0: 0.1}},
        ),
        ({"theirs": (0.8, None), "ours-0.5": (0.4, 0.5), "ours-1": (0.1, 1)}, {"ours": {0.5: 0.4, 1.0: 0.1}}),
        ({"base": (0.9, 0), "guided": (0.1, 1)}, {}),  # one strength is no line
        ({"base": (0.9, 0), "m-1": (0.1, 1), "m_1": (0.3, 1)}, {}),  # measured twice
        (  # the compared model stands at 0, before other plain ones
            {"plain": (0.7, 0), "base": (0.9, 0), "m 1": (0.1, 1), "m 2": (0.2, 2)},
            {"m": {0.0: 0.9, 1.0: 0.1, 2.0: 0.2}},
        ),
        ({"m-0.5": (0.4, 0.5), "m": (0.1, 1)}, {"m": {0.5: 0.4, 1.0: 0.1}}),
        ({"m-0.50": (0.4, 0.5), "m-1.0": (0.1, 1)}, {"m": {0.5: 0.4, 1.0: 0.1}}),
        ({"run-1": (0.4, 0.5), "run-2": (0.1, 1)}, {}),  # numbers that are not the strengths
        ({"0.5": (0.4, 0.5), "1": (0.1, 1)}, {}),
    ):
        scales = {name: scale for name, (_, scale) in models.items() if scale is not None}
        found = Results({name: {"3.0": measures(bias)} for name, (bias, _) in models.items()}, module_scales=scales)
        lines = modules_by_scale(found, compare(Run(results=found)))
        assert {name: {scale: entry.bias for scale, entry in line.items()} for name, line in lines.items()} == expected


def test_every_figure_has_its_chart_with_gaps_where_it_is_missing():
    line = {0.0: measures(0.9, accuracy=0.9), 0.5: measures(0.4, frechet=3.0), 1.0: measures(0.1, accuracy=0.8)}
    results = Results({"ours": {f"{x}": of for x, of in line.items()}})
    charts = charts_of(results, {"ours": line}, "scale of the module")
    assert [chart.title.partition(":")[0] for chart in charts] == ["Bias", "Subject right", "Fréchet distance"]
    assert [[point[:2] for point in chart.lines[0].points] for chart in charts] == [
        [(0.0, 0.9), (0.5, 0.4), (1.0, 0.1)],
        [(0.0, 0.9), (0.5, None), (1.0, 0.8)],
        [(0.0, None), (0.5, 3.0), (1.0, None)],
    ]
    assert [len(chart.floors) for chart in charts] == [1, 0, 0]
    assert charts[0].lines[0].points[0][2:] == (pytest.approx(0.8), 1.0)


def test_a_guidance_scale_that_is_not_stated_has_no_place_on_a_line():
    models = {"base": {"3.0": measures(0.9), "1.0": measures(0.7), "unstated": measures(0.1)}}
    (chart,) = over_guidance(Results(models), Comparison("base", "base", "1.0", ["1.0", "3.0"]))
    assert [point[:2] for point in chart.lines[0].points] == [(1, 0.7), (3, 0.9)]


def test_curves_are_of_the_distance_to_a_target_and_end_at_what_one_class_alone_has(capsys):
    figure = made_up_measures(0.4, interval=(0.3, 0.5), floor=0.05)
    distance = {"fairness_discrepancy": replace(figure.bias_estimate, value=0.0)}
    first = replace(figure.first, overall=figure.first.overall | distance)
    figure = replace(figure, attributes={"background": first})
    models = {"base": {"1.0": figure, "3.0": figure}}
    alone = Comparison("base", "base", "1.0", ["1.0", "3.0"])
    (chart,) = over_guidance(Results(models, target={"land": 0.1, "water": 0.9}), alone)
    assert chart.title == "Distance to the target: 0 is on target, 1.3 is farthest"
    print_results(Results(models, target={"land": 0.1, "water": 0.9}))
    assert "0.000" in (printed := capsys.readouterr().out)
    assert "0.400" not in printed  # Bias
    assert [point[1] for point in chart.lines[0].points] == [0, 0]
    three = replace(first, counts={"a photo": {"a": 1, "b": 2, "c": 0}})
    models = {"base": dict.fromkeys(("1.0", "3.0"), replace(figure, attributes={"kind": three}))}
    (chart,) = over_guidance(Results(models), alone)
    assert (chart.title, chart.top) == ("Bias: 0 is even, 0.67 is always the same class", pytest.approx(2 / 3))
