"""Fragments of HTML that tabs are made of; what others wrote is shown as text."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from jinja2 import Template

from ..report.write import html_templates

FAILED = "Something failed that the page has no words for. The terminal where `invdiff ui` runs says what."


@lru_cache(maxsize=1)
def _pieces() -> Template:
    return html_templates("invdiff.app").get_template("fragments.html.j2")


def piece(name: str, *arguments: Any) -> str:
    """Return a macro of `templates/fragments.html.j2` with its arguments filled in."""
    return str(getattr(_pieces().module, name)(*arguments))


def notice(text: str) -> str:
    """Return a line that tells what happened."""
    return piece("notice", text)


def refusal(error: Exception | str) -> str:
    """Return a line that tells what could not be done, and why."""
    return piece("notice", str(error), "error")
