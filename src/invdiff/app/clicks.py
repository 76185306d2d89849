"""Below tab Audit: an attribute is named by clicks on images, ten at a time, and inferred of all others."""

import math
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
import numpy as np

from ..auditing.asked import labels_asked
from ..auditing.asking import questions
from ..auditing.clicks import labels_of, next_to_label, random_sample, read_clicks, write_clicks
from ..auditing.edits import apply
from ..auditing.result import Audit
from ..auditing.run import audit
from ..config import AuditConfig
from ..errors import ConfigError, DataError, InvDiffError
from ..evaluation.results import CANNOT_TELL
from ..models.frozen import denoiser_fingerprint
from ..report.audit_view import unfound_table
from ..report.figures import Table, percent, quoted, share_in_words, share_of
from ..report.plots import thumb
from ..report.read import Parts, audits_in, splits_of
from .audit import AuditBook, AuditTab, Values, or_refusal
from .fragments import QUIET, fragment, notice, refusal
from .studio import Studio, Turn

AT_ONCE = 10
MOST_VALUES = 6
ABOUT = (
    "Say what you see in ten images at a time: five that are least certain, five drawn at random. Every click is "
    "saved at once. The groups of all other images are inferred from these labels."
)


class Asking(NamedTuple):
    """The attribute that is asked about."""

    run: str  # the name of the audit that its labels began from
    name: str
    values: tuple[str, ...]
    folder: Path  # of the audit with these labels, beside that one
    labels: Path  # their file
    positions: tuple[int, ...] = ()  # of the images, in that audit


def with_labels(run: str, parts: Parts) -> dict[str, Parts]:
    """The audits that were made with labels by clicks beside that of a run, by name, the latest last."""
    others = [folder for folder in audits_in(parts.run or Path()) if folder != parts.audit]
    folders = [folder for folder in others if labels_of(folder).is_file()]
    return {f"{run}, {folder.name}": replace(parts, audit=folder, results=None, module=None) for folder in folders}


