"""Line charts: what is drawn, where names stand, and gaps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.isotonic import IsotonicRegression

from invdiff.errors import EvaluationError
from invdiff.report import charts
from invdiff.report.charts import (
    MARKERS,
    SERIES_COLOURS,
    Area,
    Panel,
    Point,
    Series,
    apart,
    distinct_floors,
    line_chart,
    nice_ticks,
    numbered_series,
    save_line_charts,
    save_paths,
    without_collisions,
)
from invdiff.report.style import Sheet

AREA = Area(120, 100, 800, 400)
HOSTILE = (
    "$x^2$ {a} <b>",
    "鳥の写真 🦜",
    "line\nbreak\x00",
    "nospaces" * 200,
    "\\frac{1}{0}",
    " ",
    "%s %d",
    "é\u0301" * 90,
)


def make(
    index: int, y: list[float | None], *, bars: float = 0.0, x: list[float] | None = None, name: str = ""
) -> Series:
    x = x or [float(place) for place in range(1, len(y) + 1)]
    ends = [(None, None) if value is None or not bars else (value - bars, value + bars) for value in y]
    points = tuple(Point(at, value, *end) for at, value, end in zip(x, y, ends, strict=True))
    return numbered_series(index, name or f"series {index}", points)


def draw(series: list[Series], *, even: bool = False, **panel: Any) -> Any:
    """Draw one panel; return its axes."""
    sheet = Sheet(1400, 600)
    x_values = sorted({point.x for one in series for point in one.points})
    line_chart(sheet, AREA, Panel("y", series, **panel), x_values=x_values, even=even)
    return sheet.figure.axes[0]


def lines_of(axes: Any, colour: str) -> list[tuple[list[float], list[float]]]:
    """Every line of a colour, without its markers, as x and y."""
    chosen = [line for line in axes.lines if line.get_color() == colour and line.get_linestyle() != "None"]
    return [(list(map(float, line.get_xdata())), list(map(float, line.get_ydata()))) for line in chosen]


def save(path: Path, *panels: Panel, **options: Any) -> Path:
    words = {"title": "Title?", "subtitle": "How to read it", "x_name": "x"}
    return save_line_charts(path, panels, **(words | options))


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return image.size


def test_a_lone_line_is_drawn_through_its_figures() -> None:
    axes = draw([make(0, [0.2, 0.7, 0.4], x=[1.0, 3.0, 7.5])])
    assert lines_of(axes, SERIES_COLOURS[0]) == [([1.0, 3.0, 7.5], [0.2, 0.7, 0.4])]


def test_lines_stand_side_by_side_around_their_x() -> None:
    axes = draw([make(0, [0.2, 0.2]), make(1, [0.2, 0.2])])
    left, right = (lines_of(axes, SERIES_COLOURS[index])[0][0] for index in range(2))
    np.testing.assert_allclose(np.add(left, right) / 2, [1, 2])
    assert 0 < right[0] - left[0] < 0.05


def test_evenly_spaced_values_stand_at_their_ranks() -> None:
    axes = draw([make(0, [0.1, 0.2, 0.3, 0.4], x=[0, 0.1, 1, 10])], even=True)
    assert lines_of(axes, SERIES_COLOURS[0])[0][0] == [0, 1, 2, 3]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "0.1", "1", "10"]


def test_a_missing_figure_leaves_a_gap() -> None:
    axes = draw([make(0, [0.1, 0.2, None, 0.4, 0.5])])
    assert lines_of(axes, SERIES_COLOURS[0]) == [([1, 2], [0.1, 0.2]), ([4, 5], [0.4, 0.5])]


def test_bars_run_from_low_to_high() -> None:
    axes = draw([make(0, [0.5, None, 0.75], bars=0.25)])
    ends = [bar.get_segments()[0][:, 1].tolist() for bar in axes.collections]
    assert ends == [[0.25, 0.75], [0.5, 1.0]]


def test_all_bars_and_floors_are_within_the_axes() -> None:
    series = [make(index, [-0.2, 1.3], bars=0.2) for index in range(8)]
    axes = draw(series, floors=[[(1.0, 1.9)]])
    low, high = axes.get_ylim()
    assert low <= -0.4
    assert high >= 1.9
    xs = [segment[0, 0] for bar in axes.collections for segment in bar.get_segments()]
    left, right = axes.get_xlim()
    pixel = (right - left) / AREA.width
    assert left + 5 * pixel < min(xs)
    assert max(xs) < right - 5 * pixel


def test_a_level_crosses_the_whole_plot() -> None:
    points = tuple(Point(x, 0.6, 0.5, 0.7) for x in (1.0, 2.0))
    axes = draw([Series("base", points, "#6f7b8a", level=True), make(0, [0.1, 0.2])])
    (x, y) = lines_of(axes, "#6f7b8a")[0]
    assert (x, y) == ([0, 1], [0.6, 0.6])  # of the width of the axes
    assert axes.patches[0].get_y() == pytest.approx(0.5)
    assert axes.patches[0].get_height() == pytest.approx(0.2)


def test_floors_are_dotted_to_both_edges() -> None:
    axes = draw([make(0, [0.5, 0.5])], floors=[[(1.0, 0.1), (2.0, 0.2)]])
    (floor,) = [line for line in axes.lines if line.is_dashed()]
    left, right = axes.get_xlim()
    assert list(floor.get_xdata()) == [left, 1, 2, right]
    assert list(floor.get_ydata()) == [0.1, 0.1, 0.2, 0.2]


@pytest.mark.parametrize("count", range(1, 9))
def test_one_to_eight_series_are_drawn(count: int, tmp_path: Path) -> None:
    series = [make(index, [0.5, 0.5, 0.5], bars=0.1) for index in range(count)]
    assert size(save(tmp_path / "x.png", Panel("y", series))) == (1400, 814)


def test_eight_series_differ_in_colour_and_in_marker() -> None:
    series = [make(index, [0.5]) for index in range(8)]
    assert len({one.colour for one in series}) == len({one.marker for one in series}) == len(MARKERS) == 8


def test_a_single_point_is_drawn(tmp_path: Path) -> None:
    assert size(save(tmp_path / "x.png", Panel("y", [make(0, [0.0])]))) == (1400, 814)


def test_panels_share_one_x_axis(tmp_path: Path, written: list[str]) -> None:
    panels = [Panel("upper", [make(0, [0.5, 0.6])]), Panel("lower", [make(1, [5.0, 6.0])])]
    assert size(save(tmp_path / "x.png", *panels, x_name="groups", even=True)) == (1400, 878)
    assert {"upper", "lower", "series 0", "series 1"} <= set(written)
    assert written.count("groups, evenly spaced") == 1


def test_notes_and_floors_are_told_below(tmp_path: Path, written: list[str]) -> None:
    panel = Panel("y", [make(0, [0.5])], floors=[[(1.0, 0.1)]])
    assert size(save(tmp_path / "x.png", panel, notes=["first", "second"])) == (1400, 916)
    assert {"first", "second", "what a perfectly fair sampler would show on as many images"} <= set(written)


def test_hostile_names_are_text_and_fit(tmp_path: Path, written: list[str]) -> None:
    series = [make(index, [0.5], name=name) for index, name in enumerate(HOSTILE)]
    path = save(tmp_path / "x.png", Panel(HOSTILE[0], series), title=HOSTILE[3], subtitle=HOSTILE[3], notes=HOSTILE)
    assert "$x^2$ {a} <b>" in written
    assert any(line.startswith("nospaces") and line.endswith("…") for line in written)
    with Image.open(path) as image:
        edge = np.asarray(image.convert("RGB"))[:, -40:]
    assert (edge == 255).all()


def test_the_same_chart_is_the_same_file(tmp_path: Path) -> None:
    panel = Panel("y", [make(0, [0.5, 0.1], bars=0.1)])
    first, second = (save(tmp_path / name, panel).read_bytes() for name in ("a.png", "b.png"))
    assert first == second


@pytest.mark.parametrize("series", [[], [make(0, [None, None])]])
def test_nothing_to_draw_is_refused(series: list[Series], tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="at least one figure to draw"):
        save(tmp_path / "x.png", Panel("y", series))


@pytest.mark.parametrize(
    "point",
    [Point(1, float("nan")), Point(1, float("inf")), Point(1, 0.5, float("nan"), 1.0), Point(float("nan"), 0.5)],
)
def test_figures_that_are_not_finite_are_refused(point: Point, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="Expected finite figures of 'a'"):
        save(tmp_path / "x.png", Panel("y", [numbered_series(0, "a", (point,))]))


# Paths


def paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, series: list[Series], **options: Any) -> Any:
    """Save paths; return the axes."""
    sheets: list[Sheet] = []
    original = Sheet.save
    monkeypatch.setattr(Sheet, "save", lambda self, path: sheets.append(self) or original(self, path))
    words = {"title": "T", "subtitle": "S", "x_name": "x", "y_name": "y"}
    labels = [[str(place) for place in range(len(one.points))] for one in series]
    filled = [[place == 0 for place in range(len(one.points))] for one in series]
    save_paths(tmp_path / "x.png", series, **(words | {"labels": labels, "filled": filled} | options))
    assert size(tmp_path / "x.png")[0] == 1400
    return sheets[0].figure.axes[0]


def test_a_path_goes_through_its_points_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    axes = paths(tmp_path, monkeypatch, [make(0, [0.8, 0.2, 0.4], x=[9, 5, 7])])
    assert lines_of(axes, SERIES_COLOURS[0]) == [([9, 5, 7], [0.8, 0.2, 0.4])]


def test_points_are_filled_as_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    axes = paths(tmp_path, monkeypatch, [make(0, [0.8, 0.2])], filled=[[False, True]], floors=[0.05])
    marks = [line for line in axes.lines if line.get_marker() == MARKERS[0]]
    inside = {float(mark.get_ydata()[0]): mark.get_markerfacecolor() for mark in marks}
    assert inside == {0.8: "white", 0.2: SERIES_COLOURS[0]}


def test_a_point_on_a_level_is_marked_and_labelled_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: list[str]
) -> None:
    base = Series("Base", (Point(9, 0.8),), "#6f7b8a", level=True)
    axes = paths(tmp_path, monkeypatch, [base, make(0, [0.8, 0.2], x=[9, 5])], labels=[["base"], ["zero", "one"]])
    marks = [line for line in axes.lines if line.get_linestyle() == "None"]
    assert len(marks) == 2
    assert {"base", "one"} <= set(written)
    assert "zero" not in written


def test_words_do_not_cover_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    placed: list[tuple[float, float, str]] = []
    original = Sheet.text

    def text(self: Sheet, x: float, y: float, text: str, **options: Any) -> None:
        if text.startswith("w"):
            placed.append((x, y, text))
        original(self, x, y, text, **options)

    monkeypatch.setattr(Sheet, "text", text)
    close = make(0, [0.5, 0.51, 0.52, 0.5], x=[5.0, 5.02, 5.04, 5.06])
    paths(tmp_path, monkeypatch, [close, make(1, [0.1], x=[9])], labels=[["w1", "w2", "w3", "w4"], ["w5"]])
    for place, (x, y, _) in enumerate(placed):
        for other_x, other_y, _ in placed[:place]:
            assert abs(x - other_x) > 20 or abs(y - other_y) > 14


def test_paths_without_a_point_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="at least one figure to draw"):
        save_paths(tmp_path / "x.png", [], labels=[], filled=[], title="", subtitle="", x_name="", y_name="")


# Where things stand


def test_names_are_moved_apart_and_keep_their_order() -> None:
    assert apart([0.0, 1.0], 0.5) == [0.0, 1.0]
    assert apart([0.5, 0.5], 0.2) == pytest.approx([0.4, 0.6])
    moved = apart([0.9, 0.05, 0.0, 0.1], 0.1)
    assert np.argsort(moved).tolist() == [2, 1, 3, 0]
    assert np.diff(np.sort(moved)).min() >= 0.1 - 1e-9


@pytest.mark.parametrize("seed", range(5))
def test_names_are_moved_as_little_as_least_squares_would(seed: int) -> None:
    values = np.random.default_rng(seed).uniform(size=8)
    order, steps = np.argsort(values), 0.1 * np.arange(8)
    expected = IsotonicRegression().fit_transform(steps, values[order] - steps) + steps
    np.testing.assert_allclose(np.array(apart(values.tolist(), 0.1))[order], expected)


@pytest.mark.parametrize("values", [[0.0] * 5, [9.0] * 5, [0.0, 0.1, 4.0, 9.9, 10.0]])
def test_names_stay_between_their_limits(values: list[float]) -> None:
    moved = np.sort(apart(values, 1.5, low=0.0, high=10.0))
    assert moved[0] >= 0
    assert moved[-1] <= 10
    assert np.diff(moved).min() >= 1.5 - 1e-9


@pytest.mark.parametrize("low", [-3.0, 0.0, 0.013, 99.0])
@pytest.mark.parametrize("width", [0.0, 1e-3, 0.7, 12345.0])
def test_ticks_enclose_what_is_drawn(low: float, width: float) -> None:
    found = nice_ticks(low, low + width)
    assert found[0] <= low
    assert found[-1] >= low + width
    assert 3 <= len(found) <= 8
    np.testing.assert_allclose(np.diff(found), found[1] - found[0])


def test_shares_have_their_usual_ticks() -> None:
    assert nice_ticks(0, 1) == [0, 0.25, 0.5, 0.75, 1]


def test_alike_floors_are_one_and_parts_are_left_out() -> None:
    whole = [(1.0, 0.1), (2.0, 0.2)]
    assert distinct_floors([[(1.0, 0.1)], whole, list(reversed(whole)), [(2.0, 0.20001)], []]) == [tuple(whole)]
    assert len(distinct_floors([whole, [(1.0, 0.3)]])) == 2
    assert distinct_floors([]) == []


@pytest.mark.parametrize("seed", range(5))
def test_labels_that_are_kept_do_not_touch(seed: int) -> None:
    generator = np.random.default_rng(seed)
    centres, widths = np.sort(generator.uniform(0, 500, 30)).tolist(), generator.uniform(5, 40, 30).tolist()
    kept = without_collisions(centres, widths, 3)
    assert kept[-1] == 29
    for left in kept:
        for right in kept:
            if left < right:
                assert centres[right] - centres[left] >= (widths[left] + widths[right]) / 2 + 3


def test_labels_with_room_are_all_kept() -> None:
    assert without_collisions([0, 50, 100], [20, 20, 20], 10) == [0, 1, 2]
    assert without_collisions([], [], 10) == []


def test_room_for_names_is_that_of_the_widest() -> None:
    assert charts.name_room(["a", "a longer name"]) == charts.name_room(["a longer name"]) > charts.name_room(["a"])
    assert charts.name_room(["nospaces" * 100]) <= 46 + 400
