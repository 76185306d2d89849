"""The way through: demo, audit, train, generate, evaluate, report."""

from __future__ import annotations

import dataclasses
import shlex
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ..config import AuditConfig, DemoConfig, EvaluateConfig, GenerateConfig, TrainConfig
from ..errors import ConfigError
from ..options import command_options
from .adapter import DATA, RUN, command, option
from .arguments import (
    CacheOptions,
    CaptionOptions,
    Classes,
    Data,
    DataOptions,
    Folders,
    Model,
    Output,
    Quiet,
    WeightsOptions,
    environments_from,
    labelled_folders,
    lines_in,
)
from .print import (
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
    """Find, remove and measure hidden biases in text-to-image diffusion models, without labels.

    Audit, train, generate, evaluate: each command ends by naming the next. `demo` goes all the way on a small
    bundled model.
    """


@command(app, "invdiff demo --output out/demo --images-per-prompt 24", panel=PANEL)
def demo(*, output: Output = Path("out/demo"), settings: DemoConfig, quiet: Quiet = False) -> None:
    """Go all the way on a small bundled model: a hidden bias is found, removed and measured."""
    one_process("demo")
    say("loading the bundled model", quiet=quiet)
    silence_libraries()
    from ..demo import run_demo

    print_results(run_demo(output, config=settings, progress=not quiet))
    finish(
        f"The report is {output / 'report.html'}; its pictures and figures are in {output}. "
        f"To play with it: {shlex.join(['invdiff', 'ui', str(output)])}.",
        ["invdiff", "audit", "MODEL", "DATA", "--output", str(output.parent / "audit")],
        hint=" (with your own model and images)",
    )


@command(app, "invdiff audit out/model photos --output out/audit", panel=PANEL)
def audit(
    *,
    model: Model,
    data: Data,
    output: Output,
    settings: AuditConfig,
    words_file: Annotated[
        Path | None,
        option("A text file with further words for the words model, one a line.", "--words", metavar="FILE"),
    ] = None,
    source: CaptionOptions,
    weights: CacheOptions,
    quiet: Quiet = False,
) -> None:
    """Find hidden groups in the images that a model learnt from, without labels."""
    settings = dataclasses.replace(settings, words=(*settings.words, *lines_in(words_file, "word")))
    say("loading images and model", quiet=quiet)
    images = source.load(data)
    silence_libraries()
    from ..auditing.edits import CURATION
    from ..auditing.run import audit as run_audit
    from ..report.grids import save_audit_pictures

    found = run_audit(weights.load(model), images, config=settings, cache_dir=weights.cache_dir, progress=not quiet)
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
    result = f"The audit and its pictures are in {output}."
    shared = [*source.words(), *weights.words()]
    if found.biased:
        module = str(output.parent / "module")
        finish(result, ["invdiff", "train", model, data, str(output), "--output", module, *shared])
        return
    result = f"No hidden group was found. {result}"
    if settings.solver != "auto":  # which splits whatever has enough images
        finish(result)
        return
    changed: dict[str, Any] = {"vision_encoder": "facebook/dinov2-small"}
    if settings.vision_encoder:
        # Without what the other solvers do not read.
        levels = settings.contrast_log_snr[:1]
        changed = {"vision_encoder": "", "other_captions": (), "contrast_log_snr": levels}
        changed["solver"] = "gradient" if source.no_captions else "exact"
    again = command_options(AuditConfig, vars(settings) | changed)
    finish(
        result,
        ["invdiff", "audit", model, data, "--output", str(output), *again, *shared],
        hint=" (to split regardless)" if settings.vision_encoder else " (to look with further eyes)",
    )


@command(app, "invdiff train out/model photos out/audit --output out/module --steps 800", panel=PANEL)
def train(
    *,
    model: Model,
    data: Data,
    audit_dir: Annotated[Path, typer.Argument(metavar="AUDIT", help="The folder that `invdiff audit` wrote.")],
    output: Output,
    settings: TrainConfig,
    source: CaptionOptions,
    weights: CacheOptions,
    quiet: Quiet = False,
) -> None:
    """Train a small module beside the frozen model that balances the groups an audit found."""
    say("loading audit, images and model", quiet=quiet)
    silence_libraries()
    from ..auditing.result import Audit
    from ..sampling import drawing_flags
    from ..training.train import train as run_train

    found = Audit.load(audit_dir)
    say_edits(found, quiet=quiet)
    found.check_found()
    images = source.load(data)
    pipe = weights.load(model)
    run_train(pipe, images, found, output, config=settings, cache_dir=weights.cache_dir, progress=not quiet)
    finish(
        f"The module is in {output}.",
        ["invdiff", "generate", model]
        + [entry.prompt for entry in found.prompts if entry.found and entry.prompt]
        + ["--module", str(output), "--output", str(output.parent / "images" / "guided")]
        + drawing_flags(pipe, found.settings.get("resolution", 0))
        + WeightsOptions(weights.dtype).words(),
    )


@command(app, 'invdiff generate out/model "a photo of a doctor" --module out/module --output out/guided', panel=PANEL)
def generate(
    *,
    model: Model,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PROMPT",
            help="What to draw: prompts, or names of classes for a class-conditional model; none for one of neither.",
        ),
    ] = None,
    output: Output,
    prompts_file: Annotated[
        Path | None, option("A text file with one further prompt per line.", panel=DATA, metavar="FILE")
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
    settings: GenerateConfig,
    weights: WeightsOptions,
    quiet: Quiet = False,
) -> None:
    """Draw images of prompts, with or without a module, from the same starting noise."""
    plain = dataclasses.replace(settings, scale=GenerateConfig.scale)
    if module is None and settings != plain:
        raise ConfigError("Expected --module beside --scale, got none: the plain model has no scale.")
    wanted = [*(prompts or []), *lines_in(prompts_file)]
    mix = environments_from(environments)
    say("loading the model", quiet=quiet)
    silence_libraries()
    from ..guidance.module import load_module
    from ..sampling import generate as run_generate

    run_generate(
        weights.load(model),
        wanted,
        output,
        module=load_module(module) if module else None,
        config=settings,
        environments=mix,
        progress=not quiet,
    )
    result = f"{max(len(wanted), 1) * settings.images_per_prompt} images are in {output}."
    if module is None:
        finish(result, ["invdiff", "evaluate", str(output), "--annotator", "ANNOTATOR", "--attribute", "ATTRIBUTE"])
        return
    words = ["invdiff", "generate", model, *(prompts or []), "--output", str(output.parent / "base")]
    words += ["--prompts-file", str(prompts_file)] if prompts_file else []
    words += [*command_options(GenerateConfig, vars(plain)), *weights.words()]
    finish(result, words, hint=" (the same images without the module)")


