"""How many processes were started and which one this is, as torchrun and accelerate launch say. No torch here."""

import os

from .errors import ConfigError

VARIABLES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
HOW_TO_RUN_ALONE = f"To run alone: unset {' '.join(VARIABLES)}"


def launched() -> tuple[int, int]:
    """This process's number and how many there are: (0, 1) alone, where `WORLD_SIZE` is absent, empty or 1.

    `ConfigError` where the variables describe no processes: they may be left over from a cluster or a notebook.
    """
    given = {name: os.environ.get(name, "").strip() for name in VARIABLES}
    if given["WORLD_SIZE"] in ("", "1"):
        return 0, 1
    numbers = {name: int(text) if text.isdecimal() else -1 for name, text in given.items() if name != "MASTER_ADDR"}
    rank, count = numbers["RANK"], numbers["WORLD_SIZE"]
    if min(numbers.values()) < 0 or not rank < count or not given["MASTER_ADDR"]:
        found = ", ".join(f"{name}={text!r}" for name, text in given.items())
        raise ConfigError(
            f"Expected the environment of several processes as torchrun sets it, found {found}. {HOW_TO_RUN_ALONE}."
        )
    return rank, count


def is_first_process() -> bool:
    """Whether this is the process that prints and saves: of those that torchrun starts, the first."""
    return launched()[0] == 0


def one_process(what: str) -> None:
    """Raise `ConfigError` where a step that runs as one process is started as several."""
    if (count := launched()[1]) > 1:
        raise ConfigError(f"Expected one process for {what}, got {count}. Run without torchrun. {HOW_TO_RUN_ALONE}.")
