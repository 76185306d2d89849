"""Charts, and pictures of audits and of comparisons: what is drawn, names beside lines, and hostile text."""

import base64
import io
from dataclasses import replace

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from invdiff.auditing.result import Audit
from invdiff.report import plots
from invdiff.report.compare import compare
from invdiff.report.grids import save_audit_picture, save_before_after, save_charts
from invdiff.report.plots import BASE_COLOUR, DARK, PAPER, SERIES_COLOURS, Chart, Line
from invdiff.report.read import find_parts, read_run, splits_of
from runs import HOSTILE, LAND, WATER, make_audit


def line(place, y, *, bar=np.nan, name=""):
    points = [(float(x), v, *((None, None) if v is None else (v - bar, v + bar))) for x, v in enumerate(y, start=1)]
    return Line(name or f"line {place}", points, place)


def axes_of(lines, **chart):
    """The axes of a chart."""
    with matplotlib.rc_context(plots.style()):
        axes = Figure(layout="constrained").add_subplot()
        plots.draw_chart(axes, Chart("y", "x", lines, **chart))
        axes.figure.draw_without_rendering()
    return axes


def image_of(uri):
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def colour_at_corner(uri):
    return f"#{bytes(image_of(uri).convert('RGB').getpixel((0, 0))).hex()}"  # type: ignore[arg-type]


def test_lines_go_through_their_figures_with_gaps_and_stand_side_by_side():
    axes = axes_of([line(None, [0.1, 0.2, None, 0.4]), line(0, [0.5, 0.6, 0.7, 0.8])])
    by_colour = {one.get_color(): one for one in axes.lines if len(one.get_xdata()) > 1}
    base, other = by_colour[BASE_COLOUR], by_colour[SERIES_COLOURS[0]]
    np.testing.assert_array_equal(base.get_ydata(), [0.1, 0.2, np.nan, 0.4])
    np.testing.assert_allclose((base.get_xdata() + other.get_xdata()) / 2, [1, 2, 3, 4])
    assert 0 < other.get_xdata()[0] - base.get_xdata()[0] < 0.1
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2", "3", "4"]


def test_intervals_and_floors_are_within_the_axes_and_lines_differ_in_colour_and_in_marker():
    lines, floors = [line(k, [-0.2, None, 1.3], bar=0.2) for k in range(8)], [[(1.0, 1.9), (3.0, 1.9)]] * 2
    axes = axes_of(lines, floors=floors, top=1)
    bars = [bar for bars in axes.collections for bar in bars.get_segments() if len(bar)]
    assert [bar[:, 1].tolist() for bar in bars[:2]] == [[-0.4, 0.0], pytest.approx([1.1, 1.5])]
    assert axes.get_ylim()[0] <= -0.4
    assert axes.get_ylim()[1] >= 1.9
    xs = [bar[0, 0] for bar in bars]
    assert axes.get_xlim()[0] < min(xs) < max(xs) < axes.get_xlim()[1]
    assert [one.get_ydata().tolist() for one in axes.lines if one.get_linestyle() == ":"] == [[1.9, 1.9]]
    for look in ("color", "marker"):
        assert len({getattr(one, f"get_{look}")() for one in axes.lines if len(one.get_xdata()) == 3}) == 8


@pytest.mark.parametrize("values", [[0.0] * 8, [1.0] * 8, [0.0, 0.01, 0.5, 0.51, 0.52, 0.99, 1.0, 1.0]])
def test_names_stand_apart_beside_the_axes(values):
    axes = axes_of([line(k, [0.5, value]) for k, value in enumerate(values)], top=1)
    heights = [text.get_position()[1] for text in axes.texts]
    assert np.diff(heights).min() > 0.08
    assert max(heights) <= axes.get_ylim()[1]


def test_charts_are_drawn_on_light_and_on_dark_paper_and_the_settings_of_matplotlib_stay():
    before = dict(matplotlib.rcParams)
    found = plots.plot_chart(Chart("y", "x", [line(0, [0.5, 0.5])]), "over x")
    assert dict(matplotlib.rcParams) == before
    assert [colour_at_corner(uri) for uri in (found.light, found.dark)] == [PAPER, DARK[PAPER]]
    assert found.alt == "y over x. line 0: 0.50 at 1, 0.50 at 2."
    pixels = np.asarray(image_of(found.dark).convert("RGB"))
    wanted = np.array(matplotlib.colors.to_rgb(SERIES_COLOURS[0])) * 255
    assert (np.abs(pixels - wanted).max(axis=2) < 2).any()


