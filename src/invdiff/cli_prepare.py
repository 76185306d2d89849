"""Commands that prepare what an audit needs: captioned images, a model fitted to them, an annotator."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from .cli_options import (
    CaptionColumn,
    ConfigFile,
    Data,
    DataSource,
    ImageColumn,
    Limit,
    MaxUnreadable,
    Output,
    Quiet,
    Split,
    option,
    setting,
    settings,
)
from .cli_output import finish, one_process, print_annotator, say, silence_libraries
from .config import ArchitectureConfig, FinetuneConfig
from .errors import ConfigError

LabelledData = Annotated[
    str,
    typer.Argument(
        metavar="DATA",
        help="Images with columns of classes: a folder with metadata.csv or .jsonl, a parquet file or a folder of "
        "them, or a hub dataset id; or a folder with one sub-folder of images per class, the attribute `label`.",
    ),
]
PANEL = "To prepare"

app = typer.Typer()
annotator_app = typer.Typer(no_args_is_help=True)
app.add_typer(
    annotator_app,
    name="annotator",
    help="Train or measure what tells the attributes of images, for evaluation only.",
    epilog="Example: invdiff annotator train photos --attribute background --output out/annotator",
    rich_help_panel=PANEL,
)


@app.command(rich_help_panel=PANEL, epilog="Example: invdiff birds --output out/birds --severity 0.95")
def birds(
    output: Output,
    num_images: Annotated[int, option("How many images.", min=1)] = 6000,
    severity: Annotated[float, option("Share of images whose background agrees with the bird.", min=0, max=1)] = 0.95,
    world: Annotated[
        Literal["two-prompts", "one-prompt"], option("Land and water birds, or land birds captioned as birds.")
    ] = "two-prompts",
    resolution: Annotated[int, option("Pixels a side.", min=16)] = 64,
    image_format: Annotated[Literal["png", "jpg"], option("Format of the files.", "--format")] = "png",
    seed: Annotated[int, option("Another seed, another set.", min=0)] = 0,
    quiet: Quiet = False,
) -> None:
    """Draw the bundled world: captioned birds whose background agrees with the bird, in most images."""
    from .data.birds import BirdsWorld

    drawn = BirdsWorld(num_images, severity=severity, seed=seed, resolution=resolution, world=world)
    drawn.write(output, progress=not quiet, format=image_format)
    finish(
        f"{num_images} captioned images are in {output}.",
        ["invdiff", "finetune", str(output), "--output", str(output.parent / "model")],
    )


@app.command(
    rich_help_panel=PANEL,
    epilog="Example: invdiff finetune photos --base org/small-sd --output out/model --steps 2000",
)
def finetune(
    data: Data,
    output: Output,
    base: Annotated[
        str | None,
        option("Train this pipeline's denoiser. Without it, a small model is trained from nothing.", metavar="MODEL"),
    ] = None,
    architecture: Annotated[
        Path | None,
        option("JSON or YAML with the shape of a model trained from nothing (ArchitectureConfig).", metavar="FILE"),
    ] = None,
    config: ConfigFile = None,
    steps: Annotated[int | None, setting(FinetuneConfig, "steps", min=1)] = None,
    batch_size: Annotated[int | None, setting(FinetuneConfig, "batch_size", min=1)] = None,
    learning_rate: Annotated[float | None, setting(FinetuneConfig, "learning_rate", min=0)] = None,
    autoencoder_steps: Annotated[int | None, setting(FinetuneConfig, "autoencoder_steps", min=1)] = None,
    fresh_denoiser: Annotated[bool | None, setting(FinetuneConfig, "fresh_denoiser", flag="--fresh-denoiser")] = None,
    seed: Annotated[int | None, setting(FinetuneConfig, "seed")] = None,
    caption_column: CaptionColumn = None,
    image_column: ImageColumn = None,
    split: Split = "train",
    limit: Limit = None,
    max_unreadable: MaxUnreadable = 0.01,
    quiet: Quiet = False,
) -> None:
    """Fit a diffusion model to captioned images: it learns the set's accidents with its subject."""
    if base is not None and architecture is not None:
        raise ConfigError("Expected either --base or --architecture, got both: a base has its own shape.")
    if base is not None and autoencoder_steps is not None:
        raise ConfigError("Expected --autoencoder-steps without --base: a base keeps its own autoencoder.")
    chosen = settings(
        FinetuneConfig,
        config,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        autoencoder_steps=autoencoder_steps,
        fresh_denoiser=fresh_denoiser,
        seed=seed,
    )
    if chosen.fresh_denoiser and base is None:
        raise ConfigError("Expected --fresh-denoiser with --base: without one, all weights are new.")
    shape = ArchitectureConfig.from_file(architecture) if architecture else None
    source = DataSource(data, caption_column, image_column, split, limit, max_unreadable)
    say("opening images", quiet=quiet)
    images = source.load()
    silence_libraries()
    from .training.finetune import finetune as run_finetune

    run_finetune(images, output, base=base, architecture=shape, config=chosen, progress=not quiet)
    finish(
        f"The model is in {output}.",
        ["invdiff", "audit", str(output), data, "--output", str(output.parent / "audit"), *source.flags()],
    )


