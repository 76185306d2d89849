"""The page: what it opens, its tabs, its looks, and the figures of tab Compare."""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.processing_utils import save_file_to_cache

from ..assets import BIRDS_ANNOTATOR, BIRDS_DEMO, BIRDS_MODEL
from ..config import DemoConfig
from ..data.birds import BirdsWorld
from ..data.captioned import CaptionedImages
from ..errors import ConfigError, InvDiffError
from ..evaluation.annotators.load import LABELS, load_annotator
from ..evaluation.results import Results
from ..files import atomic_folder, check_writable, default_cache_dir, fingerprint
from ..guidance.attach import check_fit
from ..guidance.backends import load_guidance
from ..models.families import family_of
from ..models.load import denoiser_of, load_pipeline
from ..report.plots import DARK, INK, PAPER, RULE, SOFT
from ..report.read import Parts, audit_of, audits_in, find_parts
from ..report.results_view import headlines
from ..report.write import save_report
from ..text import one_line
from .audit import AuditBook, AuditTab
from .clicks import MOST_VALUES, ClicksPanel, with_labels
from .fragments import QUIET, fragment, notice, refusal
from .generate import GenerateTab
from .studio import Studio

TITLE = "invdiff"
BUNDLED = "bundled demo"
CACHE_SECONDS = (600, 3600)  # how often gradio looks for old files of images, and the age at which it deletes them


@dataclass(frozen=True)
class Workspace:
    """The parts that a page shows: those given at start, and nothing else."""

    model: str  # folder or hub id of the pipeline; "" for a page that draws nothing
    module: Path | str | None  # folder or hub id of the guidance module
    annotator: str  # folder or hub id; "" for none
    runs: Mapping[str, Parts]  # name to the parts of a folder, as a report would read it; names differ

    @property
    def audits(self) -> dict[str, Parts]:
        """The runs with an audit."""
        return {name: parts for name, parts in self.runs.items() if parts.audit is not None}


def open_workspace(
    runs: Sequence[Path] = (),
    *,
    model: str | None = None,
    module: str | None = None,
    annotator: str | None = None,
    data: CaptionedImages | str | Path | None = None,
) -> Workspace:
    """Find the parts that a page is to show: of runs such as `invdiff demo` writes, or the bundled demo.

    The model is the one that the module was trained for unless given, and the module the first run's. `data` are the
    images that were audited, in place of those of a single run; of several, where a run does not hold them.
    """
    found: dict[str, Parts] = {}
    if not runs and model is None:
        if module is not None or data is not None:
            given = "a module" if module is not None else "data"
            raise ConfigError(f"Expected a model or a run beside {given}, got none. Name the model with --model.")
        found[BUNDLED] = _bundled_run()
    resolved = [folder.resolve() for folder in runs]
    if len(set(resolved)) < len(resolved):
        raise ConfigError(f"Expected different folders, got one of {', '.join(map(str, runs))} twice. Name it once.")
    for place, folder in enumerate(resolved):
        parts = replace(find_parts(runs[place]), audit=next(iter(audits_in(runs[place])), None))
        if parts.audit is None and parts.results is None and parts.module is None:
            raise ConfigError(
                f"Expected audit/, module/ or results.json in {runs[place]}, found none. Give a folder that "
                "`invdiff demo` wrote, or that holds what audit, train and evaluate wrote."
            )
        alike = [other.name for other in resolved].count(folder.name) > 1
        name = f"{place + 1}: {one_line(str(runs[place]), 120)}" if alike else one_line(folder.name, 60) or "/"
        own = data is None or (parts.data is not None and len(resolved) > 1)
        found[name] = parts if own else replace(parts, data=data)
    found |= {made: parts for name in list(found) for made, parts in with_labels(name, found[name]).items()}
    chosen: Path | str | None = module or next((parts.module for parts in found.values() if parts.module), None)
    if model is None and chosen is not None:
        model = _model_of(chosen)
    if annotator is None and model == str(BIRDS_MODEL):
        annotator = str(BIRDS_ANNOTATOR)
    return Workspace(model or "", chosen, annotator or "", found)


