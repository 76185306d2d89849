"""Pictures of a sweep: rows become series, and series pictures."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from invdiff.errors import EvaluationError
from invdiff.report import sweep_pictures
from invdiff.report.charts import BASE_COLOUR, Point
from invdiff.report.sweep_pictures import non_dominated, save_sweep_pictures, sweep_series

FRECHET = "Frechet distance (birds-annotator)"
NOT_FOUND = "no hidden group was found"
HOSTILE = ("$x^2$ {a} <b>", "鳥の写真 🦜", "line\nbreak\x00", "nospaces" * 200, "\\frac{1}{0}", " ", "%s %d")


def row(model: str, bias: float | None, **values: Any) -> dict[str, Any]:
    figures = {"bias": bias, "bias_low": None, "bias_high": None, "bias_floor": 0.04, "note": ""}
    if bias is not None:
        figures |= {"bias_low": bias - 0.03, "bias_high": bias + 0.05}
    return {"model": model} | figures | values


def sweep(axes: str, *rows: dict[str, Any]) -> dict[str, Any]:
    names = axes.split()
    return {"axes": names, "rows": [dict.fromkeys(names) | one for one in rows]}


def guidance_sweep() -> dict[str, Any]:
    """Two modes, two guidance scales, two seeds."""
    rows = [row("base", 0.6, guidance_scale=1), row("base", 0.8, guidance_scale=5)]
    rows += [
        row("guided", bias + 0.02 * seed, mode=mode, guidance_scale=scale, seed=seed)
        for mode, low in (("balanced", 0.1), ("invariant", 0.2))
        for scale, bias in ((5, low + 0.1), (1, low))
        for seed in (0, 1)
    ]
    return sweep("mode guidance_scale seed", *rows)


def scale_sweep() -> dict[str, Any]:
    rows = [
        row("guided", bias, scale=scale, **{FRECHET: q})
        for scale, bias, q in ((1, 0.1, 7), (2, 0.3, 9), (0.5, 0.4, 6))
    ]
    return sweep("scale", row("base", 0.7, **{FRECHET: 8}), *rows)


def groups_sweep(axis: str = "num_groups") -> dict[str, Any]:
    rows = [
        row(
            "guided",
            0.1,
            mode=mode,
            group_auroc=0.9 + place / 100,
            group_adjusted_rand=0.5,
            group_homogeneity=0.6,
            audit_seconds=10.0 * (place + 1),
            train_seconds=seconds,
            **{axis: value},
        )
        for mode, seconds in (("balanced", 50.0), ("invariant", 70.0))
        for place, value in enumerate((2, 4, 8))
    ]
    return sweep(f"{axis} mode", row("base", 0.7), *rows)


@pytest.fixture
def paths_drawn(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What each picture of paths was asked to draw."""
    asked: list[dict[str, Any]] = []
    original = sweep_pictures.save_paths

    def save_paths(path: Path, paths: Any, **options: Any) -> Path:
        asked.append({"paths": paths} | options)
        return original(path, paths, **options)

    monkeypatch.setattr(sweep_pictures, "save_paths", save_paths)
    return asked


def names(paths: list[Path]) -> list[str]:
    for path in paths:
        with Image.open(path) as image:
            assert image.format == "PNG"
            assert image.width == 1400
    return [path.name for path in paths]


# Rows become series


def test_seeds_are_averaged_and_bars_are_their_range() -> None:
    _, balanced, _ = sweep_series(guidance_sweep(), over="guidance_scale")
    assert [point.x for point in balanced.points] == [1, 5]
    assert [point.y for point in balanced.points] == pytest.approx([0.11, 0.21])
    assert [point.low for point in balanced.points] == pytest.approx([0.1, 0.2])
    assert [point.high for point in balanced.points] == pytest.approx([0.12, 0.22])


def test_a_single_run_keeps_its_interval() -> None:
    base = sweep_series(guidance_sweep(), over="guidance_scale")[0]
    assert base.points == (Point(1, 0.6, 0.6 - 0.03, 0.6 + 0.05), Point(5, 0.8, 0.8 - 0.03, 0.8 + 0.05))


