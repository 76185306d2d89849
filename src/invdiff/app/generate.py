"""Tab Generate: the same seeds with and without guidance, side by side, and the classes that an annotator counts."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

import gradio as gr

from ..errors import InvDiffError
from ..evaluation.annotators.annotations import CANNOT_TELL, Annotator
from ..evaluation.fairness.intervals import CONFIDENCE
from ..report.figures import counted, quoted, share_of
from ..report.plots import BASE_COLOUR, SERIES_COLOURS, colour_of
from ..text import one_line
from .fragments import QUIET, fragment, gallery, image_file, notice, refusal
from .studio import LONGEST_PROMPT, Shot, Shown, Studio, Turn, by_factor, command_for, read_ask

_NOTHING: list[Any] = [gr.skip()] * 5  # values that leave all outputs as they are
_WITH_TIME = "(live, sent, ...values) => [live, performance.timeOrigin + performance.now(), ...values]"


def shares_seen(shown: Shown, annotator: Annotator | None) -> str:
    """Counts of each class in base and guided images as bars, with Wilson's intervals, as HTML."""
    if annotator is None:
        return notice("No annotator was given, so images are not counted. Give one with `invdiff ui --annotator`.")
    sides = [("Base model", shown.base, BASE_COLOUR), ("With guidance", shown.guided, SERIES_COLOURS[0])]

    def bars(attribute: str, name: str) -> Iterator[Any]:
        for side, shots, colour in sides:
            known = [shot.classes[attribute] for shot in shots if shot.classes[attribute] != CANNOT_TELL]
            if known:
                yield share_of(side, known.count(name), len(known), colour=colour)

    attributes = [
        (attribute, [(name, list(bars(attribute, name))) for name in classes])
        for attribute, classes in annotator.attributes.items()
    ]
    unsure = sum(CANNOT_TELL in shot.classes.values() for shot in (*shown.base, *shown.guided))
    note = f"Classes by {one_line(annotator.name, 60)}, with {CONFIDENCE:.0%} intervals."
    note += f" It cannot tell those of {counted(unsure, 'image')}." if unsure else ""
    return fragment("shares", attributes, note)


def _shelf(shots: Sequence[Shot]) -> list[tuple[str, str]]:
    """Files of images for a gallery, with their classes and seeds in words."""
    return [(image_file(image), one_line(" · ".join([*of.values(), f"seed {seed}"]), 80)) for image, seed, of in shots]


