"""Write the report of an audit, its module and their figures: one HTML file, and its Markdown twin."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from ..evaluation.manifest import Folders
from ..files import atomic_path, write_text
from .audit_pictures import OVERVIEW
from .changes import changes
from .costs import costs
from .document import Document, Missing
from .found import found
from .glance import glance
from .html import render_html
from .markdown import render_markdown
from .recipe import limits, recipe
from .sources import Parts, Sources, read_parts
from .style import SOFT, Sheet, wrap

if TYPE_CHECKING:
    from ..data.captioned import CaptionedImages

TITLE = "Hidden bias, found and measured"
HTML, MARKDOWN = "report.html", "report.md"
PICTURES = {"before_after": "report-before-after.png", "groups": "report-groups.png", "bias": "report-bias.png"}
"""What the Markdown shows, beside it."""
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
    title: str = TITLE,
) -> Path:
    """Write `report.html` and `report.md` to `output_dir` and return the former.

    The HTML is one file that loads nothing. Beside the Markdown lie its pictures, `report-*.png`. The same parts give
    the same bytes.

    Args:
        output_dir: Where to write.
        audit: What `Audit.save` or `invdiff audit` wrote.
        data: The images that were audited, to show those most typical of each group.
        results: A results.json of `invdiff evaluate` or `invdiff demo`.
        images: Model name, as in the results, to its folder or folders of generated images, to show pairs.
        module: What `invdiff train` wrote, to say how it was made.
        title: The heading.

    Raises:
        ConfigError: There is neither an audit nor results.
        InvDiffError: A part is absent or damaged, or the data is not what was audited.
    """
    sources = read_parts(
        Parts(
            audit=None if audit is None else Path(audit),
            data=data,
            results=None if results is None else Path(results),
            images=images or {},
            module=None if module is None else Path(module),
        )
    )
    document = make_document(sources, title=title)
    output_dir = Path(output_dir)
    pictures = _pictures(output_dir, sources, document, None if audit is None else Path(audit))
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


def _pictures(output_dir: Path, sources: Sources, document: Document, audit: Path | None) -> dict[str, str]:
    """Write the Markdown's pictures, remove those of an earlier report, and return the names of those there are."""
    written: dict[str, str] = {}
    if document.glance.pairs:
        _strip(document).save(output_dir / PICTURES["before_after"])
        written["before_after"] = PICTURES["before_after"]
    if audit is not None and (audit / OVERVIEW).is_file():
        _write_bytes(output_dir / PICTURES["groups"], (audit / OVERVIEW).read_bytes())
        written["groups"] = PICTURES["groups"]
    if document.costs and document.costs.curves:
        written["bias"] = PICTURES["bias"]
        picture = document.costs.curves[0].light
        _write_bytes(output_dir / PICTURES["bias"], base64.b64decode(picture.partition(",")[2]))
    for name, file_name in PICTURES.items():
        if name not in written:
            (output_dir / file_name).unlink(missing_ok=True)
    return written


def _write_bytes(path: Path, data: bytes) -> None:
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def _strip(document: Document) -> Sheet:
    """Draw the pairs of the glance on one sheet, base above guided."""
    pairs = document.glance.pairs
    margin, gap, side, label = 24, 10, 132, 150
    sheet = Sheet(2 * margin + label + len(pairs) * (side + gap) - gap, 2 * (margin + side) + gap)
    names = document.changes.names if document.changes else ("", "")
    for row, (name, images) in enumerate(
        zip(names, ([pair.before for pair in pairs], [pair.after for pair in pairs]), strict=True)
    ):
        y = margin + row * (side + gap)
        for place, line in enumerate(wrap(name, label - 20, 20)):
            sheet.text(margin, y + side / 2 + 26 * place, line, size=20, colour=SOFT)
        opened = [Image.open(io.BytesIO(base64.b64decode(image.uri.partition(",")[2]))) for image in images]
        sheet.images(opened, margin + label, y, side, columns=len(pairs), gap=gap)
    return sheet
