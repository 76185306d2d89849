"""How benchmarks keep their figures: rounded, with the command that prints them and the versions used."""

import argparse
import platform
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from invdiff.files import write_json

RESULTS = Path(__file__).parent / "results"


def rounded(value: Any) -> Any:
    """Return plain JSON types with four decimals."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return round(float(value), 4) if isinstance(value, float | np.floating) else value


def keep(benchmark: str, part: str, figures: Any, *, script: str = "", **about: Any) -> None:
    """Write `results/BENCHMARK-PART.json` and print where it is."""
    path = RESULTS / f"{benchmark}-{part}.json"
    document = {
        "command": f"python benchmarks/{script or benchmark}.py {part}",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    write_json(path, document | about | {"figures": rounded(figures)})
    print(path)


def cell_arguments(description: str, parts: Iterable[str], *, work: str) -> argparse.Namespace:
    """The arguments of a benchmark of cells: a part, or `table`; --data and --base, --work, and --cells."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=(*parts, "table"))
    parser.add_argument("--data", type=Path, help="the folder of public images in parquet files")
    parser.add_argument("--base", type=Path, help="the pipeline to audit and fine-tune")
    parser.add_argument("--work", type=Path, default=Path(work))
    parser.add_argument("--cells", default="*", help="a pattern of names, such as '0.95-*-tuned'")
    return parser.parse_args()


def run_part(benchmark: str, description: str, parts: Mapping[str, Callable[[Path], Any]], *, work: str) -> None:
    """Run the part that the command line names, in --work, and keep its figures."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=parts)
    parser.add_argument("--work", type=Path, default=Path(work))
    arguments = parser.parse_args()
    keep(benchmark, arguments.part, parts[arguments.part](arguments.work))
