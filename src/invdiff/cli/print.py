"""What commands print: progress, tables, and the command to run next."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..launched import is_first_process
from ..text import one_line, or_dash

if TYPE_CHECKING:
    from ..auditing.result import Audit
    from ..evaluation.results import Results

INTERRUPTED = 130  # the shell's exit code for a program stopped by Ctrl-C


def fail(message: str) -> NoReturn:
    """End the program with an error in one line."""
    Console(stderr=True).print(Text(f"error: {message}", style="red"), soft_wrap=True)
    raise typer.Exit(1) from None


def say(text: str, *, quiet: bool) -> None:
    """Print what goes on, on standard error."""
    if not quiet and is_first_process():
        typer.echo(text, err=True)


def say_loading(what: str, *, quiet: bool) -> None:
    """Say what is loaded, and keep notices and bars of diffusers and transformers off the terminal from now on."""
    say(f"loading {what}", quiet=quiet)
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for logging in (transformers_logging, diffusers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()


def finish(result: str, *next_command: object, hint: str = "") -> None:
    """End a command with one line: where the result lies, and the command to run next, `invdiff` left out."""
    following = f" Next{hint}: invdiff {shlex.join(map(str, next_command))}" if next_command else ""
    if is_first_process():
        typer.echo(result + following)


def print_audit(audit: Audit) -> None:
    """Print the hidden factors, why other prompts hide none, and words for the groups where there are any.

    The table fits 80 columns.
    """
    rows = []
    for place, factor in enumerate(audit.factors):
        for split in factor.splits:
            groups = [
                f"{audit.group_name(group, place).removeprefix('group ')}: {share:.1%} ({low:.1%} to {high:.1%})"
                for group, (share, (low, high)) in enumerate(zip(split.shares, split.intervals, strict=True))
            ]
            prompt = one_line(audit.prompts[split.prompt].prompt, 80)
            cells = {"factor": factor.name, "prompt": prompt, "groups": "\n".join(groups)}
            rows.append(cells | {"separation": or_dash(split.separation), "agreement": or_dash(split.agreement)})
    if rows:
        rows = [{name: cell for name, cell in row.items() if any(of[name] != "–" for of in rows)} for row in rows]
        what = "Factors asked for" if audit.asked else "Hidden factors"
        title = f"{what} ({audit.forwards_per_image:g} denoiser forwards per image)"
        caption = "Groups have 95% intervals. A rare one can also be wrong captions: look."
        _print_table(title, rows, caption, factor=_FOLDED, prompt=_FOLDED, groups={"no_wrap": True})
    told = [("nothing found under", of, of.reason) for of in audit.prompts if not of.found]
    told += [("power under", of, of.power) for of in audit.prompts if not of.found]
    told += [("note on", of, note) for of in audit.prompts for note in of.notes]
    lines = [
        f"{what} {one_line(of.prompt, 80)!r} ({of.num_images:,} image{'s' * (of.num_images > 1)}): {words}"
        for what, of, words in told
        if words
    ]
    lines += filter(None, [audit.caveats, audit.asked])
    if audit.words:
        model = one_line(audit.words.model, 80)
        lines.append(f"Words that separate groups, of {audit.words.vocabulary}, as {model} sees them")
        pooled = {entry.factor for entry in audit.words.groups if entry.prompt is None}
        for entry in audit.words.groups:
            if entry.prompt is None or entry.factor not in pooled:
                under = "" if entry.prompt is None else f", {one_line(audit.prompts[entry.prompt].prompt, 60)!r}"
                lines.append(f"  {audit.factors[entry.factor].name}{under}, group {entry.group}: {entry.line}")
    if lines:
        Console().print(Text("\n".join(lines)), soft_wrap=True)


def print_results(results: Results) -> None:
    """Print the headline measures of each model at each guidance scale, and what to know before trusting them.

    The table fits 80 columns: figures corrected for the annotator's errors are shown where they differ.
    """
    from ..report.figures import correction_matters, floors, images_each  # not needed by other commands

    figures, by = [results.judged(measures) for _, _, measures in results.each()], results.criterion
    matters = correction_matters(figures)
    counts = {images_each(measures) for _, _, measures in results.each()}
    caption = f"floor: {by.name} expected of a {by.sampler} with as many independent images"
    if matters:
        shown = floors(figures, "corrected_floor")
        caption += f"\ncorrected: for the annotator's errors on held-out images; of a {by.sampler} {shown}"
    elif any(figure.corrected is not None for figure in figures):
        caption += f"\nCorrecting for the annotator's errors on held-out images moves no {by.name.split()[0]} shown."
    rows = []
    for (model, scale, measures), figure in zip(results.each(), figures, strict=True):
        cells = {
            "model": model,
            "CFG": scale.removesuffix(".0"),
            "images": images_each(measures) if len(counts) > 1 else None,
            by.name.split()[0]: f"{figure.value:.3f}",
            f"{results.confidence:.0%} interval": f"{figure.low:.3f} to {figure.high:.3f}",
            "floor": f"{figure.floor:.3f}",
            "corrected": _or_dash(figure.corrected, ".3f") if matters else None,
            "subject": _or_dash(measures.accuracy, ".1%"),
            "Fréchet": _or_dash(measures.frechet, ".3g"),
        }
        rows.append({name: cell for name, cell in cells.items() if cell is not None})
    unmeasured = {"subject": "--subject-attribute", "Fréchet": "--reference"}
    for name in [name for name in unmeasured if all(row[name] == "-" for row in rows)]:
        caption += f"\nnot measured: {name} ({unmeasured[name]})"
        rows = [{key: cell for key, cell in row.items() if key != name} for row in rows]
    details = dict.fromkeys(rows[0], _NUMBER | {"no_wrap": True}) | {"model": _FOLDED | {"min_width": 6}}
    each = f", {min(counts)} images of each prompt" if len(counts) == 1 else ""
    _print_table(f"{by.name} of {results.attribute}{each}", rows, caption, **details)
    for note in results.notes:
        Console().print(Text(f"Note: {note}."), soft_wrap=True)


def finish_annotator(what: str, output: Path, summary: Mapping[str, Mapping[str, Any]]) -> None:
    """Print how well held-out images were annotated, from `HeldOut.summary()`, and end the command."""
    rows = [
        {
            "attribute": attribute,
            "classes": ", ".join(figures["classes"]),
            "images": f"{figures['images']}",
            "all": f"{figures['accuracy']:.1%}",
            "worst combination": _or_dash(figures["worst_combination"], ".1%"),
            "calibration error": f"{figures['calibration_error']:.3f}",
        }
        for attribute, figures in summary.items()
    ]
    caption = "calibration error: mean distance of stated confidence to accuracy (ECE, 15 bins)"
    _print_table("Accuracy on held-out images", rows, caption, attribute=_FOLDED, classes=_FOLDED)
    drawn = (output.parent / "images" / name for name in ("base", "guided"))
    words = ("evaluate", *drawn, "--annotator", output, "--attribute", next(iter(summary)))
    finish(f"The {what} is in {output}.", *words)


_NUMBER: dict[str, Any] = {"justify": "right"}
_FOLDED: dict[str, Any] = {"overflow": "fold"}


def _print_table(title: str, rows: Sequence[Mapping[str, str]], caption: str, **details: dict[str, Any]) -> None:
    """Print rows of cells by the names of their columns, which are of numbers unless `details` says otherwise."""
    table = Table(title=Text(title), caption=caption)
    for name in rows[0]:
        table.add_column(name, **details.get(name, _NUMBER))
    for row in rows:
        table.add_row(*map(Text, row.values()))
    Console().print(table)


def _or_dash(value: float | None, shape: str) -> str:
    return "-" if value is None else f"{value:{shape}}"
