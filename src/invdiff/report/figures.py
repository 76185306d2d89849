"""Figures in words and in tables, alike in every part of a report."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..evaluation.fairness.intervals import share_interval
from ..evaluation.results import UNSTATED, Estimate, Measures, Quantity
from ..text import one_line

ABSENT = "–"
LOOK = "A rare group can also be wrong captions: look at the pictures."
BETTER = {  # how to read a figure of quality, by the start of its name
    "higher is better": ("subject accuracy", "precision", "recall", "density", "coverage", "CLIP-T"),
    "lower is better": ("Frechet", "FID", "KID", "CMMD"),
    "higher is more diverse": ("Vendi", "LPIPS"),
}


@dataclass(frozen=True)
class Share:
    """A share of counted images, from 0 to 1, with Wilson's interval."""

    name: str
    share: float
    low: float
    high: float
    count: int
    total: int
    colour: str


class Table(NamedTuple):
    """Figures in words; the first cell of a row names it. A table without rows is not shown."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    notes: Sequence[str] = ()


def share_of(name: str, count: int, total: int, *, colour: str) -> Share:
    """A share of counted images."""
    return Share(name, count / total, *share_interval(count, total), count, total, colour)


def percent(share: float) -> str:
    """A share in words that never round something to nothing: "5%", "<1%", ">99%"."""
    if 0 < share < 0.005:
        return "<1%"
    if 0.995 <= share < 1:
        return ">99%"
    return f"{share:.0%}"


def bias(value: float) -> str:
    """A fairness metric as everywhere: two decimals."""
    return f"{value:.2f}".replace("-", "−")


def with_interval(form: Callable[[float], str], value: float, low: float | None, high: float | None) -> str:
    """A figure with its interval, such as "0.12 (0.03 to 0.20)", where it has one."""
    return form(value) if low is None or high is None else f"{form(value)} ({form(low)} to {form(high)})"


def share_in_words(share: Share) -> str:
    """A share with its interval, such as "88% (75% to 94%)"."""
    return with_interval(percent, share.share, share.low, share.high)


def estimate(entry: Estimate | None) -> str:
    """A fairness metric with its interval."""
    return ABSENT if entry is None else with_interval(bias, entry.value, entry.low, entry.high)


def corrected(entry: Estimate | None) -> str:
    """The same corrected for the annotator's errors, where they are known."""
    if entry is None or entry.corrected is None:
        return ABSENT
    return with_interval(bias, entry.corrected, entry.corrected_low, entry.corrected_high)


def correction_matters(entries: Iterable[Estimate | None]) -> bool:
    """Whether correcting for the annotator's errors moves one of these figures, or an end of its interval, visibly."""

    def moved(old: float, new: float | None) -> float:
        return 0.0 if new is None else abs(new - old)

    return any(
        moved(of.value, of.corrected) >= 0.0005
        or max(moved(of.low, of.corrected_low), moved(of.high, of.corrected_high)) >= 0.02
        for of in entries
        if of is not None
    )


def floors(entries: Iterable[Estimate | None], name: str = "floor") -> str:
    """What a fair sampler would show beside these figures, or beside the corrected ones ("corrected_floor")."""
    found = (getattr(of, name) for of in entries if of is not None)
    return " / ".join(dict.fromkeys(bias(floor) for floor in found if floor is not None)) or ABSENT


def images_each(measures: Measures) -> str:
    """How many images each prompt has, such as "48", or "2 to 500" where they differ."""
    numbers = sorted({sum(of.values()) for of in measures.first.counts.values()})
    return " to ".join(f"{number:,}" for number in dict.fromkeys((numbers[0], numbers[-1])))


def quantity(name: str, figure: Quantity | None) -> str:
    """A figure of quality with its interval, in percent where it is a share of images, else with three digits."""

    def number(value: float) -> str:
        text = f"{value:#.3g}".rstrip(".")
        return (f"{value:,.0f}" if "e" in text and 1e-4 <= abs(value) < 1e6 else text).replace("-", "−")

    if figure is None or figure.value is None:
        return ABSENT
    if name == "images":
        return f"{figure.value:,.0f}"
    is_share = name.startswith(("subject accuracy", "precision", "recall", "coverage")) or name.endswith(" unchanged")
    return with_interval(percent if is_share else number, figure.value, figure.low, figure.high)


def shown_name(name: str) -> str:
    """A figure's name with the accent that identifiers lack, such as "Fréchet distance"."""
    return name.replace("Frechet", "Fréchet")


def with_direction(name: str) -> str:
    """A figure's name, and which way is better."""
    better = next((f", {words}" for words, starts in BETTER.items() if name.startswith(starts)), "")
    return shown_name(name) + better


def at_scale(key: str) -> str:
    """Where figures were measured, in words."""
    return "at an unstated guidance scale" if key == UNSTATED else f"at guidance scale {key.removesuffix('.0')}"


def sentences(texts: Iterable[str]) -> list[str]:
    """Each different text once, as a sentence."""
    stripped = dict.fromkeys(text.strip().removesuffix(".") for text in texts)
    return [f"{text[0].upper()}{text[1:]}." for text in stripped if text]


def quoted(name: str) -> str:
    """A name inside a sentence, short enough for it."""
    return f"“{one_line(name, 80)}”"


def counted(count: int, noun: str) -> str:
    """A number with its noun, such as "1 prompt" and "3 prompts"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