class ClicksPanel:
    """The panel, built inside a `gr.Blocks` below the tab whose audits it adds to."""

    def __init__(self, tab: AuditTab, studio: Studio, cache_dir: Path | None = None) -> None:
        self._tab, self._studio, self._cache_dir = tab, studio, cache_dir
        self._lock, self._cards = threading.Lock(), list[Any]()
        with gr.Accordion("Name an attribute by clicks", open=False, elem_id="clicks"):
            gr.HTML(notice(ABOUT))
            with gr.Row(equal_height=True):
                label = "An attribute and its values"
                text = gr.Textbox(label=label, placeholder="place: forest, sea", max_lines=1, scale=4, elem_id="ask")
                begin = gr.Button("Show ten images", variant="primary", scale=1, min_width=160, elem_id="ask-begin")
            self._status = gr.HTML(elem_id="ask-status")
            with gr.Row(elem_classes="asks"):
                for slot in range(AT_ONCE):
                    with gr.Column(visible=False) as card:
                        image = gr.HTML()
                        value = gr.Radio([], show_label=False, container=False, elem_id=f"ask-{slot}")
                        self._cards.append((card, image, value))
            self._more = gr.Button("Infer groups, and ask about ten more", visible=False, elem_id="ask-more")
            self._figures = gr.HTML(elem_id="ask-figures")
        self._ask = gr.State(None)
        own = [self._status, self._more, self._figures, self._ask, *(part for card in self._cards for part in card)]
        gr.on([begin.click, text.submit], self.begin, [tab.at, text], own, **QUIET)
        tab.unchoose_after(self._more.click(self.infer, self._ask, [*own, *tab.loads], **QUIET))
        for slot, (*_, value) in enumerate(self._cards):
            inputs = [self._ask, gr.State(slot), value]
            value.input(self.answer, inputs, self._status, **QUIET, trigger_mode="multiple")

    @or_refusal
    def begin(self, place: str, text: str) -> Values:
        """Ask about the first ten images; an attribute that was asked about before goes on from its file."""
        asked, parts = questions([text]), self._tab.find(place)[0].parts
        if len(asked) != 1 or any(len(values) > MOST_VALUES for values in asked.values()):
            raise ConfigError(f"Expected one attribute of at most {MOST_VALUES} values, got {text!r}.")
        ((name, values),) = asked.items()
        run = next(name for name, book in self._tab.books.items() if book.parts.run == parts.run)
        home, word = parts.run or Path(str(parts.audit)).parent, re.sub(r"\W+", "-", name)
        folder = home / f"audit-{word}"
        here = Audit.load(folder).settings if (folder / "audit.json").is_file() else {"asked": "labels"}
        if "labels" not in here.get("asked", ""):
            raise ConfigError(f"Expected {folder} for clicks on {name}, found another audit there. Rename it.")
        return self._ten(Asking(run, name, values, folder, labels_of(folder)))

    def answer(self, ask: Asking, slot: int, value: str) -> str:
        """Save one label."""
        names = self._tab.books[ask.run].audit.names
        try:
            with self._lock:
                known = read_clicks(ask.labels, ask.name)
                known[names[ask.positions[slot]]] = "" if value == CANNOT_TELL else value
                write_clicks(ask.labels, ask.name, known)
        except InvDiffError as error:
            return refusal(error)
        left = sum(names[position] not in known for position in ask.positions)
        return notice(f"{left or 'None'} of these {len(ask.positions)} left to say. Saved in {ask.labels}.")

    def infer(self, ask: Asking) -> Iterator[Values]:
        """Audit all images with the labels so far, show what was found, and ask about ten more."""
        book, made = self._tab.books[ask.run], f"{ask.run}, {ask.folder.name}"
        settings, names = book.audit.settings, book.audit.names
        config = {name: value for name, value in settings.items() if name in AuditConfig.__dataclass_fields__}
        own = settings.get("own_images_of", ())
        try:
            labels = {ask.name: read_clicks(ask.labels, ask.name)}
            try:
                labels_asked(labels, names)
            except DataError as error:  # too few yet
                yield self._ten(ask, f"{error} Here are the next.")
                return
            terminal = "If they were not measured before, that takes a while: its progress is in the terminal."
            yield {self._status: notice(f"Inferring the groups of {len(names):,} images … {terminal}")}
            options: Any = {"prompts": own, "labels": labels, "cache_dir": self._cache_dir}
            # Every ten labels are another look: the levels of all, however many, sum to that of one.
            looks, level = math.ceil(len(labels[ask.name]) / AT_ONCE), config.get("level", AuditConfig.level)
            once = {"solver": "auto", "level": level / (looks * (looks + 1))}
            options["config"] = AuditConfig.from_dict(config | once)
            with self._studio.alone(Turn()):
                if settings["denoiser_fingerprint"] != denoiser_fingerprint(self._studio.pipe):
                    raise ConfigError(
                        f"Expected the model of the audit of {ask.run}, got other weights, precision or LoRAs. "
                        "Open the page with the same --model, --dtype and --lora."
                    )
                earlier = Audit.load(ask.folder) if (ask.folder / "audit.json").is_file() else book.audit
                found = audit(self._studio.pipe, None if own else book.data, **options)
                found.save(ask.folder)
            # Images that people left out of either audit stay out.
            left = {of.names[at] for of in (book.audit, earlier) for at in of.edits.left_out}
            if out := [position for position, image in enumerate(found.names) if image in left]:
                found = Audit.load(ask.folder)  # with edits to the same groups that lie there
                apply(found, found.edits.without_images(out)).save_edits(ask.folder)
            parts = replace(book.parts, audit=ask.folder, data=book.data, results=None, module=None)
            self._tab.books[made] = AuditBook(parts)
            if not self._tab.books[made].audit.biased:
                yield self._ten(ask, "These labels split no prompt yet: see below why. Here are the next.")
                return
            words = "The tab above shows the audit with these labels. To balance its groups: invdiff train MODEL DATA "
            words += f"{ask.folder}. Reports of a module trained with it, and reports without one, show this audit."
            yield self._ten(ask, words) | self._tab.turn_to(made)
        except InvDiffError as error:
            yield {self._status: refusal(error)}

    def _ten(self, ask: Asking, words: str = "") -> Values:
        """The next images, and the figures so far."""
        book, known = self._tab.books[ask.run], read_clicks(ask.labels, ask.name)
        first, found = book.audit, self._tab.books.get(f"{ask.run}, {ask.folder.name}", book).audit
        found = found if found.names == first.names else first
        asked = np.array([name in known for name in first.names]) | ~first.kept
        weights = (found if found.biased else first).group_weights[0]  # until labels part groups, those that there are
        # By the prompts of the first audit, as they may change with labels, and the random order must not.
        positions = next_to_label(weights, first.prompt_ids, asked, count=AT_ONCE).tolist()
        values: Values = {self._ask: ask._replace(positions=tuple(positions)), self._more: gr.update(visible=True)}
        values |= {self._status: notice(words or f"Labels are kept in {ask.labels}.")}
        values |= {self._figures: figures(found, ask.name, random_sample(first.prompt_ids, asked).tolist())}
        for slot, (card, image, value) in enumerate(self._cards):
            values[card] = gr.update(visible=slot < len(positions))
            if slot < len(positions):
                at = positions[slot]
                values[image] = fragment("thumb", thumb(book.image(at), f"Image {first.names[at]}"))
                values[value] = gr.update(choices=[*ask.values, CANNOT_TELL], value=None)
        return values


def figures(found: Audit, name: str, drawn: Sequence[int]) -> str:
    """What an audit with labels of `name` found, and how many of them it guesses right, those `drawn` apart, as HTML.

    `drawn` are positions of images that are a random sample.
    """
    record = found.settings.get("asked", {}).get("labels", {}).get(name)
    if record is None:
        return ""
    split = [
        [page.prompt.prompt, f"{page.prompt.num_images:,}", *(percent(share.share) for share in page.shares)]
        for page in splits_of(found)
    ]
    values, words = found.factors[0].values if split else [], [found.asked]
    hits, misses = ({*drawn} & {*record.get(part, ())} for part in ("hits", "misses"))
    if hits or misses:
        right = share_of("", len(hits), len(hits) + len(misses), colour="")
        told = f"{right.count} of {right.total}, {share_in_words(right)}"
        words.insert(0, f"Of images drawn at random, which alone stand for all, these were guessed right: {told}.")
    table = Table(("Prompt", "Images", *values), split, f"Groups by {quoted(name)}")
    table = table if split else unfound_table(found.prompts)
    return "".join([fragment("table", table), *map(notice, words)])
