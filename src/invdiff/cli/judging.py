"""To judge what was drawn: annotators, evaluate, report and the page."""

import dataclasses
import importlib.util
import os
from pathlib import Path
from typing import Any

import typer

from ..config import EvaluateConfig
from ..errors import ConfigError
from .arguments import (
    DATA,
    RUN,
    CacheOptions,
    CaptionOptions,
    Classes,
    DataOptions,
    LabelledData,
    Output,
    Quiet,
    command,
    labelled_folders,
    option,
    shown_default,
)
from .commands import PREPARE, WAY, app
from .print import finish, finish_annotator, print_results, say, say_loading

PASSWORD = "INVDIFF_UI_PASSWORD"  # noqa: S105  # the variable's name

annotator_app = typer.Typer(no_args_is_help=True)
app.add_typer(
    annotator_app,
    name="annotator",
    help="Train or measure an annotator, which names the attributes of images, for evaluation only.",
    epilog="Example: invdiff annotator train photos --attribute background --output out/annotator",
    rich_help_panel=PREPARE,
)


@command(
    app,
    "invdiff evaluate out/base out/guided --annotator out/annotator --attribute background",
    panel=WAY,
    writes_file=True,
)
def evaluate(
    *,
    folders: list[str] = typer.Argument(
        metavar="DIR",
        help="Folders that `invdiff generate` wrote, or any with a manifest (file_name, prompt), each named after its "
        "model, or NAME=DIR. Several NAME=DIR with one name are one model at several guidance scales.",
    ),
    annotator: str = option(
        ...,
        "What names the classes: a folder that `invdiff annotator train` or `measure` wrote, a CLIP model (with "
        "--classes), any image classifier of transformers, `labels` for columns of the manifest, or what `invdiff "
        "audit` wrote (with --annotator-model).",
        metavar="ANNOTATOR",
    ),
    annotator_model: str | None = option(None, "The audited model, for an audit as annotator.", metavar="MODEL"),
    annotator_lora: list[str] | None = option(
        None, "A LoRA that was fused into the audited model; repeat for more.", metavar="LORA[:WEIGHT]"
    ),
    attribute: list[str] = option(
        ..., "Attribute to measure Bias on; repeat for more, and for how they intersect.", metavar="NAME"
    ),
    classes: Classes = None,
    settings: EvaluateConfig,
    reference: str | None = option(None, "Captioned images to measure quality against.", panel=DATA, metavar="DATA"),
    source: DataOptions,
    output: Path = option(
        Path("results.json"),
        "JSON file to write; every figure is also a row of a CSV file beside it.",
        panel=RUN,
        metavar="FILE",
    ),
    quiet: Quiet = False,
) -> None:
    """Measure Bias, accuracy and quality of generated images, of any tool, at every guidance scale."""
    from ..evaluation.results import table_path

    table = table_path(output)
    seen = source.load(reference, flag="--reference")
    say_loading("the annotator", quiet=quiet)
    from ..evaluation.annotators.load import load_annotator
    from ..evaluation.evaluate import evaluate as run_evaluate

    asked: Any = {"attribute": [*attribute, settings.subject_attribute], "classes": classes}
    judge = load_annotator(annotator, **asked, model=annotator_model, loras=annotator_lora or ())
    images = labelled_folders(folders)
    results = run_evaluate(images, judge, attribute, reference=seen, config=settings, progress=not quiet)
    results.save(output)
    print_results(results)
    words = ["report", output.parent, "--output", output.parent / "report"] if output.name == "results.json" else []
    finish(f"The results are in {output}, and as a table in {table}.", *words)


@command(app, "invdiff report out/demo --output out/report", panel=WAY)
def report(
    *,
    run: Path = typer.Argument(
        metavar="RUN",
        help="A folder with audit/, module/, data/, results.json and folders of images named after their models, "
        "such as `invdiff demo` writes. Any part may be absent.",
    ),
    output: Output,
    data: str | None = option(
        None, "The images that were audited, where RUN does not hold them.", "--data", panel=DATA, metavar="DATA"
    ),
    source: CaptionOptions,
) -> None:
    """Write what was found, changed and measured as one HTML file to read and forward, and as Markdown."""
    from ..report.read import find_parts
    from ..report.write import save_report

    audited, parts = source.load(data, flag="--data", output=output), find_parts(run)
    if data:
        parts = dataclasses.replace(parts, data=audited, data_words=[data, *source.words()])
    written = save_report(output, **vars(parts))
    finish(f"The report is {written}, and as Markdown {written.with_suffix('.md')}.")


