"""The command that writes a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_options import (
    DATA_PANEL,
    CaptionColumn,
    DataSource,
    ImageColumn,
    Limit,
    MaxUnreadable,
    NoCaptions,
    Output,
    Split,
    option,
)
from .cli_output import finish, one_process
from .errors import ConfigError

PANEL = "The way through"

app = typer.Typer()


@app.command(rich_help_panel=PANEL, epilog="Example: invdiff report out/demo --output out/report")
def report(
    output: Output,
    run: Annotated[
        Path | None,
        typer.Argument(
            metavar="RUN",
            help="A folder with audit/, module/, data/, results.json and folders of images named after their models, "
            "such as `invdiff demo` writes. Any part may be absent, or named apart.",
        ),
    ] = None,
    audit: Annotated[Path | None, option("What `invdiff audit` wrote.", metavar="DIR")] = None,
    results: Annotated[
        Path | None, option("What `invdiff evaluate` or `invdiff demo` wrote: results.json.", metavar="FILE")
    ] = None,
    images: Annotated[
        list[str] | None,
        option("NAME=DIR: generated images of a model, named as in the results; repeat for more.", metavar="NAME=DIR"),
    ] = None,
    module: Annotated[Path | None, option("What `invdiff train` wrote.", metavar="DIR")] = None,
    data: Annotated[
        str | None, option("The images that were audited.", "--data", panel=DATA_PANEL, metavar="DATA")
    ] = None,
    title: Annotated[str | None, option("The heading.")] = None,
    caption_column: CaptionColumn = None,
    image_column: ImageColumn = None,
    split: Split = "train",
    limit: Limit = None,
    no_captions: NoCaptions = False,
    max_unreadable: MaxUnreadable = 0.01,
) -> None:
    """Write what was found, changed and measured as one HTML file to read and forward, and as Markdown."""
    one_process("report")
    from .report.save import TITLE, write_report
    from .report.sources import Parts, find_parts

    if run is None and audit is None and results is None:
        raise ConfigError("Expected a RUN folder, --audit or --results to report on, got none.")
    source = DataSource(data or "", caption_column, image_column, split, limit, max_unreadable, no_captions)
    if data is None and source.flags():
        raise ConfigError(f"Expected --data beside {source.flags()[0]}, got none: only data has columns.")
    parts = find_parts(run, results=results) if run is not None else Parts()
    given: dict[str, Any] = {
        "audit": audit,
        "results": results,
        "images": _named(images or ()),
        "module": module,
        "data": source.load() if data else None,
        "data_words": [data, *source.flags()] if data else [],
    }
    parts = replace(parts, **{name: part for name, part in given.items() if part})
    if parts.audit is None and parts.results is None:
        raise ConfigError(
            f"Expected audit/ or results.json in {run}, found neither. Give a folder that `invdiff demo` wrote, or "
            "name the parts with --audit and --results."
        )
    written = write_report(output, parts, title=title or TITLE)
    finish(f"The report is {written}, and as Markdown {written.with_suffix('.md')}.")


def _named(images: Sequence[str]) -> dict[str, list[Path]]:
    """Return model name to folders from words such as `base=out/base`.

    Raises:
        ConfigError: A folder has no name.
    """
    folders: dict[str, list[Path]] = {}
    for words in images:
        name, equals, folder = words.partition("=")
        if not (name and equals and folder):
            raise ConfigError(f"Expected --images NAME=DIR, such as --images base=out/base, got {words!r}.")
        folders.setdefault(name, []).append(Path(folder))
    return folders
