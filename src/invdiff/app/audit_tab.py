"""Tab Audit: look through hidden groups, move the score at which they part, name them, leave images out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from ..errors import ConfigError, InvDiffError
from ..groups.curation import NAME_LIMIT
from ..report.audit_reading import Group, Page
from ..report.document import Table
from ..report.plots import histogram, thumb
from ..report.style import colour_of, percent
from ..report.words import counted, quoted, share_of
from ..text import one_line
from .archive import AuditBook
from .generate_tab import mix_label
from .pieces import notice, piece, refusal

CHOOSE = "Choose an image to see it, or to leave it out."
CONFIDENCE = 0.95
PER_GROUP = 12
MOST_PER_GROUP = 60
MOST_CANDIDATES = 12
MOST_UNFOUND = 40
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
        named: The audit whose groups the mix sliders are of; None where there are none.
        mix: Those sliders, [factor][group].
    """

    def __init__(
        self,
        books: Mapping[str, AuditBook],
        *,
        named: AuditBook | None = None,
        mix: Sequence[Sequence[gr.Slider]] = (),
    ) -> None:
        self._books, self._named = dict(books), named
        self._mix = [slider for factor in mix for slider in factor] if named is not None else []
        self._groups = max(groups for book in books.values() for groups in book.num_groups)
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
                self._cuts = [
                    gr.Slider(
                        -1, 1, 0, label="Score at which the groups part", visible=False, elem_id=f"audit-cut-{index}"
                    )
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
            self._out = _gallery("left-out", 8)
        with gr.Accordion("Splits that were considered, and prompts that hide nothing", open=False):
            self._tables = gr.HTML(elem_id="audit-tables")
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
        """Every component that shows the chosen prompt."""
        blocks = [part for b in self._blocks for part in (b.column, b.head, b.typical, b.nearest)]
        return [self._facts, self._plot, self._moved, self._out, self._tables, self._positions, *blocks]

    def _connect(self) -> None:
        where = [self._book, self._page, self._count]
        settings = [*self._cuts, *(block.name for block in self._blocks)]
        opened = [*settings, *self.outputs]
        live: dict[str, Any] = {**_QUIET, "trigger_mode": "always_last"}
        self._page.change(self._open, where, opened, **live)
        self._count.change(self._show, [*where, *self._cuts], self.outputs, **live)
        for slider in self._cuts:
            slider.change(self._show, [*where, *self._cuts], self.outputs, **live)
        self._book.change(self._open_book, self._book, self._page, **_QUIET)

        done = [self._status, *self._mix, *opened]
        each: dict[str, Any] = {**_QUIET, "trigger_mode": "multiple"}  # none is lost while another is saved
        self._keep.click(self._keep_cuts, [*where, *self._cuts], done, **each)
        self._reset.click(self._reset_cuts, where, done, **each)
        names = [block.name for block in self._blocks]
        gr.on(
            [trigger for block in self._blocks for trigger in (block.save.click, block.name.submit)],
            self._save_names,
            [*where, *names],
            done,
            **each,
        )
        self._leave.click(self._leave_out, [*where, self._picked], done, **each)
        self._back.click(self._put_back, [*where, self._picked], done, **each)
        shelves = {"left out": self._out}
        for group, block in enumerate(self._blocks):
            shelves |= {f"typical {group}": block.typical, f"nearest {group}": block.nearest}
        for shelf, gallery in shelves.items():
            gallery.select(self._picker(shelf), [self._book, self._positions], [self._picked, self._chosen], **_QUIET)

    def first(self) -> list[Any]:
        """Return what a page shows when it is opened: values of `loads`."""
        name = next(iter(self._books))
        return self._open(name, self._choices(name)[0][1], PER_GROUP)

    @property
    def loads(self) -> list[Any]:
        """The components that `first` fills."""
        return [*self._cuts, *(block.name for block in self._blocks), *self.outputs]

    # What is shown.

    def _choices(self, book: str) -> list[tuple[str, int]]:
        """Return the prompts to choose from, each with its place; a single line where nothing is hidden."""
        pages = self._books[book].pages
        if not pages:
            return [("No hidden group was found", -1)]
        return [
            (f"{place + 1}. {page.factor}{one_line(page.prompt['prompt'], 100)}", place)
            for place, page in enumerate(pages)
        ]

    def _open_book(self, book: str) -> Any:
        choices = self._choices(book)
        return gr.update(choices=choices, value=choices[0][1])

    def _find(self, book: str, place: Any) -> tuple[AuditBook, Page | None]:
        chosen = self._books[book]
        page = chosen.pages[place] if isinstance(place, int) and 0 <= place < len(chosen.pages) else None
        return chosen, page

    def _open(self, book: str, place: int, count: float) -> list[Any]:
        """Return sliders, names and everything else of a prompt that was just chosen."""
        chosen, page = self._find(book, place)
        movable = page is not None and _movable(page)
        sliders = []
        for index in range(len(self._cuts)):
            if page is None or not movable or index >= len(page.cuts):
                sliders.append(gr.update(visible=False))
                continue
            low, high = float(page.scores.min()), float(page.scores.max())
            step = 10.0 ** np.floor(np.log10(max(high - low, 1e-6) / 200))
            label = "Score at which the groups part"
            label += f" ({index + 1} of {len(page.cuts)})" if len(page.cuts) > 1 else ""
            sliders.append(
                gr.update(
                    minimum=float(np.floor(low / step) * step),
                    maximum=float(np.ceil(high / step) * step),
                    step=step,
                    value=_briefly(page.cuts[index], page),
                    label=label,
                    visible=True,
                )
            )
        names = [gr.update(value=self._given_name(chosen, page, group)) for group in range(self._groups)]
        return [*sliders, *names, *self._shown(chosen, page, page, int(count))]

    def _given_name(self, book: AuditBook, page: Page | None, group: int) -> str:
        factor = page.factor_index if page is not None else 0
        names = book.curation.names[factor] if factor < len(book.curation.names) else ()
        return names[group] if group < len(names) else ""

    def _show(self, book: str, place: int, count: float, *cuts: float) -> list[Any]:
        """Return a prompt's images as other cuts would part them."""
        chosen, page = self._find(book, place)
        if page is None or not _movable(page):
            return self._shown(chosen, page, page, int(count))
        wanted = [float(cut) for cut in cuts[: len(page.cuts)]]
        try:
            other = chosen.preview(page, wanted)
            same = np.array_equal(other.labels, page.labels)
            return self._shown(chosen, page, page if same else other, int(count))
        except InvDiffError as error:
            shown = self._shown(chosen, page, page, int(count))
            shown[2] = refusal(error)
            return shown

    def _shown(self, book: AuditBook, kept: Page | None, page: Page | None, count: int) -> list[Any]:
        """Return the values of `outputs`; images that `page` has in another group than `kept` are marked."""
        out = list(book.curation.left_out)
        positions: dict[str, list[int]] = {"left out": out}
        count = min(max(count, 1), MOST_PER_GROUP)
        if page is None or kept is None:
            words = "No hidden group was found: see below why not."
            nothing: list[Any] = [gr.update(visible=False), "", [], []]
            hidden = nothing * len(self._blocks)
            return [notice(words), "", "", self._images(book, out), _tables(book, None), positions, *hidden]
        before = dict(zip(kept.rows.tolist(), kept.labels.tolist(), strict=True))
        now = dict(zip(page.rows.tolist(), page.labels.tolist(), strict=True))
        moved = {position for position, label in now.items() if before.get(position) != label}
        blocks: list[Any] = []
        for group in range(self._groups):
            if group >= len(page.groups):
                blocks += [gr.update(visible=False), "", [], []]
                continue
            of = page.groups[group]
            near = _nearest(of, page)[:count]
            positions |= {f"typical {group}": of.typical[:count], f"nearest {group}": near}
            share = share_of(of.name, of.size, len(page.labels), confidence=CONFIDENCE, colour=colour_of(of.index))
            told = book.words.of(page.index, group, page.factor_index) if book.words is not None else None
            blocks += [
                gr.update(visible=True),
                piece("group", share, told.line if told is not None else ""),
                self._images(book, of.typical[:count], moved),
                self._images(book, near, moved),
            ]
        return [
            piece("facts", _facts(page)),
            piece("plot", histogram(page)),
            _moves(kept, page),
            self._images(book, out),
            _tables(book, page),
            positions,
            *blocks,
        ]

    def _images(
        self, book: AuditBook, positions: Sequence[int], moved: set[int] | frozenset[int] = frozenset()
    ) -> list[tuple[Image.Image, str]]:
        if book.data is None:
            return []
        return [(book.image(at), "moved" if at in moved else "") for at in positions]

    # What is changed.

    def _done(self, book: str, place: int, count: float, words: str) -> list[Any]:
        names = [name for factor in self._named.group_names() for name in factor] if self._named is not None else []
        sliders = [gr.update(label=mix_label(name)) for name in names]
        opened = self._open(book, place, count)
        for block in range(len(self._blocks)):  # what somebody types meanwhile stays
            opened[len(self._cuts) + block] = gr.skip()
        return [words, *sliders, *opened]

    def _refused(self, error: Exception) -> list[Any]:
        return [refusal(error), *[gr.skip()] * (len(self._mix) + len(self.loads))]

    def _keep_cuts(self, book: str, place: int, count: float, *cuts: float) -> list[Any]:
        chosen, page = self._find(book, place)
        try:
            if page is None or not _movable(page):
                raise ConfigError(
                    "Expected a prompt whose groups are parted by their scores, got another. Choose another prompt."
                )
            chosen.part_at(page, [float(cut) for cut in cuts[: len(page.cuts)]])
        except InvDiffError as error:
            return self._refused(error)
        return self._done(book, place, count, notice(f"Kept: the groups part there now. {_saved(chosen)}"))

    def _reset_cuts(self, book: str, place: int, count: float) -> list[Any]:
        chosen, page = self._find(book, place)
        try:
            if page is not None:
                chosen.part_at(page, None)
        except InvDiffError as error:
            return self._refused(error)
        return self._done(book, place, count, notice(f"The groups part as they were inferred. {_saved(chosen)}"))

    def _save_names(self, book: str, place: int, count: float, *names: str) -> list[Any]:
        chosen, page = self._find(book, place)
        try:
            factor = page.factor_index if page is not None else 0
            chosen.rename(factor, [str(name or "") for name in names[: chosen.num_groups[factor]]])
        except InvDiffError as error:
            return self._refused(error)
        return self._done(book, place, count, notice(f"Names saved. {_saved(chosen)}"))

    def _leave_out(self, book: str, place: int, count: float, picked: int | None) -> list[Any]:
        return self._change_image(book, place, count, picked, back=False)

    def _put_back(self, book: str, place: int, count: float, picked: int | None) -> list[Any]:
        return self._change_image(book, place, count, picked, back=True)

    def _change_image(self, book: str, place: int, count: float, picked: int | None, *, back: bool) -> list[Any]:
        chosen, _ = self._find(book, place)
        try:
            if picked is None or not 0 <= picked < len(chosen.names):
                raise ConfigError("Expected an image to be chosen first, got none. Click on one.")
            if back and picked not in chosen.curation.left_out:
                raise ConfigError("Expected an image that was left out, got one that was not. Choose another.")
            (chosen.put_back if back else chosen.leave_out)([picked])
        except InvDiffError as error:
            return self._refused(error)
        words = "counts again" if back else "counts nowhere now: training, pictures and reports leave it out"
        name = quoted(chosen.names[picked])
        return self._done(book, place, count, notice(f"{name} {words}. {_saved(chosen)}"))

    def _picker(self, shelf: str) -> Any:
        def pick(event: gr.SelectData, book: str, positions: dict[str, list[int]]) -> list[Any]:
            shown = positions.get(shelf, [])
            chosen = self._books[book]
            if not isinstance(event.index, int) or not 0 <= event.index < len(shown):
                return [None, notice(CHOOSE)]
            at = shown[event.index]
            return [at, self._details(chosen, at)]

        return pick

    def _details(self, book: AuditBook, at: int) -> str:
        captions = book.data.captions if book.data is not None else None
        facts = [("score", f"{book.score(at):.2f}"), ("prompt", f"“{book.prompt_of(at)}”")]
        if captions is not None:
            facts.append(("caption", f"“{captions[book.row(at)]}”"))
        if at in book.curation.left_out:
            facts.append(("counts", "no: it was left out"))
        picture = thumb(book.image(at), f"Image {book.names[at]}") if book.data is not None else None
        return piece("image", picture, book.names[at], facts)


def _gallery(name: str, columns: int) -> gr.Gallery:
    return gr.Gallery(
        show_label=False,
        format="png",
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


def _movable(page: Page) -> bool:
    """Whether scores alone part the groups, so that the cuts between them can be moved."""
    filled = sum(group.size > 0 for group in page.groups)
    return page.factor_index == 0 and len(page.cuts) > 0 and (page.by_hand or len(page.cuts) == filled - 1)


def _briefly(cut: float, page: Page) -> float:
    """Return a cut with as few digits as part the same images."""
    above = page.scores >= cut
    short = (round(cut, digits) for digits in range(2, 8))
    return next((value for value in short if np.array_equal(page.scores >= value, above)), cut)


def _nearest(group: Group, page: Page) -> list[int]:
    """Return the group's images by how near their scores are to a cut; by doubt where scores part nothing."""
    if not page.cuts:
        return list(group.uncertain)
    own = np.flatnonzero(page.labels == group.index)
    distance = np.abs(page.scores[own][:, None] - np.array(page.cuts)[None]).min(axis=1)
    nearest: list[int] = page.rows[own[np.argsort(distance, kind="stable")]].tolist()
    return nearest


def _moves(before: Page, after: Page) -> str:
    """Return how many images a moved cut takes from one group to another, in words."""
    names = {group.index: group.name for group in before.groups}
    moves = []
    for old in names:
        for new in names:
            count = int(np.count_nonzero((before.labels == old) & (after.labels == new)))
            if old != new and count:
                moves.append(f"{counted(count, 'image')} from {quoted(names[old])} to {quoted(names[new])}")
    return notice(f"Would move {'; '.join(moves)}. Not kept yet.") if moves else ""


def _facts(page: Page) -> list[tuple[str, str]]:
    prompt = page.prompt
    return [
        ("images", f"{prompt['num_images']:,}"),
        ("separation", f"{prompt['separation']:.2f}"),
        ("stability", f"{prompt['stability']:.2f}"),
        ("evidence", str(prompt["evidence"])),
        *([("changed", "by hand")] if page.by_hand else []),
    ]


def _tables(book: AuditBook, page: Page | None) -> str:
    """Return the splits considered under a prompt, and the prompts under which nothing was found."""
    tables = []
    candidates = (page.prompt.get("candidates") or [])[:MOST_CANDIDATES] if page is not None else []
    if candidates:
        rows = [
            [
                str(entry["evidence"]),
                " / ".join(percent(share) for share in entry["shares"]),
                f"{entry['separation']:.2f}",
                f"{entry['stability']:.2f}",
                "yes" if entry["accepted"] else "no",
            ]
            for entry in candidates
        ]
        columns = ("Evidence", "Shares", "Separation", "Stability", "Passes")
        tables.append(piece("table", Table(columns, rows, "Splits that were considered, best first")))
    unfound = sorted((p for p in book.prompts if not p["found"]), key=lambda p: -p["num_images"])
    if unfound:
        rows = [[p["prompt"], f"{p['num_images']:,}", p["reason"]] for p in unfound[:MOST_UNFOUND]]
        rest = len(unfound) - len(rows)
        notes = [f"{rest:,} more: see audit.json."] if rest else []
        caption = "Prompts under which nothing was found, and why"
        tables.append(piece("table", Table(("Prompt", "Images", "Why not"), rows, caption, notes)))
    return "".join(tables)


def _saved(book: AuditBook) -> str:
    """Return what people changed so far, in words."""
    curation = book.curation
    named = sum(bool(name) for names in curation.names for name in names)
    parts = [
        f"{counted(named, 'name')}" if named else "",
        f"{counted(len(curation.left_out), 'image')} left out" if curation.left_out else "",
        f"{counted(len(curation.cuts), 'prompt')} parted by hand" if curation.cuts else "",
    ]
    return "Beside the audit: " + (", ".join(filter(None, parts)) or "no changes") + "."
