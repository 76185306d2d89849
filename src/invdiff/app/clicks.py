"""Below tab Audit: an attribute is named by clicks on images, ten at a time, and inferred of all others."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import gradio as gr
import numpy as np

from ..auditing.asking import questions
from ..auditing.clicks import next_to_label, random_sample, read_clicks, still_needed, write_clicks
from ..auditing.result import Audit
from ..auditing.run import audit
from ..config import AuditConfig
from ..errors import ConfigError, InvDiffError
from ..evaluation.results import CANNOT_TELL
from ..files import visible
from ..report.figures import ABSENT, Table, percent, share_in_words, share_of, with_interval
from ..report.plots import thumb
from ..report.read import Parts
from ..text import one_line
from .audit import AuditBook, AuditTab, Values
from .fragments import CONFIDENCE, QUIET, fragment, notice, refusal
from .studio import Studio, Turn

AT_ONCE = 10
MOST_VALUES = 6
ABOUT = (
    "Say what you see in ten images at a time: five that are least certain, five drawn at random. Every click is "
    "saved at once. The groups of all other images are inferred from these labels."
)


class Asking(NamedTuple):
    """The attribute that is asked about, and the images, as positions in the audit."""

    run: str
    name: str
    values: tuple[str, ...]
    positions: tuple[int, ...] = ()


def place_of(book: AuditBook, name: str) -> tuple[Path, Path]:
    """The file of labels of an attribute, and the folder of the audit that is made with them, beside an audit."""
    home, word = book.parts.run or book.folder.parent, re.sub(r"\W+", "-", name)
    return home / f"labels-{word}.csv", home / f"audit-{word}"


def with_labels(run: str, parts: Parts) -> dict[str, Parts]:
    """The audits that were made with labels by clicks beside that of a run, by name, the latest last."""
    assert parts.run is not None
    made = [path.parent / path.stem.replace("labels", "audit", 1) for path in visible(parts.run, "labels-*.csv")]
    made = [folder for folder in made if (folder / "audit.json").is_file()]
    made.sort(key=lambda folder: (folder / "audit.json").stat().st_mtime)
    return {f"{run}, {folder.name}": replace(parts, audit=folder, results=None, module=None) for folder in made}


class ClicksPanel:
    """The panel, built inside a `gr.Blocks` below the tab whose audits it adds to."""

    def __init__(self, tab: AuditTab, studio: Studio, cache_dir: Path | None = None) -> None:
        self._tab, self._studio, self._cache_dir = tab, studio, cache_dir
        self._lock = threading.Lock()
        with gr.Accordion("Name an attribute by clicks", open=False, elem_id="clicks"):
            gr.HTML(notice(ABOUT))
            with gr.Row(equal_height=True):
                label = "An attribute and its values"
                text = gr.Textbox(label=label, placeholder="place: forest, sea", max_lines=1, scale=4, elem_id="ask")
                begin = gr.Button("Show ten images", variant="primary", scale=1, min_width=160, elem_id="ask-begin")
            self._status = gr.HTML(elem_id="ask-status")
            with gr.Row(elem_classes="asks"):
                self._cards = [self._card(slot) for slot in range(AT_ONCE)]
            self._more = gr.Button("Infer groups, and ask about ten more", visible=False, elem_id="ask-more")
            self._figures = gr.HTML(elem_id="ask-figures")
        self._ask = gr.State(None)
        parts = [part for card in self._cards for part in (card.column, card.image, card.value)]
        own = [self._status, self._more, self._figures, self._ask, *parts]
        gr.on([begin.click, text.submit], self.begin, [tab.at, text], own, **QUIET)
        self._more.click(self.infer, self._ask, [*own, *tab.loads], **QUIET)
        for slot, card in enumerate(self._cards):
            inputs = [self._ask, gr.State(slot), card.value]
            card.value.input(self.answer, inputs, self._status, **QUIET, trigger_mode="multiple")

    def _card(self, slot: int) -> SimpleNamespace:
        with gr.Column(min_width=150, visible=False) as column:
            image = gr.HTML()
            value = gr.Radio([], show_label=False, container=False, elem_id=f"ask-{slot}")
        return SimpleNamespace(column=column, image=image, value=value)

    def begin(self, place: int, text: str) -> Values:
        """Ask about the first ten images; an attribute that was asked about before goes on from its file."""
        try:
            asked = questions([text])
            if len(asked) != 1 or any(len(values) > MOST_VALUES for values in asked.values()):
                raise ConfigError(f"Expected one attribute of at most {MOST_VALUES} values, got {text!r}.")
            ((name, values),) = asked.items()
            book = self._tab.book(place)
            run = next(name for name, other in self._tab.books.items() if other is book)
            return self._ten(Asking(run, name, values))
        except InvDiffError as error:
            return {self._status: refusal(error)}

    def answer(self, ask: Asking, slot: int, value: str) -> str:
        """Save one label."""
        book = self._tab.books[ask.run]
        path, names = place_of(book, ask.name)[0], book.audit.names
        try:
            with self._lock:
                labels = read_clicks(path, ask.name)
                labels[names[ask.positions[slot]]] = "" if value == CANNOT_TELL else value
                write_clicks(path, ask.name, labels)
        except InvDiffError as error:
            return refusal(error)
        left = sum(names[position] not in labels for position in ask.positions)
        return notice(f"{left or 'None'} of these {len(ask.positions)} left to say. Saved in {path}.")

    def infer(self, ask: Asking) -> Iterator[Values]:
        """Audit all images with the labels so far, show what was found, and ask about ten more."""
        book = self._tab.books[ask.run]
        path, folder = place_of(book, ask.name)
        try:
            labels = read_clicks(path, ask.name)
            if lack := still_needed(labels, ask.values):
                yield self._ten(ask, f"Before groups can be inferred, {lack} are needed. Here are the next images.")
                return
            yield {self._status: notice(f"Inferring the groups of {len(book.audit.names):,} images …")}
            settings = book.audit.settings
            own = settings.get("own_images_of", ())
            known = {name: settings[name] for name in AuditConfig().to_dict() if name in settings}
            config = replace(AuditConfig.from_dict(known), solver="auto")
            options: Any = {"config": config, "cache_dir": self._cache_dir, "progress": False}
            with self._studio.alone(Turn()):
                found = audit(self._studio.pipe, None if own else book.data, prompts=own, labels=path, **options)
            found.save(folder)
            run = next(name for name, other in self._tab.books.items() if other.parts.run == book.parts.run)
            made, parts = f"{run}, {folder.name}", replace(book.parts, audit=folder, results=None, module=None)
            self._tab.books[made] = AuditBook(parts)
            words = (
                f"The audit with these labels is {folder}. The tab above shows it, reports written here use it, and "
            )
            words += f"`invdiff train MODEL DATA {folder}` balances its groups."
            yield self._ten(ask._replace(run=made), words) | self._tab.turn_to(made)
        except InvDiffError as error:
            yield {self._status: refusal(error)}

    def _ten(self, ask: Asking, words: str = "") -> Values:
        """The next images, and the figures so far."""
        book = self._tab.books[ask.run]
        path, folder = place_of(book, ask.name)
        book = next((other for other in self._tab.books.values() if other.folder == folder), book)
        labels, found = read_clicks(path, ask.name), book.audit
        asked = np.array([name in labels for name in found.names]) | ~found.kept
        first = next(other.audit for other in self._tab.books.values() if other.parts.run == book.parts.run)
        first = first if first.names == found.names else found
        weights = (found if found.biased else first).group_weights[0]  # until there are groups, those found without
        positions = next_to_label(weights, first.prompt_ids, asked, count=AT_ONCE)
        sample = random_sample(first.prompt_ids, asked)  # of an audit that stays, as prompts may change with labels
        ask = ask._replace(positions=tuple(positions.tolist()))
        values: Values = {self._ask: ask, self._status: notice(words or f"Labels are kept in {path}.")}
        values |= {
            self._more: gr.update(visible=True),
            self._figures: figures(found, ask.name, [at for at in sample if labels.get(found.names[at])]),
        }
        for slot, card in enumerate(self._cards):
            values[card.column] = gr.update(visible=slot < len(positions))
            if slot < len(positions):
                values[card.image] = fragment(
                    "ask", thumb(book.image(positions[slot]), f"Image {found.names[positions[slot]]}")
                )
                values[card.value] = gr.update(choices=[*ask.values, CANNOT_TELL], value=None)
        return values


def figures(found: Audit, name: str, drawn: Sequence[int]) -> str:
    """What an audit with labels of `name` found, and how many of them it guesses right, those `drawn` apart, as HTML.

    `drawn` are positions of labelled images that are a random sample.
    """
    record = found.settings.get("asked", {}).get("labels", {}).get(name)
    if record is None:
        return ""
    factor = [m for m, factor in enumerate(found.factors) if factor.name == name]
    values, rows = found.factors[factor[0]].values if factor else [], []
    for index, prompt in enumerate(found.prompts):
        split = found.split(factor[0], index) if factor else None
        ends = zip(split.shares, split.intervals, strict=True) if split else ()
        shares = [with_interval(percent, share, *interval) for share, interval in ends] or [ABSENT] * len(values)
        rows.append([prompt.prompt, f"{prompt.num_images:,}", *shares, "" if split else prompt.reason])
    missed, labelled = np.array(record["missed"], dtype=int), sum(record["images"].values())
    each = ", ".join(f"{value} {percent(right)}" for value, right in record["right"].items())
    told = f"Guessed right when left out (cross-validated): {labelled - len(missed)} of {labelled} labels ({each})."
    if drawn:
        correct = int((~np.isin(drawn, missed)).sum())
        right = share_of("", correct, len(drawn), confidence=CONFIDENCE, colour="")
        told += f" Of those drawn at random, which alone stand for all images: {correct} of {len(drawn)}, "
        told += f"{share_in_words(right)}."
    columns, caption = ("Prompt", "Images", *values, "Why not split"), f"Groups of “{one_line(name, 60)}”"
    keep = len(columns) if any(row[-1] for row in rows) else -1
    return fragment("table", Table(columns[:keep], [row[:keep] for row in rows], caption, [told]))
