"""Tab Audit: look through hidden groups, move the score at which they part, name them, leave images out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gradio as gr
import numpy as np

from ..auditing.edits import NAME_LIMIT
from ..errors import ConfigError, InvDiffError
from ..report.figures import quoted
from ..report.groups import Split
from ..text import one_line
from .archive import AuditBook
from .audit_view import LEFT_OUT, MOST_PER_GROUP, AuditView, kept_so_far
from .generate import GenerateTab
from .pictures import Pictures
from .pieces import notice, refusal

CHOOSE = "Choose an image to see it, or to leave it out."
PER_GROUP = 12
_QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}


@dataclass(frozen=True)
class _GroupBlock:
    """The components of one group."""

    column: gr.Column
    head: gr.HTML
    name: gr.Textbox
    save: gr.Button
    typical: gr.Gallery
    nearest: gr.Gallery


class AuditTab:
    """The tab, built inside a `gr.Blocks`.

    Args:
        books: Name to audit; at least one.
        pictures: Where images go.
        named: The audit whose groups the mix sliders are of; None where there are none.
        drawn: The tab with these sliders, if any.
    """

    def __init__(
        self,
        books: Mapping[str, AuditBook],
        pictures: Pictures,
        *,
        named: AuditBook | None = None,
        drawn: GenerateTab | None = None,
    ) -> None:
        self._books = dict(books)
        self._drawn = drawn if named is not None else None
        self._groups = max(groups for book in books.values() for groups in book.num_groups)
        self._view = AuditView(pictures, self._groups)
        self._build()
        self._connect()

    def _build(self) -> None:
        first = next(iter(self._books))
        choices = self._choices(first)
        with gr.Row():
            self._book = gr.Dropdown(
                list(self._books), value=first, label="Audit", visible=len(self._books) > 1, elem_id="audit-book"
            )
            self._page = gr.Dropdown(choices, value=choices[0][1], label="Prompt", scale=3, elem_id="audit-prompt")
            self._count = gr.Slider(
                4, MOST_PER_GROUP, PER_GROUP, step=4, label="Images in a row of a group", elem_id="audit-count"
            )
        self._facts = gr.HTML(elem_id="audit-facts")
        with gr.Row(elem_classes="workbench"):
            with gr.Column(scale=2, min_width=300):
                self._plot = gr.HTML(elem_id="audit-plot")
                label = "Score at which the groups part"
                self._cuts = [
                    gr.Slider(-1, 1, 0, label=label, visible=False, elem_id=f"audit-cut-{index}")
                    for index in range(self._groups - 1)
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
                self._blocks = [self._block(group) for group in range(self._groups)]
        with gr.Accordion("Images left out", open=False):
            self._out_note = gr.HTML(elem_id="left-out-note")
            self._out = _gallery("left-out", 8)
        with gr.Accordion("Splits that were considered, and prompts that hide nothing", open=False):
            self._tables = gr.HTML(elem_id="audit-tables")
        # What the sliders and galleries show, which may be other than what was chosen a moment ago.
        self._at = gr.Textbox("", visible="hidden", elem_id="audit-at")
        self._positions = gr.State({})
        self._picked = gr.State(None)

    def _block(self, group: int) -> _GroupBlock:
        with gr.Column(elem_classes="group-block") as column:
            with gr.Row(equal_height=True, elem_classes="group-head"):
                head = gr.HTML(elem_id=f"group-{group}")
                name = gr.Textbox(
                    "",
                    label=f"Name of group {group}",
                    placeholder="such as “on water”",
                    max_length=NAME_LIMIT,
                    max_lines=1,
                    min_width=120,
                    elem_id=f"group-name-{group}",
                )
                save = gr.Button("Save name", size="sm", scale=0, min_width=90, elem_id=f"group-save-{group}")
            gr.HTML('<p class="fine">Most typical</p>')
            typical = _gallery(f"typical-{group}", 6)
            gr.HTML('<p class="fine">Nearest to another group</p>')
            nearest = _gallery(f"nearest-{group}", 6)
        return _GroupBlock(column, head, name, save, typical, nearest)

    @property
    def outputs(self) -> list[Any]:
        """Every component that shows the groups of the chosen prompt."""
        blocks = [part for b in self._blocks for part in (b.column, b.head, b.typical, b.nearest)]
        whole = [self._facts, self._plot, self._moved, self._out_note, self._out, self._tables, self._positions]
        return [*whole, *blocks]

    @property
    def loads(self) -> list[Any]:
        """The components that `first` fills."""
        names = [block.name for block in self._blocks]
        return [self._status, self._at, self._picked, self._chosen, *self._cuts, *names, *self.outputs]

    def first(self) -> list[Any]:
        """Return what a page shows when it is opened."""
        name = next(iter(self._books))
        return self._open(name, self._choices(name)[0][1], PER_GROUP)

    def _connect(self) -> None:
        where = [self._book, self._page, self._count]
        live: dict[str, Any] = {**_QUIET, "trigger_mode": "always_last"}
        self._page.change(self._open, where, self.loads, **live)
        self._book.change(self._open_book, [self._book, self._count], [self._page, *self.loads], **live)
        self._count.change(self._show, [*where, self._at, *self._cuts], self.outputs, **live)
        for slider in self._cuts:  # not `change`, which values that are only shown would set off
            slider.input(self._show, [*where, self._at, *self._cuts], self.outputs, **live)

        here = [*where, self._at]
        done = [*self._mix_sliders, *self.loads]
        each: dict[str, Any] = {**_QUIET, "trigger_mode": "multiple"}  # none is lost while another is saved
        self._keep.click(self._keep_cuts, [*here, *self._cuts], done, **each)
        self._reset.click(self._reset_cuts, here, done, **each)
        self._leave.click(self._leave_out, [*here, self._picked], done, **each)
        self._back.click(self._put_back, [*here, self._picked], done, **each)
        for group, block in enumerate(self._blocks):
            saved = gr.on([block.save.click, block.name.submit], self._namer(group), [*here, block.name], done, **each)
            if self._drawn is not None:
                saved.then(self._drawn.first, self._drawn.mix, self._drawn.loads, **_QUIET)
        shelves = {LEFT_OUT: self._out}
        for group, block in enumerate(self._blocks):
            shelves |= {f"typical {group}": block.typical, f"nearest {group}": block.nearest}
        for shelf, gallery in shelves.items():
            gallery.select(self._picker(shelf), [self._book, self._positions], [self._picked, self._chosen], **_QUIET)

    @property
    def _mix_sliders(self) -> list[Any]:
        return [] if self._drawn is None else self._drawn.mix

    # What is shown.

    def _choices(self, book: str) -> list[tuple[str, int]]:
        """Return the prompts to choose from, each with its place; a single line where nothing is hidden."""
        pages = self._books[book].pages
        if not pages:
            return [("No hidden group was found", -1)]
        return [
            (f"{place + 1}. {page.factor}{one_line(page.prompt.prompt, 100)}", place)
            for place, page in enumerate(pages)
        ]

    def _open_book(self, book: str, count: float) -> list[Any]:
        choices = self._choices(book)
        place = choices[0][1]
        return [gr.update(choices=choices, value=place), *self._open(book, place, count)]

    def _find(self, book: str, place: Any) -> tuple[AuditBook, Split | None]:
        chosen = self._books[book]
        page = chosen.pages[place] if isinstance(place, int) and 0 <= place < len(chosen.pages) else None
        return chosen, page

    def _place(self, book: str, place: Any) -> str:
        return f"{list(self._books).index(book)} {place}"

    def _open(self, book: str, place: int, count: float) -> list[Any]:
        """Return the values of `loads` for a prompt that was just chosen."""
        chosen, page = self._find(book, place)
        names = [gr.update(value=self._view.given_name(chosen, page, group)) for group in range(self._groups)]
        opened = ["", self._place(book, place), None, notice(CHOOSE), *self._view.sliders(chosen, page), *names]
        return [*opened, *self._view.shown(chosen, page, page, int(count))]

    def _show(self, book: str, place: int, count: float, at: str, *cuts: float) -> list[Any]:
        """Return the values of `outputs` as other cuts would part the images."""
        chosen, page = self._find(book, place)
        if page is None or not chosen.is_movable(page) or at != self._place(book, place):
            return self._view.shown(chosen, page, page, int(count))
        try:
            other = chosen.preview(page, [float(cut) for cut in cuts[: len(page.cuts)]])
        except (InvDiffError, TypeError) as error:
            shown = self._view.shown(chosen, page, page, int(count))
            shown[2] = refusal("Expected a number, got none." if isinstance(error, TypeError) else error)
            return shown
        same = np.array_equal(other.labels, page.labels)
        return self._view.shown(chosen, page, page if same else other, int(count))

    # What is changed.

    def _here(self, book: str, place: int, at: str) -> tuple[AuditBook, Split | None]:
        """Return the audit and page that a change is meant for.

        Raises:
            ConfigError: Another prompt was chosen, and is not shown yet.
        """
        if at != self._place(book, place):
            raise ConfigError("Expected the chosen prompt to be shown, found another still there. Press again.")
        return self._find(book, place)

    def _done(self, book: str, place: int, count: float, words: str, *, chosen: str | None = None) -> list[Any]:
        labels = self._drawn.first()[:-1] if self._drawn is not None else []
        opened = self._open(book, place, count)
        opened[0] = notice(f"{words} {kept_so_far(self._books[book])}")
        opened[2], opened[3] = gr.skip(), gr.skip() if chosen is None else chosen
        names = 4 + len(self._cuts)
        opened[names : names + len(self._blocks)] = [gr.skip()] * len(self._blocks)  # somebody may be typing there
        return [*labels, *opened]

    def _refused(self, error: Exception) -> list[Any]:
        mix = [gr.skip()] * len(self._mix_sliders)
        return [*mix, refusal(error), *[gr.skip()] * (len(self.loads) - 1)]

    def _keep_cuts(self, book: str, place: int, count: float, at: str, *cuts: float) -> list[Any]:
        try:
            chosen, page = self._here(book, place, at)
            if page is None or not chosen.is_movable(page):
                raise ConfigError(
                    "Expected a prompt whose groups are parted by their scores, got another. Choose another prompt."
                )
            chosen.part_at(page, [float(cut) for cut in cuts[: len(page.cuts)]])
        except (InvDiffError, TypeError) as error:
            return self._refused(error)
        return self._done(book, place, count, "Kept: the groups part there now.")

    def _reset_cuts(self, book: str, place: int, count: float, at: str) -> list[Any]:
        try:
            chosen, page = self._here(book, place, at)
            if page is not None:
                chosen.part_at(page, None)
        except InvDiffError as error:
            return self._refused(error)
        return self._done(book, place, count, "The groups part as they were inferred.")

    def _namer(self, group: int) -> Any:
        def save_name(book: str, place: int, count: float, at: str, name: str) -> list[Any]:
            try:
                chosen, page = self._here(book, place, at)
                chosen.rename(page.factor_index if page is not None else 0, group, str(name or ""))
            except InvDiffError as error:
                return self._refused(error)
            return self._done(book, place, count, "Name saved.")

        return save_name

    def _leave_out(self, book: str, place: int, count: float, at: str, picked: Any) -> list[Any]:
        return self._change_image(book, place, count, at, picked, back=False)

    def _put_back(self, book: str, place: int, count: float, at: str, picked: Any) -> list[Any]:
        return self._change_image(book, place, count, at, picked, back=True)

    def _change_image(self, book: str, place: int, count: float, at: str, picked: Any, *, back: bool) -> list[Any]:
        try:
            chosen, _ = self._here(book, place, at)
            if picked is None or picked[0] != book:
                raise ConfigError("Expected an image to be chosen first, got none. Click on one.")
            position = picked[1]
            if back and position not in chosen.edits.left_out:
                raise ConfigError("Expected an image that was left out, got one that was not. Choose another.")
            (chosen.put_back if back else chosen.leave_out)([position])
        except InvDiffError as error:
            return self._refused(error)
        words = "counts again" if back else "counts nowhere now: training, pictures and reports leave it out"
        words = f"{quoted(chosen.names[position])} {words}."
        return self._done(book, place, count, words, chosen=self._view.details(chosen, position))

    def _picker(self, shelf: str) -> Any:
        def pick(event: gr.SelectData, book: str, positions: dict[str, list[int]]) -> list[Any]:
            shown = positions.get(shelf, [])
            chosen = self._books[book]
            if not isinstance(event.index, int) or not 0 <= event.index < len(shown):
                return [None, notice(CHOOSE)]
            position = shown[event.index]
            return [(book, position), self._view.details(chosen, position)]

        return pick


def _gallery(name: str, columns: int) -> gr.Gallery:
    return gr.Gallery(
        show_label=False,
        columns=columns,
        height="auto",
        object_fit="contain",
        interactive=False,
        allow_preview=False,
        buttons=[],
        container=False,
        elem_id=name,
        elem_classes=["shots", f"of-{columns}"],
    )
