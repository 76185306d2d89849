"""Run the command line as `python -m invdiff`."""

from .cli import main

main()