def test_labels_say_only_what_differs() -> None:
    document = guidance_sweep()
    assert [one.name for one in sweep_series(document, over="guidance_scale")] == [
        "Base model",
        "balanced",
        "invariant",
    ]
    document = sweep(
        "guidance_scale mode", *[one for one in document["rows"] if one["seed"] == 0 or one["mode"] is None]
    )
    document["rows"] = [one for one in document["rows"] if one["mode"] != "invariant"]
    assert [one.name for one in sweep_series(document, over="guidance_scale")] == ["Base model", "With guidance"]


def test_every_combination_is_a_series_beside_its_own_base_model() -> None:
    rows = [row("base", 0.5 + scale / 10, guidance_scale=scale) for scale in (1, 3)]
    rows += [
        row("guided", 0.1, mode=mode, guidance_scale=scale, penalty=penalty)
        for mode in ("balanced", "invariant")
        for scale in (1, 3)
        for penalty in (0, 10)
    ]
    series = sweep_series(sweep("mode guidance_scale penalty", *rows), over="penalty")
    assert [one.name for one in series] == [
        "Base model · guidance scale 1",
        "balanced · guidance scale 1",
        "Base model · guidance scale 3",
        "balanced · guidance scale 3",
        "invariant · guidance scale 1",
        "invariant · guidance scale 3",
    ]
    assert [one.drawn for one in series[::2]][:2] == [[(0, 0.6), (10, 0.6)], [(0, 0.8), (10, 0.8)]]


def test_a_base_model_that_the_axis_does_not_concern_is_a_level() -> None:
    base, guided = sweep_series(
        sweep("penalty", row("base", 0.7), row("guided", 0.3, penalty=0.1), row("guided", 0.2, penalty=10)),
        over="penalty",
    )
    assert base.level
    assert base.colour == BASE_COLOUR
    assert base.drawn == [(0.1, 0.7), (10, 0.7)]
    assert not guided.level
    assert guided.drawn == [(0.1, 0.3), (10, 0.2)]


def test_the_base_model_is_scale_zero() -> None:
    base, guided = sweep_series(scale_sweep(), over="scale")
    assert base.drawn == [(0, 0.7), (0.5, 0.7), (1, 0.7), (2, 0.7)]
    assert guided.drawn == [(0, 0.7), (0.5, 0.4), (1, 0.1), (2, 0.3)]
    assert guided.points[0].low is None


def test_a_base_model_whose_row_says_scale_zero_is_the_same() -> None:
    document = scale_sweep()
    document["rows"][0]["scale"] = 0
    assert sweep_series(document, over="scale") == sweep_series(scale_sweep(), over="scale")


def test_a_measured_scale_zero_is_kept() -> None:
    document = scale_sweep()
    document["rows"].append(row("guided", 0.66, scale=0))
    assert sweep_series(document, over="scale")[1].drawn[0] == (0, 0.66)


def test_a_missing_figure_is_a_gap() -> None:
    document = sweep("scale", *(row("guided", bias, scale=scale) for scale, bias in ((1, 0.2), (2, None), (3, 0.1))))
    (guided,) = sweep_series(document, over="scale")
    assert [point.y for point in guided.points] == [0.2, None, 0.1]


def test_a_missing_seed_leaves_the_mean_of_the_others() -> None:
    document = guidance_sweep()
    document["rows"][2].update(bias=None)  # seed 0 of balanced at 5
    balanced = sweep_series(document, over="guidance_scale")[1]
    assert balanced.points[1] == Point(5, 0.22, pytest.approx(0.19), pytest.approx(0.27))


def test_any_figure_can_be_asked_for() -> None:
    base, guided = sweep_series(scale_sweep(), over="scale", figure=FRECHET)
    assert base.drawn[0] == (0, 8)
    assert guided.drawn == [(0, 8), (0.5, 6), (1, 7), (2, 9)]


