"""Tab Audit: browse hidden groups, move the score at which they part, name them, leave images out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import gradio as gr
import numpy as np
from PIL import ImageDraw

from ..auditing.edits import NAME_LIMIT, Edits
from ..errors import ConfigError, InvDiffError
from ..report.audit_view import candidates_table, unfound_table
from ..report.figures import counted, quoted, share_of
from ..report.groups import Group, Split, splits_of
from ..report.plots import colour_of, histogram, thumb
from ..text import one_line
from .audit_state import AuditBook
from .fragments import QUIET, fragment, gallery, image_file, notice, refusal
from .generate import GenerateTab

CHOOSE = "Choose an image to see it, or to leave it out."
NO_DATA = "The audited images were not given, so none is shown: give them with `invdiff ui --data DATA`."
CONFIDENCE = 0.95
PER_GROUP = 12
MOST_PER_GROUP = 60
Values = dict[Any, Any]
"""Component to its new value."""


class AuditTab:
    """The tab, built inside a `gr.Blocks`.

    Args:
        books: Name to audit; at least one.
        drawn: The tab whose mix sliders bear the names of groups, if any.
    """

    def __init__(self, books: Mapping[str, AuditBook], drawn: GenerateTab | None = None) -> None:
        self._drawn = drawn
        self._choices: list[str] = []
        self._places: list[tuple[AuditBook, tuple[int, int] | None]] = []
        for name, book in books.items():
            run = f"{name} · " if len(books) > 1 else ""
            found = splits_of(book.inferred)
            for place, page in enumerate(found):
                self._choices.append(f"{run}{place + 1}. {page.factor}{one_line(page.prompt.prompt, 100)}")
                self._places.append((book, (page.index, page.factor_index)))
            if not found:
                self._choices.append(f"{run}No hidden group was found")
                self._places.append((book, None))
        self._build(max(groups for book in books.values() for groups in book.audit.num_groups))
        self._connect()

    def _build(self, groups: int) -> None:
        with gr.Row():
            choices = [(choice, place) for place, choice in enumerate(self._choices)]
            self._prompt = gr.Dropdown(choices, value=0, label="Prompt", scale=3, elem_id="audit-prompt")
            self._count = gr.Slider(
                4, MOST_PER_GROUP, PER_GROUP, step=4, label="Images in a row of a group", elem_id="audit-count"
            )
        self._facts = gr.HTML(elem_id="audit-facts")
        with gr.Row(elem_classes="workbench"):
            with gr.Column(scale=2, min_width=300):
                self._plot = gr.HTML(elem_id="audit-plot")
                self._cuts = [
                    gr.Slider(-1, 1, 0, visible=False, elem_id=f"audit-cut-{index}") for index in range(groups - 1)
                ]
                self._moved = gr.HTML(elem_id="audit-moved")
                with gr.Row():
                    self._keep = gr.Button("Keep this threshold", size="sm", elem_id="audit-keep")
                    self._reset = gr.Button("As inferred", size="sm", elem_id="audit-reset")
                self._chosen = gr.HTML(notice(CHOOSE), elem_id="audit-chosen")
                with gr.Row():
                    self._leave = gr.Button("Leave this image out", size="sm", elem_id="audit-leave")
                    self._back = gr.Button("Put it back", size="sm", elem_id="audit-back")
                self._status = gr.HTML(elem_id="audit-status")
            with gr.Column(scale=3, min_width=320):
                self._blocks = [self._block(group) for group in range(groups)]
        with gr.Accordion("Images left out", open=False):
            self._out_note = gr.HTML(elem_id="left-out-note")
            self._out = gallery("left-out", 8, allow_preview=False, buttons=[])
        with gr.Accordion("Splits that were considered, and prompts that hide nothing", open=False):
            self._tables = gr.HTML(elem_id="audit-tables")
        # The prompt that the browser shows, which may be other than the one that was chosen a moment ago.
        self._at = gr.Number(0, precision=0, visible="hidden", elem_id="audit-at")
        self._positions = gr.State({})
        self._picked = gr.State(None)

    def _block(self, group: int) -> SimpleNamespace:
        with gr.Column(elem_classes="group-block") as column:
            with gr.Row(equal_height=True, elem_classes="group-head"):
                head = gr.HTML(elem_id=f"group-{group}")
                name = gr.Textbox(
                    label=f"Name of group {group}",
                    placeholder="such as “on water”",
                    max_length=NAME_LIMIT,
                    max_lines=1,
                    min_width=120,
                    elem_id=f"group-name-{group}",
                )
                save = gr.Button("Save name", size="sm", scale=0, min_width=90, elem_id=f"group-save-{group}")
            gr.HTML('<p class="fine">Most typical</p>')
            typical = gallery(f"typical-{group}", 6, allow_preview=False, buttons=[])
            gr.HTML('<p class="fine">Nearest to another group</p>')
            nearest = gallery(f"nearest-{group}", 6, allow_preview=False, buttons=[])
        return SimpleNamespace(column=column, head=head, name=name, save=save, typical=typical, nearest=nearest)

    @property
    def loads(self) -> list[Any]:
        """The components that `first` and every event fill."""
        blocks = [part for b in self._blocks for part in (b.column, b.head, b.name, b.typical, b.nearest)]
        whole = [self._facts, self._plot, self._moved, self._chosen, self._status, self._out_note, self._out]
        return [*whole, self._tables, self._at, self._positions, self._picked, *self._cuts, *blocks]

    def _connect(self) -> None:
        live: dict[str, Any] = {**QUIET, "trigger_mode": "always_last"}
        each: dict[str, Any] = {**QUIET, "trigger_mode": "multiple"}  # none is lost while another is saved
        at = [self._at, self._count]
        self._prompt.change(self.open, [self._prompt, self._count], self.loads, **live)
        # Not `change`, which values that are only shown would cause.
        gr.on(
            [slider.input for slider in (self._count, *self._cuts)], self.show, [*at, *self._cuts], self.loads, **live
        )
        self._keep.click(self.keep, [*at, *self._cuts], self.loads, **each)
        self._reset.click(self.reset, at, self.loads, **each)
        for button, counts in ((self._leave, False), (self._back, True)):
            button.click(self.count_image, [*at, self._picked, gr.State(counts)], self.loads, **each)
        galleries = {"left-out": self._out}
        for group, block in enumerate(self._blocks):
            here = [*at, gr.State(group), block.name]
            saved = gr.on([block.save.click, block.name.submit], self.rename, here, self.loads, **each)
            if self._drawn is not None:
                saved.then(self._drawn.first, self._drawn.mix, self._drawn.loads, **QUIET)
            galleries |= {f"typical-{group}": block.typical, f"nearest-{group}": block.nearest}
        for name, shelf in galleries.items():
            inputs = [self._at, gr.State(name), self._positions]
            shelf.select(self.pick, inputs, [self._picked, self._chosen], **QUIET)

    def first(self) -> Values:
        """The first prompt, when a page is opened."""
        return self.open(0, PER_GROUP)

    def open(self, place: int, count: float) -> Values:
        """A prompt that was just chosen: names and sliders as saved, no image chosen."""
        book, page = self._find(place)
        names = book.audit.edits.names[page.factor_index if page else 0] if book.audit.edits.names else ()
        values = {block.name: name for block, name in zip(self._blocks, names, strict=False)}
        blank = {block.name: "" for block in self._blocks} | {self._status: "", self._at: place}
        return self._saved(place, count) | blank | values | {self._picked: None, self._chosen: notice(CHOOSE)}

    def show(self, place: int, count: float, *cuts: float) -> Values:
        """A prompt with its images parted at other scores; those that change sides are marked, nothing is saved."""
        book, kept = self._find(place)
        page, words = kept, ""
        if kept is not None and cuts and book.is_movable(kept):
            try:
                page = book.page(kept.index, 0, [float(cut) for cut in cuts[: len(kept.cuts)]])
                words = _moves(kept, page)
            except (InvDiffError, TypeError) as error:
                words = refusal("Expected a number, got none." if isinstance(error, TypeError) else error)
        page = page if words else kept
        moved = {} if page is None or kept is None else _moved(kept, page)
        out = book.audit.edits.left_out
        shelves: dict[str, list[int]] = {"left-out": list(out[:MOST_PER_GROUP])}
        rest = f", of which {MOST_PER_GROUP} are shown" if len(out) > MOST_PER_GROUP else ""
        considered = candidates_table(page.prompt.candidates) if page is not None else None
        unfound = unfound_table([prompt for prompt in book.inferred.prompts if not prompt.found])
        tables = [fragment("table", table) for table in (considered, unfound) if table and table.rows]
        values: Values = {
            self._facts: notice("No hidden group was found: see below why not."),
            self._plot: "",
            self._moved: words,
            self._out_note: notice(f"{counted(len(out), 'image')} left out{rest}."),
            self._out: _images(book, shelves["left-out"]),
            self._tables: "".join(tables),
            self._positions: shelves,
        }
        if page is not None:
            values[self._facts] = _facts(page) + (notice(NO_DATA) if book.data is None else "")
            values[self._plot] = fragment("plot", histogram(page))
        for group, block in enumerate(self._blocks):
            shown = page is not None and group < len(page.groups)
            values[block.column] = gr.update(visible=shown)
            if page is not None and shown:
                of, most = page.groups[group], int(min(max(count, 1), MOST_PER_GROUP))
                typical, nearest = of.typical[:most], _nearest(of, page)[:most]
                shelves |= {f"typical-{group}": typical, f"nearest-{group}": nearest}
                colour, total = colour_of(group), len(page.labels)
                words_of = book.audit.words.of(page.index, group, page.factor_index) if book.audit.words else None
                share = share_of(of.name, of.size, total, confidence=CONFIDENCE, colour=colour)
                values[block.head] = fragment("group", share, [words_of.line] if words_of else [])
                values[block.typical] = _images(book, typical, moved)
                values[block.nearest] = _images(book, nearest, moved)
        return values

    def keep(self, place: int, count: float, *cuts: float) -> Values:
        """Save the cuts that the sliders show."""

        def part(book: AuditBook, page: Split | None, edits: Edits) -> Edits:
            if page is None or not book.is_movable(page):
                raise ConfigError(
                    "Expected a prompt whose groups are parted by their scores, got another. Choose another prompt."
                )
            return edits.with_cuts(page.index, [float(cut) for cut in cuts[: len(page.cuts)]])

        return self._edit(place, count, part, "Kept: the groups part there now.")

    def reset(self, place: int, count: float) -> Values:
        """Part the groups as inferred."""

        def part(book: AuditBook, page: Split | None, edits: Edits) -> Edits:
            return edits if page is None else edits.with_cuts(page.index, None)

        return self._edit(place, count, part, "The groups part as they were inferred.")

    def rename(self, place: int, count: float, group: int, name: str) -> Values:
        """Name a group."""

        def call(book: AuditBook, page: Split | None, edits: Edits) -> Edits:
            return edits.with_name(page.factor_index if page is not None else 0, group, str(name or ""))

        return self._edit(place, count, call, "Name saved.")

    def count_image(self, place: int, count: float, picked: tuple[int, int] | None, counts: bool) -> Values:
        """Leave the chosen image out, or count it again."""

        def change(book: AuditBook, page: Split | None, edits: Edits) -> Edits:
            if picked is None or self._find(picked[0])[0] is not book:
                raise ConfigError("Expected an image to be chosen first, got none. Click on one.")
            if counts and picked[1] not in edits.left_out:
                raise ConfigError("Expected an image that was left out, got one that was not. Choose another.")
            return (edits.with_images if counts else edits.without_images)([picked[1]])

        words = "It counts again." if counts else "It counts nowhere now: training, pictures and reports leave it out."
        values = self._edit(place, count, change, words)
        if picked is not None and self._at in values:
            values[self._chosen] = _details(self._find(place)[0], picked[1])
        return values

    def pick(self, event: gr.SelectData, place: int, shelf: str, positions: dict[str, list[int]]) -> list[Any]:
        """Show the image that was clicked on, and what is known of it."""
        shown = positions.get(shelf, [])
        if not isinstance(event.index, int) or not 0 <= event.index < len(shown):
            return [None, notice(CHOOSE)]
        return [(place, shown[event.index]), _details(self._find(place)[0], shown[event.index])]

    def _find(self, place: int) -> tuple[AuditBook, Split | None]:
        book, page = self._places[place]
        return book, None if page is None else book.page(*page)

    def _edit(
        self, place: int, count: float, change: Callable[[AuditBook, Split | None, Edits], Edits], words: str
    ) -> Values:
        """Save a change and show it, or why it cannot be made. Text fields stay: somebody may be typing a name."""
        book, page = self._find(place)
        try:
            book.edit(lambda edits: change(book, page, edits))
        except (InvDiffError, TypeError) as error:
            return {self._status: refusal("Expected a number, got none." if isinstance(error, TypeError) else error)}
        edits = book.audit.edits
        named = sum(bool(name) for names in edits.names for name in names)
        parts = [
            counted(named, "name") if named else "",
            f"{counted(len(edits.left_out), 'image')} left out" if edits.left_out else "",
            f"{counted(len(edits.cuts), 'prompt')} parted by hand" if edits.cuts else "",
        ]
        kept = ", ".join(filter(None, parts)) or "no changes"
        return self._saved(place, count) | {
            self._status: notice(f"{words} Beside the audit: {kept}."),
            self._at: place,
        }

    def _saved(self, place: int, count: float) -> Values:
        """A prompt as saved, with the sliders of its cuts."""
        book, page = self._find(place)
        cuts = page.cuts if page is not None and book.is_movable(page) else []
        values = self.show(place, count)
        for index, slider in enumerate(self._cuts):
            if page is None or index >= len(cuts):
                values[slider] = gr.update(visible=False)
                continue
            low, high = float(page.scores.min()), float(page.scores.max())
            step = 10.0 ** np.floor(np.log10(max(high - low, 1e-6) / 200))
            short = round(cuts[index], 2)
            same = np.array_equal(page.scores >= short, page.scores >= cuts[index])
            which = f" ({index + 1} of {len(cuts)})" if len(cuts) > 1 else ""
            values[slider] = gr.update(
                minimum=float(np.floor(low / step) * step),
                maximum=float(np.ceil(high / step) * step),
                step=step,
                value=short if same else cuts[index],
                label=f"Score at which the groups part{which}",
                visible=True,
            )
        return values


def _images(book: AuditBook, positions: Sequence[int], moved: Mapping[int, int] | None = None) -> list[Any]:
    """Images with their names; those that moved are framed in the colour of the group that they leave."""
    shown = []
    for at in positions if book.data is not None else ():
        image, name = book.image(at), one_line(book.audit.names[at], 80)
        if moved and at in moved:
            image, name = image.convert("RGB"), f"moved: {name}"
            width = max(2, 12 * min(image.size) // 256)
            box = (0, 0, image.width - 1, image.height - 1)
            ImageDraw.Draw(image).rectangle(box, outline=colour_of(moved[at]), width=width)
        shown.append((image_file(image), name))
    return shown


def _moved(before: Split, after: Split) -> dict[int, int]:
    """Position of each image that changes sides to the group that it leaves."""
    changed = np.flatnonzero(before.labels != after.labels)
    return dict(zip(before.rows[changed].tolist(), before.labels[changed].tolist(), strict=True))


def _moves(before: Split, after: Split) -> str:
    """How many images moved cuts take from one group to another, in words; "" for none."""
    names = {group.index: quoted(group.name) for group in before.groups}
    words = [
        f"{counted(count, 'image')} from {names[old]} to {names[new]}"
        for old in names
        for new in names
        if old != new and (count := int(np.count_nonzero((before.labels == old) & (after.labels == new))))
    ]
    return notice(f"Would move {'; '.join(words)}. Not kept yet.") if words else ""


def _nearest(group: Group, page: Split) -> list[int]:
    """The group's images by how near their scores are to a cut; by doubt where scores part nothing."""
    if not page.cuts:
        return group.uncertain
    own = np.flatnonzero(page.labels == group.index)
    distance = np.abs(page.scores[own][:, None] - np.array(page.cuts)[None]).min(axis=1)
    ordered: list[int] = page.rows[own[np.argsort(distance, kind="stable")]].tolist()
    return ordered


def _facts(page: Split) -> str:
    prompt = page.prompt
    facts = {
        "images": f"{prompt.num_images:,}",
        "separation": f"{prompt.separation:.2f}",
        "stability": f"{prompt.stability:.2f}",
        "evidence": prompt.evidence,
    }
    return fragment("facts", [*facts.items(), *([("changed", "by hand")] if page.by_hand else [])])


def _details(book: AuditBook, position: int) -> str:
    """An image, and what is known of it."""
    audit, name = book.audit, book.audit.names[position]
    facts = [("score", f"{audit.scores[position]:.2f}")]
    facts.append(("prompt", f"“{audit.prompts[audit.prompt_ids[position]].prompt}”"))
    if book.data is not None:
        facts.append(("caption", f"“{book.data.captions[book.rows[position]]}”"))
    if position in audit.edits.left_out:
        facts.append(("counts", "no: it was left out"))
    picture = thumb(book.image(position), f"Image {name}") if book.data is not None else None
    return fragment("image", picture, name, facts)
