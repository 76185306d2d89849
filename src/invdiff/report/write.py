"""Write the report of an audit, its module and their figures: one HTML file, and its Markdown twin with pictures."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ..data.images import read_image
from ..evaluation.images import Folders
from ..files import atomic_path, is_inside, write_text
from ..text import escape, one_line
from .audit_view import withheld
from .compare import (
    BASE,
    GUIDED,
    Comparison,
    compare,
    label,
    measured,
    modules_by_scale,
    over_guidance,
    over_module_scale,
    same_seeds,
)
from .figures import at_scale, bias, percent, share_in_words
from .grids import OVERVIEW, save_before_after, save_groups
from .groups import MOST_PROMPTS
from .plots import save_charts
from .read import Parts, Run, read_run
from .theme import DARK, INK, PAPER, RULE, SOFT
from .view import view_of

if TYPE_CHECKING:
    from ..data.captioned import CaptionedImages

TITLE = "Hidden bias, found and measured"
HTML, MARKDOWN = "report.html", "report.md"
PICTURES = {
    "before_after": "report-before-after.png",
    "groups": "report-groups.png",
    "bias": "report-bias.png",
    "scale": "report-module-scale.png",
}
MOST_CHARACTERS = 300
"""Of a caption or a name; a longer one is cut and ends in an ellipsis."""


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
    audited images outside the data's folder are not shown, links followed, and no path of the machine is shown.

    Args:
        output_dir: Where to write.
        audit: A folder that `Audit.save` or `invdiff audit` wrote.
        data: The images that were audited, to show those most typical of each group, and, where a column is named as
            the attribute measured, to count its classes beside those of generated images.
        results: A results.json of `invdiff evaluate` or `invdiff demo`.
        images: Model name, as in the results, to its folder or folders of generated images, to show pairs.
        module: A folder that `invdiff train` wrote, to say how it was made.
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
    """Do the same as `save_report`, with parts such as `find_parts` returns."""
    output_dir = Path(output_dir)
    run = read_run(parts)
    view = view_of(run, title=title)
    pictures = _save_pictures(output_dir, run, parts.audit)
    page = markdown_templates().get_template("report.md.j2").render(view=view, pictures=pictures)
    write_text(output_dir / MARKDOWN, re.sub(r"\n{3,}", "\n\n", page).strip() + "\n")
    page = html_templates("invdiff.report").get_template("report.html.j2").render(view=view, theme=theme())
    write_text(output_dir / HTML, page)
    return output_dir / HTML


def theme() -> dict[str, dict[str, str]]:
    """Colours by name, on light and on dark paper."""
    light = {"ink": INK, "soft": SOFT, "rule": RULE, "paper": PAPER}
    return {"light": light, "dark": {name: DARK[colour] for name, colour in light.items()}}


def html_templates(package: str) -> Environment:
    """The templates of a package; no text that others wrote is taken for markup."""
    environment = _environment(package, _shown)
    environment.filters.update(cut=_cut, brief=lambda text: one_line(text, 60), percent=percent, bias=bias)
    return environment


def markdown_templates() -> Environment:
    """The templates of Markdown; no text that others wrote is taken for markup."""
    environment = _environment("invdiff.report", lambda value: _escaped(value, 1000))
    environment.filters.update(cell=lambda text: _escaped(text, MOST_CHARACTERS), code=_code, share=share_in_words)
    return environment


def _environment(package: str, finalize: Callable[[Any], Any]) -> Environment:
    return Environment(
        loader=PackageLoader(package),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _cut(text: str) -> str:
    return one_line(text, MOST_CHARACTERS)


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


def _save_pictures(folder: Path, run: Run, audit: Path | None) -> dict[str, str]:
    """Write the pictures beside the Markdown that the parts suffice for, and remove those of an earlier report.

    Returns:
        File name by kind, as in `PICTURES`.
    """
    paths = {name: folder / file_name for name, file_name in PICTURES.items()}
    written = {"groups": _groups(paths["groups"], run, audit)}
    chosen = compare(run.results, run.images)
    if chosen:
        written["before_after"] = _before_after(paths["before_after"], run, chosen)
    if chosen and run.results:
        bias_chart = over_guidance(run.results, chosen)[:1]
        if bias_chart:
            written["bias"] = save_charts(paths["bias"], bias_chart, title="Bias at every guidance scale")
        charts = over_module_scale(modules_by_scale(run, chosen))
        if charts:
            title = "Bias and quality at every scale of the module"
            written["scale"] = save_charts(paths["scale"], charts, title=title)
    for name, path in paths.items():
        if not written.get(name):
            path.unlink(missing_ok=True)
    return {name: PICTURES[name] for name in PICTURES if written.get(name)}


def _groups(path: Path, run: Run, folder: Path | None) -> Path | None:
    audit, data = run.audit, run.data
    if audit is None or folder is None or withheld(run):
        return None
    if data is not None:
        rows = run.rows
        return save_groups(
            path, audit, run.splits[:MOST_PROMPTS], lambda chosen: [data.image(rows[at]) for at in chosen]
        )
    own = folder / OVERVIEW
    if audit.edits.changed or not own.is_file() or not is_inside(own, folder):
        return None  # people may have changed the audit since its own picture was drawn
    with atomic_path(path) as temporary:
        temporary.write_bytes(own.read_bytes())
    return path


def _before_after(path: Path, run: Run, chosen: Comparison) -> Path | None:
    both = (chosen.before, chosen.after)
    pairs = dict(list(same_seeds(run.images, chosen).items())[:2])
    if not pairs:
        return None
    models = measured(run.results, chosen)
    shares = {
        prompt: [models[model].shares[prompt] for model in both]
        for prompt in pairs
        if all(model in models and prompt in models[model].shares for model in both)
    }
    subtitle = "Both models' images of the same starting noise"
    if both == (BASE, GUIDED):
        subtitle = "Each image of the base model, and what guidance makes of the same starting noise"
    return save_before_after(
        path,
        {
            prompt: [(read_image(before.path), read_image(after.path)) for before, after in shown[:8]]
            for prompt, shown in pairs.items()
        },
        (label(chosen.before), label(chosen.after)),
        subtitle=f"{subtitle} · {at_scale(chosen.key).removeprefix('at ')}",
        shares=shares,
    )
