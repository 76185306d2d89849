"""Write the report of an audit, its module and their figures: one HTML file, and its Markdown twin."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from ..evaluation.images import Folders
from ..files import write_text
from .changes import changes
from .costs import costs
from .document import Document, Missing
from .found import found
from .glance import glance
from .html import render_html
from .markdown import render_markdown
from .markdown_pictures import save_pictures
from .recipe import limits, recipe
from .sources import Parts, Sources, read_parts

if TYPE_CHECKING:
    from ..data.captioned import CaptionedImages

TITLE = "Hidden bias, found and measured"
HTML, MARKDOWN = "report.html", "report.md"
NO_AUDIT = Missing(
    "No audit was given, so what was hidden is not told here.", "invdiff audit MODEL DATA --output audit"
)
NO_RESULTS = Missing(
    "No results were given, so nothing was measured here.",
    "invdiff evaluate base=DIR guided=DIR --annotator ANNOTATOR --attribute ATTRIBUTE",
)


def save_report(
    output_dir: str | Path,
    *,
    audit: str | Path | None = None,
    data: str | Path | CaptionedImages | None = None,
    results: str | Path | None = None,
    images: Mapping[str, Folders] | None = None,
    module: str | Path | None = None,
    run: str | Path | None = None,
    title: str = TITLE,
) -> Path:
    """Write `report.html` and `report.md` to `output_dir` and return the former.

    The HTML is one file that loads nothing. Beside the Markdown lie its pictures, `report-*.png`. The same parts give
    the same bytes. Reports are passed on: images whose files lie outside the folder of generated images are refused,
    audited images outside the data's folder are not shown, links followed, and no path of the machine is told.

    Args:
        output_dir: Where to write.
        audit: What `Audit.save` or `invdiff audit` wrote.
        data: The images that were audited, to show those most typical of each group, and, where a column is named as
            the attribute measured, to count its classes beside those of generated images.
        results: A results.json of `invdiff evaluate` or `invdiff demo`.
        images: Model name, as in the results, to its folder or folders of generated images, to show pairs.
        module: What `invdiff train` wrote, to say how it was made.
        run: The folder that these lie in: commands name them from there. Without it, a part whose path is not
            relative is called by the last part of it.
        title: The heading.

    Raises:
        ConfigError: There is neither an audit nor results.
        InvDiffError: A part is absent or damaged, or the data is not what was audited.
    """
    parts = Parts(
        audit=None if audit is None else Path(audit),
        data=data,
        results=None if results is None else Path(results),
        images=images or {},
        module=None if module is None else Path(module),
        run=None if run is None else Path(run),
    )
    return write_report(output_dir, parts, title=title)


def write_report(output_dir: str | Path, parts: Parts, *, title: str = TITLE) -> Path:
    """Do what `save_report` does, with parts such as `find_parts` returns."""
    output_dir = Path(output_dir)
    sources = read_parts(parts)
    document = make_document(sources, title=title)
    pictures = save_pictures(output_dir, sources, parts.audit)
    write_text(output_dir / MARKDOWN, render_markdown(document, pictures=pictures))
    write_text(output_dir / HTML, render_html(document))
    return output_dir / HTML


def make_document(sources: Sources, *, title: str = TITLE) -> Document:
    """Return what a report says."""
    results = sources.measured.results if sources.measured else None
    own = version("invdiff")
    return Document(
        title=title,
        version=own,
        glance=glance(sources),
        found=found(sources.audit, confidence=results.confidence if results else 0.95) if sources.audit else None,
        changes=changes(sources),
        costs=costs(sources),
        recipe=recipe(sources, version=own),
        limits=limits(sources),
        no_audit=NO_AUDIT,
        no_results=NO_RESULTS,
    )
