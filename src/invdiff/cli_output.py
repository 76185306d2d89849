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

if TYPE_CHECKING:
    from .groups.result import Audit

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
    Console().print(table)


def print_results(results: Mapping[str, Mapping[str, Mapping[str, Any]]], attribute: str) -> None:
    """Print the measures of each model at each guidance scale, given as `Results.to_dict()`."""
    table = Table(
        title=f"Bias of {attribute}",
        caption="floor: Bias expected of a perfectly fair model with as many images",
    )
    table.add_column("model")
    for name in ("guidance scale", "images per prompt", "Bias", "floor", "95% interval", "accuracy", "Fréchet"):
        table.add_column(name, justify="right")
    for model, by_scale in results.items():
        for scale, measures in by_scale.items():
            low, high = measures["bias_ci"]
            table.add_row(
                Text(model),
                f"{float(scale):g}",
                str(measures["images_per_prompt"]),
                f"{measures['bias']:.3f}",
                f"{measures['bias_floor']:.3f}",
                f"{low:.3f} to {high:.3f}",
                "-" if measures["accuracy"] is None else f"{measures['accuracy']:.1%}",
                "-" if measures["frechet"] is None else f"{measures['frechet']:.3g}",
            )
    Console().print(table)


def print_annotator(config: Mapping[str, Any]) -> None:
    """Print how well held-out images were annotated."""
    table = Table(title="Accuracy on held-out images")
    for name in ("attribute", "classes"):
        table.add_column(name)
    for name in ("all", "worst combination"):
        table.add_column(name, justify="right")
    for attribute, classes in config["attributes"].items():
        worst = config["holdout_worst_group"][attribute]
        table.add_row(
            Text(attribute),
            Text(", ".join(classes)),
            f"{config['holdout_accuracy'][attribute]:.1%}",
            "-" if worst is None else f"{worst:.1%}",
        )
    Console().print(table)
