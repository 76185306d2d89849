"""Tab Audit: browse hidden groups, move the score at which they part, name them, leave images out."""

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache, wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image, ImageDraw, ImageOps

from ..auditing.asked import known_rows
from ..auditing.edits import NAME_LIMIT, Edits, apply
from ..auditing.result import Audit
from ..errors import AuditError, ConfigError, DataError, InvDiffError
from ..report.audit_view import candidates_table, unfound_table
from ..report.figures import LOOK, counted, quoted
from ..report.plots import INK, RULE, colour_of, histogram, is_rare, thumb
from ..report.read import Parts, Split, read_run, splits_of
from ..text import one_line, or_dash
from .fragments import QUIET, fragment, gallery, image_file, notice, refusal
from .generate import GenerateTab

CHOOSE = f"{LOOK} Choose an image to see it, or to leave it out."
NO_DATA = "The audited images were not given, so none is shown: give them with `invdiff ui --data DATA`."
NO_CUTS = "Expected a prompt whose groups are parted by their scores, got another. Choose another prompt."
PER_GROUP = 12
MOST_PER_GROUP = 60
SIDE = 256  # pixels of an image in a gallery, at most
MOST_KEPT = 1024  # such images in memory
Values = dict[Any, Any]  # component to its new value
_UNCHOSEN = gr.update(selected_index=-1)  # of a gallery, in which no image is framed as chosen; None would be dropped


def or_refusal(event: Callable[..., Values]) -> Callable[..., Values]:
    """An event of a tab, or panel, with a `_status`: an error of ours is stated there, and nothing else changes."""

    @wraps(event)
    def answered(tab: Any, *given: Any) -> Values:
        try:
            return event(tab, *given)
        except InvDiffError as error:
            return {tab._status: refusal(error)}

    return answered