def test_averages_agree_with_numpy() -> None:
    generator = np.random.default_rng(0)
    table = generator.uniform(size=(4, 5))
    rows = [
        row("guided", float(table[place, seed]), omega=place / 10, seed=seed)
        for seed in range(5)
        for place in range(4)
    ]
    (guided,) = sweep_series(sweep("seed omega", *rows), over="omega")
    np.testing.assert_allclose([point.y for point in guided.points], table.mean(axis=1))
    np.testing.assert_allclose([point.low for point in guided.points], table.min(axis=1))
    np.testing.assert_allclose([point.high for point in guided.points], table.max(axis=1))


def test_seeds_of_data_and_training_are_averaged_together(tmp_path: Path, written: list[str]) -> None:
    rows = [
        row("guided", seed / 10 + data, omega=1, seed=seed, data_seed=data) for seed in (1, 2) for data in (0, 0.5)
    ]
    rows[3].update(bias=None, note="broken")
    document = sweep("data_seed seed omega", *rows)
    (guided,) = sweep_series(document, over="omega")
    assert guided.points == (Point(1, pytest.approx((0.1 + 0.6 + 0.2) / 3), 0.1, 0.6),)
    assert names(save_sweep_pictures(tmp_path, document)) == ["bias_over_omega.png"]
    assert "Not measured at 1 with seed 2, 0.5 (With guidance): broken" in written


def test_a_plain_row_listed_for_every_run_is_one_run() -> None:
    document = guidance_sweep()
    document["rows"] += copy.deepcopy(document["rows"][:2])
    assert sweep_series(document, over="guidance_scale") == sweep_series(guidance_sweep(), over="guidance_scale")


# What is drawn


@pytest.mark.parametrize("seed", range(5))
def test_points_that_nothing_beats_are_found_as_by_brute_force(seed: int) -> None:
    points = np.random.default_rng(seed).integers(0, 6, (30, 2)).tolist()
    beaten = [any(o[0] <= p[0] and o[1] <= p[1] and o != p for o in points) for p in points]
    assert non_dominated(points).tolist() == [not one for one in beaten]


def test_equal_points_do_not_beat_each_other() -> None:
    assert non_dominated([(1, 1), (1, 1), (1, 2)]).tolist() == [True, True, False]
    assert non_dominated([]).tolist() == []


def test_each_axis_has_the_pictures_it_calls_for(tmp_path: Path) -> None:
    assert names(save_sweep_pictures(tmp_path, guidance_sweep())) == ["bias_over_guidance_scale.png"]
    assert names(save_sweep_pictures(tmp_path, scale_sweep())) == ["bias_over_scale.png", "pareto.png"]
    assert names(save_sweep_pictures(tmp_path, groups_sweep())) == ["groups_over_num_groups.png"]
    found = names(save_sweep_pictures(tmp_path, groups_sweep("omega")))
    assert found == ["bias_over_omega.png", "groups_over_omega.png"]


def test_several_numeric_axes_have_a_picture_each(tmp_path: Path) -> None:
    rows = [row("guided", 0.1, steps=steps, width=width) for steps in (10, 50) for width in (32, 64)]
    found = names(save_sweep_pictures(tmp_path, sweep("steps width", *rows)))
    assert found == ["bias_over_steps.png", "bias_over_width.png"]


def test_names_and_seeds_alone_call_for_no_picture(tmp_path: Path) -> None:
    document = sweep("mode seed", row("base", 0.7), row("guided", 0.1, mode="balanced", seed=1))
    assert save_sweep_pictures(tmp_path, document) == []


def test_bias_over_num_groups_needs_no_truth(tmp_path: Path, written: list[str]) -> None:
    document = sweep("num_groups", *(row("guided", 0.1, num_groups=count) for count in (2, 4)))
    assert names(save_sweep_pictures(tmp_path, document)) == ["groups_over_num_groups.png"]
    assert "Cost in seconds" not in written


def test_values_over_decades_are_spaced_evenly(tmp_path: Path, written: list[str]) -> None:
    document = sweep("penalty", *(row("guided", 0.1, penalty=penalty) for penalty in (0, 0.1, 1, 10)))
    save_sweep_pictures(tmp_path, document)
    assert "penalty λ, evenly spaced" in written


