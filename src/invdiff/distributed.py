"""Several processes at one job, started by `torchrun` or `accelerate launch`: who does what, and who waits.

Processes share work through the file system (a process writes whole files, all read them after `wait`), so several
machines need a common one. A single process takes every share and never waits.
"""

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from .errors import ConfigError, first_line
from .launched import HOW_TO_RUN_ALONE, VARIABLES, launched

T = TypeVar("T")

PATIENCE = timedelta(hours=12)  # the longest wait for each other: one may weigh evidence for hours
JOINING, NOTICE = timedelta(minutes=5), timedelta(seconds=10)  # the longest wait to start, and when they say so


def state() -> PartialState:
    """The processes as accelerate sees them; the first call joins them, a `ConfigError` where some do not come."""
    if PartialState._shared_state:
        return PartialState()
    rank, count = launched()
    if count > 1:
        _join(rank, count)
    else:  # accelerate takes what a cluster or a notebook left for a group to join
        for name in (*VARIABLES, "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"):
            os.environ.pop(name, None)
    return PartialState(cpu=not torch.cuda.is_available())


def _join(rank: int, count: int) -> None:
    """Make the process group, once all processes are here."""
    from torch.distributed.rendezvous import rendezvous

    waiting = f"waiting for {count} processes, of which this is number {rank + 1}. {HOW_TO_RUN_ALONE}"
    notice = threading.Timer(NOTICE.total_seconds(), print, [waiting], {"file": sys.stderr, "flush": True})
    notice.daemon = True
    notice.start()
    try:
        if rank > 0:
            _wait_for_first()
        store = next(rendezvous("env://", timeout=JOINING))[0]
        store.set(f"here {rank}", "")
        store.wait([f"here {other}" for other in range(count)], JOINING)
        store.set_timeout(PATIENCE)
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        torch.distributed.init_process_group(backend, timeout=PATIENCE, world_size=count, rank=rank, store=store)
    except (RuntimeError, OSError) as error:
        raise ConfigError(
            f"Expected {count} processes to come together at {os.environ['MASTER_ADDR']}, of which this is number "
            f"{rank + 1}: {first_line(error)} {HOW_TO_RUN_ALONE}."
        ) from error
    finally:
        notice.cancel()


def _wait_for_first() -> None:
    """Wait until the address answers, where another process is to: torch would report each try with a stack of C++."""
    deadline = time.monotonic() + JOINING.total_seconds()
    while True:
        try:
            socket.create_connection((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), 10).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise OSError(f"nothing answers there ({error}).") from error
            time.sleep(0.2)


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
    made: list[T | None] = [make() if is_main() else None]
    broadcast_object_list(made)
    return made[0]  # type: ignore[return-value]
