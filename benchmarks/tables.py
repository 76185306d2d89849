"""The table of a benchmark, from the figures that are kept: Markdown for people, CSV for everything else."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from kept import markdown_table
from runner import Suite, kept

from invdiff.errors import ConfigError
from invdiff.evaluation.fairness.correction import correct_for_annotator
from invdiff.evaluation.fairness.metrics import bias
from invdiff.files import read_json, write_text

COLUMNS = {
    "Bias": "bias",
    "Bias corrected": "bias corrected",
    "Bias by the audit": "bias by the audit",
    "floor": "floor",
    "subject right": "subject right",
    "worst cell": "worst cell",
    "CLIP-T": "CLIP-T",
    "Frechet": "Frechet distance",
    "precision": "precision",
    "recall": "recall",
}
OF_FEATURES = {"Frechet distance", "precision", "recall"}
"""Figures that compare only by the same features: seeds judged by others than the first are left out."""
DIFFERS = 0.03
"""By which a figure corrected for the judge's errors differs where it is shown."""


def rows(benchmark: str, results: Path) -> Iterator[dict[str, Any]]:
    """One row a cell, way of drawing and guidance scale, with mean and range over seeds, in the order of the YAML."""
    found, labels = kept(results / benchmark), results / f"{benchmark}-labels.json"
    correct(found, read_json(labels) if labels.is_file() else None)
    suite = Suite.named(benchmark)
    usual = next((_features(of) for cell in suite.each() for of in found.get(cell, {}).values()), "")
    for cell, cells in suite.each().items():
        by_seed = found.get(cell, {})
        for seed in by_seed:
            suite.check_kept(cells, results / benchmark / f"{cell}-seed-{seed}.json")
        first: Mapping[str, Any] = next(iter(by_seed.values()), {})
        # A calibrated mix is spread over the images like even shares.
        draws = "i.i.d." if first.get("settings", {}).get("environments") == "iid" else "stratified"
        for key in (key for key, of in first.get("figures", {}).items() if "bias" in of):
            seeds = [of for of in by_seed.values() if key in of["figures"]]
            each = [of["figures"][key] for of in seeds]
            alike = [of["figures"][key] for of in seeds if _features(of) == usual]
            drawn, _, scale = key.rpartition("CFG ")
            row = {"method": cell, "supervision": first["supervision"], "draws": drawn.strip() or draws}
            row |= {"CFG": scale, "seeds": len(each), "images": first["settings"]["images"]}
            for label, name in COLUMNS.items():
                values = [of.get(name) for of in (alike if name in OF_FEATURES else each)]
                values = [value for value in values if value is not None]
                row[label] = float(np.mean(values)) if values else None
                row[f"{label} low"], row[f"{label} high"] = (min(values), max(values)) if values else (None, None)
            if len(each) == 1:  # of images, where it is not over seeds
                row["Bias low"], row["Bias high"] = each[0]["low"], each[0]["high"]
            row |= {name: first.get(name) for name in ("forwards", "sampling", "device")}
            row["parameters"] = max(of["parameters"] for of in by_seed.values())  # more where more factors are found
            seconds = [of["seconds of fitting"] for of in by_seed.values() if of["seconds of fitting"] is not None]
            yield row | {"seconds of fitting": round(float(np.mean(seconds)), 1) if seconds else None}


def _features(document: Mapping[str, Any]) -> str:
    """The encoder of a cell's figures, where it was tuned: others need no telling apart, and were not always kept."""
    name = document.get("features", "")
    return name if "-tuned-" in name else ""


def correct(found: Mapping[str, Mapping[int, Any]], labels: Mapping[str, Any] | None) -> None:
    """Add Bias corrected for what the judge says of generated images that people labelled, at their guidance scale.

    Without labels it is corrected for the judge's errors on real images held out, at every scale.
    """
    for document in (document for by_seed in found.values() for document in by_seed.values()):
        for key, figures in document["figures"].items():
            if labels is None:
                figures["bias corrected"] = figures.get("corrected")
            elif key.rpartition("CFG ")[2] == labels["guidance scale"] and "shares" in figures:
                counts = [[of[name] for name in labels["classes"]] + [0.0] for of in figures["shares"].values()]
                shares = correct_for_annotator(counts, labels["confusion"])
                figures["bias corrected"] = float(np.mean(bias(shares, np.full(shares.shape[1], 1 / shares.shape[1]))))


def markdown(benchmark: str, results: Path) -> str:
    """A table of each way of drawing and number of images: Frechet distances compare at equal numbers only."""
    every, parts = list(rows(benchmark, results)), []
    for kind in dict.fromkeys((row["draws"], row["images"]) for row in every):
        of_kind = [row for row in every if (row["draws"], row["images"]) == kind]
        scales = sorted({row["CFG"] for row in of_kind}, key=float)
        corrected = [row["Bias corrected"] - row["Bias"] for row in of_kind if row["Bias corrected"] is not None]
        hidden = {"Bias", "floor"} | (set() if any(abs(by) > DIFFERS for by in corrected) else {"Bias corrected"})
        shown = [name for name in COLUMNS if name not in hidden]
        shown = [name for name in shown if any(row[name] is not None for row in of_kind)]
        head, lines = ["method", "given", "seeds", *(f"Bias, CFG {scale}" for scale in scales), *shown], []
        for method, own in by_method(of_kind).items():
            first = next(iter(own.values()))
            cells = [method, first["supervision"], str(max(row["seeds"] for row in own.values()))]
            cells += [spread(own.get(scale), "Bias", with_range=True) for scale in scales]
            cells += [" / ".join(spread(own[scale], name) for scale in scales if scale in own) for name in shown]
            cost = f"{first['sampling']:.1f}" if first["sampling"] else "-"
            lines.append([*cells, f"{first['parameters']:,}", f"{first['forwards']:,.0f}", cost])
        floor = f"{of_kind[0]['floor']:.3f}"
        about = f"{kind[1]} images of each prompt, groups drawn {kind[0]}; a fair model would show a Bias of {floor}."
        parts.append(f"{about}\n\n{markdown_table([*head, 'parameters', 'forwards', 'a sample'], lines)}")
    return "\n\n".join(parts)