def test_values_of_one_size_are_spaced_by_size(tmp_path: Path, written: list[str]) -> None:
    save_sweep_pictures(tmp_path, sweep("steps", *(row("guided", 0.1, steps=steps) for steps in range(1, 41))))
    assert "steps" in written


def test_groups_of_one_audit_are_drawn_once(tmp_path: Path, written: list[str]) -> None:
    save_sweep_pictures(tmp_path, groups_sweep())
    figures = {"AUROC", "adjusted Rand", "homogeneity", "audit", "training · balanced", "training · invariant"}
    assert figures | {"Base model", "balanced", "invariant", "Cost in seconds"} <= set(written)


def test_pareto_draws_quality_against_bias(tmp_path: Path, paths_drawn: list[dict[str, Any]]) -> None:
    save_sweep_pictures(tmp_path, scale_sweep())
    (asked,) = paths_drawn
    base, guided = asked["paths"]
    assert base.drawn == [(8, 0.7)]
    assert guided.drawn == [(8, 0.7), (6, 0.4), (7, 0.1), (9, 0.3)]
    assert [list(labels) for labels in asked["labels"]] == [["base"], ["0", "0.5", "1", "2"]]
    assert asked["filled"] == [[False], [False, True, True, False]]
    assert asked["floors"] == [0.04]


def test_pareto_leaves_out_what_lacks_a_figure(
    tmp_path: Path, paths_drawn: list[dict[str, Any]], written: list[str]
) -> None:
    document = scale_sweep()
    document["rows"][1].update({FRECHET: None, "note": "too few images"})
    save_sweep_pictures(tmp_path, document)
    assert paths_drawn[0]["paths"][1].drawn == [(8, 0.7), (6, 0.4), (9, 0.3)]
    assert "Not measured at 1 (With guidance): too few images" in written


def test_without_a_frechet_distance_there_is_no_pareto(tmp_path: Path) -> None:
    document = scale_sweep()
    document["rows"] = [{name: value for name, value in one.items() if name != FRECHET} for one in document["rows"]]
    assert names(save_sweep_pictures(tmp_path, document)) == ["bias_over_scale.png"]


def test_gaps_are_told_with_their_reason(tmp_path: Path, written: list[str]) -> None:
    document = guidance_sweep()
    for one in document["rows"]:
        if one["guidance_scale"] == 5 and one["model"] == "guided":
            one.update(bias=None, bias_low=None, bias_high=None, note=NOT_FOUND)
    document["rows"][-1].update(bias=None, note="")
    document["rows"][0].update(bias=None, note="broken")
    save_sweep_pictures(tmp_path, document)
    assert f"Not measured at 5 (balanced, invariant): {NOT_FOUND}" in written
    assert "Not measured at 1 with seed 1 (invariant): no reason was recorded" in written
    assert "Not measured at 1 (Base model): broken" in written


def test_many_gaps_are_counted(tmp_path: Path, written: list[str]) -> None:
    rows = [row("guided", None, mode=f"m{index}", omega=1, note=f"reason {index}") for index in range(7)]
    save_sweep_pictures(tmp_path, sweep("mode omega", row("base", 0.7), *rows))
    assert sum(line.startswith("Not measured") for line in written) == 4
    assert "3 more gaps: see the sweep's table." in written


def test_at_most_eight_series_are_drawn_and_the_rest_counted(tmp_path: Path, written: list[str]) -> None:
    rows = [row("guided", 0.1, mode=f"m{index}", omega=omega) for index in range(10) for omega in (0.1, 0.2)]
    save_sweep_pictures(tmp_path, sweep("mode omega", row("base", 0.7), *rows))
    assert "m6" in written
    assert "m7" not in written
    assert "3 more lines of Bias not drawn: see the sweep's table." in written


def test_the_subtitle_says_what_bars_are(tmp_path: Path, written: list[str]) -> None:
    save_sweep_pictures(tmp_path, guidance_sweep())
    assert "Points: means of 2 seeds. Bars: their range, or the interval of a single run." in " ".join(written)
    written.clear()
    save_sweep_pictures(tmp_path, scale_sweep())
    assert "Bars: the interval of a single run. Base model: scale 0, the flat line." in " ".join(written)


