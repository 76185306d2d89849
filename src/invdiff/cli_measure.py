"""Commands that measure: evaluate images, teach a classifier with them, and sweep over settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .cli_options import (
    DATA_PANEL,
    RUN_PANEL,
    CaptionColumn,
    DataSource,
    ImageColumn,
    Limit,
    MaxUnreadable,
    Quiet,
    Split,
    labelled_folders,
    option,
    subjects_from,
    target_from,
)
from .cli_output import finish, one_process, print_results, say, silence_libraries
from .config import EvaluateConfig
from .errors import ConfigError

PANEL = "The way through"
EXPERIMENTS = "To experiment"

app = typer.Typer()

Folders = Annotated[
    list[str],
    typer.Argument(
        metavar="DIR",
        help="Folders that `invdiff generate` wrote, or any with a manifest (file_name, prompt), each named after its "
        "model, or NAME=DIR. Several NAME=DIR with one name are one model at several guidance scales.",
    ),
]


@app.command(
    rich_help_panel=PANEL,
    epilog="Example: invdiff evaluate out/base out/guided --annotator out/annotator --attribute background",
)
def evaluate(
    folders: Folders,
    annotator: Annotated[
        str,
        option(
            "What names the classes: a folder that `invdiff annotator train` or `measure` wrote, a CLIP model (with "
            "--classes), any image classifier of transformers, or `labels` for columns of the manifest.",
            metavar="ANNOTATOR",
        ),
    ],
    attribute: Annotated[
        list[str],
        option("Sensitive attribute, to measure Bias on; repeat for more, and for how they intersect."),
    ],
    subject_attribute: Annotated[str | None, option("Attribute that prompts name, to measure accuracy on.")] = None,
    subject_of: Annotated[
        list[str] | None,
        option("What a prompt shows, as PROMPT=CLASS, where prompts do not name it; accuracy is of these alone."),
    ] = None,
    classes: Annotated[
        Path | None,
        option("YAML or JSON for a CLIP annotator: attribute to class to prompts.", metavar="FILE"),
    ] = None,
    min_confidence: Annotated[
        float, option("Images whose likeliest class is less probable are counted as `cannot tell`.", min=0, max=1)
    ] = 0.0,
    target: Annotated[
        str | None, option("Desired mix of the first attribute, such as land=0.3,water=0.7. Without it, uniform.")
    ] = None,
    baseline: Annotated[
        str | None, option("Model that others are compared with, seed by seed. Without it, `base` if there is one.")
    ] = None,
    confidence: Annotated[float, option("Coverage of the intervals.", min=0.5, max=0.999)] = 0.95,
    features: Annotated[
        list[str] | None,
        option(
            "Further features to measure quality on: `inception` (extra `metrics`), or a vision model such as DINOv2, "
            "by folder or hub id; repeat for more.",
            metavar="MODEL",
        ),
    ] = None,
    clip: Annotated[
        str | None, option("CLIP model, to measure how well images show their prompts (CLIP-T).", metavar="MODEL")
    ] = None,
    lpips: Annotated[
        bool, option("Measure the diversity of each prompt's images by LPIPS (extra `metrics`).", "--lpips")
    ] = False,
    reference: Annotated[
        str | None, option("Captioned images that quality is measured against.", panel=DATA_PANEL, metavar="DATA")
    ] = None,
    caption_column: CaptionColumn = None,
    image_column: ImageColumn = None,
    split: Split = "train",
    limit: Limit = None,
    max_unreadable: MaxUnreadable = 0.01,
    output: Annotated[
        Path, option("JSON file to write; every figure is also a row of a CSV file beside it.", panel=RUN_PANEL)
    ] = Path("results.json"),
    quiet: Quiet = False,
) -> None:
    """Measure Bias, accuracy and quality of generated images, of any tool, at every guidance scale."""
    one_process("evaluate")
    source = DataSource(reference or "", caption_column, image_column, split, limit, max_unreadable)
    if reference is None and source.flags():
        raise ConfigError(f"Expected --reference beside {source.flags()[0]}, got none: only a reference has columns.")
    mix = target_from(target) if target else None
    shows = subjects_from(subject_of) if subject_of else None
    if output.suffix.lower() == ".csv":
        raise ConfigError(f"Expected a .json file for --output, got {output}: the table is written beside it as .csv.")
    say("loading the annotator", quiet=quiet)
    silence_libraries()
    from .evaluation.annotators.load import load_annotator
    from .evaluation.evaluate import evaluate as run_evaluate
    from .evaluation.results import table_path

    judge = load_annotator(annotator, attribute=[*attribute, subject_attribute or ""], classes=classes)
    config = EvaluateConfig(
        subject_attribute=subject_attribute or "",
        subject_of=shows or {},
        target=mix or {},
        baseline=baseline or "",
        min_confidence=min_confidence,
        confidence=confidence,
        features=tuple(features or ()),
        clip=clip or "",
        lpips=lpips,
    )
    results = run_evaluate(
        labelled_folders(folders),
        judge,
        attribute,
        reference=source.load() if reference is not None else None,
        config=config,
        progress=not quiet,
    )
    results.save(output)
    print_results(results)
    finish(f"The results are in {output}, and as a table in {table_path(output)}.")
