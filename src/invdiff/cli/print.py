"""What commands print: progress, tables, errors, and the command to run next."""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..errors import ConfigError, InvDiffError
from ..text import one_line

if TYPE_CHECKING:
    from ..auditing.result import Audit
    from ..evaluation.results import Results

INTERRUPTED = 130
"""The shell's exit code for a program stopped by Ctrl-C."""


@contextlib.contextmanager
def plain_errors(*, debug: bool) -> Iterator[None]:
    """Turn errors that a user can mend into one line on standard error; `debug` keeps their traceback."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("stopped; run the same command again to go on", err=True)
        raise typer.Exit(INTERRUPTED) from None
    except InvDiffError as error:
        if debug:
            raise
        Console(stderr=True).print(Text(f"error: {error}", style="red"), soft_wrap=True)
        raise typer.Exit(1) from None


def silence_libraries() -> None:
    """Keep notices of diffusers and transformers and their bars for reading a few files off the terminal."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for logging in (transformers_logging, diffusers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()


def is_first_process() -> bool:
    """Whether this is the process that prints and saves: of those that torchrun starts, the first."""
    return os.environ.get("RANK", "0") == "0"


def one_process(command: str) -> None:
    """Raise `ConfigError` where a command that runs as one process is started as several."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(f"Expected one process for {command}, got several. Run it without torchrun.")


def say(text: str, *, quiet: bool) -> None:
    """Print what goes on, on standard error."""
    if not quiet and is_first_process():
        typer.echo(text, err=True)


def finish(result: str, next_command: Sequence[str] = (), *, hint: str = "") -> None:
    """End a command with one line: where the result lies, and the command to run next."""
    following = f" Next{hint}: {shlex.join(next_command)}" if next_command else ""
    if is_first_process():
        typer.echo(result + following)


def print_audit(audit: Audit) -> None:
    """Print what was found under each prompt, and words for the groups where there are any."""
    rows = []
    for entry in audit.prompts:
        shares = " / ".join(f"{share:.1%}" for share in entry.shares) if entry.found else "not found"
        figures = [f"{entry.stability:.2f}", f"{entry.separation:.2f}"] if entry.found else ["", ""]
        rows.append([entry.prompt, f"{len(entry.captions)}", f"{entry.num_images}", shares, entry.reason, *figures])
    columns = {"prompt": _FOLDED, "captions": _NUMBER, "images": _NUMBER, "groups": {"no_wrap": True}, "why": {}}
    title = f"Hidden groups ({audit.forwards_per_image:g} denoiser forwards per image)"
    _print_table(title, columns | {"stability": _NUMBER, "separation": _NUMBER}, rows)
    if audit.words is None:
        return
    everywhere = [entry for entry in audit.words.groups if entry.prompt is None]
    where = "over all prompts" if everywhere else "under the prompt"
    model = one_line(audit.words.model, 80)
    _print_lines([f"Words that distinguish groups {where}, of {audit.words.vocabulary}, as {model} sees them"])
    for words in everywhere or audit.words.groups:
        factor = f"factor {words.factor}, " if words.factor else ""
        _print_lines([f"  {factor}group {words.group}: {words.line}"])


def say_edits(audit: Audit, *, quiet: bool) -> None:
    """Print on standard error what people changed about an audit, where that changes the training."""
    left_out = len(audit.edits.left_out)
    if left_out:
        say(f"images left out by people: {left_out:,} of {len(audit.names):,}", quiet=quiet)
    for index, cuts in audit.edits.cuts.items():
        scores = ", ".join(f"{cut:g}" for cut in cuts)
        say(f"cuts moved by people: {one_line(audit.prompts[index].prompt, 80)!r} at {scores}", quiet=quiet)


def print_results(results: Results) -> None:
    """Print the headline measures of each model at each guidance scale, and what to know before trusting them.

    The table fits 80 columns: figures corrected for the annotator's errors are shown where they differ.
    """
    measured = [measures for _, _, measures in results.each()]
    biases = [measures.bias_estimate for measures in measured]
    known = [(bias.corrected, bias.value) for bias in biases if bias.corrected is not None]
    matters = any(abs(corrected - plain) >= 0.0005 for corrected, plain in known)
    counts = sorted({measures.images_per_prompt for measures in measured})
    dropped = {"images"} if len(counts) == 1 else set()
    dropped |= set() if matters else {"corrected"}
    caption = "floor: Bias expected of a perfectly fair model with as many images"
    if matters:
        caption += "\ncorrected: for the annotator's errors on held-out images; its interval is in the results"
    elif known:
        caption += "\nCorrecting for the annotator's errors on held-out images moves no Bias shown."
    rows = []
    for model, scale, measures in results.each():
        bias = measures.bias_estimate
        cells = {
            "model": model,
            "CFG": scale.removesuffix(".0"),
            "images": f"{measures.images_per_prompt}",
            "Bias": f"{bias.value:.3f}",
            f"{results.confidence:.0%} interval": f"{bias.low:.3f} to {bias.high:.3f}",
            "floor": f"{bias.floor:.3f}",
            "corrected": _or_dash(bias.corrected, ".3f"),
            "subject": _or_dash(measures.accuracy, ".1%"),
            "Fréchet": _or_dash(measures.frechet, ".3g"),
        }
        rows.append({name: cell for name, cell in cells.items() if name not in dropped})
    columns = {name: _NUMBER | {"no_wrap": True} for name in rows[0]} | {"model": _FOLDED | {"min_width": 6}}
    title = f"Bias of {results.attribute}" + (f", {counts[0]} images of each prompt" if len(counts) == 1 else "")
    _print_table(title, columns, [list(row.values()) for row in rows], caption=caption)
    _print_lines(f"Note: {note}." for note in results.notes)


def print_annotator(
    summary: Mapping[str, Mapping[str, Any]], *, before: Mapping[str, Mapping[str, float]] | None = None
) -> None:
    """Print how well held-out images were annotated.

    Args:
        summary: From `HeldOut.summary()`.
        before: Each attribute's calibration error without its temperature, under "uncalibrated".
    """
    rows = []
    for attribute, figures in summary.items():
        error = f"{figures['calibration_error']:.3f}"
        if before is not None:
            error += f" (was {before[attribute]['uncalibrated']:.3f})"
        shares = [f"{figures['accuracy']:.1%}", _or_dash(figures["worst_combination"], ".1%")]
        rows.append([attribute, ", ".join(figures["classes"]), f"{figures['images']}", *shares, error])
    columns = {"attribute": _FOLDED, "classes": _FOLDED}
    columns |= dict.fromkeys(("images", "all", "worst combination", "calibration error"), _NUMBER)
    caption = "calibration error: mean distance of stated confidence to accuracy (ECE, 15 bins)"
    _print_table("Accuracy on held-out images", columns, rows, caption=caption)


_NUMBER: dict[str, Any] = {"justify": "right"}
_FOLDED: dict[str, Any] = {"overflow": "fold"}


def _print_table(
    title: str, columns: Mapping[str, dict[str, Any]], rows: Iterable[Sequence[str]], *, caption: str | None = None
) -> None:
    table = Table(title=Text(title), caption=caption)
    for name, details in columns.items():
        table.add_column(name, **details)
    for row in rows:
        table.add_row(*map(Text, row))
    Console().print(table)


def _print_lines(lines: Iterable[str]) -> None:
    for line in lines:
        Console().print(Text(line), soft_wrap=True)


def _or_dash(value: float | None, shape: str) -> str:
    return "-" if value is None else f"{value:{shape}}"