def test_single_points_are_drawn(tmp_path: Path) -> None:
    quality = {FRECHET: 5.0}
    document = sweep("scale penalty", row("base", 0.7, **quality), row("guided", 0.1, scale=1, penalty=0, **quality))
    assert len(save_sweep_pictures(tmp_path, document)) == 3


def test_a_floor_where_nothing_was_drawn_is_no_obstacle(tmp_path: Path) -> None:
    rows = [row("guided", 0.1, mode="a", omega=0.1), row("guided", None, mode="b", omega=0.9, note="x")]
    assert len(save_sweep_pictures(tmp_path, sweep("mode omega", *rows))) == 1


def test_hostile_names_and_notes_are_text(tmp_path: Path, written: list[str]) -> None:
    rows = [row("guided", 0.1, mode=name, omega=0.1) for name in HOSTILE]
    rows += [row("guided", None, mode=name, omega=0.2, note=name) for name in HOSTILE]
    assert len(save_sweep_pictures(tmp_path, sweep("mode omega", *rows))) == 1
    assert "$x^2$ {a} <b>" in written
    assert "Not measured at 0.2 ($x^2$ {a} <b>): $x^2$ {a} <b>" in written


def test_the_same_sweep_gives_the_same_files(tmp_path: Path) -> None:
    first, second = (save_sweep_pictures(tmp_path / name, scale_sweep()) for name in "ab")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


# What is refused


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({}, "Expected axes as a list of names, got None"),
        ([], "Expected axes"),
        ({"axes": "scale", "rows": [row("base", 0.1)]}, "Expected axes"),
        ({"axes": ["../up"], "rows": [row("base", 0.1)]}, r"got \['../up'\]"),
        ({"axes": ["scale"], "rows": []}, "Expected rows"),
        ({"axes": ["scale"]}, "Expected rows"),
        (sweep("scale", row("other", 0.1)), "'base' or 'guided'"),
        ({"axes": ["scale"], "rows": [3]}, "'base' or 'guided'"),
        (sweep("scale", row("guided", float("nan"), scale=1)), "finite number or null for 'bias', got nan"),
        (sweep("scale", row("guided", 0.1, scale=float("inf"))), "finite number or null for 'scale', got inf"),
        (sweep("scale", row("guided", 0.1, scale=1) | {"bias": "low"}), "for 'bias', got 'low'"),
        (sweep("scale", row("guided", 0.1, scale=[1])), r"for the axis 'scale', got \[1\]"),
        (sweep("scale", row("guided", 0.1, scale=1), row("guided", 0.2, scale=1)), "scale 1, got two that disagree"),
        (sweep("omega", row("guided", 0.1, omega=1), row("guided", 0.2)), "got a row with omega None"),
        (sweep("omega", row("base", 0.1, omega=1), row("base", 0.2)), "in all rows or in none of 'Base model'"),
    ],
)
def test_what_is_no_sweep_is_refused(document: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=message):
        save_sweep_pictures(tmp_path, document)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("axes", ["scale", "num_groups", "omega", "mode"])
def test_a_sweep_without_any_figure_is_refused_with_its_notes(axes: str, tmp_path: Path) -> None:
    document = sweep(axes, row("base", None, note="no images"), row("guided", None, note=NOT_FOUND, **{axes: 1}))
    if axes == "mode":
        document["rows"][1]["mode"] = "balanced"
    with pytest.raises(EvaluationError, match=rf"at least one measured figure.*\({NOT_FOUND}; no images\)"):
        save_sweep_pictures(tmp_path, document)


@pytest.mark.parametrize("axis", ["mode", "absent"])
def test_series_over_no_numeric_axis_are_refused(axis: str) -> None:
    with pytest.raises(EvaluationError, match=f"Expected a numeric axis among .*, got '{axis}'"):
        sweep_series(guidance_sweep(), over=axis)