@command(app, "invdiff ui out/demo", panel=WAY)
def ui(
    *,
    runs: list[Path] | None = typer.Argument(
        None,
        metavar="RUN",
        help="Folders with audit/, module/, data/ and results.json, such as `invdiff demo` writes; any part may "
        "be absent. Without one, and without a model, the bundled demo is opened.",
    ),
    model: str | None = option(
        None, "The pipeline." + shown_default("the one that the module was trained for"), metavar="MODEL"
    ),
    module: str | None = option(
        None, "What `invdiff train` wrote." + shown_default("the first run's"), metavar="MODULE"
    ),
    annotator: str | None = option(
        None,
        "What counts images, as for `invdiff evaluate`." + shown_default("for the bundled model, its own"),
        metavar="ANNOTATOR",
    ),
    attribute: str | None = option(None, "For an image classifier: what its classes are classes of.", metavar="NAME"),
    classes: Classes = None,
    data: str | None = option(
        None, "The images that were audited, where a run does not hold them.", "--data", panel=DATA, metavar="DATA"
    ),
    source: CaptionOptions,
    weights: CacheOptions,
    host: str = option(
        "127.0.0.1", "Address to listen on. Any but this machine's own needs --public.", panel=RUN, metavar="HOST"
    ),
    port: int | None = option(
        None,
        "Port to listen on." + shown_default("the first free one from 7860"),
        panel=RUN,
        min=1,
        max=65535,
        metavar="PORT",
    ),
    public: bool = option(
        False, "Let others on the network in, who are asked for the password above.", "--public", panel=RUN
    ),
    browser: bool = option(True, "Open a browser.", panel=RUN),
    quiet: Quiet = False,
) -> None:
    """Open a page in the browser: draw with and without guidance, look through an audit, compare results.

    Nothing leaves this machine. Names given to groups and images left out are saved beside the audit. With --public,
    the variable INVDIFF_UI_PASSWORD holds the password.
    """
    if importlib.util.find_spec("gradio") is None:
        raise ConfigError("Expected gradio for the page, found none. Install it: pip install 'invdiff[ui]'.")
    from ..app.serve import check_address, ended_by_signals, launch, own_files

    password = os.environ.get(PASSWORD) or None
    check_address(host, public=public, password=password)
    images = source.load(data, flag="--data")
    with ended_by_signals(), own_files():
        say_loading("the page", quiet=quiet)
        from ..app.page import build_page, open_studio, open_workspace

        workspace = open_workspace(runs or (), model=model, module=module, annotator=annotator, data=images)
        if workspace.model:
            say("loading the model", quiet=quiet)
        loads: Any = {"load": weights.load, "options": dataclasses.replace(weights, cache_dir=None).words()}
        studio = open_studio(workspace, **loads, attribute=attribute or "", classes=classes)
        page = build_page(workspace, studio, weights.cache_dir)
        address = launch(page, host=host, port=port, password=password, browser=browser, public=public)
        finish(f"The page is at {address} until you press Ctrl-C.")
        for name, parts in workspace.audits.items():
            say(f"names and changes to the audit of “{name}” are kept in {parts.audit}", quiet=quiet)
        page.block_thread()


@command(annotator_app, "invdiff annotator train photos --attribute background --output out/annotator", name="train")
def annotator_train(
    *,
    data: LabelledData,
    output: Output,
    attribute: list[str] | None = option(
        None, "Column to learn; repeat for more. Unless given, all but captions.", metavar="COLUMN"
    ),
    steps: int = option(400, "Optimiser steps.", min=1, metavar="INT"),
    batch_size: int = option(64, "Images per step.", min=1, metavar="INT"),
    resolution: int = option(64, "Pixels a side that images are resized to.", min=16, metavar="INT"),
    seed: int = option(0, "Seed of split, weights and batches.", metavar="INT"),
    source: DataOptions,
    quiet: Quiet = False,
) -> None:
    """Train a small network to name attributes of images, from a labelled set. For evaluation only."""
    say_loading("images", quiet=quiet)
    from ..evaluation.annotators.conv import ConvAnnotator

    images = source.load(data, labelled=True, output=output)
    sizes = {"steps": steps, "batch_size": batch_size, "resolution": resolution}
    trained = ConvAnnotator.fit(images, attribute or None, **sizes, seed=seed, progress=not quiet)
    trained.save_pretrained(output)
    assert trained.held_out is not None  # `fit` measures
    finish_annotator("annotator", output, trained.held_out.summary())


@command(
    annotator_app,
    "invdiff annotator measure openai/clip-vit-base-patch32 photos --classes classes.yaml --output out/clip",
    name="measure",
)
def annotator_measure(
    *,
    annotator: str = typer.Argument(
        metavar="ANNOTATOR",
        help="A folder that `invdiff annotator train` wrote, or a folder or hub id of a CLIP model (with "
        "--classes) or of an image classifier from transformers.",
    ),
    data: LabelledData,
    output: Output,
    attribute: list[str] | None = option(
        None,
        "Column to measure on; repeat for more. Without it, all that annotator and images share.",
        metavar="COLUMN",
    ),
    classes: Classes = None,
    source: DataOptions,
    quiet: Quiet = False,
) -> None:
    """Measure how often an annotator errs on labelled images, so that figures can be corrected for it.

    The images must be others than it was trained on. OUTPUT stands for the annotator from then on.
    """
    say_loading("images", quiet=quiet)
    from ..evaluation.annotators.heldout import Measurable, measure_annotator
    from ..evaluation.annotators.load import check_measurable, load_annotator, save_measured

    check_measurable(annotator, output)
    images = source.load(data, labelled=True, output=output)
    judge = load_annotator(annotator, attribute=attribute or "", classes=classes)
    if not isinstance(judge, Measurable):
        raise ConfigError(f"Expected an annotator of images, got {annotator!r}: given labels are taken as true.")
    held_out = measure_annotator(judge, images, attribute or None, progress=not quiet)
    save_measured(output, judge, held_out, spec=annotator, attribute=(attribute or [""])[0], classes=classes)
    finish_annotator("measured annotator", output, held_out.summary())
