"""The command line: `invdiff COMMAND`. Each command reads settings, calls one function and says what is next.

Whatever imports torch is imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import shlex
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from .cli_measure import app as measure_app
from .cli_options import (
    DATA_PANEL,
    CacheDir,
    CaptionColumn,
    ConfigFile,
    Data,
    DataSource,
    Dtype,
    ImageColumn,
    Limit,
    MaxUnreadable,
    Model,
    NoCaptions,
    Output,
    Quiet,
    Split,
    dtype_flag,
    environments_from,
    flags,
    lines_in,
    option,
    setting,
    settings,
)
from .cli_output import (
    finish,
    is_first_process,
    one_process,
    plain_errors,
    print_audit,
    print_results,
    say,
    say_edits,
    silence_libraries,
)
from .cli_prepare import app as prepare_app
from .cli_report import app as report_app
from .cli_ui import app as ui_app
from .config import AuditConfig, DemoConfig, GenerateConfig, TrainConfig
from .errors import ConfigError

PANEL = "The way through"


class Commands(TyperGroup):
    """The top-level command: errors that a user can mend end it with one line and no traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen command."""
        with plain_errors(debug=bool(ctx.params.get("debug"))):
            return super().invoke(ctx)


app = typer.Typer(
    name="invdiff",
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
)


def main() -> None:
    """Run the command line."""
    # Read when a library is first imported. Threads that spin while they wait slow a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    app()


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"invdiff {version('invdiff')}")
        raise typer.Exit


@app.callback(epilog="Example: invdiff demo --output out/demo")
def invdiff(
    debug: Annotated[
        bool, typer.Option("--debug", envvar="INVDIFF_DEBUG", help="Show the traceback of every error.")
    ] = False,
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and stop.")
    ] = False,
) -> None:
    """Find, remove and prove hidden biases in text-to-image diffusion models, without labels.

    Audit, train, generate, evaluate: each command ends by naming the next. `demo` goes all the way on a small
    bundled model.
    """


@app.command(rich_help_panel=PANEL, epilog="Example: invdiff demo --output out/demo --images-per-prompt 24")
def demo(
    output: Output = Path("out/demo"),
    config: ConfigFile = None,
    num_images: Annotated[int | None, setting(DemoConfig, "num_images", min=200)] = None,
    severity: Annotated[float | None, setting(DemoConfig, "severity", min=0, max=1)] = None,
    steps: Annotated[int | None, setting(DemoConfig, "steps", min=1)] = None,
    images_per_prompt: Annotated[int | None, setting(DemoConfig, "images_per_prompt", min=2)] = None,
    seed: Annotated[int | None, setting(DemoConfig, "seed")] = None,
    quiet: Quiet = False,
) -> None:
    """Go all the way on a small bundled model: a hidden bias is found, removed and measured."""
    one_process("demo")
    chosen = settings(
        DemoConfig,
        config,
        num_images=num_images,
        severity=severity,
        steps=steps,
        images_per_prompt=images_per_prompt,
        seed=seed,
    )
    say("loading the bundled model", quiet=quiet)
    silence_libraries()
    from .demo import run_demo

    print_results(run_demo(output, config=chosen, progress=not quiet))
    finish(
        f"The report is {output / 'report.html'}; its pictures and figures are in {output}. "
        f"To play with it: {shlex.join(['invdiff', 'ui', str(output)])}.",
        ["invdiff", "audit", "MODEL", "DATA", "--output", str(output.parent / "audit")],
        hint=" (with your own model and images)",
    )


@app.command(rich_help_panel=PANEL, epilog="Example: invdiff audit out/model photos --output out/audit")
def audit(
    model: Model,
    data: Data,
    output: Output,
    config: ConfigFile = None,
    solver: Annotated[Literal["auto", "exact", "gradient"] | None, setting(AuditConfig, "solver")] = None,
    num_groups: Annotated[int | None, setting(AuditConfig, "num_groups", min=0)] = None,
    contrast_draws: Annotated[int | None, setting(AuditConfig, "contrast_draws", min=1)] = None,
    vision_encoder: Annotated[str | None, setting(AuditConfig, "vision_encoder")] = None,
    words_model: Annotated[str | None, setting(AuditConfig, "words_model")] = None,
    words: Annotated[
        Path | None, option("One a line: words for the words model to choose from, beside its own.", metavar="FILE")
    ] = None,
    min_images: Annotated[int | None, setting(AuditConfig, "min_images", min=1)] = None,
    resolution: Annotated[int | None, setting(AuditConfig, "resolution", min=0)] = None,
    batch_size: Annotated[int | None, setting(AuditConfig, "batch_size", min=1)] = None,
    seed: Annotated[int | None, setting(AuditConfig, "seed")] = None,
    caption_column: CaptionColumn = None,
    image_column: ImageColumn = None,
    split: Split = "train",
    limit: Limit = None,
    no_captions: NoCaptions = False,
    max_unreadable: MaxUnreadable = 0.01,
    cache_dir: CacheDir = None,
    dtype: Dtype = "fp32",
    quiet: Quiet = False,
) -> None:
    """Find hidden groups in the images that a model learnt from, without labels."""
    options: dict[str, Any] = {
        "solver": solver,
        "num_groups": num_groups,
        "contrast_draws": contrast_draws,
        "vision_encoder": vision_encoder,
        "words_model": words_model,
        "min_images": min_images,
        "resolution": resolution,
        "batch_size": batch_size,
        "seed": seed,
    }
    further_words = None if words is None else tuple(lines_in(words, "word"))
    chosen = settings(AuditConfig, config, **options, words=further_words)
    source = DataSource(data, caption_column, image_column, split, limit, max_unreadable, no_captions)
    say("loading images and model", quiet=quiet)
    images = source.load()
    silence_libraries()
    from .auditing.edits import CURATION
    from .auditing.run import audit as run_audit
    from .models.load import dtype_named, load_pipeline
    from .report.audit_pictures import save_audit_pictures

    found = run_audit(
        load_pipeline(model, dtype=dtype_named(dtype)), images, config=chosen, cache_dir=cache_dir, progress=not quiet
    )
    if not is_first_process():
        return
    aside = found.put_aside(output)
    if aside:
        say(f"people's changes to another audit were put aside, in {aside}", quiet=quiet)
    elif (output / CURATION).is_file():
        say(f"people's changes in {output / CURATION} are kept; the table shows the audit before them", quiet=quiet)
    found.save(output)
    save_audit_pictures(output, images)
    print_audit(found)
    shared = [*source.flags(), *flags(cache_dir=cache_dir), *dtype_flag(dtype)]
    if found.biased:
        module = str(output.parent / "module")
        finish(
            f"The audit and its pictures are in {output}.",
            ["invdiff", "train", model, data, str(output), "--output", module, *shared],
        )
        return
    result = f"No hidden group was found. The audit and its pictures are in {output}."
    if chosen.solver != "auto":
        finish(result)  # which splits whatever has enough images
        return
    if chosen.vision_encoder:
        further: dict[str, Any] = {"solver": "gradient" if no_captions else "exact"}
        further["vision_encoder"] = "" if config else None  # which other solvers do not read
    else:
        further = {"vision_encoder": "facebook/dinov2-small"}
    again = ["invdiff", "audit", model, data, "--output", str(output)]
    finish(
        result,
        [*again, *flags(config=config, **{**options, **further}, words=words), *shared],
        hint=" (to split regardless)" if chosen.vision_encoder else " (to look with further eyes)",
    )


@app.command(
    rich_help_panel=PANEL, epilog="Example: invdiff train out/model photos out/audit --output out/module --steps 800"
)
def train(
    model: Model,
    data: Data,
    audit_dir: Annotated[Path, typer.Argument(metavar="AUDIT", help="The folder that `invdiff audit` wrote.")],
    output: Output,
    config: ConfigFile = None,
    mode: Annotated[Literal["balanced", "invariant"] | None, setting(TrainConfig, "mode")] = None,
    steps: Annotated[int | None, setting(TrainConfig, "steps", min=1)] = None,
    batch_size: Annotated[int | None, setting(TrainConfig, "batch_size", min=1)] = None,
    learning_rate: Annotated[float | None, setting(TrainConfig, "learning_rate")] = None,
    penalty: Annotated[float | None, setting(TrainConfig, "penalty", min=0)] = None,
    rounds: Annotated[int | None, setting(TrainConfig, "rounds", min=1)] = None,
    width: Annotated[int | None, setting(TrainConfig, "width", min=0)] = None,
    seed: Annotated[int | None, setting(TrainConfig, "seed")] = None,
    caption_column: CaptionColumn = None,
    image_column: ImageColumn = None,
    split: Split = "train",
    limit: Limit = None,
    no_captions: NoCaptions = False,
    max_unreadable: MaxUnreadable = 0.01,
    cache_dir: CacheDir = None,
    dtype: Dtype = "fp32",
    quiet: Quiet = False,
) -> None:
    """Train a small module beside the frozen model that balances the groups an audit found."""
    chosen = settings(
        TrainConfig,
        config,
        mode=mode,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        penalty=penalty,
        rounds=rounds,
        width=width,
        seed=seed,
    )
    source = DataSource(data, caption_column, image_column, split, limit, max_unreadable, no_captions)
    say("loading audit, images and model", quiet=quiet)
    silence_libraries()
    from .auditing.result import Audit
    from .models.load import dtype_named, load_pipeline
    from .sampling import drawing_flags
    from .training.train import train as run_train

    found = Audit.load(audit_dir)
    say_edits(found, quiet=quiet)
    found.check_found()
    images = source.load()
    pipe = load_pipeline(model, dtype=dtype_named(dtype))
    run_train(pipe, images, found, output, config=chosen, cache_dir=cache_dir, progress=not quiet)
    finish(
        f"The module is in {output}.",
        ["invdiff", "generate", model]
        + [entry.prompt for entry in found.prompts if entry.found and entry.prompt]
        + ["--module", str(output), "--output", str(output.parent / "images" / "guided")]
        + drawing_flags(pipe, found.settings.get("resolution", 0))
        + dtype_flag(dtype),
    )


@app.command(
    rich_help_panel=PANEL,
    epilog='Example: invdiff generate out/model "a photo of a doctor" --module out/module --output out/guided',
)
def generate(
    model: Model,
    output: Output,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PROMPT",
            help="What to draw: prompts, or names of classes for a class-conditional model; none for one of neither.",
        ),
    ] = None,
    prompts_file: Annotated[
        Path | None, option("A text file with one further prompt per line.", panel=DATA_PANEL, metavar="FILE")
    ] = None,
    module: Annotated[
        str | None,
        option(
            "What `invdiff train` wrote: a folder, or a hub id. Without it, the plain model draws.", metavar="MODULE"
        ),
    ] = None,
    environments: Annotated[
        str, option("Target mix of the groups: uniform, or one proportion per group such as 0.7,0.3.")
    ] = "uniform",
    config: ConfigFile = None,
    scale: Annotated[float | None, setting(GenerateConfig, "scale", min=0)] = None,
    guidance_scale: Annotated[float | None, setting(GenerateConfig, "guidance_scale", min=0)] = None,
    images_per_prompt: Annotated[int | None, setting(GenerateConfig, "images_per_prompt", min=1)] = None,
    steps: Annotated[int | None, setting(GenerateConfig, "num_inference_steps", flag="--steps", min=1)] = None,
    resolution: Annotated[int | None, setting(GenerateConfig, "resolution", min=0)] = None,
    batch_size: Annotated[int | None, setting(GenerateConfig, "batch_size", min=1)] = None,
    seed: Annotated[int | None, setting(GenerateConfig, "seed")] = None,
    dtype: Dtype = "fp32",
    quiet: Quiet = False,
) -> None:
    """Draw images of prompts, with or without a module, from the same starting noise."""
    if module is None and scale is not None:
        raise ConfigError("Expected --module beside --scale, got none: the plain model has no scale.")
    chosen = settings(
        GenerateConfig,
        config,
        scale=scale,
        guidance_scale=guidance_scale,
        images_per_prompt=images_per_prompt,
        num_inference_steps=steps,
        resolution=resolution,
        batch_size=batch_size,
        seed=seed,
    )
    wanted = [*(prompts or []), *(lines_in(prompts_file) if prompts_file else [])]
    mix = environments_from(environments)
    say("loading the model", quiet=quiet)
    silence_libraries()
    from .guidance.loading import load_module
    from .models.load import dtype_named, load_pipeline
    from .sampling import generate as run_generate

    run_generate(
        load_pipeline(model, dtype=dtype_named(dtype)),
        wanted,
        output,
        module=load_module(module) if module else None,
        config=chosen,
        environments=mix,
        progress=not quiet,
    )
    result = f"{max(len(wanted), 1) * chosen.images_per_prompt} images are in {output}."
    if module is None:
        finish(result, ["invdiff", "evaluate", str(output), "--annotator", "ANNOTATOR", "--attribute", "ATTRIBUTE"])
    else:
        same = flags(
            prompts_file=prompts_file,
            config=config,
            guidance_scale=guidance_scale,
            images_per_prompt=images_per_prompt,
            steps=steps,
            resolution=resolution,
            batch_size=batch_size,
            seed=seed,
        )
        plain = [
            "invdiff",
            "generate",
            model,
            *(prompts or []),
            "--output",
            str(output.parent / "base"),
            *same,
            *dtype_flag(dtype),
        ]
        finish(result, plain, hint=" (the same images without the module)")


app.add_typer(measure_app)
app.add_typer(report_app)
app.add_typer(ui_app)
app.add_typer(prepare_app)
