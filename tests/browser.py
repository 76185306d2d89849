"""A real browser for tests: Debian's chromium, driven by playwright; where either is absent, tests skip and say so."""

import contextlib
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium: apt-get install chromium")

LAYOUT = """() => ({
    broken: [...document.images].filter(image => image.complete && !image.naturalWidth).length,
    width: document.documentElement.scrollWidth,
    outside: [...document.querySelectorAll('body *')].filter(element =>
        element.checkVisibility()
        && !element.closest('.scroll, pre, .who, .code_wrap, svg')
        && element.getBoundingClientRect().width > 0
        && element.getBoundingClientRect().right > innerWidth + 1).map(element => element.outerHTML.slice(0, 120)),
})"""
"""What is broken in a page: images that show nothing, and elements that stick out on the right."""


@contextlib.contextmanager
def open_browser() -> Iterator[Any]:
    """A browser of playwright's; skips the test where there is no playwright."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        try:
            yield browser
        finally:
            browser.close()
