"""What commands print: tables, errors and the line that says what to run next."""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .errors import ConfigError, InvDiffError
from .text import one_line

if TYPE_CHECKING:
    from .auditing.result import Audit, AuditWords
    from .evaluation.results import Results

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
    """Keep off the terminal what is no news to the user of a command.

    That is notices about optional packages and unusual parts, and bars for reading a few files.
    """
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    diffusers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    diffusers_logging.disable_progress_bar()


def is_first_process() -> bool:
    """Whether this is the process that prints and saves: of those that torchrun starts, the first."""
    return os.environ.get("RANK", "0") == "0"


def one_process(command: str) -> None:
    """Raise `ConfigError` where a command that runs as one process is started as several."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(f"Expected one process for {command}, got several. Run it without torchrun.")


def say(text: str, *, quiet: bool) -> None:
    """Tell what goes on, on standard error."""
    if not quiet and is_first_process():
        typer.echo(text, err=True)


def finish(result: str, next_command: Sequence[str] = (), *, hint: str = "") -> None:
    """End a command with one line: where the result lies, and the command to run next."""
    following = f" Next{hint}: {shlex.join(next_command)}" if next_command else ""
    if is_first_process():
        typer.echo(result + following)


def print_audit(audit: Audit) -> None:
    """Print what was found under each prompt."""
    table = Table(title=f"Hidden groups ({audit.forwards_per_image:g} denoiser forwards per image)")
    table.add_column("prompt", overflow="fold")
    for name in ("captions", "images"):
        table.add_column(name, justify="right")
    table.add_column("groups", no_wrap=True)
    table.add_column("why")
    for name in ("stability", "separation"):
        table.add_column(name, justify="right")
    for entry in audit.prompts:
        figures = [f"{entry.stability:.2f}", f"{entry.separation:.2f}"] if entry.found else ["", ""]
        table.add_row(
            Text(entry.prompt),
            str(len(entry.captions)),
            str(entry.num_images),
            Text(" / ".join(f"{share:.1%}" for share in entry.shares) if entry.found else "not found"),
            Text(entry.reason),
            *figures,
        )
    console = Console()
    console.print(table)
    if audit.words is not None:
        _print_words(console, audit.words)


def _print_words(console: Console, words: AuditWords) -> None:
    """Print what tells each group apart: over all prompts, where there are several."""
    everywhere = [entry for entry in words.groups if entry.prompt is None]
    where = "over all prompts" if everywhere else "under the prompt"
    title = f"Words that tell groups apart {where}, of {words.vocabulary}: {one_line(words.model, 80)}'s opinion"
    console.print(Text(title), soft_wrap=True)
    for entry in everywhere or words.groups:
        factor = f"factor {entry.factor}, " if entry.factor else ""
        console.print(Text(f"  {factor}group {entry.group}: {entry.line}"), soft_wrap=True)


def say_edits(audit: Audit, *, quiet: bool) -> None:
    """Tell what people changed about an audit, where they changed what is trained on; on standard error."""
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
    measured = [measures for by_scale in results.models.values() for measures in by_scale.values()]
    biases = [measures.first.overall["bias"] for measures in measured]
    known = [(bias.corrected, bias.value) for bias in biases if bias.corrected is not None]
    matters = any(abs(corrected - plain) >= 0.0005 for corrected, plain in known)
    counts = sorted({measures.images_per_prompt for measures in measured})
    title = f"Bias of {results.attribute}" + (f", {counts[0]} images of each prompt" if len(counts) == 1 else "")
    caption = "floor: Bias expected of a perfectly fair model with as many images"
    if matters:
        caption += "\ncorrected: for the annotator's errors on held-out images; its interval is in the results"
    elif known:
        caption += "\nCorrecting for the annotator's errors on held-out images moves no Bias shown."
    table = Table(title=Text(title), caption=caption)
    table.add_column("model", overflow="fold", min_width=6)
    table.add_column("CFG", justify="right")
    if len(counts) > 1:
        table.add_column("images", justify="right")
    interval = f"{results.confidence:.0%} interval"
    for name in ("Bias", interval, "floor", *(["corrected"] if matters else []), "subject", "Fréchet"):
        table.add_column(name, justify="right", no_wrap=True)
    for model, by_scale in results.models.items():
        for scale, measures in by_scale.items():
            bias = measures.first.overall["bias"]
            table.add_row(
                Text(model),
                scale.removesuffix(".0"),
                *([str(measures.images_per_prompt)] if len(counts) > 1 else []),
                f"{bias.value:.3f}",
                f"{bias.low:.3f} to {bias.high:.3f}",
                f"{bias.floor:.3f}",
                *([_or_dash(bias.corrected, ".3f")] if matters else []),
                _or_dash(measures.accuracy, ".1%"),
                _or_dash(measures.frechet, ".3g"),
            )
    console = Console()
    console.print(table)
    for note in results.notes:
        console.print(Text(f"Note: {note}."), soft_wrap=True)


def _or_dash(value: float | None, shape: str) -> str:
    return "-" if value is None else f"{value:{shape}}"


def _with_ends(value: float | None, low: float | None, high: float | None) -> str:
    return "-" if value is None or low is None or high is None else f"{value:.3f} ({low:.3f} to {high:.3f})"


def print_annotator(
    summary: Mapping[str, Mapping[str, Any]], *, before: Mapping[str, Mapping[str, float]] | None = None
) -> None:
    """Print how well held-out images were annotated, given as `HeldOut.summary()`.

    `before` holds each attribute's calibration error without its temperature, under "uncalibrated".
    """
    table = Table(
        title="Accuracy on held-out images",
        caption="calibration error: mean distance of stated confidence to accuracy (ECE, 15 bins)",
    )
    for name in ("attribute", "classes"):
        table.add_column(name, overflow="fold")
    for name in ("images", "all", "worst combination", "calibration error"):
        table.add_column(name, justify="right")
    for attribute, figures in summary.items():
        worst, error = figures["worst_combination"], f"{figures['calibration_error']:.3f}"
        table.add_row(
            Text(attribute),
            Text(", ".join(figures["classes"])),
            str(figures["images"]),
            f"{figures['accuracy']:.1%}",
            "-" if worst is None else f"{worst:.1%}",
            error if before is None else f"{error} (was {before[attribute]['uncalibrated']:.3f})",
        )
    Console().print(table)
