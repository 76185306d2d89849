"""The page: its tabs, its looks, and what is loaded for it."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from importlib.resources import files
from typing import Any

import gradio as gr

from ..models.families import family_of
from ..models.load import denoiser_of
from ..report.theme import DARK, INK, PAPER, RULE, SOFT
from .archive import AuditBook
from .audit_tab import AuditTab
from .compare_tab import CompareTab
from .generate import GenerateTab
from .pictures import Pictures
from .pieces import notice
from .studio import Studio
from .workspace import Workspace

TITLE = "invdiff"
CACHE_SECONDS = (600, 3600)
"""How often files of images shown are looked through, and how old those are that are deleted."""
_FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "DejaVu Sans", "sans-serif"]
_MONO = ["ui-monospace", "SF Mono", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace"]


def build_page(workspace: Workspace, studio: Studio | None) -> gr.Blocks:
    """Return the page; `looks()` goes to its `launch`.

    Args:
        workspace: What it may open.
        studio: What draws; None for a page without a model.

    Raises:
        InvDiffError: An audit, its data or changes to it are damaged.
    """
    books = {name: AuditBook(parts) for name, parts in workspace.audits.items()}
    named = _named(workspace, studio, books)
    pictures = Pictures()
    tabs: list[GenerateTab | AuditTab | CompareTab] = []
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=CACHE_SECONDS) as page:
        gr.HTML(f'<header class="top"><h1>{TITLE}</h1><p>Hidden bias, seen and balanced</p></header>')
        drawn: GenerateTab | None = None
        with gr.Tab("Generate", id="generate"):
            if studio is None:
                gr.HTML(notice("No model was given. `invdiff ui --model MODEL --module MODULE` opens one."))
            else:
                drawn = GenerateTab(
                    studio,
                    suggestions=_suggestions(books),
                    group_names=lambda: _group_names(studio, named),
                    resolution=_resolution(studio, named),
                )
                tabs.append(drawn)
        with gr.Tab("Audit", id="audit"):
            if books:
                tabs.append(AuditTab(books, pictures, named=named, drawn=drawn))
            else:
                gr.HTML(notice("No audit was given. `invdiff ui RUN` opens the one in RUN/audit."))
        with gr.Tab("Compare", id="compare"):
            if workspace.results:
                tabs.append(CompareTab(workspace.results))
            else:
                gr.HTML(notice("No results were given. `invdiff ui RUN` opens RUN/results.json."))
        words = f"invdiff {version('invdiff')} · computed on the machine that serves this page"
        gr.HTML(f'<footer class="bottom">{words}</footer>')
        for tab in tabs:
            page.load(tab.first, None, tab.loads, show_progress="hidden", api_visibility="private")
    return page


def _named(workspace: Workspace, studio: Studio | None, books: Mapping[str, AuditBook]) -> AuditBook | None:
    """Return the audit whose groups the module's are: that of the module's run, if any, with as many groups."""
    if studio is None or not studio.num_groups:
        return None
    own = [name for name, parts in workspace.audits.items() if parts.module == workspace.module]
    fitting = [books[name] for name in (*own, *books) if books[name].num_groups == studio.num_groups]
    return fitting[0] if fitting else None


def _group_names(studio: Studio, named: AuditBook | None) -> list[list[str]]:
    if named is not None:
        return named.group_names()
    return [[f"group {group}" for group in range(count)] for count in studio.num_groups]


def _resolution(studio: Studio, named: AuditBook | None) -> int:
    """Return the side of images in pixels as the module was trained, 0 where that is the model's own."""
    trained = named.resolution if named is not None else 0
    own = family_of(studio.pipe).resolution(studio.pipe, denoiser_of(studio.pipe))
    return 0 if trained == own else trained


def _suggestions(books: Mapping[str, AuditBook]) -> list[str]:
    """Return prompts that hide groups, the largest first; where none does, those of most images."""
    found = [page.prompt.prompt for book in books.values() for page in book.pages]
    others = sorted((prompt for book in books.values() for prompt in book.prompts), key=lambda p: -p.num_images)
    return [prompt for prompt in dict.fromkeys(found or [p.prompt for p in others]) if prompt.strip()]


def looks() -> dict[str, Any]:
    """Return the arguments of `Blocks.launch` that make the page look like our reports."""
    theme = gr.themes.Base(
        primary_hue=gr.themes.colors.blue,
        neutral_hue=gr.themes.colors.slate,
        font=_FONTS,
        font_mono=_MONO,
        radius_size=gr.themes.sizes.radius_md,
    ).set(
        body_background_fill=PAPER,
        body_background_fill_dark=DARK[PAPER],
        body_text_color=INK,
        body_text_color_dark=DARK[INK],
        body_text_color_subdued=SOFT,
        body_text_color_subdued_dark=DARK[SOFT],
        border_color_primary=RULE,
        border_color_primary_dark=DARK[RULE],
        button_primary_background_fill="#1f6fb5",
        button_primary_background_fill_hover="#195a93",
        button_primary_background_fill_dark="#1f6fb5",
        button_primary_text_color="#ffffff",
        link_text_color="#1f6fb5",
        color_accent="#1f6fb5",
        slider_color="#1f6fb5",
        slider_color_dark="#4a97d8",
    )
    return {"theme": theme, "css": files("invdiff.app").joinpath("page.css").read_text(encoding="utf-8")}
