"""Tab Generate: the same seeds with and without guidance, side by side, and what an annotator sees in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gradio as gr

from ..errors import InvDiffError
from ..report.document import Share
from ..report.style import colour_of
from ..report.words import counted
from ..text import one_line
from .asking import LONGEST_PROMPT, Commands, by_factor, command_for, read_ask
from .pictures import Pictures
from .pieces import FAILED, notice, piece, refusal
from .seen import shares_seen
from .studio import MOST_IMAGES, Ask, Shot, Shown, Studio

MOST_SUGGESTIONS = 3
BEGIN = "Press Draw: the base model and guidance draw the same seeds side by side."
WAIT = "Waiting for the model …"
NO_MODULE = "No module was given: there is nothing to compare with. `invdiff train` makes one; give it with --module."
GroupNames = Callable[[], Sequence[Sequence[str]]]
_NOW: dict[str, Any] = {"concurrency_limit": None, "show_progress": "hidden", "api_visibility": "private"}
"""Of what is done at once, while others wait for the model."""


class GenerateTab:
    """The tab, built inside a `gr.Blocks`.

    Args:
        studio: What draws.
        pictures: Where images go.
        suggestions: Prompts to begin with, the first filled in.
        group_names: Returns what the groups of each factor are called by now.
        commands: The words for the command that draws the same images.
        resolution: Side of the images in pixels; 0 for the model's own.

    Attributes:
        mix: [factor][group]: the sliders of the target mix.
    """

    def __init__(
        self,
        studio: Studio,
        pictures: Pictures,
        *,
        suggestions: Sequence[str],
        group_names: GroupNames,
        commands: Commands,
        resolution: int = 0,
    ) -> None:
        self._studio, self._pictures, self._group_names = studio, pictures, group_names
        self._commands, self._resolution = commands, resolution
        self._suggestions = list(suggestions[:MOST_SUGGESTIONS]) if studio.needs_prompts else []
        with gr.Row(elem_classes="workbench"):
            with gr.Column(scale=1, min_width=280, elem_classes="controls"):
                self._build_controls()
            with gr.Column(scale=3, min_width=320):
                self._build_results()
        self._connect()

    def _build_controls(self) -> None:
        reads, guided = self._studio.needs_prompts, self._studio.module is not None
        self._prompt = gr.Textbox(
            self._suggestions[0] if self._suggestions else "",
            label="Prompt" if reads else "Prompt (this model reads none)",
            lines=2,
            max_lines=4,
            max_length=LONGEST_PROMPT,
            interactive=reads,
            elem_id="prompt",
        )
        with gr.Column(elem_classes="suggestions", visible=len(self._suggestions) > 1):
            self._chips = [gr.Button(one_line(text, 40), size="sm") for text in self._suggestions]
        with gr.Row(elem_classes="actions"):
            self._draw = gr.Button("Draw", variant="primary", min_width=80, elem_id="draw")
            self._stop = gr.Button("Stop", min_width=80, elem_id="stop")
        with gr.Group():
            self._scale = gr.Slider(
                0.0,
                2.0,
                1.0,
                step=0.05,
                label="Strength",
                info="0: base model, 1: as trained",
                interactive=guided,
                elem_id="scale",
            )
            self.mix = self._mix_sliders()
            self._target = gr.HTML(self._target_bar(), padding=True, visible=bool(self.mix), elem_id="mix")
        with gr.Group():
            self._cfg = gr.Slider(
                1.0,
                15.0,
                3.0 if reads else 1.0,
                step=0.5,
                label="Guidance scale (CFG)",
                interactive=reads,
                elem_id="cfg",
            )
        with gr.Accordion("Images, seed and steps", open=False, elem_id="more"):
            self._images = gr.Slider(1, MOST_IMAGES, 12, step=1, label="Images", elem_id="images")
            self._seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31 - 1, elem_id="seed")
            self._steps = gr.Slider(2, 100, 20, step=1, label="Sampling steps", elem_id="steps")
        label = "Draw again as I move strength, shares or CFG"
        self._live = gr.Checkbox(True, label=label, container=False, elem_id="live")

    def _mix_sliders(self) -> list[list[gr.Slider]]:
        labels = iter(mix_labels(self._group_names()))
        return [
            [gr.Slider(0, 100, 50, step=1, label=next(labels), elem_id=f"mix-{factor}-{e}") for e in range(groups)]
            for factor, groups in enumerate(self._studio.num_groups)
        ]

    def _build_results(self) -> None:
        guided = self._studio.module is not None
        self._status = gr.HTML(notice(BEGIN if guided else NO_MODULE), elem_id="status")
        with gr.Row(equal_height=True):
            with gr.Column(min_width=280, elem_classes="pane"):
                gr.HTML('<h2 class="side">Base model</h2>')
                self._base = _gallery("Images of the base model", "base")
            with gr.Column(min_width=280, visible=guided, elem_classes="pane"):
                gr.HTML('<h2 class="side">With guidance <small>the same seeds</small></h2>')
                self._guided = _gallery("Images with guidance", "guided")
        self._shares = gr.HTML(elem_id="shares")
        with gr.Accordion("The same images from the command line", open=False):
            self._command = gr.Code(language="shell", label="Command", interactive=False, lines=2)
        self._ticket = gr.Number(0, precision=0, visible="hidden", elem_id="ticket")

    def _connect(self) -> None:
        flat = [slider for factor in self.mix for slider in factor]
        controls = [self._prompt, self._seed, self._images, self._cfg, self._steps, self._scale, *flat]
        outputs = [self._status, self._base, self._guided, self._shares, self._command]
        played = [slider.change for slider in (self._scale, self._cfg, *flat)]
        claimed = [self._ticket, self._status]

        # A wish takes its ticket at once, which ends what is drawn for an earlier one, and then waits for the model.
        asked = gr.on([self._draw.click, self._prompt.submit], self._take_ticket, None, claimed, **_NOW)
        live = gr.on(played, self._take_live_ticket, self._live, claimed, trigger_mode="always_last", **_NOW)
        wishes = [asked, live]
        for chip, text in zip(self._chips, self._suggestions, strict=True):
            chosen = chip.click(lambda text=text: text, None, self._prompt, **_NOW)
            wishes.append(chosen.then(self._take_ticket, None, claimed, **_NOW))
        for wish in wishes:
            drawn = wish.then(
                self._run,
                [self._ticket, *controls],
                outputs,
                concurrency_id="model",
                concurrency_limit=1,
                show_progress="hidden",
                trigger_mode="multiple",
                api_visibility="private",
            )
            drawn.failure(lambda: refusal(FAILED), None, self._status, **_NOW)
        self._stop.click(self._halt, None, self._status, **_NOW)
        for slider in flat:
            slider.change(self._show_target, flat, self._target, **_NOW)

    @property
    def loads(self) -> list[Any]:
        """The components that `first` fills."""
        return [*(slider for factor in self.mix for slider in factor), self._target]

    def first(self) -> list[Any]:
        """Return what a page shows when it is opened: the names of groups may be newer than the page."""
        return [*(gr.update(label=label) for label in mix_labels(self._group_names())), self._target_bar()]

    def show_target_after(self, event: Any) -> None:
        """Show the target mix anew once an event that names groups is over."""
        flat = [slider for factor in self.mix for slider in factor]
        event.then(self._show_target, flat, self._target, **_NOW)

    def _take_ticket(self, request: gr.Request) -> list[Any]:
        return [self._studio.take_ticket(str(request.session_hash)), notice(WAIT)]

    def _take_live_ticket(self, request: gr.Request, wanted: bool) -> list[Any]:
        return self._take_ticket(request) if wanted else [-1, gr.skip()]

    def _run(self, request: gr.Request, ticket: int, *values: Any) -> Iterator[list[Any]]:
        studio, session = self._studio, str(request.session_hash)
        nothing: list[Any] = [gr.skip()] * 5
        if not studio.begin(session, int(ticket)):
            yield nothing
            return
        try:
            ask = read_ask(values, studio.num_groups, batch_size=studio.batch_size, resolution=self._resolution)
            yield [gr.skip(), gr.skip(), gr.skip(), gr.skip(), command_for(ask, self._commands)]
            for shown in studio.draw(ask, session, int(ticket)):
                if shown.stopped and not studio.was_stopped(session, int(ticket)):
                    yield nothing  # another wish follows
                    return
                galleries = [self._gallery_of(shots) for shots in (shown.base, shown.guided)]
                yield [_status(shown, ask), *galleries, shares_seen(shown, studio.annotator), gr.skip()]
        except InvDiffError as error:
            yield [refusal(error), *nothing[1:]]

    def _halt(self, request: gr.Request) -> str:
        self._studio.stop(str(request.session_hash))
        return notice("Stopped.")

    def _gallery_of(self, shots: Sequence[Shot]) -> list[tuple[str, str]]:
        return [(self._pictures.path(shot.image), _seen(shot)) for shot in shots]

    def _show_target(self, *values: float) -> str:
        return self._target_bar(values)

    def _target_bar(self, values: Sequence[float] | None = None) -> str:
        """Return the mix asked for, as bars."""
        groups, names = self._studio.num_groups, self._group_names()
        bars = []
        for factor, row in enumerate(by_factor([1.0] * sum(groups) if values is None else values, groups)):
            if any(not isinstance(value, int | float) for value in row) or sum(row) <= 0:
                bars.append(refusal("Give at least one group a share above 0."))
                continue
            shares = [
                Share(names[factor][group], value / sum(row), None, None, None, None, colour_of(group))
                for group, value in enumerate(row)
            ]
            bars.append(piece("mix", shares))
        return "".join(bars)


def mix_labels(names: Sequence[Sequence[str]]) -> list[str]:
    """Return what the sliders of all groups are called, factor by factor."""
    several = len(names) > 1
    return [
        f"Share of “{one_line(name, 60)}”" + (f" (factor {factor})" if several else "")
        for factor, groups in enumerate(names)
        for name in groups
    ]


def _gallery(label: str, name: str) -> gr.Gallery:
    return gr.Gallery(
        label=label,
        show_label=False,
        columns=4,
        height="auto",
        object_fit="contain",
        interactive=False,
        container=False,
        buttons=["download", "fullscreen"],
        elem_id=name,
        elem_classes=["shots", "of-4"],
    )


def _seen(shot: Shot) -> str:
    return one_line(" · ".join([*shot.classes.values(), f"seed {shot.seed}"]), 80)


def _status(shown: Shown, ask: Ask) -> str:
    wanted = ask.config.images_per_prompt
    done = len(shown.guided) if shown.guided else len(shown.base)
    words = f"{done} of {counted(wanted, 'image')} in {shown.seconds:.1f} s"
    if shown.stopped:
        words = f"Stopped at {words}"
    elif done < wanted:
        words += " …"
    return notice(f"{words} · “{one_line(ask.prompt, 80)}”")
