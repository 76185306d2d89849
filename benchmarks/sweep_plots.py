"""Plots of a sweep's table: Bias over each numeric setting, groups and cost over E, Bias against quality."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler
from matplotlib.style import context

AXIS_NAMES = {
    "guidance_scale": "guidance scale",
    "scale": "scale Δ",
    "penalty": "penalty λ",
    "num_groups": "number of groups E",
    "omega": "ω",
    "num_images": "data set size",
}
GROUPS = {"group_auroc": "AUROC", "group_adjusted_rand": "adjusted Rand", "group_homogeneity": "homogeneity"}
COST = {"audit_seconds": "audit", "train_seconds": "training"}
SEEDS = ("seed", "data_seed")
"""Axes that figures are averaged over."""
COLOURS = ("#1f6fb4", "#1f9d78", "#b5538f", "#c77d1e", "#5f5fc4", "#7a8a3c", "#b04a4a", "#3c8a96")
GREY = "#6f7a8c"
STYLE = {
    "figure.constrained_layout.use": True,
    "figure.dpi": 140,
    "font.size": 10,
    "axes.prop_cycle": cycler(color=COLOURS) + cycler(marker=list("os^Dv<>P")),
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.titlelocation": "left",
    "grid.color": "#dde1e6",
    "lines.linewidth": 2,
    "legend.frameon": False,
}
Row = Mapping[str, Any]


class Series(NamedTuple):
    """The rows of one model at each value of an axis; several rows at one value differ in their seeds only."""

    name: str
    rows_at: dict[float, list[Row]]

    def points(self, figure: str) -> list[tuple[float, float, float, float]]:
        """(x, mean, low, high): the range over seeds, or the interval of a single run."""
        found = []
        for x, rows in sorted(self.rows_at.items()):
            values = [row[figure] for row in rows if row.get(figure) is not None]
            if len(values) == 1:
                low, high = rows[0].get(f"{figure}_low"), rows[0].get(f"{figure}_high")
                found.append((x, values[0], values[0] if low is None else low, values[0] if high is None else high))
            elif values:
                found.append((x, fmean(values), min(values), max(values)))
        return found


def save_sweep_plots(folder: Path, name: str, table: Mapping[str, Any]) -> list[Path]:
    """Draw what the numeric axes of `run_sweep`'s table call for, as PNG in `folder`; nothing where only names vary.

    Returns:
        The paths of the pictures.
    """
    folder.mkdir(parents=True, exist_ok=True)
    axes, rows = table["axes"], table["rows"]
    numeric = [axis for axis in axes if axis not in SEEDS and isinstance(_first(rows, axis), int | float)]
    paths = []
    with context(STYLE):
        for axis in numeric:
            stem = f"{name}-{{}}-over-{axis.replace('_', '-')}.png"
            if axis == "num_groups":
                paths.append(_save_groups(folder / stem.format("groups"), axes, rows, axis))
            else:
                paths.append(_save_bias(folder / stem.format("bias"), axes, rows, axis))
            if axis == "scale" and _distance(rows):
                paths.append(_save_pareto(folder / f"{name}-pareto.png", axes, rows))
    return paths


def _first(rows: Sequence[Row], axis: str) -> Any:
    return next((row[axis] for row in rows if row[axis] is not None), None)


def _distance(rows: Sequence[Row]) -> str | None:
    return next((name for name in rows[0] if name.startswith(("Frechet", "FID")) and name[-1] == ")"), None)


def _series(axes: Sequence[str], rows: Sequence[Row], over: str) -> Iterator[Series]:
    """The base model first, where it has a value of `over` itself; then each guided model."""
    named = [axis for axis in axes if axis not in (over, *SEEDS)]
    found: dict[str, dict[float, list[Row]]] = {}
    for row in rows:
        if row[over] is not None:
            values = " · ".join(str(row[axis]) for axis in named if row[axis] is not None)
            model = "base model" if row["model"] == "base" else values or "with guidance"
            found.setdefault(model, {}).setdefault(float(row[over]), []).append(row)
    yield from (Series(model, rows_at) for model, rows_at in found.items())


def _draw(panel: Axes, series: Series, figure: str, **options: Any) -> None:
    points = series.points(figure)
    if points:
        x, y, low, high = zip(*points, strict=True)
        (line,) = panel.plot(x, y, label=series.name, **options)
        panel.vlines(x, low, high, color=line.get_color(), alpha=0.35, linewidth=6)


def _draw_bias(panel: Axes, axes: Sequence[str], rows: Sequence[Row], over: str) -> None:
    flat = [row for row in rows if row["model"] == "base" and row[over] is None]
    if flat:
        panel.axhline(fmean(row["bias"] for row in flat), color=GREY, label="base model")
    for series in _series(axes, rows, over):
        _draw(panel, series, "bias", **({"color": GREY, "marker": "o"} if series.name == "base model" else {}))
    floors = {round(row["bias_floor"], 4) for row in rows if row.get("bias_floor") is not None}
    for floor in sorted(floors):
        panel.axhline(floor, color=GREY, linestyle=":", label="a perfectly fair sampler, as many images")
    panel.set(ylabel="Bias", ylim=(0, 1.02))
    handles = dict(zip(*panel.get_legend_handles_labels()[::-1], strict=True))
    panel.legend(handles.values(), handles, loc="center left", bbox_to_anchor=(1.01, 0.5))


def _caption(rows: Sequence[Row]) -> str:
    seeds = len({tuple(row.get(axis) for axis in SEEDS) for row in rows if row["model"] == "guided"})
    if seeds == 1:
        return "0 is balanced, 1 always the same class. Bars: 95% interval."
    return f"0 is balanced, 1 always the same class. Points: means of {seeds} training seeds. Bars: their range."


def _save_bias(path: Path, axes: Sequence[str], rows: Sequence[Row], over: str) -> Path:
    figure = Figure(figsize=(10, 5.4))
    panel = figure.subplots()
    _draw_bias(panel, axes, rows, over)
    panel.set_title(f"Bias over {AXIS_NAMES.get(over, over)}\n", fontsize=15, fontweight="bold")
    panel.text(0, 1.02, _caption(rows), transform=panel.transAxes, color=GREY)
    panel.set_xlabel(AXIS_NAMES.get(over, over.replace("_", " ")))
    if over == "penalty":
        panel.set_xscale("symlog", linthresh=0.1)
        panel.set_xlim(left=-0.02)
    ticks = sorted({float(row[over]) for row in rows if row[over] is not None})
    panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    figure.savefig(path)
    return path


def _save_groups(path: Path, axes: Sequence[str], rows: Sequence[Row], over: str) -> Path:
    figure = Figure(figsize=(10, 9))
    groups, bias, cost = figure.subplots(3, sharex=True)
    (first, *_) = [series for series in _series(axes, rows, over) if series.name != "base model"]
    for panel, figures in ((groups, GROUPS), (cost, COST)):
        for column, label in figures.items():
            _draw(panel, Series(label, first.rows_at), column)
        panel.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    _draw_bias(bias, axes, rows, over)
    groups.set_title("Groups, Bias and cost over the number of groups E\n", fontsize=15, fontweight="bold")
    groups.text(0, 1.04, "Groups against the truth: 1 is perfect.", transform=groups.transAxes, color=GREY)
    bias.text(0, 1.04, _caption(rows), transform=bias.transAxes, color=GREY)
    groups.set_ylabel("agreement")
    cost.set(ylabel="seconds", xlabel=AXIS_NAMES[over], xscale="log", ylim=(0, None))
    ticks = sorted(first.rows_at)
    cost.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
    cost.minorticks_off()
    figure.savefig(path)
    return path


def _save_pareto(path: Path, axes: Sequence[str], rows: Sequence[Row]) -> Path:
    """Bias against the Frechet distance along Delta; a plain model is where every line starts."""
    distance = _distance(rows)
    assert distance is not None
    figure = Figure(figsize=(10, 5.4))
    panel = figure.subplots()
    base = next((row for row in rows if row["model"] == "base"), None)
    if base:
        panel.plot(base[distance], base["bias"], "o", color=GREY, label="base model, Δ 0")
    for place, series in enumerate(_series(axes, rows, "scale")):
        below = (7, -12) if place % 2 else (-7, 7)
        x, y = ([point[1] for point in series.points(column)] for column in (distance, "bias"))
        panel.plot(x, y, label=series.name)
        for left, top, scale in zip(x, y, sorted(series.rows_at), strict=True):
            if left > 0.02 * panel.get_xlim()[1]:  # nearer to the origin labels would cover each other
                panel.annotate(f"{scale:g}", (left, top), textcoords="offset points", xytext=below, fontsize=9)
    panel.set_title("Bias against quality along scale Δ\n", fontsize=15, fontweight="bold")
    panel.text(0, 1.02, "Beside each point: its Δ. Lower left is better.", transform=panel.transAxes, color=GREY)
    panel.set(xlabel=distance.replace("Frechet", "Fréchet"), ylabel="Bias", xlim=(0, None), ylim=(0, 1.02))
    panel.legend(loc="lower right")
    figure.savefig(path)
    return path