@command(
    app,
    "invdiff evaluate out/base out/guided --annotator out/annotator --attribute background",
    panel=PANEL,
)
def evaluate(
    *,
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
    classes: Classes = None,
    settings: EvaluateConfig,
    reference: Annotated[
        str | None, option("Captioned images that quality is measured against.", panel=DATA, metavar="DATA")
    ] = None,
    source: DataOptions,
    output: Annotated[
        Path, option("JSON file to write; every figure is also a row of a CSV file beside it.", panel=RUN)
    ] = Path("results.json"),
    quiet: Quiet = False,
) -> None:
    """Measure Bias, accuracy and quality of generated images, of any tool, at every guidance scale."""
    one_process("evaluate")
    source.expect(reference, "--reference")
    if output.suffix.lower() == ".csv":
        raise ConfigError(f"Expected a .json file for --output, got {output}: the table is written beside it as .csv.")
    say("loading the annotator", quiet=quiet)
    silence_libraries()
    from ..evaluation.annotators.load import load_annotator
    from ..evaluation.evaluate import evaluate as run_evaluate
    from ..evaluation.results import table_path

    judge = load_annotator(annotator, attribute=[*attribute, settings.subject_attribute], classes=classes)
    seen = source.load(reference) if reference is not None else None
    results = run_evaluate(
        labelled_folders(folders), judge, attribute, reference=seen, config=settings, progress=not quiet
    )
    results.save(output)
    print_results(results)
    finish(f"The results are in {output}, and as a table in {table_path(output)}.")


@command(app, "invdiff report out/demo --output out/report", panel=PANEL)
def report(
    *,
    run: Annotated[
        Path | None,
        typer.Argument(
            metavar="RUN",
            help="A folder with audit/, module/, data/, results.json and folders of images named after their models, "
            "such as `invdiff demo` writes. Any part may be absent, or named apart.",
        ),
    ] = None,
    output: Output,
    audit: Annotated[Path | None, option("What `invdiff audit` wrote.", metavar="DIR")] = None,
    results: Annotated[
        Path | None, option("What `invdiff evaluate` or `invdiff demo` wrote: results.json.", metavar="FILE")
    ] = None,
    images: Annotated[
        list[str] | None,
        option("NAME=DIR: generated images of a model, named as in the results; repeat for more.", metavar="NAME=DIR"),
    ] = None,
    module: Annotated[Path | None, option("What `invdiff train` wrote.", metavar="DIR")] = None,
    data: Annotated[str | None, option("The images that were audited.", "--data", panel=DATA, metavar="DATA")] = None,
    title: Annotated[str | None, option("The heading.")] = None,
    source: CaptionOptions,
) -> None:
    """Write what was found, changed and measured as one HTML file to read and forward, and as Markdown."""
    one_process("report")
    from ..report.read import Parts, find_parts
    from ..report.write import TITLE, write_report

    if run is None and audit is None and results is None:
        raise ConfigError("Expected a RUN folder, --audit or --results to report on, got none.")
    source.expect(data, "--data")
    named: dict[str, list[Path]] = {}
    for words in images or ():
        name, equals, folder = words.partition("=")
        if not (name and equals and folder):
            raise ConfigError(f"Expected --images NAME=DIR, such as --images base=out/base, got {words!r}.")
        named.setdefault(name, []).append(Path(folder))
    parts = find_parts(run, results=results) if run is not None else Parts()
    given: dict[str, Any] = {
        "audit": audit,
        "results": results,
        "images": named,
        "module": module,
        "data": source.load(data) if data else None,
        "data_words": [data, *source.words()] if data else [],
    }
    parts = dataclasses.replace(parts, **{name: part for name, part in given.items() if part})
    if parts.audit is None and parts.results is None:
        raise ConfigError(
            f"Expected audit/ or results.json in {run}, found neither. Give a folder that `invdiff demo` wrote, or "
            "name the parts with --audit and --results."
        )
    written = write_report(output, parts, title=title or TITLE)
    finish(f"The report is {written}, and as Markdown {written.with_suffix('.md')}.")
