"""The way through from images to images: demo, audit, train, generate; and birds and finetune, to prepare it."""

import dataclasses
import shlex
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import typer
from typer.core import TyperGroup

from ..assets import PROFESSIONS
from ..config import ArchitectureConfig, AuditConfig, DemoConfig, FinetuneConfig, GenerateConfig, TrainConfig
from ..errors import ConfigError, InvDiffError
from ..files import CURATION, default_cache_dir
from ..launched import is_first_process
from ..options import command_options, with_prompts
from .arguments import (
    DATA,
    IMAGES,
    AskOptions,
    CacheOptions,
    CaptionOptions,
    Data,
    DataOptions,
    Model,
    Output,
    Quiet,
    WeightsOptions,
    command,
    lines_in,
    option,
)
from .print import INTERRUPTED, fail, finish, print_audit, print_results, say, say_loading

WAY, PREPARE = "The way through", "To prepare"  # panels of the help


class Commands(TyperGroup):
    """The top-level command: errors that a user can mend end it with one line and no traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("stopped; what was finished, if anything, is kept: the same command goes on there", err=True)
            raise typer.Exit(INTERRUPTED) from None
        except (InvDiffError, OSError) as error:
            if ctx.params.get("debug") or isinstance(error, BrokenPipeError):  # the reader of a pipe has had enough
                raise
            fail(str(error))
        except RuntimeError as error:
            if ctx.params.get("debug") or type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported
                raise
            fail(
                "Expected enough memory on the device, found it full; finished work is kept. Lower --batch-size or "
                "--resolution, or give --dtype bf16; train takes the least with --backend module."
            )


app = typer.Typer(
    name="invdiff",
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"invdiff {version('invdiff')}")
        raise typer.Exit


@app.callback(epilog="Example: invdiff demo --output out/demo")
def invdiff(
    debug: bool = typer.Option(False, "--debug", envvar="INVDIFF_DEBUG", help="Show the traceback of every error."),
    show_version: bool = typer.Option(
        False, "--version", callback=_show_version, is_eager=True, help="Show the version and stop."
    ),
) -> None:
    """Find, remove and measure hidden biases in text-to-image diffusion models, without labels.

    Audit, train, generate, evaluate: each names the next. `demo` goes all the way on a small bundled model.
    """


@command(app, "invdiff demo --output out/demo --images-per-prompt 24", panel=WAY)
def demo(*, output: Output = Path("out/demo"), settings: DemoConfig, quiet: Quiet = False) -> None:
    """Go all the way on a small bundled model: a hidden bias is found, removed and measured."""
    say_loading("the bundled model", quiet=quiet)
    from ..demo import run_demo

    print_results(run_demo(output, config=settings, progress=not quiet))
    finish(
        f"The report is {output / 'report.html'}; its pictures and figures are in {output}. "
        f"To play with it: {shlex.join(['invdiff', 'ui', str(output)])}.",
        *("audit", "MODEL", "DATA", "--output", output.parent / "audit"),
        hint=" (with your own model and images)",
    )


@command(app, "invdiff audit out/model photos --output out/audit", panel=WAY, shared=True)
def audit(
    *,
    model: Model,
    data: str | None = typer.Argument(None, metavar="DATA", help=f"{IMAGES} Without them, the model draws its own."),
    output: Output,
    prompt: list[str] | None = option(
        None, "Without DATA: a prompt for the model to draw images of; repeat for more.", panel=DATA, metavar="TEXT"
    ),
    prompts: Path | None = option(
        None, "Without DATA: a text file with one prompt a line, or `professions`.", panel=DATA, metavar="FILE"
    ),
    asked: AskOptions,
    settings: AuditConfig,
    words_file: Path | None = option(
        None, "A text file with further words for the words model, one a line.", "--words", metavar="FILE"
    ),
    source: CaptionOptions,
    weights: CacheOptions,
    quiet: Quiet = False,
) -> None:
    """Find hidden groups in the images that a model learnt from, without labels unless they are asked for."""
    weights.check_cache()
    wanted = (*(prompt or ()), *lines_in(PROFESSIONS if prompts == Path("professions") else prompts))
    if not (data or wanted):
        raise ConfigError("Expected DATA, or --prompt once or more for images of the model's own, got neither.")
    drawing = {name: getattr(settings, name) for name in ("images_per_prompt", "guidance_scale")}
    if data and (useless := command_options(AuditConfig, drawing)):
        raise ConfigError(f"Expected {useless[0]} for images of the model's own, got DATA beside it. Leave one out.")
    settings = dataclasses.replace(settings, words=(*settings.words, *lines_in(words_file, "word")))
    say_loading("images and model", quiet=quiet)
    from ..auditing.run import audit as run_audit
    from ..auditing.run import check_replaced
    from ..models.frozen import denoiser_fingerprint
    from ..report.grids import save_audit_picture
    from ..sampling import own_images

    images, pipe = source.load(data, flag="DATA", output=output), weights.load(model)
    of_data = {"data_fingerprint": images.fingerprint} if data else drawing | {"own_images_of": [*wanted]}
    check_replaced(output, of_data | {"denoiser_fingerprint": denoiser_fingerprint(pipe)})
    options: Any = {"config": settings, "cache_dir": weights.cache_dir, "progress": not quiet}
    found = run_audit(pipe, images, prompts=wanted, **vars(asked), **options)
    images = images or own_images(pipe, found.settings, weights.cache_dir or default_cache_dir(), progress=False)
    if not is_first_process():
        return
    if aside := found.put_aside(output):
        say(f"people's changes to another audit were put aside, in {aside}", quiet=quiet)
    elif (output / CURATION).is_file():
        say(f"people's changes in {output / CURATION} are kept; the table shows the audit before them", quiet=quiet)
    found.save(output)
    save_audit_picture(output, images)
    print_audit(found)
    result = f"The audit and its picture are in {output}." + (f" Its images are in {images.folder}." * (not data))
    audited = [data] if data else []
    shared = [*source.words(), *weights.words()]
    if found.biased:
        finish(result, "train", model, *audited, output, "--output", output.parent / "module", *shared)
    elif not asked.words() and all("too few" in (of.power or of.reason) for of in found.prompts):
        more = "--images-per-prompt" if wanted else "more images, or label a few (--labels)"
        finish(f"No hidden group was found, of too few images: give {more}. {result}")
    elif settings.solver != "auto" or settings.vision_encoder or asked.words():
        finish(f"No hidden group was found. {result}")
    else:
        options = command_options(AuditConfig, vars(settings) | {"vision_encoder": "facebook/dinov2-small"})
        drawn = [word for text in wanted for word in ("--prompt", text)]
        words = ("audit", model, *audited, *drawn, "--output", output, *options, *shared)
        finish(f"No hidden group was found. {result}", *words, hint=" (to look with further eyes)")


@command(app, "invdiff train out/model photos out/audit --output out/module", panel=WAY, shared=True)
def train(
    *,
    model: Model,
    data: Data,
    audit_dir: Path | None = typer.Argument(
        None, metavar="AUDIT", help="What `invdiff audit` wrote; in the place of DATA where it drew its own images."
    ),
    output: Output,
    calibrate: list[float] = option(
        [],
        "A guidance scale that images will be drawn at: the mix of groups that makes them even there is solved for, "
        "for `generate --environments calibrated`; repeat for more.",
        metavar="CFG",
    ),
    settings: TrainConfig,
    source: CaptionOptions,
    weights: CacheOptions,
    quiet: Quiet = False,
) -> None:
    """Train guidance of the frozen model that balances the groups an audit found."""
    weights.check_cache()
    for scale in calibrate:
        GenerateConfig(guidance_scale=scale)  # before training, not after it
        settings.require("mode", settings.mode == "balanced", "balanced beside --calibrate, which solves for a mix")
    say_loading("audit, images and model", quiet=quiet)
    from ..auditing.result import Audit
    from ..sampling import drawing_flags
    from ..training.train import train as run_train

    images = source.load(data if audit_dir else None, flag="DATA", output=output)
    audited = audit_dir or data
    if not (Path(audited) / "audit.json").is_file():
        order = "MODEL, DATA and what `invdiff audit` wrote, in this order"
        raise ConfigError(f"Expected {order}; the last, {audited}, has no audit.json.")
    found = Audit.load(audited)
    if found.edits.changed:
        from ..report.audit_view import about_edits

        say(about_edits(found.edits), quiet=quiet)
    found.check_found()
    pipe = weights.load(model)
    module = run_train(pipe, images, found, output, config=settings, cache_dir=weights.cache_dir, progress=not quiet)
    if calibrate:
        from ..evaluation.calibrate import calibrate as solve

        options: Any = {"choose_null": settings.null_adapter == "auto", "progress": not quiet}
        solve(pipe, module, audited, output, guidance_scales=calibrate, **options)
    prompts = [entry.prompt for entry in found.prompts if entry.found and entry.prompt]
    words = ["--module", output, "--output", output.parent / "images" / "guided"]
    words += drawing_flags(pipe, found.settings.get("resolution", 0), 0 if calibrate else settings.distilled_guidance)
    if calibrate:
        words += ["--environments", "calibrated"]
        scale = GenerateConfig.guidance_scale if GenerateConfig.guidance_scale in calibrate else calibrate[0]
        known = "--guidance-scale" in words  # of a model that takes no guidance
        words += [] if known else command_options(GenerateConfig, {"guidance_scale": scale})
    words += dataclasses.replace(weights, cache_dir=None).words()
    finish(f"The module is in {output}.", *with_prompts(["generate", model], prompts, words))


@command(
    app,
    'invdiff generate out/model "a photo of a doctor" --module out/module --output out/guided',
    panel=WAY,
    shared=True,
)
def generate(
    *,
    model: Model,
    prompts: list[str] | None = typer.Argument(
        None,
        metavar="PROMPT",
        help="What to draw: prompts, or names of classes for a class-conditional model; none for one of neither.",
    ),
    output: Output,
    prompts_file: Path | None = option(None, "A file with one further prompt per line.", panel=DATA, metavar="FILE"),
    module: str | None = option(
        None, "What `invdiff train` wrote: a folder, or a hub id. Without it, the plain model draws.", metavar="MODULE"
    ),
    environments: list[str] = option(
        ["uniform"],
        "Target mix of the groups: uniform; calibrated (see `train --calibrate`); or one proportion per group such as "
        "0.7,0.3, of several hidden factors such as 'factor 1=0.7,0.3', once for each that is not uniform. Images are "
        "spread evenly over the mix; iid draws each one's group by itself from an even mix, as Bias floors assume.",
        metavar="MIX",
    ),
    settings: GenerateConfig,
    weights: WeightsOptions,
    quiet: Quiet = False,
) -> None:
    """Draw images of prompts, with or without a module, from the same starting noise."""
    plain = dataclasses.replace(settings, scale=GenerateConfig.scale)
    if module is None and (settings, environments) != (plain, ["uniform"]):
        raise ConfigError(
            "Expected --module beside --scale and --environments, which change guidance alone, got none."
        )
    wanted = [*(prompts or []), *lines_in(prompts_file)]
    mix: Any = environments[0]
    try:
        if environments not in (["uniform"], ["iid"], ["calibrated"]):
            shares = {of.rpartition("=")[0]: list(map(float, of.rpartition("=")[2].split(","))) for of in environments}
            if len(shares) < len(environments) or ("" in shares and len(shares) > 1):
                raise ValueError("a factor twice, or without its name")
            mix = shares.get("", shares)
    except ValueError as error:
        raise ConfigError(
            "Expected environments 'uniform', 'calibrated', 'iid', one proportion per group such as 0.7,0.3, or each "
            f"of several factors once, such as 'factor 1=0.7,0.3', got {', '.join(map(repr, environments))}."
        ) from error
    say_loading("the model", quiet=quiet)
    from ..guidance.backends import load_guidance
    from ..sampling import generate as run_generate

    pipe = weights.load(model)
    guidance = load_guidance(module) if module else None
    run_generate(pipe, wanted, output, module=guidance, config=settings, environments=mix, progress=not quiet)
    result = f"{max(len(wanted), 1) * settings.images_per_prompt} images are in {output}."
    if module is None:
        finish(result, "evaluate", output, "--annotator", "ANNOTATOR", "--attribute", "ATTRIBUTE")
        return
    words = ["--output", output.parent / "base"]
    words += ["--prompts-file", prompts_file] if prompts_file else []
    words += [*command_options(GenerateConfig, vars(plain)), *weights.words()]
    words = with_prompts(["generate", model], prompts or [], words)
    finish(result, *words, hint=" (the same images without the module)")


@command(app, "invdiff export out/module --output out/lora", panel=WAY)
def export(
    *,
    guidance: str = typer.Argument(metavar="GUIDANCE", help="What `invdiff train --backend lora` wrote, or a hub id."),
    output: Output,
) -> None:
    """Write a LoRA of each group, which diffusers, ComfyUI and WebUI load without this package."""
    from ..guidance.backends import load_guidance

    files = load_guidance(guidance).export(output)
    finish(f"{len(files)} files are in {output}. To load one: pipe.load_lora_weights({str(files[0])!r}).")


@command(app, "invdiff birds --output out/birds --severity 0.95", panel=PREPARE)
def birds(
    *,
    output: Output,
    num_images: int = option(6000, "How many images.", min=1, metavar="INT"),
    severity: float = option(
        0.95, "Share of images whose background agrees with the bird.", min=0, max=1, metavar="FLOAT"
    ),
    world: Literal["two-prompts", "one-prompt"] = option(
        "two-prompts", "Land and water birds, or land birds captioned as birds."
    ),
    resolution: int = option(64, "Pixels a side.", min=16, metavar="INT"),
    seed: int = option(0, "Another seed, another set.", min=0, metavar="INT"),
    quiet: Quiet = False,
) -> None:
    """Draw the bundled world: captioned birds whose background agrees with the bird, in most images."""
    from ..data.birds import BirdsWorld

    drawn = BirdsWorld(num_images, severity=severity, seed=seed, resolution=resolution, world=world)
    drawn.write(output, progress=not quiet)
    finish(f"{num_images} captioned images are in {output}.", "finetune", output, "--output", output.parent / "model")


@command(app, "invdiff finetune photos --base org/small-sd --output out/model --steps 2000", panel=PREPARE)
def finetune(
    *,
    data: Data,
    output: Output,
    base: str | None = option(
        None, "Train this pipeline's denoiser. Without it, a small model is trained from scratch.", metavar="MODEL"
    ),
    architecture: Path | None = option(
        None, "JSON or YAML with the shape of a model trained from scratch (ArchitectureConfig).", metavar="FILE"
    ),
    audit: Path | None = option(
        None,
        "Let the hidden groups that this audit of the same images found come equally often, so that the model does "
        "not learn their bias. Best with the --base from before it was biased.",
        metavar="AUDIT",
    ),
    settings: FinetuneConfig,
    source: DataOptions,
    quiet: Quiet = False,
) -> None:
    """Fit a diffusion model to captioned images: it learns their spurious attributes with their subjects."""
    if base is not None and settings.autoencoder_steps != FinetuneConfig.autoencoder_steps:
        raise ConfigError("Expected --autoencoder-steps without --base: a base keeps its own autoencoder.")
    shape = ArchitectureConfig.from_file(architecture) if architecture else None
    say_loading("images", quiet=quiet)
    from ..auditing.result import Audit
    from ..training.finetune import finetune as run_finetune

    found = Audit.load(audit) if audit else None
    options: Any = {"base": base, "architecture": shape, "audit": found, "config": settings, "progress": not quiet}
    run_finetune(source.load(data, output=output), output, **options)
    words = ["audit", output, data, "--output", output.parent / "audit", *source.words()]
    if found:
        prompts = [entry.prompt for entry in found.prompts if entry.found and entry.prompt]
        words = with_prompts(["generate", output], prompts, ["--output", output.parent / "images"])
    finish(f"The model is in {output}.", *words)
