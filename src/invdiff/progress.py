"""Progress on the terminal: one bar per step, with the figures that matter beside it."""

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
    """A running bar."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def advance(self, amount: int = 1, loss: torch.Tensor | None = None) -> None:
        """Move on by `amount`, and show every tenth loss: reading a tensor waits for the device."""
        task = self._progress.tasks[0]
        if loss is not None and task.completed % 10 == 0:
            task.fields["figures"] = f"loss {loss.item():.4g}"
        self._progress.advance(task.id, amount)


@contextlib.contextmanager
def progress_bar(description: str, total: int, *, start: int = 0, enabled: bool = True) -> Iterator[Bar]:
    """Show a bar on standard error while the block runs, or nothing where `enabled` is false."""
    columns = [TextColumn("[bold]{task.description:<18}"), BarColumn(bar_width=28), MofNCompleteColumn()]
    columns += [TimeRemainingColumn(), TextColumn("[dim]{task.fields[figures]}")]
    with Progress(*columns, console=console, disable=not (enabled and is_main())) as progress:
        progress.add_task(description, total=total, completed=start, figures="")
        yield Bar(progress)