def _bundled_run() -> Parts:
    """The bundled demo, copied to the cache, where edits to its audit can be saved. Its images are drawn on demand."""
    files = ("audit/audit.json", "module/config.json", "results.json")
    digest = fingerprint(*((BIRDS_DEMO / name).read_bytes() for name in files))
    folder = default_cache_dir() / f"birds-demo-{digest}"
    if not folder.is_dir():
        check_writable(folder.parent, "INVDIFF_CACHE")
        with atomic_folder(folder) as temporary:
            shutil.copytree(BIRDS_DEMO, temporary, dirs_exist_ok=True)
    defaults = DemoConfig()
    world = BirdsWorld(defaults.num_images, severity=defaults.severity, seed=defaults.seed)
    return replace(find_parts(folder), data=world.captioned())


def _model_of(module: Path | str) -> str:
    """The pipeline that a module was trained beside."""
    config = load_guidance(module).config
    hub_id = ((config.get("record") or {}).get("base") or {}).get("hub_id")
    if hub_id or config["base_model"] == BIRDS_MODEL.name:
        return str(hub_id or BIRDS_MODEL)
    raise ConfigError(
        f"Expected the model that the module in {module} was trained for, which was called "
        f"{config['base_model'] or 'nothing'!r}, got none. Name its folder with --model."
    )


def open_studio(
    workspace: Workspace,
    *,
    load: Callable[[str], Any] = load_pipeline,
    options: Sequence[str] = (),
    attribute: str = "",
    classes: Path | None = None,
) -> Studio | None:
    """Load the model, the module and the annotator of a workspace; None for a workspace without a model.

    `load` loads a pipeline as `options` say on the command line; `load_annotator` explains `attribute` and `classes`.
    """
    if not workspace.model:
        return None
    if workspace.annotator == LABELS:
        raise ConfigError(
            "Expected an annotator that looks at images, got 'labels', which are of images drawn before. Give another."
        )
    pipe = load(workspace.model)
    module = load_guidance(workspace.module) if workspace.module else None
    if module is not None:
        check_fit(pipe, module)
    named = workspace.annotator
    judge: Any = load_annotator(named, attribute=attribute, classes=classes) if named else None
    return Studio(pipe, module, judge, names=(workspace.model, str(workspace.module or "")), options=options)


def build_page(workspace: Workspace, studio: Studio | None, cache_dir: Path | None = None) -> gr.Blocks:
    """The page of a workspace; `looks()` goes to its `launch`. Without a `studio` it draws nothing.

    Measurements of audits are kept in `cache_dir`, None for the usual place.
    """
    books = {name: AuditBook(parts) for name, parts in workspace.audits.items()}
    generate: GenerateTab | None = None
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=CACHE_SECONDS) as page:
        gr.HTML(f'<header class="top"><h1>{TITLE}</h1><p>Hidden bias, seen and balanced</p></header>')
        with gr.Tab("Generate", id="generate"):
            if studio is None:
                gr.HTML(notice("No model was given. `invdiff ui --model MODEL --module MODULE` opens one."))
            else:
                generate = _build_generate(studio, books)
                page.load(generate.first, None, generate.loads, **QUIET)
        with gr.Tab("Audit", id="audit"):
            if books:
                audit = AuditTab(books, generate, MOST_VALUES)
                page.load(audit.turn_to, None, audit.loads, **QUIET)
                if studio is not None:
                    ClicksPanel(audit, studio, cache_dir)
            else:
                gr.HTML(notice("No audit was given. `invdiff ui RUN` opens the one in RUN/audit."))
        with gr.Tab("Compare", id="compare"):
            results = {name: parts for name, parts in workspace.runs.items() if parts.results is not None}
            if results:
                _build_compare(results)
            else:
                gr.HTML(notice("No results were given. `invdiff ui RUN` opens RUN/results.json."))
        words = f"invdiff {version('invdiff')} · computed on the machine that serves this page"
        gr.HTML(f'<footer class="bottom">{words}</footer>')
    return page


