"""The command line: `invdiff COMMAND`. Each command reads settings, calls one function and names the next command.

Whatever imports torch is imported inside the commands, so that `--help` answers at once.
"""

import io
import os
import sys

from . import judging  # noqa: F401  # registers its commands
from .commands import app


def main() -> None:
    """Run the command line."""
    # Read when a library is first imported. Threads that wait spin for a moment only: more slows a busy machine.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a pipe or a terminal may lack characters that are printed
            stream.reconfigure(errors="replace")
    app()