@annotator_app.command(
    "train", epilog="Example: invdiff annotator train photos --attribute background --output out/annotator"
)
def annotator_train(
    data: LabelledData,
    output: Output,
    attribute: Annotated[
        list[str] | None, option("Column to learn; repeat for more. Without it, all columns but captions.")
    ] = None,
    steps: Annotated[int, option("Optimiser steps.", min=1)] = 400,
    batch_size: Annotated[int, option("Images per step.", min=1)] = 64,
    resolution: Annotated[int, option("Pixels a side that images are resized to.", min=16)] = 64,
    seed: Annotated[int, option("Seed of split, weights and batches.")] = 0,
    caption_column: CaptionColumn = None,
    image_column: ImageColumn = None,
    split: Split = "train",
    limit: Limit = None,
    max_unreadable: MaxUnreadable = 0.01,
    quiet: Quiet = False,
) -> None:
    """Train a small network to tell attributes of images, from a labelled set. For evaluation only."""
    one_process("annotator train")
    say("opening images", quiet=quiet)
    from .evaluation.annotators.conv import ConvAnnotator

    images = DataSource(data, caption_column, image_column, split, limit, max_unreadable).load_labelled()
    silence_libraries()
    trained = ConvAnnotator.fit(
        images,
        attribute or None,
        steps=steps,
        batch_size=batch_size,
        resolution=resolution,
        seed=seed,
        progress=not quiet,
    )
    trained.save_pretrained(output)
    assert trained.held_out is not None  # `fit` measures
    print_annotator(trained.held_out.summary(), before=trained.config["holdout_calibration_error"])
    generated, learnt = str(output.parent / "images"), next(iter(trained.attributes))
    finish(
        f"The annotator is in {output}.",
        ["invdiff", "evaluate", generated, "--annotator", str(output), "--attribute", learnt],
    )


@annotator_app.command(
    "measure",
    epilog="Example: invdiff annotator measure openai/clip-vit-base-patch32 photos --classes classes.yaml "
    "--output out/clip",
)
def annotator_measure(
    annotator: Annotated[
        str,
        typer.Argument(
            metavar="ANNOTATOR",
            help="A folder that `invdiff annotator train` wrote, or a folder or hub id of a CLIP model (with "
            "--classes) or of an image classifier from transformers.",
        ),
    ],
    data: LabelledData,
    output: Output,
    attribute: Annotated[
        list[str] | None,
        option("Column to measure on; repeat for more. Without it, all that annotator and images share."),
    ] = None,
    classes: Annotated[
        Path | None,
        option("YAML or JSON for a CLIP model: attribute to class to prompts.", metavar="FILE"),
    ] = None,
    caption_column: CaptionColumn = None,
    image_column: ImageColumn = None,
    split: Split = "train",
    limit: Limit = None,
    max_unreadable: MaxUnreadable = 0.01,
    quiet: Quiet = False,
) -> None:
    """Measure how often an annotator errs on labelled images, so that figures can be corrected for it.

    The images must be others than it was trained on. OUTPUT stands for the annotator from then on.
    """
    one_process("annotator measure")
    say("opening images", quiet=quiet)
    from .evaluation.annotators.heldout import Measurable, measure_annotator
    from .evaluation.annotators.load import load_annotator, refuse_own_folder, save_measured

    refuse_own_folder(output, annotator)
    images = DataSource(data, caption_column, image_column, split, limit, max_unreadable).load_labelled()
    silence_libraries()
    judge = load_annotator(annotator, attribute=attribute or "", classes=classes)
    if not isinstance(judge, Measurable):
        raise ConfigError(f"Expected an annotator of images, got {annotator!r}: given labels are taken as true.")
    held_out = measure_annotator(judge, images, attribute or None, progress=not quiet)
    save_measured(output, judge, held_out, spec=annotator, attribute=(attribute or [""])[0], classes=classes)
    print_annotator(held_out.summary())
    generated, measured = str(output.parent / "images"), next(iter(held_out.attributes))
    finish(
        f"The measured annotator is in {output}.",
        ["invdiff", "evaluate", generated, "--annotator", str(output), "--attribute", measured],
    )