class GenerateTab:
    """The tab, built inside a `gr.Blocks`.

    `prompts` are suggestions, the first filled in, `names` the present names of each factor's groups, and `resolution`
    the side of the images in pixels, 0 for the model's own.
    """

    def __init__(self, studio: Studio, prompts: Sequence[str], names: Callable[[], Any], resolution: int = 0) -> None:
        self._studio, self._group_names, self._resolution = studio, names, resolution
        guided = studio.module is not None
        with gr.Row(elem_classes="workbench"):
            with gr.Column(scale=1, min_width=280, elem_classes="controls"):
                controls, chips, draw, stop, live = self._controls(prompts[:3] if studio.needs_prompts else [])
            with gr.Column(scale=3, min_width=320):
                begin = "Press Draw: the base model and guidance draw the same seeds side by side."
                alone = "No module was given, so there is no guidance to compare with. Give one with --module."
                status = gr.HTML(notice(begin if guided else alone), elem_id="status")
                with gr.Row():
                    with gr.Column(min_width=280, elem_classes="pane"):
                        gr.HTML('<h2 class="side">Base model</h2>')
                        base = gallery("base", 4, label="Images of the base model", buttons=["download", "fullscreen"])
                    with gr.Column(min_width=280, visible=guided, elem_classes="pane"):
                        gr.HTML('<h2 class="side">With guidance <small>the same seeds</small></h2>')
                        beside = gallery("guided", 4, label="Images with guidance", buttons=["download", "fullscreen"])
                shares = gr.HTML(elem_id="shares")
                with gr.Accordion("The same images from the command line", open=False):
                    command = gr.Code(language="shell", label="Command", interactive=False, lines=2, wrap_lines=True)
        outputs = [status, base, beside, shares, command]
        # All run at once: the studio lets one draw at a time, and the newest of a session ends the others.
        options: dict[str, Any] = {**QUIET, "concurrency_limit": None, "trigger_mode": "multiple"}
        sent = gr.Number(0, visible="hidden")
        always, drawing = [gr.State(True), sent, *controls], {**options, "js": _WITH_TIME}
        gr.on([draw.click, controls[0].submit], self.draw, always, outputs, **drawing)
        for text, chip in chips.items():
            chosen = chip.click(lambda text=text: text, None, controls[0], **options)
            chosen.then(self.draw, always, outputs, **drawing)
        moved = [slider.change for slider in (controls[3], *controls[5:])]
        gr.on(moved, self.draw, [live, sent, *controls], outputs, **drawing)
        stop.click(self.stop, None, status, **options)
        for slider in self.mix:
            slider.change(self.target_bar, self.mix, self._target, **options)

    def _controls(self, suggestions: Sequence[str]) -> tuple[list[Any], dict[str, gr.Button], Any, Any, Any]:
        """Build what `read_ask` reads, in its order; the suggestions, Draw, Stop, and whether sliders draw."""
        reads, guided = self._studio.needs_prompts, self._studio.module is not None
        text, label = [*suggestions, ""][0], "Prompt" if reads else "Prompt (this model reads none)"
        prompt = gr.Textbox(
            text, label=label, lines=2, max_lines=4, max_length=LONGEST_PROMPT, interactive=reads, elem_id="prompt"
        )
        with gr.Column(elem_classes="suggestions", visible=len(suggestions) > 1):
            chips = {text: gr.Button(one_line(text, 40), size="sm") for text in suggestions}
        with gr.Row(elem_classes="actions"):
            draw = gr.Button("Draw", variant="primary", min_width=80, elem_id="draw")
            stop = gr.Button("Stop", min_width=80, elem_id="stop")
        with gr.Group():
            info = "0: base model, 1: as trained"
            scale = gr.Slider(0, 2, 1, step=0.05, label="Strength", info=info, interactive=guided, elem_id="scale")
            labels = iter(self._mix_labels())
            self.mix = [
                gr.Slider(0, 100, 50, step=1, label=next(labels), elem_id=f"mix-{factor}-{group}")
                for factor, groups in enumerate(self._studio.num_groups)
                for group in range(groups)
            ]
            bar = self.target_bar(*[50] * len(self.mix))
            self._target = gr.HTML(bar, padding=True, visible=bool(self.mix), elem_id="mix")
            self.loads = [*self.mix, self._target]
        with gr.Group():
            label, scaled = "Guidance scale (CFG)", self._studio.reads_guidance
            cfg = gr.Slider(1, 15, 3 if scaled else 1, step=0.5, label=label, interactive=scaled, elem_id="cfg")
        with gr.Accordion("Images, seed and steps", open=False, elem_id="more"):
            images = gr.Slider(1, 64, 12, step=1, label="Images", elem_id="images")
            seed = gr.Number(0, label="Seed", elem_id="seed")
            steps = gr.Slider(2, 100, 20, step=1, label="Sampling steps", elem_id="steps")
        live = gr.Checkbox(True, label="Draw again as I move strength, shares or CFG", container=False, elem_id="live")
        return [prompt, seed, images, cfg, steps, scale, *self.mix], chips, draw, stop, live

    def first(self, *values: float) -> list[Any]:
        """Present names of groups, at the sliders and in the mix of `values`, which are equal shares if not given."""
        labels = [gr.update(label=label) for label in self._mix_labels()]
        return [*labels, self.target_bar(*(values or [50] * len(self.mix)))]

    async def draw(self, request: gr.Request, live: bool, sent: float, *values: Any) -> AsyncIterator[list[Any]]:
        """Draw what the controls state, and show each batch; nothing where moving a slider should not draw.

        Requests come out of their order where they come fast: `sent` is the browser's time of each.
        """
        if not live or (turn := self._studio.next_turn(str(request.session_hash), sent)).over:
            yield _NOTHING  # gradio clears the outputs of an event that yields no values
            return
        # Drawing has a thread of asyncio's own, which a page that ends waits for; it would not for one of gradio's.
        batches = self.batches(turn, *values)
        while (shown := await asyncio.to_thread(next, batches, None)) is not None:
            yield shown

    def batches(self, turn: Turn, *values: Any) -> Iterator[list[Any]]:
        """Values of status, both galleries, counts and command: the command first, then after each batch."""
        studio = self._studio
        try:
            ask = read_ask(values, studio, resolution=self._resolution)
            yield [notice("Waiting for the model …"), *_NOTHING[:3], command_for(ask, studio)]
            for shown in studio.draw(ask, turn):
                sides = map(_shelf, (shown.base, shown.guided))
                done, wanted = len(shown.guided or shown.base), ask.config.images_per_prompt
                words = f"{'Stopped at ' * shown.stopped}{done} of {counted(wanted, 'image')} in {shown.seconds:.1f} s"
                words += " …" * (done < wanted and not shown.stopped) + f" · {quoted(ask.prompt)}"
                yield [notice(words), *sides, shares_seen(shown, studio.annotator), gr.skip()]
            if turn.over and not turn.stopped:
                yield _NOTHING  # gradio repeats the last values at the end, when those of a newer request may be shown
        except InvDiffError as error:
            yield [refusal(error), *_NOTHING[:4]]

    def stop(self, request: gr.Request) -> str:
        """End the drawing of a session."""
        self._studio.stop(str(request.session_hash))
        return notice("Stopped.")

    def _mix_labels(self) -> list[str]:
        names, module = self._group_names(), self._studio.module
        return [
            f"Share of “{one_line(name, 60)}”" + (f" ({factor})" if len(names) > 1 else "")
            for factor, groups in zip(module.factor_names if module else (), names, strict=False)
            for name in groups
        ]

    def target_bar(self, *values: float) -> str:
        """The mix asked for, as a bar for each factor."""
        bars = []
        for names, row in zip(self._group_names(), by_factor(values, self._studio.num_groups), strict=True):
            if sum(row) <= 0:
                bars.append(refusal("Give at least one group a share above 0."))
                continue
            shares = [
                {"name": name, "share": value / sum(row), "colour": colour_of(k)}
                for k, (name, value) in enumerate(zip(names, row, strict=True))
            ]
            bars.append(fragment("stacked", shares))
        return "".join(bars)
