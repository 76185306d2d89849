"""Several processes at one job, started by `torchrun` or `accelerate launch`: who does what, and who waits.

Processes share work through the file system (a process writes whole files, all read them after `wait`), so several
machines need a common one. A single process takes every share and never waits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from .errors import ConfigError

T = TypeVar("T")

PATIENCE = timedelta(hours=12)
"""The longest that processes wait for each other: one may weigh the evidence of many images meanwhile."""


def state() -> PartialState:
    """The processes as accelerate sees them; the first call joins them."""
    joining = {} if PartialState._shared_state else {"cpu": not torch.cuda.is_available(), "timeout": PATIENCE}
    return PartialState(**joining)


def num_processes() -> int:
    """How many processes work together."""
    return state().num_processes


def is_main() -> bool:
    """Whether this process is the one that decides, reports and writes what is written once."""
    return state().is_main_process


def mine(items: Sequence[T]) -> Sequence[T]:
    """This process's share of the items: every n-th."""
    return items[state().process_index :: num_processes()]


def wait() -> None:
    """Wait until every process is here."""
    state().wait_for_everyone()


def from_main(make: Callable[[], T]) -> T:
    """Let the main process make something and hand it to the others."""
    if num_processes() == 1:
        return make()
    made: list[T | None] = [make() if is_main() else None]
    broadcast_object_list(made)
    return made[0]  # type: ignore[return-value]


def gather(items: Iterable[T]) -> list[T]:
    """The items of all processes, process by process."""
    return gather_object(list(items))


def refuse_several_processes(what: str) -> None:
    """Raise `ConfigError` where a step that runs as one process is started as several."""
    if num_processes() > 1:
        raise ConfigError(
            f"Expected one process for {what}, got {num_processes()}. Run it without torchrun or accelerate launch."
        )