def test_hostile_names_are_drawn_as_text_and_the_same_chart_is_the_same_file(tmp_path):
    names = [*HOSTILE, "_hidden", "x" * 10_000]
    chart = Chart(HOSTILE[1], HOSTILE[0], [line(k, [0.5, 0.2], name=name) for k, name in enumerate(names)])
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path in paths:
        save_charts(path, [chart] * 2, title=HOSTILE[0])
    assert paths[0].read_bytes() == paths[1].read_bytes()
    with Image.open(paths[0]) as image:
        assert image.width == 1600
        assert (np.asarray(image.convert("RGB"))[:, -20:] == 255).all()


def test_a_histogram_shows_cuts_and_names_each_group_s_reach(tmp_path):
    make_audit(tmp_path)
    split = splits_of(Audit.load(tmp_path))[0]
    found = plots.histogram(split)
    assert found.alt.startswith("Histogram of the scores of 20 images: group 0 from -")
    assert f"parted at {split.cuts[0]:.2f}." in found.alt
    assert found.caption.startswith("Images, on a log scale, by score.")
    axes = Figure().add_subplot()
    plots.draw_histogram(axes, replace(split, cuts=[-99.0, 0.25, 99.0]), log_scale=True)
    assert [one.get_xdata()[0] for one in axes.lines] == [0.25]  # cuts outside are not drawn
    assert sum(patch.get_height() for patch in axes.patches) == 20


def test_small_images_are_kept_exactly_and_large_ones_are_made_small():
    small, large = (plots.thumb(Image.new("RGB", (side, side), (200, 40, 40)), "alt") for side in (96, 640))
    assert colour_at_corner(small.uri) == "#c82828"
    assert large.uri.startswith("data:image/jpeg")
    assert image_of(large.uri).size == (192, 192)


RED, BLUE = (200, 40, 40), (40, 40, 200)


def pixels(path):
    with Image.open(path) as image:
        assert (image.format, image.width) == ("PNG", 1600)
        return np.asarray(image.convert("RGB"))


def test_an_audit_is_drawn_with_its_images_by_name(tmp_path, drawn):
    data = make_audit(tmp_path, per_prompt=40, rare=5)
    path = save_audit_picture(tmp_path, data)
    assert path == tmp_path / "groups.png"
    assert all((pixels(path) == colour).all(axis=2).any() for colour in (RED, BLUE))
    of_prompt = ["group 0 · 88% · 35 images", "most typical", 8, "least certain", 8]
    of_prompt += ["group 1 · 12% · 5 images", "most typical", 5]
    for prompt in (LAND, WATER):
        start = drawn.index(f"“{prompt}”") - len(of_prompt)
        assert drawn[start : start + len(of_prompt)] == of_prompt
    first = path.read_bytes()
    shuffled = data.select(np.random.default_rng(0).permutation(len(data)))
    assert save_audit_picture(tmp_path, shuffled).read_bytes() == first


@pytest.mark.parametrize("found", [True, False])
def test_hostile_prompts_are_drawn_inside_the_margins(tmp_path, drawn, found):
    prompts = tuple(text.replace("\ud800", "") for text in (*HOSTILE[:9], "W" * 500))
    path = save_audit_picture(tmp_path, make_audit(tmp_path, prompts=prompts, per_prompt=3, rare=1, found=found))
    assert (pixels(path)[:, -60:] == 255).all()
    assert sum(str(part).startswith("group 1 · ") for part in drawn) == (8 if found else 0)  # and no more
    assert ("No hidden group was found" in drawn) == (not found)
    assert any(str(part).startswith("one hump, not WWW") for part in drawn) == (not found)


def test_before_and_after_stand_above_each_other(finished, tmp_path, drawn):
    save_before_after(tmp_path / "a.png", compare(read_run(find_parts(finished))))
    land = [f"“{LAND}”", "Base model · land 90% · water 10%", 8, "With guidance · land 55% · water 45%", 8]
    assert drawn[2:7] == land
    assert f"“{WATER}”" in drawn
    assert (pixels(tmp_path / "a.png") == (0, 0, 120)).all(axis=2).any()
