"""Figures in words, alike in every part of a report."""

from __future__ import annotations

from collections.abc import Iterable

from ..evaluation.quality.intervals import share_interval
from ..evaluation.results import UNSTATED, Quantity
from ..text import one_line
from .document import Share
from .style import percent

SHARES = ("subject accuracy", "precision", "recall", "coverage")
"""Figures that are shares of images."""
BETTER = {
    "subject accuracy": "higher is better",
    "Frechet": "lower is better",
    "FID": "lower is better",
    "KID": "lower is better",
    "CMMD": "lower is better",
    "precision": "higher is better",
    "recall": "higher is better",
    "density": "higher is better",
    "coverage": "higher is better",
    "CLIP-T": "higher is better",
    "Vendi": "higher is more diverse",
    "LPIPS": "higher is more diverse",
}
ABSENT = "–"


def number(value: float, *, digits: int = 3) -> str:
    """Return a figure to some digits, with a true minus sign."""
    text = f"{value:.{digits}g}"
    if "e" in text and 1e-4 <= abs(value) < 1e6:
        text = f"{value:,.0f}"
    return text.replace("-", "−")


def bias(value: float) -> str:
    """Return a Bias as everywhere: two decimals."""
    return f"{value:.2f}".replace("-", "−")


def sentences(texts: Iterable[str]) -> list[str]:
    """Return each different text once, as a sentence."""
    stripped = dict.fromkeys(text.strip().rstrip(".") for text in texts)
    return [f"{text[0].upper()}{text[1:]}." for text in stripped if text]


def with_interval(value: str, low: str | None, high: str | None) -> str:
    """Return a figure with its interval in brackets, where it has one."""
    return value if low is None or high is None else f"{value} ({low} to {high})"


def share_in_words(share: Share) -> str:
    """Return a share with its interval, such as "88% (75% to 94%)"."""
    if share.low is None or share.high is None:
        return percent(share.share)
    return with_interval(percent(share.share), percent(share.low), percent(share.high))


def quantity(name: str, figure: Quantity | None) -> str:
    """Return a figure of quality with its interval, as a share where it is one."""
    if figure is None or figure.value is None:
        return ABSENT
    is_share = name.startswith(SHARES) or name.endswith(" unchanged")
    form = percent if is_share else number
    low, high = (None if end is None else form(end) for end in (figure.low, figure.high))
    return with_interval(form(figure.value), low, high)


def shown_name(name: str) -> str:
    """Return a figure's name, and which way is better."""
    better = next((words for start, words in BETTER.items() if name.startswith(start)), "")
    name = name.replace("Frechet", "Fréchet")
    return f"{name}, {better}" if better else name


def share_of(name: str, count: int, total: int, *, confidence: float, colour: str) -> Share:
    """Return a share of counted images with Wilson's interval."""
    low, high = share_interval(count, total, confidence=confidence)
    return Share(name, count / total, low, high, count, total, colour)


def at_scale(key: str) -> str:
    """Return where figures were measured, in words."""
    return "at an unstated guidance scale" if key == UNSTATED else f"at guidance scale {key.removesuffix('.0')}"


def quoted(name: str) -> str:
    """Return a name of others inside a sentence, short enough for it."""
    return f"“{one_line(name, 80)}”"


def counted(count: int, noun: str) -> str:
    """Return a number with its noun, such as "1 prompt" and "3 prompts"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