def headline(benchmark: str, results: Path, methods: Collection[str]) -> str:
    """These methods, of most images: Bias at each scale, the rest at the one in the middle."""
    every = [row for row in rows(benchmark, results) if row["draws"] == "i.i.d."]
    every = [row for row in every if row["images"] == max(row["images"] for row in every)]
    every = [row for row in every if row["method"] in methods]
    scales = sorted({row["CFG"] for row in every}, key=float)
    middle, shown = scales[len(scales) // 2], ("subject right", "worst cell", "Frechet")
    head = ["", "given", *(f"Bias, CFG {scale}" for scale in scales), *(f"{name}, CFG {middle}" for name in shown)]
    lines = []
    for method, own in by_method(every).items():
        of_bias = [spread(own.get(scale), "Bias", with_range=True) for scale in scales]
        lines.append([method, own[middle]["supervision"], *of_bias, *(spread(own[middle], name) for name in shown)])
    return markdown_table(head, lines)


def by_method(every: Collection[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Method to guidance scale to its row."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in every:
        found.setdefault(row["method"], {})[row["CFG"]] = row
    return found


def spread(row: Mapping[str, Any] | None, name: str, *, with_range: bool = False) -> str:
    """A figure with two decimals, or none; with its range over seeds, or its interval."""
    if row is None or row[name] is None:
        return "-"
    text = f"{row[name]:.2f}" if abs(row[name]) < 10 else f"{row[name]:.0f}"
    return f"{text} ({row[f'{name} low']:.2f} to {row[f'{name} high']:.2f})" if with_range else text


def write_csv(benchmark: str, results: Path) -> None:
    """Write results/BENCHMARK.csv."""
    every = list(rows(benchmark, results))
    if not every:
        return
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, list(every[0]))
    writer.writeheader()
    writer.writerows(every)
    write_text(results / f"{benchmark}.csv", stream.getvalue())


def studies_picture(benchmark: str, results: Path, output: Path) -> None:
    """Write a panel a study, which is a group of cells whose names end in a number: Bias and worst cell over it."""
    lines: dict[str, dict[str, list[tuple[float, Mapping[str, Any]]]]] = {}
    for cell, by_seed in kept(results / benchmark).items():
        name, _, value = cell.rpartition("-")
        if name and value.replace(".", "", 1).isdigit():
            study, _, variant = name.partition("-")
            for document in by_seed.values():
                lines.setdefault(study, {}).setdefault(variant, []).append(
                    (float(value), document["figures"]["CFG 3"])
                )
    if not lines:
        remedy = "Name methods to draw their images."
        raise ConfigError(f"Expected figures of {benchmark} in cells named such as delta-0.5, found none. {remedy}")
    figure, axes = plt.subplots(2, -(-len(lines) // 2), figsize=(11, 6), layout="constrained", squeeze=False)
    for axis, (study, variants) in zip(axes.flat, lines.items(), strict=False):
        # The settings of all variants, evenly spaced.
        every = sorted({value for points in variants.values() for value, _ in points})
        for variant, points in variants.items():
            values, figures = zip(*sorted(points, key=lambda point: point[0]), strict=True)
            places = [every.index(value) for value in values]
            bias = [of["bias"] for of in figures]
            ends = np.abs([[of[end] for of in figures] for end in ("low", "high")] - np.array(bias))
            axis.errorbar(places, bias, ends, marker="o", capsize=2, label=f"Bias, {variant or 'ours'}")
            worst = [of["worst cell"] for of in figures]
            axis.plot(places, worst, "s--", alpha=0.6, label=f"worst cell, {variant or 'ours'}")
        axis.set_xticks(range(len(every)), [f"{value:g}" for value in every])
        axis.set(title=study, ylim=(-0.02, 1.02))
        axis.legend(fontsize=7)
    for axis in axes.flat[len(lines) :]:
        axis.axis("off")
    figure.savefig(output, dpi=100)
    plt.close(figure)


def sheets_picture(sheets: Mapping[str, Path], output: Path) -> None:
    """Write the contact sheets of methods below each other, each with its name."""
    if absent := [name for name, path in sheets.items() if not path.is_file()]:
        remedy = "`run` draws them: give its --work, and a --seed and --scale of these cells."
        raise ConfigError(f"Expected images of {', '.join(absent)} at {sheets[absent[0]]}, found none. {remedy}")
    figure, axes = plt.subplots(len(sheets), figsize=(10, 1.5 * len(sheets)), layout="constrained")
    for axis, (name, path) in zip(np.atleast_1d(axes), sheets.items(), strict=True):
        axis.imshow(plt.imread(path), interpolation="nearest")
        axis.set_ylabel(name, rotation=0, ha="right", va="center")
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    figure.savefig(output, dpi=100)
    plt.close(figure)
