"""Sweeps: settings varied in every combination over one config file, into one table and its pictures.

    python benchmarks/sweeps.py guidance-scale   # base, balanced, invariant; CFG 1 to 10; three training seeds
    python benchmarks/sweeps.py scale            # Delta, the strength of guidance
    python benchmarks/sweeps.py penalty          # lambda, in the paper's mode
    python benchmarks/sweeps.py num-groups       # E: quality of W, Bias, cost
    python benchmarks/sweeps.py num-groups-gradient  # the same with the paper's own solver, one training seed
    python benchmarks/sweeps.py my-sweep.yaml --output out/my-sweep   # any other, on any model and data
    python benchmarks/sweeps.py scale --draw     # the pictures of docs/sweeps/ again, from the kept table

A name reads benchmarks/sweeps/NAME.yaml, keeps its table in benchmarks/results/ and draws to docs/sweeps/. Work is
kept in --work and shared by sweeps, so a stopped run goes on.
"""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from experiment import NOT_FOUND, Cell, Experiment, Workshop, cells
from kept import RESULTS, keep
from numpy.typing import ArrayLike
from sklearn.metrics import adjusted_rand_score, homogeneity_score, roc_auc_score
from sweep_plots import save_sweep_plots

from invdiff.errors import EvaluationError
from invdiff.evaluation.fairness.metrics import METRICS
from invdiff.evaluation.results import Measures, Quantity
from invdiff.files import read_json, write_json, write_text

SWEEPS = Path(__file__).parent / "sweeps"
DOCS = Path(__file__).parents[1] / "docs" / "sweeps"


def run_sweep(config: Experiment, output_dir: Path, *, work_dir: Path, progress: bool = True) -> dict[str, Any]:
    """Measure every cell into `table.json` and `table.csv`, which grow row by row.

    Returns:
        {"axes": varied settings, "rows": one per model and cell}: each row holds its value of each axis, "model"
        ("base" or "guided"), "note" and figures, None where one is not defined.

    Raises:
        InvDiffError: A step failed; finished steps are kept.
    """
    plan = cells(config)
    workshop = Workshop(work_dir, config, progress=progress)
    workshop.check()
    table: dict[str, Any] = {"axes": list(config.vary), "rows": []}
    seen: set[str] = set()
    for cell in plan:
        plain = cell.images_name(guided=False)
        if plain not in seen:  # many cells share the plain model's images
            seen.add(plain)
            measured = figures(workshop.measures(cell, guided=False))
            table["rows"].append(cell.base_axes | {"model": "base", "note": ""} | measured)
        table["rows"].append(guided_row(workshop, cell))
        save_table(output_dir, table)
    return table


def guided_row(workshop: Workshop, cell: Cell) -> dict[str, Any]:
    """Figures of the guided model, of its groups and of their cost."""
    found = workshop.audit(cell)
    row = cell.axes | {"model": "guided", "note": "" if found.biased else NOT_FOUND}
    if found.biased:
        row |= figures(workshop.measures(cell, guided=True))
    row |= {
        "forwards_per_image": found.forwards_per_image,
        "audit_seconds": workshop.seconds(f"audits/{cell.audit_name}"),
        "train_seconds": workshop.seconds(f"modules/{cell.module_name}"),
    }
    column = cell.config.hidden_attribute
    if column:
        data = workshop.data(cell)
        if column not in data.attributes:
            raise EvaluationError(
                f"Expected the hidden attribute {column!r} in the data, got {', '.join(data.attributes) or 'none'}."
            )
        truth = dict(zip(data.names, data.attributes[column], strict=True))
        classes = [str(truth[name]) for name in found.names]
        quality = group_quality(found.prompt_ids, found.scores[0], found.group_weights[0].argmax(axis=1), classes)
        row |= {f"group_{name}": value for name, value in quality.items()}
    return row