class AuditBook:
    """An audit with its images, read once from a run, and people's edits, which are saved beside it."""

    def __init__(self, parts: Parts) -> None:
        assert parts.audit is not None
        self.parts, self.folder = parts, Path(parts.audit)
        self.run = read_run(Parts(audit=parts.audit, data=parts.data))
        assert self.run.audit is not None
        self.audit, self.data = self.run.audit, self.run.data
        self.image = lru_cache(maxsize=MOST_KEPT)(self._image)
        self._lock = threading.Lock()

    @property
    def inferred(self) -> Audit:
        """The audit without people's edits."""
        return self.audit.inferred or self.audit

    @property
    def group_names(self) -> list[list[str]]:
        """Names of the groups of each factor, a number where people gave none."""
        sizes = enumerate(self.audit.num_groups)
        return [[self.audit.group_name(group, factor) for group in range(count)] for factor, count in sizes]

    def page(self, index: int, factor: int, cuts: Sequence[float] | None = None) -> Split:
        """One prompt under one hidden factor; with other cuts than those kept, if given."""
        audit = self.audit if cuts is None else apply(self.audit, self.audit.edits.with_cuts(factor, index, cuts))
        return next(page for page in splits_of(audit) if (page.index, page.factor_index) == (index, factor))

    def is_movable(self, page: Split) -> bool:
        """Whether scores alone part the groups of a page, so that the cuts between them can be moved."""
        weights = self.inferred.group_weights[page.factor_index][self.inferred.prompt_ids == page.index]
        return len(page.cuts) == len(np.unique(weights[known_rows(weights)].argmax(axis=1))) - 1 > 0

    def edit(self, change: Callable[[Edits], Edits]) -> None:
        """Change people's edits, those that others made meanwhile included, and save them."""
        with self._lock:
            found, opened = Audit.load(self.folder), self.inferred
            plain = found.inferred or found
            if any(getattr(plain, part) != getattr(opened, part) for part in ("fingerprint", "names", "prompts")):
                raise AuditError(f"Expected the audit that was opened in {self.folder}, found another. Start again.")
            edited = apply(found, change(found.edits))
            edited.save_edits(self.folder)
            self.audit = edited

    def _image(self, position: int) -> Image.Image:
        """An image small enough for a gallery; a crossed-out tile where it is damaged or lies outside its data set."""
        with suppress(DataError):  # audit and training state what is wrong with it
            if self.run.may_show(position):
                (image,) = self.run.images_at([position])
                image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
                return image
        tile = Image.new("RGB", (SIDE // 4, SIDE // 4), RULE)
        for ends in ((0, 0, *tile.size), (0, tile.height, tile.width, 0)):
            ImageDraw.Draw(tile).line(ends, fill=INK)
        return tile


class AuditTab:
    """The tab of one or several audits by name, built inside a `gr.Blocks`; `drawn` has sliders named after groups.

    There is room for audits of up to `most_groups` groups that join `books` while the page is open: see `turn_to`.
    """

    def __init__(self, books: dict[str, AuditBook], drawn: GenerateTab | None = None, most_groups: int = 0) -> None:
        self.books, self._galleries = books, dict[str, gr.Gallery]()
        self._build(max(most_groups, *(groups for book in books.values() for groups in book.audit.num_groups)))
        whole = [self._facts, self._plot, self._moved, self._chosen, self._status, self._out_note, *self._cuts]
        whole += [*self._galleries.values(), *(part for b in self._blocks for part in (b.column, b.head, b.name))]
        self.loads = [*whole, self._prompt, self._tables, self.at, self._positions, self._picked]
        self._connect(drawn)

    def _list(self) -> list[tuple[str, str]]:
        """What can be chosen, in words, and its place: indices of prompt and factor, -1 for none, and the audit."""
        listed = []
        for name, book in self.books.items():
            run = f"{name} · " if len(self.books) > 1 else ""
            listed += [
                (f"{run}{k}. {of.factor}{one_line(of.prompt.prompt, 100)}", f"{of.index} {of.factor_index} {name}")
                for k, of in enumerate(splits_of(book.inferred), start=1)
            ] or [(f"{run}No hidden group was found", f"-1 -1 {name}")]
        return listed

    def _build(self, groups: int) -> None:
        with gr.Row():
            self._prompt = gr.Dropdown(self._list(), label="Prompt", scale=3, min_width=240, elem_id="audit-prompt")
            about: dict[str, Any] = {"label": "Images shown", "min_width": 240, "elem_id": "audit-count"}
            self._count = gr.Slider(4, MOST_PER_GROUP, PER_GROUP, step=4, **about)
        self._facts = gr.HTML(elem_id="audit-facts")
        with gr.Row(elem_classes="workbench"):
            with gr.Column(scale=2, min_width=300):
                self._plot = gr.HTML(elem_id="audit-plot")
                self._cuts = [gr.Slider(-1, 1, 0, visible=False, elem_id=f"audit-cut-{k}") for k in range(groups - 1)]
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
            self._galleries["left-out"] = gallery("left-out", 8, allow_preview=False, buttons=[])
        with gr.Accordion("Splits that were considered, and prompts that hide nothing", open=False):
            self._tables = gr.HTML(elem_id="audit-tables")
        # The prompt that the browser shows, which may be other than the one that was chosen a moment ago.
        self.at = gr.Textbox(self._prompt.value, visible="hidden", elem_id="audit-at")
        self._positions, self._picked = gr.State({}), gr.State(None)

    def _block(self, group: int) -> SimpleNamespace:
        with gr.Column(elem_classes="group-block") as column:
            with gr.Row(equal_height=True, elem_classes="group-head"):
                head = gr.HTML(elem_id=f"group-{group}")
                about: dict[str, Any] = {"label": f"Name of group {group}", "elem_id": f"group-name-{group}"}
                about |= {"placeholder": "such as “on water”", "max_length": NAME_LIMIT, "max_lines": 1}
                name = gr.Textbox(min_width=120, **about)
                save = gr.Button("Save name", size="sm", scale=0, min_width=90, elem_id=f"group-save-{group}")
            for shelf, words in (("typical", "Most typical"), ("nearest", "Nearest to another group")):
                gr.HTML(f'<p class="fine">{words}</p>')
                self._galleries[f"{shelf}-{group}"] = gallery(f"{shelf}-{group}", 6, allow_preview=False, buttons=[])
        return SimpleNamespace(column=column, head=head, name=name, save=save)

    def _connect(self, drawn: GenerateTab | None) -> None:
        live: dict[str, Any] = {**QUIET, "trigger_mode": "always_last"}
        each: dict[str, Any] = {**QUIET, "trigger_mode": "multiple"}  # none is lost while another is saved
        at, cuts = [self.at, self._count], [self.at, self._count, *self._cuts]
        shown = [self._prompt.change(self.open, [self._prompt, self._count], self.loads, **live)]
        # Not `change`, which values that are only shown would cause.
        moved = [slider.input for slider in (self._count, *self._cuts)]
        shown += [gr.on(moved, self.show, cuts, self.loads, **live)]
        shown += [self._keep.click(self.keep, cuts, self.loads, **each)]
        shown += [self._reset.click(self.keep, at, self.loads, **each)]
        for button, counts in ((self._leave, False), (self._back, True)):
            shown += [button.click(self.count_image, [*at, self._picked, gr.State(counts)], self.loads, **each)]
        for group, block in enumerate(self._blocks):
            here = [*at, gr.State(group), block.name]
            saved = gr.on([block.save.click, block.name.submit], self.rename, here, self.loads, **each)
            shown.append(saved)
            if drawn is not None:
                saved.then(drawn.first, drawn.mix, drawn.loads, **QUIET)
        for event in shown:
            self.unchoose_after(event)
        for name, shelf in self._galleries.items():
            inputs = [self.at, gr.State(name), self._positions]
            shelf.select(self.pick, inputs, [self._picked, self._chosen, *self._galleries.values()], **QUIET)

    def unchoose_after(self, event: Any) -> None:
        """Frame no image once an event has shown others in its place; at once, a gallery would keep its frame."""
        shelves = list(self._galleries.values())
        event.then(lambda: [_UNCHOSEN] * len(shelves), None, shelves, **QUIET)

    def turn_to(self, name: str = "") -> Values:
        """Show the first prompt of an audit, which may have joined meanwhile; without a name, of all."""
        choices = self._list()
        place = next((place for _, place in choices if place.split(" ", 2)[2] == name), choices[0][1])
        return self.open(place) | {self._prompt: gr.update(choices=choices, value=place)}

    def open(self, place: str, count: float = PER_GROUP) -> Values:
        """A prompt that was just chosen: names and sliders as saved, no image chosen."""
        book, page = self.find(place)
        names = book.audit.edits.names[page.factor_index if page else 0]
        values = {block.name: name for block, name in zip(self._blocks, names, strict=False)}
        blank = {block.name: "" for block in self._blocks}
        return self._saved(place, count) | blank | values | {self._picked: None, self._chosen: notice(CHOOSE)}

    def show(self, place: str, count: float, *cuts: float) -> Values:
        """A prompt with its images parted at other scores; those that change sides are marked, nothing is saved."""
        book, page = self.find(place)
        out = book.audit.edits.left_out
        rest = f", of which {MOST_PER_GROUP} are shown" if len(out) > MOST_PER_GROUP else ""
        shelves: dict[str, list[int]] = {"left-out": list(out[:MOST_PER_GROUP])}
        moved: dict[int, int] = {}
        values: Values = {block.column: gr.update(visible=False) for block in self._blocks} | {
            self._facts: notice("No hidden group was found: see below why not."),
            self._plot: "",
            self._moved: "",
            self._out_note: notice(f"{counted(len(out), 'image')} left out{rest}."),
            self._tables: fragment("table", unfound_table(book.inferred.prompts)),
            self._positions: shelves,
        }
        if page is not None:
            saved, of = page, page.figures
            if cuts and book.is_movable(page):
                try:
                    parted = book.page(page.index, page.factor_index, cuts[: len(page.cuts)])
                    page, moved, values[self._moved] = _moved(page, parted)
                except InvDiffError as error:
                    values[self._moved] = refusal(error)
            facts = [("images", f"{page.prompt.num_images:,}"), ("separation", or_dash(of.separation))]
            facts += [("agreement", or_dash(of.agreement)), ("evidence", of.evidence)]
            facts += [("changed", "by hand")] if saved.by_hand else []
            values[self._facts] = fragment("facts", facts) + (notice(NO_DATA) if book.data is None else "")
            values[self._plot] = fragment("plot", histogram(page, log_scale=is_rare(saved)))
            considered = candidates_table(page.prompt.candidates, of)
            values[self._tables] = fragment("table", considered) + values[self._tables]
            for k, (group, share, block) in enumerate(zip(page.groups, page.shares, self._blocks, strict=False)):
                said = book.audit.words.of(page.index, k, page.factor_index) if book.audit.words else None
                values[block.column] = gr.update(visible=True)
                values[block.head] = fragment("group", share, said.line if said else "")
                shelves |= {f"typical-{k}": group.typical[: int(count)], f"nearest-{k}": group.uncertain[: int(count)]}
        values |= {self._galleries[name]: _images(book, images, moved) for name, images in shelves.items()}
        values[self._galleries["left-out"]]["visible"] = bool(out)
        return values

    @or_refusal
    def keep(self, place: str, count: float, *cuts: float) -> Values:
        """Part the groups where the sliders show it; without cuts as inferred."""
        book, page = self.find(place)
        if page is None or (cuts and not book.is_movable(page)):
            raise ConfigError(NO_CUTS)
        wanted = cuts[: len(page.cuts)] or None
        book.edit(lambda edits: edits.with_cuts(page.factor_index, page.index, wanted))
        empty = [quoted(group.name) for group in book.page(page.index, page.factor_index).groups if not group.size]
        words = "Kept: the groups part there now." if wanted else "The groups part as they were inferred."
        return self._saved(place, count, words + (f" No image is left in {', '.join(empty)}." if empty else ""))

    @or_refusal
    def rename(self, place: str, count: float, group: int, name: str) -> Values:
        """Name a group."""
        book, page = self.find(place)
        factor = page.factor_index if page is not None else 0
        book.edit(lambda edits: edits.with_name(factor, group, name or ""))
        kept = book.audit.edits.names[factor][group]
        return self._saved(place, count, "Name saved." if kept else "The group has no name now, only its number.")

    @or_refusal
    def count_image(self, place: str, count: float, picked: tuple[str, int] | None, counts: bool) -> Values:
        """Leave the chosen image out, or count it again."""
        book, page = self.find(place)
        if picked is None or self.find(picked[0])[0] is not book:
            raise ConfigError("Expected an image to be chosen first, got none. Click on one.")
        change = Edits.with_images if counts else Edits.without_images
        book.edit(lambda edits: change(edits, [picked[1]]))
        places = "training, pictures and reports"
        words = f"It counts in {places}." if counts else f"It counts nowhere now: {places} leave it out."
        return self._saved(place, count, words) | {self._chosen: _details(book, page, picked[1])}

    def pick(self, event: gr.SelectData, place: str, shelf: str, positions: dict[str, list[int]]) -> list[Any]:
        """Show the image that was clicked on, and what is known of it; those of other galleries are chosen no more."""
        shown = positions.get(shelf, [])
        others = [gr.skip() if name == shelf else _UNCHOSEN for name in self._galleries]
        if not isinstance(event.index, int) or not 0 <= event.index < len(shown):
            return [None, notice(CHOOSE), *others]
        return [(place, shown[event.index]), _details(*self.find(place), shown[event.index]), *others]

    def find(self, place: str) -> tuple[AuditBook, Split | None]:
        """The audit of a place in the list of prompts, and its page; None where nothing was found."""
        index, factor, name = place.split(" ", 2)
        book = self.books[name]
        with suppress(StopIteration):  # an audit by clicks that was made anew may lack it
            return book, book.page(int(index), int(factor))
        return book, None

    def _saved(self, place: str, count: float, said: str = "") -> Values:
        """A prompt as saved, with the sliders of its cuts. Text fields stay: somebody may be typing a name."""
        book, page = self.find(place)
        values = self.show(place, count) | {slider: gr.update(visible=False) for slider in self._cuts}
        values |= {self._status: notice(said) if said else "", self.at: place}
        if page is None or not book.is_movable(page):
            return values
        low, high = float(page.scores.min()), float(page.scores.max())
        step = 10.0 ** np.floor(np.log10(max(high - low, 1e-6) / 200))
        for k, (slider, cut) in enumerate(zip(self._cuts, page.cuts, strict=False), start=1):
            short = round(cut, 2)
            values[slider] = gr.update(
                minimum=round(float(np.floor(low / step) * step), 6),
                maximum=round(float(np.ceil(high / step) * step), 6),
                step=step,
                value=short if np.array_equal(page.scores >= short, page.scores >= cut) else cut,
                label="Score at which the groups part" + (f" ({k} of {len(page.cuts)})" if len(page.cuts) > 1 else ""),
                visible=True,
            )
        return values


def _images(book: AuditBook, positions: Sequence[int], moved: Mapping[int, int]) -> dict[str, Any]:
    """A gallery's images with their names; those that moved are framed in the colour of the group that they leave."""
    shown = []
    for at in positions if book.data is not None else ():
        image, name = book.image(at), one_line(book.audit.names[at], 80)
        if at in moved:
            name, width = f"moved: {name}", max(2, 12 * min(image.size) // 256)
            image = ImageOps.expand(ImageOps.crop(image.convert("RGB"), width), width, colour_of(moved[at]))
        shown.append((image_file(image), name))
    return gr.update(value=shown)


def _moved(before: Split, after: Split) -> tuple[Split, dict[int, int], str]:
    """The page to show, position of each image that changes sides to the group that it leaves, and that in words."""
    changed = np.flatnonzero(before.labels != after.labels)
    if not len(changed):
        return before, {}, ""
    old, new = before.labels[changed].tolist(), after.labels[changed].tolist()
    names = [quoted(group.name) for group in before.groups]
    words = [
        f"{counted(images, 'image')} from {names[left]} to {names[joined]}"
        for (left, joined), images in sorted(Counter(zip(old, new, strict=True)).items())
    ]
    positions = before.rows[changed].tolist()
    return after, dict(zip(positions, old, strict=True)), notice(f"Would move {'; '.join(words)}. Not kept yet.")


def _details(book: AuditBook, page: Split | None, position: int) -> str:
    """An image, and what is known of it."""
    audit, name = book.audit, book.audit.names[position]
    facts = [("score", f"{audit.scores[page.factor_index if page else 0, position]:.2f}")]
    facts.append(("prompt", f"“{audit.prompts[audit.prompt_ids[position]].prompt}”"))
    if book.data is not None:
        facts.append(("caption", f"“{book.data.captions[book.run.rows[position]]}”"))
    if position in audit.edits.left_out:
        facts.append(("counts", "no: it was left out"))
    picture = thumb(book.image(position), f"Image {name}") if book.data is not None else None
    return fragment("image", picture, name, facts)
