"""Run a sweep: cell by cell into one tidy table, kept as CSV and JSON, and the pictures it calls for."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..evaluation.fairness.metrics import METRICS
from ..evaluation.results import Measures, Quantity
from ..files import write_json, write_text
from ..report.sweep_pictures import save_sweep_pictures
from .config import SweepConfig
from .plan import Cell, cells
from .stages import Workshop

NOT_FOUND = "no hidden group was found"


@dataclass(frozen=True)
class SweepTable:
    """One row per model and combination of values."""

    axes: tuple[str, ...]
    """The settings that vary."""
    rows: list[dict[str, Any]]
    """Axes, "model" ("base" or "guided"), "note", and figures; None where a figure is not defined."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return {"axes": list(self.axes), "rows": self.rows}

    def save(self, folder: Path) -> None:
        """Write `table.json` and `table.csv`."""
        write_json(folder / "table.json", self.to_dict())
        columns = list(dict.fromkeys(name for row in self.rows for name in row))
        stream = io.StringIO(newline="")
        writer = csv.DictWriter(stream, columns)
        writer.writeheader()
        writer.writerows(self.rows)
        write_text(folder / "table.csv", stream.getvalue())


def run_sweep(
    config: SweepConfig, output_dir: str | Path, *, work_dir: str | Path | None = None, progress: bool = True
) -> SweepTable:
    """Audit, train, draw and measure at every combination of the varied settings.

    Steps whose settings agree are done once. Writes `table.json` and `table.csv` after every cell, and pictures at
    the end. A stopped run goes on where it stopped.

    Args:
        config: What is varied and what is fixed.
        output_dir: Where the table and the pictures go.
        work_dir: Where data, audits, modules, images and measures are kept; `output_dir/work` unless given. Sweeps
            may share one.
        progress: Show progress bars.

    Raises:
        InvDiffError: A step failed; what was finished is kept.
    """
    output_dir = Path(output_dir)
    plan = cells(config)
    write_json(output_dir / "sweep.json", config.to_dict())
    workshop = Workshop(Path(work_dir) if work_dir else output_dir / "work", config, progress=progress)
    workshop.check()
    rows: list[dict[str, Any]] = []
    table = SweepTable(tuple(config.vary), rows)
    seen: set[str] = set()
    for cell in plan:
        plain = cell.images_name(guided=False)
        if plain not in seen:  # many cells share the plain model's images
            seen.add(plain)
            measured = workshop.measures(cell, guided=False)
            rows.append(cell.base_axes | {"model": "base", "note": ""} | _figures(measured))
        rows.append(_guided_row(workshop, cell))
        table.save(output_dir)
    save_sweep_pictures(output_dir, table.to_dict())
    return table


def _guided_row(workshop: Workshop, cell: Cell) -> dict[str, Any]:
    found = workshop.audit(cell)
    row = cell.axes | {"model": "guided", "note": "" if found.biased else NOT_FOUND}
    if found.biased:
        row |= _figures(workshop.measures(cell, guided=True))
    row |= {"forwards_per_image": found.forwards_per_image} | workshop.seconds(cell)
    quality = workshop.group_quality(cell)
    if quality is not None:
        row |= {
            "group_auroc": quality.auroc,
            "group_adjusted_rand": quality.adjusted_rand,
            "group_homogeneity": quality.homogeneity,
        }
    return row


def _figures(measures: Measures) -> dict[str, Any]:
    figures: dict[str, Any] = {"images_per_prompt": measures.images_per_prompt}
    for metric in METRICS:
        estimate = measures.first.overall[metric]
        figures |= {metric: estimate.value, f"{metric}_low": estimate.low, f"{metric}_high": estimate.high}
        figures |= {f"{metric}_floor": estimate.floor, f"{metric}_sd_over_prompts": estimate.sd_over_prompts}
        figures[f"{metric}_corrected"] = estimate.corrected
        figures |= {
            f"{metric}_corrected_low": estimate.corrected_low,
            f"{metric}_corrected_high": estimate.corrected_high,
        }
    figures |= _quantities({"subject_accuracy": measures.subject_accuracy} if measures.subject_accuracy else {})
    return figures | _quantities(measures.quality) | _quantities(measures.preservation)


def _quantities(named: Mapping[str, Quantity]) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for name, quantity in named.items():
        figures[name] = quantity.value
        if quantity.low is not None:
            figures |= {f"{name}_low": quantity.low, f"{name}_high": quantity.high}
    return figures
