"""The benchmarks of photographs: data sets, methods, tables.

  prepare SET SOURCE OUT                      captioned folders of a published set
  run BENCHMARK --data SOURCE --base MODEL    every cell that has no figures yet
  table BENCHMARK                             its table, in Markdown and CSV
  picture BENCHMARK METHOD ... --output FILE  images of the same seeds
  picture studies --output FILE               Bias over each setting that varies

BENCHMARK is a file of benchmarks/suites, such as waterbirds: a data set and the
methods compared on it. A cell is one method with one seed; its figures are kept
in benchmarks/results. To add a method, see docs/benchmarks.md.
"""

import argparse
import fnmatch
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # these modules import each other by name, as when run alone
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read at import: no notices of what is not installed
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")  # nor of long captions of the bundled world that are cut

import sets
from kept import RESULTS
from runner import Runner, Suite, check_known
from tables import markdown, sheets_picture, studies_picture, write_csv

from invdiff.assets import BIRDS_MODEL
from invdiff.errors import ConfigError, InvDiffError


def main() -> None:
    """Read the command line and do what it says."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    sets.add_prepare(commands)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("benchmark", help=f"one of {', '.join(Suite.names())}")
    common.add_argument("--results", type=Path, default=RESULTS, help="where figures are kept (benchmarks/results)")
    run = commands.add_parser("run", parents=[common], help="run the cells of a benchmark that have no figures yet")
    images = "the folder of public images in parquet files that worlds.py names"
    run.add_argument("--data", type=Path, help=f"{images}; drawn birds need none")
    run.add_argument("--base", type=Path, help="the pipeline that is fine-tuned on biased images; as --data")
    run.add_argument("--work", type=Path, default=Path("out/benchmarks"), help="models, images, caches (%(default)s)")
    run.add_argument("--cells", default="*", help="a pattern of names in the YAML, such as 'ours*' (all)")
    run.add_argument("--clip", default="", help="a CLIP model, by folder or hub id, to measure CLIP-T with (none)")
    run.add_argument("--seeds", default="", help="only these of the YAML's, such as 0,1 (all)")
    commands.add_parser("table", parents=[common], help="print the table of a benchmark")
    picture = commands.add_parser("picture", parents=[common], help="draw a picture of what methods drew")
    methods = "cells that were run, a row each; none draws figures over settings"
    picture.add_argument("methods", nargs="*", help=methods)
    picture.add_argument("--work", type=Path, default=Path("out/benchmarks"), help="that of `run` (%(default)s)")
    picture.add_argument("--seed", type=int, default=0, help="one of the YAML's (%(default)s)")
    picture.add_argument("--scale", type=float, default=3.0, help="of classifier-free guidance (%(default)s)")
    picture.add_argument("--output", type=Path, required=True, help="the picture to write")
    arguments = parser.parse_args()
    commands_by_name = {"prepare": sets.prepare, "run": run_cells, "table": print_table, "picture": draw_picture}
    try:
        commands_by_name[arguments.command](arguments)
    except InvDiffError as error:
        sys.exit(f"Error: {error}")


def run_cells(arguments: argparse.Namespace) -> None:
    """Run the cells that are asked for."""
    if Suite.named(arguments.benchmark).world["kind"] == "bundled":
        if arguments.data or arguments.base:
            raise ConfigError(f"Expected no --data and no --base for {arguments.benchmark}, whose birds are bundled.")
        arguments.base = BIRDS_MODEL
    elif not (arguments.data and arguments.base):
        raise ConfigError(f"Expected --data and --base, which {arguments.benchmark} needs. Drawn birds need neither.")
    places = arguments.data, arguments.base, arguments.work, arguments.results
    runner = Runner(arguments.benchmark, *places, clip=arguments.clip)
    only = arguments.seeds.split(",") if arguments.seeds else []
    asked = [
        (name, seed)
        for name, cells in runner.suite.each().items()
        for seed in cells.seeds
        if fnmatch.fnmatch(name, arguments.cells) and (not only or str(seed) in only)
    ]
    if not asked:
        raise ConfigError(f"Expected cells of {', '.join(runner.suite.cells)} with seeds that they have, found none.")
    for name, seed in asked:
        runner.run(name, seed)


def print_table(arguments: argparse.Namespace) -> None:
    """Print one benchmark's table, and write it as CSV."""
    write_csv(arguments.benchmark, arguments.results)
    print(markdown(arguments.benchmark, arguments.results) or "No figures are kept yet: `run` makes them.")


def draw_picture(arguments: argparse.Namespace) -> None:
    """Draw rows of images, of one seed and guidance scale, or figures over the settings that cells are named by."""
    if not arguments.methods:
        studies_picture(arguments.benchmark, arguments.results, arguments.output)
        return
    suite = Suite.named(arguments.benchmark)
    check_known("cells", arguments.methods, suite.cells)
    place, sheet = arguments.work / (suite.shares or arguments.benchmark), f"drawn-{arguments.scale:g}/sheet.png"
    folders = {name: suite.folder_of(arguments.seed, cells.world) for name, cells in suite.each().items()}
    sheets = {name: place / folders[name] / name / sheet for name in arguments.methods}
    sheets_picture(sheets, arguments.output)


if __name__ == "__main__":
    main()