def _build_generate(studio: Studio, books: Mapping[str, AuditBook]) -> GenerateTab:
    """Build tab Generate; its groups are those of the audit that the module was trained with, or of its record."""
    record = (studio.module.config["record"] if studio.module is not None else None) or {}
    as_many = [book for book in books.values() if book.audit.num_groups == studio.num_groups]
    fitting = [book for book in as_many if book.audit.has_trained(record)]
    recorded, trained = record.get("group_names", ()), record.get("resolution", 0)
    recorded = recorded if tuple(map(len, recorded)) == studio.num_groups else [[""] * n for n in studio.num_groups]
    recorded = [[name or f"group {group}" for group, name in enumerate(names)] for names in recorded]
    prompts = [prompt for book in books.values() for prompt in book.inferred.prompts if prompt.prompt.strip()]
    prompts = sorted([of for of in prompts if of.found] or prompts, key=lambda of: -of.num_images)
    is_own = trained == family_of(studio.pipe).resolution(studio.pipe, denoiser_of(studio.pipe))
    suggestions = list(dict.fromkeys(prompt.prompt for prompt in prompts))
    names: Any = (lambda: fitting[0].group_names) if fitting else (lambda: recorded)
    return GenerateTab(studio, suggestions, names, resolution=0 if is_own else trained)


def _build_compare(runs: Mapping[str, Parts]) -> None:
    """Build tab Compare: tables of the main figures of all runs, with their notes, and their reports."""
    tables = []
    for name, parts in runs.items():
        results = Results.load(Path(str(parts.results)))
        run = f"{name}: " if len(runs) > 1 else ""
        of = f"{results.criterion.name} of “{one_line(results.attribute, 60)}”"
        caption, notes = f"{run}{of}, with {results.confidence:.0%} intervals", [f"{note}." for note in results.notes]
        tables.append(fragment("table", headlines(results, results.each(), caption, notes)))
    gr.HTML("".join(tables), elem_id="compare")
    write = gr.Button("Write the report", size="sm", elem_id="compare-report")
    status = gr.HTML(elem_id="compare-status")
    reports = gr.Files(label="To open in a browser", visible=False, interactive=False, elem_id="compare-files")

    def write_reports() -> Iterator[list[Any]]:
        yield [notice("Writing …"), gr.skip()]
        try:
            given = [replace(parts, audit=audit_of(Path(str(parts.run)), parts.module)) for parts in runs.values()]
            paths = [save_report(Path(str(parts.results)).parent, **vars(parts)) for parts in given]
        except InvDiffError as error:
            yield [refusal(error), gr.skip()]
            return
        served = [save_file_to_cache(path, os.environ["GRADIO_TEMP_DIR"]) for path in paths]
        words = f"Written: {', '.join(one_line(str(path)) for path in paths)}"
        yield [notice(words), gr.update(value=served, visible=True)]

    write.click(write_reports, None, [status, reports], **QUIET)


def looks() -> dict[str, Any]:
    """Arguments of `Blocks.launch` that make the page look like our reports."""
    names = {"body_background_fill": PAPER, "body_text_color": INK}
    names |= {"body_text_color_subdued": SOFT, "border_color_primary": RULE}
    button = [f"button_primary_background_fill{kind}" for kind in ("", "_dark", "_hover", "_hover_dark")]
    theme = gr.themes.Base(
        primary_hue=gr.themes.colors.blue,
        neutral_hue=gr.themes.colors.slate,
        font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "DejaVu Sans", "sans-serif"],
        font_mono=["ui-monospace", "SF Mono", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace"],
        radius_size=gr.themes.sizes.radius_md,
    ).set(
        **names,
        **{f"{name}_dark": DARK[colour] for name, colour in names.items()},
        **dict.fromkeys([*button[:2], "link_text_color", "color_accent", "slider_color"], "#1f6fb5"),
        **dict.fromkeys(button[2:], "#195a93"),
        button_primary_text_color="#ffffff",
        link_text_color_dark="#82bdf0",
        slider_color_dark="#4a97d8",
    )
    return {"theme": theme, "css": files("invdiff.app").joinpath("page.css").read_text(encoding="utf-8")}
