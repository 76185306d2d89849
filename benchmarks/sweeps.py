"""The sweeps of docs/evaluation.md on the bundled world: tables to benchmarks/results/, pictures to docs/sweeps/.

    python benchmarks/sweeps.py guidance-scale   # base, balanced, invariant; CFG 1 to 10; three training seeds
    python benchmarks/sweeps.py scale            # Delta, the strength of guidance
    python benchmarks/sweeps.py penalty          # lambda, in the paper's mode
    python benchmarks/sweeps.py num-groups       # E: quality of W, Bias, cost
    python benchmarks/sweeps.py num-groups-gradient  # the same with the paper's own solver, one training seed

Each reads benchmarks/sweeps/NAME.yaml. Work is kept in out/sweeps (or --work) and shared, so a stopped run goes on.
"""

import argparse
from pathlib import Path

from kept import keep

from invdiff.sweep.config import SweepConfig
from invdiff.sweep.run import run_sweep

SWEEPS = Path(__file__).parent / "sweeps"
DOCS = Path(__file__).parents[1] / "docs" / "sweeps"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(path.stem for path in SWEEPS.glob("*.yaml")))
    parser.add_argument("--work", type=Path, default=Path("out/sweeps"))
    arguments = parser.parse_args()
    config = SweepConfig.from_file(SWEEPS / f"{arguments.name}.yaml")
    output = arguments.work / arguments.name
    table = run_sweep(config, output, work_dir=arguments.work / "work")
    keep("sweep", arguments.name, table.to_dict(), script="sweeps", settings=config.to_dict())
    DOCS.mkdir(exist_ok=True)
    for picture in output.glob("*.png"):
        (DOCS / f"{arguments.name}-{picture.name.replace('_', '-')}").write_bytes(picture.read_bytes())


if __name__ == "__main__":
    main()
