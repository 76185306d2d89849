"""To prepare what an audit needs: captioned images, a model fitted to them, an annotator."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..config import ArchitectureConfig, FinetuneConfig
from ..errors import ConfigError
from .adapter import command, option
from .arguments import Classes, Data, DataOptions, LabelledData, Output, Quiet
from .print import finish, one_process, print_annotator, say, silence_libraries

PANEL = "To prepare"

app = typer.Typer()
annotator_app = typer.Typer(no_args_is_help=True)
app.add_typer(
    annotator_app,
    name="annotator",
    help="Train or measure an annotator, which names the attributes of images, for evaluation only.",
    epilog="Example: invdiff annotator train photos --attribute background --output out/annotator",
    rich_help_panel=PANEL,
)


@command(app, "invdiff birds --output out/birds --severity 0.95", panel=PANEL)
def birds(
    *,
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
    from ..data.birds import BirdsWorld

    drawn = BirdsWorld(num_images, severity=severity, seed=seed, resolution=resolution, world=world)
    drawn.write(output, progress=not quiet, format=image_format)
    finish(
        f"{num_images} captioned images are in {output}.",
        ["invdiff", "finetune", str(output), "--output", str(output.parent / "model")],
    )


@command(app, "invdiff finetune photos --base org/small-sd --output out/model --steps 2000", panel=PANEL)
def finetune(
    *,
    data: Data,
    output: Output,
    base: Annotated[
        str | None,
        option("Train this pipeline's denoiser. Without it, a small model is trained from scratch.", metavar="MODEL"),
    ] = None,
    architecture: Annotated[
        Path | None,
        option("JSON or YAML with the shape of a model trained from scratch (ArchitectureConfig).", metavar="FILE"),
    ] = None,
    settings: FinetuneConfig,
    source: DataOptions,
    quiet: Quiet = False,
) -> None:
    """Fit a diffusion model to captioned images: it learns their spurious attributes with their subjects."""
    if base is not None and settings.autoencoder_steps != FinetuneConfig.autoencoder_steps:
        raise ConfigError("Expected --autoencoder-steps without --base: a base keeps its own autoencoder.")
    shape = ArchitectureConfig.from_file(architecture) if architecture else None
    say("opening images", quiet=quiet)
    images = source.load(data)
    silence_libraries()
    from ..training.finetune import finetune as run_finetune

    run_finetune(images, output, base=base, architecture=shape, config=settings, progress=not quiet)
    finish(
        f"The model is in {output}.",
        ["invdiff", "audit", str(output), data, "--output", str(output.parent / "audit"), *source.words()],
    )


@command(annotator_app, "invdiff annotator train photos --attribute background --output out/annotator", name="train")
def annotator_train(
    *,
    data: LabelledData,
    output: Output,
    attribute: Annotated[
        list[str] | None, option("Column to learn; repeat for more. Without it, all columns but captions.")
    ] = None,
    steps: Annotated[int, option("Optimiser steps.", min=1)] = 400,
    batch_size: Annotated[int, option("Images per step.", min=1)] = 64,
    resolution: Annotated[int, option("Pixels a side that images are resized to.", min=16)] = 64,
    seed: Annotated[int, option("Seed of split, weights and batches.")] = 0,
    source: DataOptions,
    quiet: Quiet = False,
) -> None:
    """Train a small network to name attributes of images, from a labelled set. For evaluation only."""
    one_process("annotator train")
    say("opening images", quiet=quiet)
    from ..evaluation.annotators.conv import ConvAnnotator

    images = source.load_labelled(data)
    silence_libraries()
    sizes = {"steps": steps, "batch_size": batch_size, "resolution": resolution}
    trained = ConvAnnotator.fit(images, attribute or None, **sizes, seed=seed, progress=not quiet)
    trained.save_pretrained(output)
    assert trained.held_out is not None  # `fit` measures
    print_annotator(trained.held_out.summary(), before=trained.config["holdout_calibration_error"])
    _finish("The annotator", output, trained.attributes)


@command(
    annotator_app,
    "invdiff annotator measure openai/clip-vit-base-patch32 photos --classes classes.yaml --output out/clip",
    name="measure",
)
def annotator_measure(
    *,
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
    classes: Classes = None,
    source: DataOptions,
    quiet: Quiet = False,
) -> None:
    """Measure how often an annotator errs on labelled images, so that figures can be corrected for it.

    The images must be others than it was trained on. OUTPUT stands for the annotator from then on.
    """
    one_process("annotator measure")
    say("opening images", quiet=quiet)
    from ..evaluation.annotators.heldout import Measurable, measure_annotator
    from ..evaluation.annotators.load import load_annotator, refuse_own_folder, save_measured

    refuse_own_folder(output, annotator)
    images = source.load_labelled(data)
    silence_libraries()
    judge = load_annotator(annotator, attribute=attribute or "", classes=classes)
    if not isinstance(judge, Measurable):
        raise ConfigError(f"Expected an annotator of images, got {annotator!r}: given labels are taken as true.")
    held_out = measure_annotator(judge, images, attribute or None, progress=not quiet)
    save_measured(output, judge, held_out, spec=annotator, attribute=(attribute or [""])[0], classes=classes)
    print_annotator(held_out.summary())
    _finish("The measured annotator", output, held_out.attributes)


def _finish(what: str, output: Path, attributes: Any) -> None:
    words = ["invdiff", "evaluate", str(output.parent / "images"), "--annotator", str(output)]
    finish(f"{what} is in {output}.", [*words, "--attribute", next(iter(attributes))])
