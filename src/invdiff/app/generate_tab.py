"""Tab Generate: the same seeds with and without guidance, side by side, and what an annotator sees in them."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from ..config import GenerateConfig
from ..errors import ConfigError, InvDiffError
from ..report.document import Share
from ..report.style import colour_of
from ..report.words import counted
from ..text import one_line
from .pieces import notice, piece, refusal
from .seen import shares_seen
from .studio import MOST_IMAGES, Ask, Shot, Shown, Studio

LONGEST_PROMPT = 2000
"""Characters; models read far fewer."""
MOST_SUGGESTIONS = 3
BEGIN = "Press Draw: the base model and guidance draw the same seeds side by side."
NO_MODULE = "No module was given: there is nothing to compare with. `invdiff train` makes one; give it with --module."
GroupNames = Callable[[], Sequence[Sequence[str]]]


@dataclass(frozen=True)
class Commands:
    """How what is shown is named on a command line."""

    model: str
    module: str


@dataclass(frozen=True)
class GenerateTab:
    """What other tabs change in this one."""

    mix: Sequence[Sequence[gr.Slider]]
    """[factor][group]: proportions of the target mix."""


def generate_tab(
    studio: Studio, *, suggestions: Sequence[str], group_names: GroupNames, commands: Commands
) -> GenerateTab:
    """Build the tab inside a `gr.Blocks`.

    Args:
        studio: What draws.
        suggestions: Prompts to begin with, the first filled in.
        group_names: Returns what the groups of each factor are called by now.
        commands: The words for the command that draws the same images.
    """
    guided = studio.module is not None
    with gr.Row(elem_classes="workbench"):
        with gr.Column(scale=1, min_width=280, elem_classes="controls"):
            prompt = gr.Textbox(
                suggestions[0] if suggestions else "",
                label="Prompt" if studio.needs_prompts else "Prompt (this model reads none)",
                lines=2,
                max_lines=4,
                max_length=LONGEST_PROMPT,
                interactive=studio.needs_prompts,
                elem_id="prompt",
            )
            offered = list(suggestions[:MOST_SUGGESTIONS]) if studio.needs_prompts and len(suggestions) > 1 else []
            with gr.Column(elem_classes="suggestions", visible=bool(offered)):
                chips = [gr.Button(one_line(text, 40), size="sm", variant="secondary") for text in offered]
            with gr.Row(elem_classes="actions"):
                draw = gr.Button("Draw", variant="primary", min_width=80, elem_id="draw")
                stop = gr.Button("Stop", min_width=80, elem_id="stop")
            with gr.Group():
                scale = gr.Slider(
                    0.0,
                    2.0,
                    1.0,
                    step=0.05,
                    label="Strength",
                    info="0: base model, 1: as trained",
                    interactive=guided,
                    elem_id="scale",
                )
                mix = _mix_sliders(studio.num_groups, group_names())
                target = gr.HTML(
                    _target(_even(studio.num_groups), group_names()),
                    padding=True,
                    visible=bool(mix),
                    elem_id="mix",
                )
            with gr.Group():
                cfg = gr.Slider(
                    1.0,
                    15.0,
                    3.0 if studio.needs_prompts else 1.0,
                    step=0.5,
                    label="Guidance scale (CFG)",
                    interactive=studio.needs_prompts,
                    elem_id="cfg",
                )
            with gr.Accordion("Images, seed and steps", open=False, elem_id="more"):
                images = gr.Slider(1, MOST_IMAGES, 12, step=1, label="Images", elem_id="images")
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31 - 1, elem_id="seed")
                steps = gr.Slider(2, 100, 20, step=1, label="Sampling steps", elem_id="steps")
            live = gr.Checkbox(
                True, label="Draw again as I move strength, shares or CFG", container=False, elem_id="live"
            )
        with gr.Column(scale=3, min_width=320):
            status = gr.HTML(notice(BEGIN if guided else NO_MODULE), elem_id="status")
            with gr.Row(equal_height=True):
                with gr.Column(min_width=280, elem_classes="pane"):
                    gr.HTML('<h2 class="side">Base model</h2>')
                    base_gallery = _gallery("Images of the base model", "base")
                with gr.Column(min_width=280, visible=guided, elem_classes="pane"):
                    gr.HTML('<h2 class="side">With guidance <small>the same seeds</small></h2>')
                    guided_gallery = _gallery("Images with guidance", "guided")
            shares = gr.HTML(elem_id="shares")
            with gr.Accordion("The same images from the command line", open=False):
                command = gr.Code(language="shell", label="Command", interactive=False, lines=2)

    flat = [slider for factor in mix for slider in factor]
    inputs = [prompt, seed, images, cfg, steps, scale, *flat]
    outputs = [status, base_gallery, guided_gallery, shares, command]

    def ask_of(values: Sequence[Any]) -> Ask:
        return read_ask(values, studio.num_groups, batch_size=studio.batch_size)

    def run(request: gr.Request, *values: Any) -> Iterator[list[Any]]:
        try:
            ask = ask_of(values)
            yield [notice("Waiting for the model …"), gr.skip(), gr.skip(), gr.skip(), command_for(ask, commands)]
            for shown in studio.draw(ask, str(request.session_hash)):
                yield [_status(shown, ask), *_galleries(shown), shares_seen(shown, studio.annotator), gr.skip()]
        except InvDiffError as error:
            yield [refusal(error), *[gr.skip()] * 4]

    def run_live(request: gr.Request, wanted: bool, *values: Any) -> Iterator[list[Any]]:
        if wanted:
            yield from run(request, *values)
        else:
            yield [gr.skip()] * len(outputs)

    def make_way(request: gr.Request, wanted: bool, *values: Any) -> None:
        """End what is being drawn where it is not what the sliders say by now."""
        try:
            ask = ask_of(values)
        except InvDiffError:
            return  # the drawing itself will say what is wrong
        if wanted:
            studio.stop_unless(ask, str(request.session_hash))

    def halt(request: gr.Request) -> str:
        studio.stop(str(request.session_hash))
        return notice("Stopped.")

    shared: dict[str, Any] = {
        "outputs": outputs,
        "concurrency_id": "model",
        "concurrency_limit": 1,
        "show_progress": "hidden",
        "trigger_mode": "always_last",
        "api_visibility": "private",
    }
    now = gr.on([draw.click, prompt.submit], run, inputs, **shared)
    played = [slider.change for slider in (scale, cfg, *flat)]
    again = gr.on(played, run_live, [live, *inputs], **shared)
    quick: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    gr.on(played, make_way, [live, *inputs], trigger_mode="multiple", **quick)
    runs = [now, again]
    for chip, text in zip(chips, offered, strict=True):
        runs.append(chip.click(lambda text=text: text, None, prompt, **quick).then(run, inputs, **shared))
    stop.click(halt, None, status, cancels=runs, **quick)

    def show_target(*values: float) -> str:
        return _target(_rows(values, studio.num_groups), group_names())

    for slider in flat:
        slider.change(show_target, flat, target, **quick)
    return GenerateTab(mix)


def read_ask(values: Sequence[Any], num_groups: Sequence[int], *, batch_size: int) -> Ask:
    """Return what the controls ask for.

    Args:
        values: Prompt, seed, images, guidance scale, steps, scale, then a proportion for each group of each factor.
        num_groups: Groups of each factor.
        batch_size: Images in one call of the pipeline.

    Raises:
        ConfigError: A value is missing or outside its range.
    """
    prompt, *numbers = values
    if not isinstance(prompt, str) or any(not isinstance(number, int | float) for number in numbers):
        raise ConfigError("Expected a prompt and a number in every field, got an empty one. Fill it in.")
    if len(prompt) > LONGEST_PROMPT:
        raise ConfigError(f"Expected a prompt of at most {LONGEST_PROMPT} characters, got {len(prompt)}. Shorten it.")
    seed, images, cfg, steps, scale, *proportions = numbers
    if not 1 <= images <= MOST_IMAGES:
        raise ConfigError(f"Expected 1 to {MOST_IMAGES} images, got {images:g}.")
    if not (1 <= steps <= 1000 and 0 <= scale <= 10 and 0 <= cfg <= 100 and 0 <= seed < 2**31):
        raise ConfigError("Expected settings within their sliders' ranges, got others.")
    config = GenerateConfig(
        images_per_prompt=int(images),
        guidance_scale=float(cfg),
        scale=float(scale),
        num_inference_steps=int(steps),
        batch_size=batch_size,
        seed=int(seed),
    )
    mix = tuple(_normalised(row) for row in _rows(proportions, num_groups))
    return Ask(prompt.strip(), config, mix)


def _normalised(row: Sequence[float]) -> tuple[float, ...]:
    total = sum(row)
    if total <= 0 or min(row) < 0:
        raise ConfigError("Expected a share above 0 for at least one group, got none. Move one of the mix sliders.")
    return tuple(value / total for value in row)


def _rows(values: Sequence[float], num_groups: Sequence[int]) -> list[list[float]]:
    """Return a flat list of proportions by factor."""
    left = list(values)
    return [[left.pop(0) for _ in range(groups)] for groups in num_groups]


def _even(num_groups: Sequence[int]) -> list[list[float]]:
    return [[1.0] * groups for groups in num_groups]


def _mix_sliders(num_groups: Sequence[int], names: Sequence[Sequence[str]]) -> list[list[gr.Slider]]:
    return [
        [
            gr.Slider(
                0,
                100,
                50,
                step=1,
                label=mix_label(names[factor][group]),
                elem_id=f"mix-{factor}-{group}",
                elem_classes="mix-slider",
            )
            for group in range(groups)
        ]
        for factor, groups in enumerate(num_groups)
    ]


def mix_label(name: str) -> str:
    """Return what the slider of a group is called."""
    return f"Share of “{one_line(name, 60)}”"


def _target(rows: Sequence[Sequence[float]], names: Sequence[Sequence[str]]) -> str:
    """Return the mix asked for, as a bar."""
    bars = []
    for factor, row in enumerate(rows):
        total = sum(row)
        if total <= 0:
            bars.append(refusal("Give at least one group a share above 0."))
            continue
        shares = [
            Share(names[factor][group], value / total, None, None, None, None, colour_of(group))
            for group, value in enumerate(row)
        ]
        bars.append(piece("mix", shares))
    return "".join(bars)


def _gallery(label: str, name: str) -> gr.Gallery:
    return gr.Gallery(
        label=label,
        show_label=False,
        format="png",
        columns=4,
        height="auto",
        object_fit="contain",
        interactive=False,
        container=False,
        buttons=["download", "fullscreen"],
        elem_id=name,
        elem_classes=["shots", "of-4"],
    )


def _galleries(shown: Shown) -> list[list[tuple[Any, str]]]:
    return [[(shot.image, _seen(shot)) for shot in shots] for shots in (shown.base, shown.guided)]


def _seen(shot: Shot) -> str:
    return one_line(" · ".join(shot.classes.values()) or f"seed {shot.seed}", 60)


def _status(shown: Shown, ask: Ask) -> str:
    wanted = ask.config.images_per_prompt
    done = max(len(shown.guided), 0) if shown.guided else len(shown.base)
    words = f"{done} of {counted(wanted, 'image')} in {shown.seconds:.1f} s"
    if shown.stopped:
        words = f"Stopped at {words}"
    elif done < wanted:
        words += " …"
    return notice(f"{words} · “{one_line(ask.prompt, 80)}”")


def command_for(ask: Ask, commands: Commands) -> str:
    """Return the command that draws these images, guided where there is a module."""
    plain = GenerateConfig()
    flags: Mapping[str, tuple[Any, Any]] = {
        "--images-per-prompt": (ask.config.images_per_prompt, plain.images_per_prompt),
        "--guidance-scale": (ask.config.guidance_scale, plain.guidance_scale),
        "--steps": (ask.config.num_inference_steps, plain.num_inference_steps),
        "--seed": (ask.config.seed, plain.seed),
    }
    words = ["invdiff", "generate", commands.model, *([ask.prompt] if ask.prompt else [])]
    if commands.module:
        words += ["--module", commands.module]
        if ask.config.scale != plain.scale:
            words += ["--scale", f"{ask.config.scale:g}"]
        if len(ask.mix) == 1 and len(set(ask.mix[0])) > 1:
            words += ["--environments", ",".join(f"{share:.4f}" for share in ask.mix[0])]
    for flag, (value, default) in flags.items():
        words += [flag, f"{value:g}"] if value != default else []
    return shlex.join([*words, "--output", "images"])
