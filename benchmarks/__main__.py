"""The benchmarks of photographs: data sets, methods, tables.

python -m benchmarks prepare SET SOURCE OUT                        captioned folders of an official data set
python -m benchmarks run BENCHMARK --data SOURCE --base MODEL      every cell of suites/BENCHMARK.yaml without figures
python -m benchmarks table BENCHMARK                               its table, in Markdown, and results/BENCHMARK.csv
python -m benchmarks picture BENCHMARK METHOD ... --output FILE    images of methods at the same seeds, a row each
"""

import argparse
import fnmatch
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # these modules import each other by name, as when run alone

import sets
from kept import RESULTS
from runner import Runner
from tables import markdown, sheets_picture, write_csv

from invdiff.errors import InvDiffError


def main() -> None:
    """Read the command line and do what it says."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    sets.add_prepare(commands)
    run = commands.add_parser("run", help="run the cells of a benchmark that have no figures yet")
    run.add_argument("benchmark")
    run.add_argument("--data", type=Path, required=True, help="the folder of public images in parquet files")
    run.add_argument("--base", type=Path, required=True, help="the pipeline that is fine-tuned on biased images")
    run.add_argument("--work", type=Path, default=Path("out/benchmarks"), help="models, images and caches")
    run.add_argument("--results", type=Path, default=RESULTS, help="where figures are kept")
    run.add_argument("--cells", default="*", help="a pattern of names, such as 'ours*'")
    run.add_argument("--seeds", default="", help="only these, such as 0,1")
    table = commands.add_parser("table", help="print the table of a benchmark")
    table.add_argument("benchmark")
    table.add_argument("--results", type=Path, default=RESULTS)
    picture = commands.add_parser("picture", help="draw a picture of what methods drew")
    picture.add_argument("benchmark")
    picture.add_argument("methods", nargs="+")
    picture.add_argument("--work", type=Path, default=Path("out/benchmarks"))
    picture.add_argument("--seed", type=int, default=0)
    picture.add_argument("--scale", default="3", help="of classifier-free guidance")
    picture.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    commands_by_name = {"prepare": sets.prepare, "run": run_cells, "table": print_table, "picture": draw_picture}
    try:
        commands_by_name[arguments.command](arguments)
    except InvDiffError as error:
        sys.exit(f"Error: {error}")


def run_cells(arguments: argparse.Namespace) -> None:
    """Run the cells that are asked for."""
    runner = Runner(arguments.benchmark, arguments.data, arguments.base, arguments.work, arguments.results)
    only = {int(seed) for seed in arguments.seeds.split(",") if seed}
    for name, cells in runner.suite.each().items():
        for seed in cells.seeds:
            if fnmatch.fnmatch(name, arguments.cells) and (not only or seed in only):
                runner.run(name, seed)


def print_table(arguments: argparse.Namespace) -> None:
    """Print one benchmark's table, and write it as CSV."""
    write_csv(arguments.benchmark, arguments.results)
    print(markdown(arguments.benchmark, arguments.results))


def draw_picture(arguments: argparse.Namespace) -> None:
    """Draw rows of images, of one seed and guidance scale."""
    place = arguments.work / arguments.benchmark / f"seed-{arguments.seed}"
    sheets = {name: place / name / f"drawn-{arguments.scale}" / "sheet.png" for name in arguments.methods}
    sheets_picture(sheets, arguments.output)


if __name__ == "__main__":
    main()