def group_quality(prompt_ids: ArrayLike, scores: ArrayLike, groups: ArrayLike, classes: ArrayLike) -> dict[str, float]:
    """Agreement of inferred groups with the classes of a hidden attribute, within prompts, averaged over images.

    Args:
        prompt_ids: The prompt of each image, (N,).
        scores: How rare the audit takes each image to be, (N,).
        groups: The group of each image within its prompt, (N,).
        classes: The class of each image, (N,).

    Returns:
        "auroc", the chance that an image of the prompt's rarest class scores above another of the prompt;
        "adjusted_rand" of groups and classes, 1 when they are the same and 0 for chance; "homogeneity", 1 when no
        group mixes classes, though several may share one. Prompts in which the attribute does not vary are left out.

    Raises:
        EvaluationError: The attribute varies within no prompt.
    """
    prompts, rarity, found, truth = (np.asarray(values) for values in (prompt_ids, scores, groups, classes))
    figures, sizes = [], []
    for rows in (prompts == prompt for prompt in np.unique(prompts)):
        names, counts = np.unique(truth[rows], return_counts=True)
        if len(names) > 1:
            auroc = roc_auc_score(truth[rows] == names[counts.argmin()], rarity[rows])
            agreement = (score(truth[rows], found[rows]) for score in (adjusted_rand_score, homogeneity_score))
            figures.append((auroc, *agreement))
            sizes.append(int(rows.sum()))
    if not figures:
        raise EvaluationError("Expected a hidden attribute that varies within a prompt, got one that does not.")
    means = np.average(figures, axis=0, weights=sizes).tolist()
    return dict(zip(("auroc", "adjusted_rand", "homogeneity"), means, strict=True))


def figures(measures: Measures) -> dict[str, Any]:
    """Every figure of one model's images, by name, with the ends of its interval."""
    row: dict[str, Any] = {"images_per_prompt": measures.images_per_prompt}
    for metric in METRICS:
        estimate = measures.first.overall[metric]
        row[metric] = estimate.value
        for name in ("low", "high", "floor", "sd_over_prompts", "corrected", "corrected_low", "corrected_high"):
            row[f"{metric}_{name}"] = getattr(estimate, name)
    subject = {} if measures.subject_accuracy is None else {"subject_accuracy": measures.subject_accuracy}
    quantities: Mapping[str, Quantity] = {**subject, **measures.quality, **measures.preservation}
    for name, quantity in quantities.items():
        row[name] = quantity.value
        if quantity.low is not None:
            row |= {f"{name}_low": quantity.low, f"{name}_high": quantity.high}
    return row


def save_table(folder: Path, table: dict[str, Any]) -> None:
    """Write `table.json` and `table.csv`."""
    write_json(folder / "table.json", table)
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, list(dict.fromkeys(name for row in table["rows"] for name in row)))
    writer.writeheader()
    writer.writerows(table["rows"])
    write_text(folder / "table.csv", stream.getvalue())


def main() -> None:
    """Run or draw the sweep that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", help=f"{', '.join(sorted(path.stem for path in SWEEPS.glob('*.yaml')))}, or a file")
    parser.add_argument("--output", type=Path, help="folder of table and pictures (default: WORK/../NAME)")
    parser.add_argument("--work", type=Path, default=Path("out/sweeps/work"), help="folder of all steps' work")
    parser.add_argument("--draw", action="store_true", help="only draw the pictures of a table that is there")
    arguments = parser.parse_args()
    ours = SWEEPS / f"{arguments.sweep}.yaml"
    name = arguments.sweep if ours.is_file() else Path(arguments.sweep).stem
    output = arguments.output or arguments.work.parent / name
    if arguments.draw:
        table = read_json(RESULTS / f"sweep-{name}.json")["figures"] if ours.is_file() else None
        table = table or read_json(output / "table.json")
    else:
        config = Experiment.from_file(ours if ours.is_file() else arguments.sweep)
        table = run_sweep(config, output, work_dir=arguments.work)
        if ours.is_file():
            keep("sweep", name, table, script="sweeps", settings=config.to_dict())
    for path in save_sweep_plots(DOCS if ours.is_file() else output, name, table):
        print(path)


if __name__ == "__main__":
    main()
