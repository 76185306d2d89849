"""The benchmarks of photographs: `python -m benchmarks COMMAND`."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # these modules import each other by name, as when run alone

import sets

from invdiff.errors import InvDiffError


def main() -> None:
    """Read the command line and do what it says."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    sets.add_prepare(commands)
    arguments = parser.parse_args()
    try:
        sets.prepare(arguments)
    except InvDiffError as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()
