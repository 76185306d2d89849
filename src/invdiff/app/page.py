"""The page: its tabs, its looks, and the figures of tab Compare."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import gradio as gr

from ..errors import InvDiffError
from ..evaluation.results import Quantity, Results
from ..models.families import family_of
from ..models.load import denoiser_of
from ..report.figures import Table
from ..report.plots import DARK, INK, PAPER, RULE, SOFT
from ..report.read import Parts
from ..report.write import save_report
from ..text import one_line
from .audit import AuditTab
from .audit_state import AuditBook
from .fragments import QUIET, fragment, notice, refusal
from .generate import GenerateTab
from .studio import Studio
from .workspace import Workspace

TITLE = "invdiff"
CACHE_SECONDS = (600, 3600)
"""How often gradio looks through files of images, and the age at which it deletes them."""
FIGURES = ("Model", "Guidance scale", "Bias", "By chance", "Subject accuracy", "Fréchet distance", "Images per prompt")
_FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "DejaVu Sans", "sans-serif"]
_MONO = ["ui-monospace", "SF Mono", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace"]


def build_page(workspace: Workspace, studio: Studio | None) -> gr.Blocks:
    """The page of a workspace; `looks()` goes to its `launch`.

    Args:
        workspace: The parts to show.
        studio: From `open_studio`; None for a page that draws nothing.

    Raises:
        InvDiffError: An audit, its data, edits to it or results are damaged.
    """
    books = {name: AuditBook(parts) for name, parts in workspace.audits.items()}
    named = None if studio is None else _named(workspace, studio, books)
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=CACHE_SECONDS) as page:
        gr.HTML(f'<header class="top"><h1>{TITLE}</h1><p>Hidden bias, seen and balanced</p></header>')
        tabs: list[GenerateTab | AuditTab] = []
        drawn: GenerateTab | None = None
        with gr.Tab("Generate", id="generate"):
            if studio is None:
                gr.HTML(notice("No model was given. `invdiff ui --model MODEL --module MODULE` opens one."))
            else:
                names = [[f"group {group}" for group in range(count)] for count in studio.num_groups]
                drawn = GenerateTab(
                    studio,
                    suggestions=_suggestions(books),
                    group_names=lambda: names if named is None else named.group_names,
                    resolution=0 if named is None else _resolution(studio, named),
                )
                tabs.append(drawn)
        with gr.Tab("Audit", id="audit"):
            if books:
                tabs.append(AuditTab(books, drawn if named is not None else None))
            else:
                gr.HTML(notice("No audit was given. `invdiff ui RUN` opens the one in RUN/audit."))
        with gr.Tab("Compare", id="compare"):
            if workspace.results:
                _build_compare(workspace.results)
            else:
                gr.HTML(notice("No results were given. `invdiff ui RUN` opens RUN/results.json."))
        words = f"invdiff {version('invdiff')} · computed on the machine that serves this page"
        gr.HTML(f'<footer class="bottom">{words}</footer>')
        for tab in tabs:
            page.load(tab.first, None, tab.loads, **QUIET)
    return page


def _named(workspace: Workspace, studio: Studio, books: Mapping[str, AuditBook]) -> AuditBook | None:
    """The audit whose groups the module's are: the one in the module's run, or else one with as many groups."""
    own = [name for name, parts in workspace.audits.items() if parts.module == workspace.module]
    return next((books[name] for name in (*own, *books) if books[name].audit.num_groups == studio.num_groups), None)


def _resolution(studio: Studio, named: AuditBook) -> int:
    """Side of images in pixels as the module was trained, 0 where that is the model's own."""
    trained = named.audit.settings.get("resolution", 0)
    return 0 if trained == family_of(studio.pipe).resolution(studio.pipe, denoiser_of(studio.pipe)) else trained


def _suggestions(books: Mapping[str, AuditBook]) -> list[str]:
    """Prompts of most images, those that hide groups alone where there are any."""
    prompts = [prompt for book in books.values() for prompt in book.inferred.prompts if prompt.prompt.strip()]
    chosen = [prompt for prompt in prompts if prompt.found] or prompts
    return list(dict.fromkeys(prompt.prompt for prompt in sorted(chosen, key=lambda prompt: -prompt.num_images)))


def _build_compare(runs: Mapping[str, Parts]) -> None:
    """Build tab Compare: one table of the figures of all runs, and their reports."""
    gr.HTML(compare(runs), elem_id="compare")
    write = gr.Button("Write the report", size="sm", elem_id="compare-report")
    status = gr.HTML(elem_id="compare-status")
    reports = gr.Files(label="To open in a browser", visible=False, interactive=False, elem_id="compare-files")

    def write_reports() -> list[Any]:
        try:
            paths = [write_report(parts) for parts in runs.values()]
        except InvDiffError as error:
            return [refusal(error), gr.skip()]
        copies = []
        for place, path in enumerate(paths):  # into the folder that the page serves
            copies.append(Path(os.environ["GRADIO_TEMP_DIR"]) / "reports" / str(place) / path.name)
            copies[-1].parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copies[-1])
        words = f"Written: {', '.join(one_line(str(path)) for path in paths)}"
        return [notice(words), gr.update(value=[str(copy) for copy in copies], visible=True)]

    write.click(write_reports, None, [status, reports], **QUIET)


def compare(runs: Mapping[str, Parts]) -> str:
    """The main figures of all results as an HTML table, with their notes.

    Raises:
        EvaluationError: Results are damaged.
    """
    shown: list[str] = []
    for name, parts in runs.items():
        assert parts.results is not None
        results = Results.load(parts.results)
        rows = [
            [
                model,
                scale.removesuffix(".0"),
                _figure(measures.bias_estimate),
                f"{measures.bias_floor:.2f}",
                _figure(measures.subject_accuracy),
                _figure(Quantity(measures.frechet)),
                f"{measures.images_per_prompt:,}",
            ]
            for model, scale, measures in results.each()
        ]
        run = f"{name}: Bias" if len(runs) > 1 else "Bias"
        caption = f"{run} of “{one_line(results.attribute, 60)}”, with {results.confidence:.0%} intervals"
        shown.append(fragment("table", Table(FIGURES, rows, caption, [f"{note}." for note in results.notes])))
    return "".join(shown)


def _figure(figure: Quantity | None) -> str:
    if figure is None or figure.value is None:
        return "–"
    interval = "" if figure.low is None or figure.high is None else f" ({figure.low:.2f} to {figure.high:.2f})"
    return f"{figure.value:.2f}{interval}"


def write_report(parts: Parts) -> Path:
    """Write the report of a run beside its results and return its path."""
    assert parts.results is not None
    folder = Path(parts.results).parent
    return save_report(
        folder,
        run=folder,
        audit=parts.audit,
        data=parts.data if parts.audit is not None else None,
        results=parts.results,
        images=parts.images,
        module=parts.module,
    )


def looks() -> dict[str, Any]:
    """Arguments of `Blocks.launch` that make the page look like our reports."""
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
