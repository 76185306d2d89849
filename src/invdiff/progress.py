"""Progress on the terminal: one bar per step, with the figures that matter beside it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from .distributed import is_main

console = Console(stderr=True)


def note(text: str) -> None:
    """Print a line on standard error, from the first process only: what people should know, bars or not."""
    if is_main():
        console.print(Text(text), soft_wrap=True)


class Bar:
    """A running bar. Figures given to `advance` are smoothed before they are shown."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._figures: dict[str, float] = {}
        self._count = 0

    def advance(self, amount: int = 1, **figures: float | torch.Tensor) -> None:
        """Move on by `amount` and show the figures' moving averages."""
        if self._progress is None:
            return
        if self._count % 10 == 0:  # reading a tensor waits for the device
            for name, figure in figures.items():
                value = float(figure.detach() if isinstance(figure, torch.Tensor) else figure)
                self._figures[name] = value + 0.9 * (self._figures.get(name, value) - value)
        self._count += 1
        shown = "  ".join(f"{name} {value:.4g}" for name, value in self._figures.items())
        self._progress.update(self._progress.task_ids[0], advance=amount, figures=shown)


@contextlib.contextmanager
def progress_bar(description: str, total: int, *, start: int = 0, enabled: bool = True) -> Iterator[Bar]:
    """Show a bar on standard error while the block runs, or nothing where `enabled` is false."""
    if not enabled or not is_main():
        yield Bar(None)
        return
    columns = [TextColumn("[bold]{task.description:<18}"), BarColumn(bar_width=28), MofNCompleteColumn()]
    columns += [TimeRemainingColumn(), TextColumn("[dim]{task.fields[figures]}")]
    with Progress(*columns, console=console) as progress:
        progress.add_task(description, total=total, completed=start, figures="")
        yield Bar(progress)
