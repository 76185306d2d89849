"""The command line: `invdiff COMMAND`. Each command reads settings, calls one function and names the next command.

Whatever imports torch is imported inside the commands, so that `--help` answers at once.
"""

import io
import sys

from . import judging  # noqa: F401  # registers its commands
from .commands import app


def main() -> None:
    """Run the command line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a pipe or a terminal may lack characters that are printed
            stream.reconfigure(errors="replace")
    app()
