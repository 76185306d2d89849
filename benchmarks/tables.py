"""The table of a benchmark, from the figures that are kept: Markdown for people, CSV for everything else."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from runner import Suite, kept

from invdiff.files import write_text

COLUMNS = {
    "Bias": "bias",
    "floor": "floor",
    "subject right": "subject right",
    "worst cell": "worst cell",
    "Frechet": "Frechet distance",
    "precision": "precision",
    "recall": "recall",
}


def rows(benchmark: str, results: Path) -> Iterator[dict[str, Any]]:
    """One row a cell, way of drawing and guidance scale, with mean and range over seeds, in the order of the YAML."""
    found = kept(results / benchmark)
    for cell in Suite.named(benchmark).each():
        by_seed = found.get(cell, {})
        first: Mapping[str, Any] = next(iter(by_seed.values()), {})
        for key in first.get("figures", {}):
            drawn, _, scale = key.rpartition("CFG ")
            row = {"method": cell, "supervision": first["supervision"], "draws": drawn.strip() or "i.i.d."}
            row |= {"CFG": scale, "seeds": len(by_seed), "images": first["settings"]["images"]}
            for label, name in COLUMNS.items():
                values = [of["figures"][key].get(name) for of in by_seed.values() if key in of["figures"]]
                values = [value for value in values if value is not None]
                row[label] = float(np.mean(values)) if values else None
                row[f"{label} low"], row[f"{label} high"] = (min(values), max(values)) if values else (None, None)
            if len(by_seed) == 1:  # of images, where it is not over seeds
                row["Bias low"], row["Bias high"] = (first["figures"][key][end] for end in ("low", "high"))
            row |= {"parameters": first["parameters"], "forwards": first["forwards"], "device": first["device"]}
            yield row | {"seconds of fitting": first["seconds of fitting"]}


def markdown(benchmark: str, results: Path) -> str:
    """Two tables: images that draw groups independently, and those with groups spread evenly."""
    every = list(rows(benchmark, results))
    parts = []
    for draws in dict.fromkeys(row["draws"] for row in every):
        of_draws = [row for row in every if row["draws"] == draws]
        scales = list(dict.fromkeys(row["CFG"] for row in of_draws))
        head = ["method", "given", "seeds x images", *(f"Bias at CFG {scale}" for scale in scales)]
        head += [name for name in COLUMNS if name not in ("Bias", "floor")] + ["parameters", "forwards"]
        lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
        for method in dict.fromkeys(row["method"] for row in of_draws):
            own = {row["CFG"]: row for row in of_draws if row["method"] == method}
            first = next(iter(own.values()))
            line = [method, first["supervision"], f"{first['seeds']} x {first['images']}"]
            line += [spread(own.get(scale), "Bias", with_range=True) for scale in scales]
            shown = [name for name in COLUMNS if name not in ("Bias", "floor")]
            line += [" / ".join(spread(own[scale], name) for scale in scales if scale in own) for name in shown]
            line += [f"{first['parameters']:,}", f"{first['forwards']:,.0f}"]
            lines.append("| " + " | ".join(line) + " |")
        parts.append(f"Groups drawn {draws}\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


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
