"""Lines over the guidance scale and over the module's: which models belong to one, and what they show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from invdiff.evaluation.results import AttributeMeasures, Estimate, Measures, Quantity, Results
from invdiff.report.charts import BASE_COLOUR, save_line_charts
from invdiff.report.comparison import Comparison, choose
from invdiff.report.curves import ModuleLine, module_lines, over_guidance, over_module_scale
from invdiff.report.sources import Generated
from test_pictures import HOSTILE, size


def measures(bias: float, *, accuracy: float | None = None, frechet: float | None = None) -> Measures:
    of_bias = Estimate(value=bias, low=bias - 0.1, high=bias + 0.1, floor=0.05)
    spread = AttributeMeasures({}, {"bias": of_bias})
    return Measures(
        10,
        {"background": spread},
        subject_accuracy=None if accuracy is None else Quantity(accuracy, 0.8, 1.0),
        quality={} if frechet is None else {"Frechet distance (net)": Quantity(frechet)},
    )


def results(biases: dict[str, float], scales: dict[str, float]) -> Results:
    return Results({name: {"3.0": measures(bias)} for name, bias in biases.items()}, module_scales=scales)


def lines(measured: Results, images: dict[str, Generated] | None = None) -> dict[str, dict[float, float]]:
    """Name of a module to Delta to Bias."""
    found = module_lines(measured, images or {}, choose(measured))
    return {line.name: {scale: entry.bias for scale, entry in line.measures.items()} for line in found}


def drawn(module: str, **settings: Any) -> Generated:
    return Generated([], ["folder"], [{"module": module} | settings])


def test_a_module_at_two_strengths_is_a_line_that_begins_at_the_base_model() -> None:
    measured = results(
        {"base": 0.9, "guided-1": 0.1, "guided-0.5": 0.4}, {"base": 0.0, "guided-1": 1.0, "guided-0.5": 0.5}
    )
    assert lines(measured) == {"With guidance": {0.0: 0.9, 0.5: 0.4, 1.0: 0.1}}


def test_without_a_model_at_0_a_line_begins_where_it_was_measured() -> None:
    measured = results({"theirs": 0.8, "ours-0.5": 0.4, "ours-1": 0.1}, {"ours-0.5": 0.5, "ours-1": 1.0})
    assert lines(measured) == {"ours": {0.5: 0.4, 1.0: 0.1}}


def test_one_strength_is_no_line() -> None:
    assert lines(results({"base": 0.9, "guided": 0.1}, {"base": 0.0, "guided": 1.0})) == {}
    assert lines(results({"base": 0.9, "guided": 0.1, "more": 0.2}, {})) == {}


def test_the_compared_model_comes_before_other_plain_ones() -> None:
    biases = {"plain": 0.7, "base": 0.9, "m 1": 0.1, "m 2": 0.2}
    assert lines(results(biases, {"plain": 0, "base": 0, "m 1": 1, "m 2": 2}))["m"][0.0] == 0.9


@pytest.mark.parametrize(
    ("names", "stem"),
    [
        (("m-0.5", "m-1"), "m"),
        (("m", "m-0.5"), "m"),
        (("m_scale_0.5", "m_scale_1"), "m"),
        (("m-delta-0.5", "m delta=1.0"), "m"),
        (("run-1", "run-2"), None),  # numbers that are not the strengths
        (("balanced", "invariant"), None),
        (("0.5", "1"), None),
    ],
)
def test_names_tell_which_models_are_of_one_module(names: tuple[str, str], stem: str | None) -> None:
    scales = dict(zip(names, sorted((0.5, 1.0), reverse=names == ("m", "m-0.5")), strict=True))
    found = lines(results(dict.fromkeys(names, 0.2), scales))
    assert list(found) == ([] if stem is None else [stem])


def test_settings_of_the_images_tell_it_better_than_names() -> None:
    measured = results(dict.fromkeys(("weak", "strong", "other"), 0.2), {"weak": 0.5, "strong": 1, "other": 2})
    images = {"weak": drawn("a"), "strong": drawn("a"), "other": drawn("b")}
    assert lines(measured, images) == {"weak": {0.5: 0.2, 1.0: 0.2}}
    images["strong"] = drawn("a", environments=[[0.9, 0.1]])
    assert lines(measured, images) == {}


def test_a_strength_measured_twice_makes_no_line() -> None:
    measured = results(dict.fromkeys(("a", "b", "c"), 0.2), {"a": 0.5, "b": 1, "c": 1})
    assert lines(measured, {name: drawn("same") for name in "abc"}) == {}


def test_modules_of_one_name_are_told_apart() -> None:
    scales = {"m-0.5": 0.5, "m-1": 1.0, "m-2": 2.0, "m-3": 3.0}
    images = {name: drawn("a" if scale <= 1 else "b") for name, scale in scales.items()}
    assert list(lines(results(dict.fromkeys(scales, 0.2), scales), images)) == ["m-0.5", "m-2"]


def test_every_figure_has_its_curve_with_gaps_where_it_is_missing() -> None:
    line = {0.0: measures(0.9, accuracy=0.9), 0.5: measures(0.4, frechet=3.0), 1.0: measures(0.1, accuracy=0.8)}
    curves = over_module_scale([ModuleLine("ours", line)], "3.0")
    assert [curve.panel.y_name for curve in curves] == ["Bias", "subject right", "Fréchet distance"]
    assert [[point.y for point in curve.panel.series[0].points] for curve in curves] == [
        [0.9, 0.4, 0.1],
        [0.9, None, 0.8],
        [None, 3.0, None],
    ]
    assert curves[0].alt == "Bias over the module's scale. ours: 0.90 at 0, 0.40 at 0.5, 0.10 at 1."
    assert "At guidance scale 3; 0 is the base model" in curves[0].caption
    assert [len(curve.panel.floors) for curve in curves] == [1, 0, 0]


def test_every_model_has_its_line_over_the_guidance_scale() -> None:
    models = {
        "guided": {"1.0": measures(0.1), "3.0": measures(0.2), "unstated": measures(0.9)},
        "base": {"1.0": measures(0.7), "3.0": measures(0.9)},
    }
    found = Results(models)
    (curve,) = over_guidance(found, ["base", "guided"], choose(found))
    assert (
        curve.alt == "Bias over guidance scale. Base model: 0.70 at 1, 0.90 at 3. With guidance: 0.10 at 1, 0.20 at 3."
    )
    assert [line.colour == BASE_COLOUR for line in curve.panel.series] == [True, False]
    single = Results({"base": {"3.0": measures(0.7)}, "guided": {"3.0": measures(0.1)}})
    assert over_guidance(single, ["base", "guided"], choose(single)) == []


def test_hostile_names_are_drawn(tmp_path: Path) -> None:
    names = [*HOSTILE, "-" * 10_000 + "1", "base"]
    found = Results({name: {"1.0": measures(0.5), "3.0": measures(0.5)} for name in names})
    (curve,) = over_guidance(found, names, Comparison("base", HOSTILE[0], "1.0", ("1.0", "3.0")))
    panel = curve.panel
    path = save_line_charts(tmp_path / "x.png", [panel], title="$Title$", subtitle="", x_name=curve.x_name)
    assert size(path)[0] == 1400
    measured = results(dict.fromkeys(names, 0.5), {name: 1.0 + place for place, name in enumerate(names)})
    assert lines(measured) == {}
