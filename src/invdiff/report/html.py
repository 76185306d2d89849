"""The report as one HTML file that opens anywhere, offline, and asks nothing of any server."""

from __future__ import annotations

import unicodedata

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ..text import one_line
from .document import Document
from .style import DARK, INK, PAPER, RULE, SOFT, percent
from .words import bias, share_in_words

MOST_CHARACTERS = 300
"""Of a caption or a name; what is longer is cut, and says so by its ellipsis."""


def render_html(document: Document) -> str:
    """Return the report as HTML; nothing in it that others wrote is taken for markup."""
    page = templates("invdiff.report").get_template("report.html.j2")
    theme = {"ink": INK, "soft": SOFT, "rule": RULE, "paper": PAPER}
    dark = {name: DARK[colour] for name, colour in theme.items()}
    return page.render(document=document, theme=theme, dark=dark)


def templates(package: str) -> Environment:
    """Return the templates of a package; nothing in what they show that others wrote is taken for markup."""
    environment = Environment(
        loader=PackageLoader(package),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(cut=_cut, brief=_brief, percent=percent, bias=bias, share=share_in_words)
    return environment


def _cut(text: str) -> str:
    return one_line(text, MOST_CHARACTERS)


def _brief(text: str) -> str:
    """Cut what stands beside a figure."""
    return one_line(text, 60)


def _shown(value: object) -> object:
    """Replace what no page should hold: characters that turn the direction of text, or that UTF-8 does not have."""
    if not isinstance(value, str) or isinstance(value, Markup) or (value.isascii() and value.isprintable()):
        return value
    return "".join(
        "\ufffd" if unicodedata.category(c) in ("Cf", "Cs", "Cc") and c not in "\n\u200c\u200d" else c for c in value
    )
