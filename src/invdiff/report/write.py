"""Write the report of an audit, its module and their figures: one HTML file, and its Markdown twin with pictures."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ..errors import check_kinds
from ..evaluation.images import Folders
from ..files import write_text
from ..text import escape, one_line
from .audit_view import found, parted, withheld
from .compare import Comparison, compare, label, over_guidance, over_module
from .figures import at_scale, bias, corrected, percent, quoted, sentences, share_in_words
from .grids import save_before_after, save_charts, save_groups
from .plots import DARK, INK, PAPER, RULE, SOFT
from .read import Parts, Run, read_run
from .reproduce import reproduce
from .results_view import changes, costs, glance, where

if TYPE_CHECKING:
    from ..data.captioned import CaptionedImages

HTML, MARKDOWN = "report.html", "report.md"
PICTURES = {  # file name and title of what lies beside the Markdown
    "before_after": ("report-before-after.png", "The same prompts and seeds before and after"),
    "groups": ("report-groups.png", "The images most typical of each hidden group"),
    "bias": ("report-bias.png", "How uneven images are at every guidance scale"),
    "scale": ("report-module-scale.png", "How uneven and how good images are at every scale of the module"),
}
MOST_CHARACTERS = 300  # of a caption or a name; a longer one is cut and ends in an ellipsis


def save_report(
    output_dir: str | Path,
    *,
    audit: str | Path | None = None,
    data: str | Path | CaptionedImages | None = None,
    results: str | Path | None = None,
    images: Mapping[str, Folders] | None = None,
    module: str | Path | None = None,
    run: str | Path | None = None,
    data_words: Sequence[str] = (),
    title: str = "",
) -> Path:
    """Write `report.html` and `report.md` to `output_dir` and return the former.

    The HTML is one file that loads nothing. Beside the Markdown lie its pictures, `report-*.png`. The same parts give
    the same bytes. Reports are passed on: images whose files lie outside the folder of generated images are refused,
    audited images outside the data's folder are not shown, links followed, and no path of the machine is shown.

    Args:
        output_dir: Where to write.
        audit: A folder that `invdiff audit` wrote.
        data: The images that were audited; a column named as the attribute measured is counted beside images.
        results: A results.json of `invdiff evaluate` or `invdiff demo`.
        images: Model name, as in the results, to its folder or folders of generated images, to show pairs. Folders at
            another scale of the module than was measured are left out.
        module: A folder that `invdiff train` wrote, to say how it was made.
        run: The folder that these lie in: commands name them from there, else by the last part of a path.
        data_words: The data on the command line, and the options to read it with; empty for where it lies.
        title: The heading; "" says whether a hidden bias was found, and measured.

    Raises:
        InvDiffError: There is neither an audit nor results, a part is damaged, or the data is not what was audited.
    """
    check_kinds(audit=(audit, str | Path | None), results=(results, str | Path | None))
    output_dir = Path(output_dir)
    audit, results, module, folder = (None if of is None else Path(of) for of in (audit, results, module, run))
    read = read_run(Parts(audit, data, results, images or {}, module, folder, data_words))
    chosen, own = compare(read), version("invdiff")
    view = {
        "title": title or _title(read),
        "version": own,
        "glance": glance(read, chosen),
        "found": found(read, read.audit) if read.audit else None,
        "changes": changes(read, chosen) if chosen else None,
        "costs": costs(chosen, read.results) if chosen and read.results else None,
        "reproduce": reproduce(read, own),
        "run": read,
        "chosen": chosen,
    }
    pictures = _save_pictures(output_dir, read, chosen)
    page = _markdown_templates().get_template("report.md.j2").render(view=view, pictures=pictures)
    write_text(output_dir / MARKDOWN, re.sub(r"\n{3,}", "\n\n", page).strip() + "\n")
    light = {"ink": INK, "soft": SOFT, "rule": RULE, "paper": PAPER}
    theme = {"light": light, "dark": {name: DARK[colour] for name, colour in light.items()}}
    page = html_templates("invdiff.report").get_template("report.html.j2").render(view=view, theme=theme)
    write_text(output_dir / HTML, page)
    return output_dir / HTML


def _title(run: Run) -> str:
    if run.audit and parted(run.audit):
        return "Hidden bias, found and measured" if run.results else "Hidden bias, found"
    return "Bias, measured" if run.results else "No hidden bias was found"


@cache
def html_templates(package: str) -> Environment:
    """The templates of a package, and those of reports; no text that others wrote is taken for markup."""
    cut, brief = partial(one_line, limit=MOST_CHARACTERS), partial(one_line, limit=60)
    return _environment(package, _shown, cut=cut, brief=brief)


@cache
def _markdown_templates() -> Environment:
    cell = partial(_escaped, limit=MOST_CHARACTERS)
    return _environment("invdiff.report", partial(_escaped, limit=1000), cell=cell, code=_code, share=share_in_words)


def _environment(package: str, finalize: Callable[[Any], Any], **filters: Callable[..., Any]) -> Environment:
    loader = ChoiceLoader([PackageLoader(package), PackageLoader("invdiff.report")])
    made = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, finalize=finalize)
    made.trim_blocks = made.lstrip_blocks = True
    shared = {"percent": percent, "bias": bias, "quoted": quoted, "sentences": sentences, "at_scale": at_scale}
    made.filters.update(shared, label=label, corrected=corrected, where=where, **filters)
    return made


def _shown(value: object) -> object:
    """Replace what no page should hold: characters that turn the direction of text, or that UTF-8 does not have."""
    if not isinstance(value, str) or isinstance(value, Markup) or (value.isascii() and value.isprintable()):
        return value
    return "".join(
        "\ufffd" if unicodedata.category(c) in ("Cf", "Cs", "Cc") and c not in "\n\u200c\u200d" else c for c in value
    )


def _escaped(value: Any, limit: int) -> Markup:
    return value if isinstance(value, Markup) else Markup(escape(str(value), limit))  # noqa: S704


def _code(text: str) -> Markup:
    """A Markdown block that no text inside can end."""
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
    return Markup(f"{fence}bash\n{one_line(text)}\n{fence}")  # noqa: S704


def _save_pictures(folder: Path, run: Run, chosen: Comparison | None) -> dict[str, Any]:
    """Write the pictures that the parts suffice for and return their part of `PICTURES`; remove earlier ones."""
    save: dict[str, Callable[[Path], None]] = {}
    if chosen and run.results:
        charts = {"bias": over_guidance(run.results, chosen)[:1], "scale": over_module(run.results, chosen)}
        save = {name: partial(save_charts, charts=of, title=PICTURES[name][1]) for name, of in charts.items() if of}
    if chosen and chosen.pairs:
        save["before_after"] = partial(save_before_after, chosen=chosen)
    if run.audit and run.data is not None and not withheld(run):
        save["groups"] = partial(save_groups, run=run)
    for name, (file_name, _) in PICTURES.items():
        if name in save:
            save[name](folder / file_name)
        else:
            (folder / file_name).unlink(missing_ok=True)
    return {name: picture for name, picture in PICTURES.items() if name in save}
