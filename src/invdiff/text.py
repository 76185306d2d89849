"""Text from outside, such as captions, class names and file names, spelled in one way and made safe to show."""

import math
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

_SPECIAL = {ord(character): f"&#{ord(character)};" for character in "&<>|`*_[]{}~#$@:\\^"}
_JOINERS = "\u200c\u200d"  # formatting characters that some scripts are written with


def one_line(text: str, limit: int | None = None) -> str:
    """Text as one line without control, formatting and unpaired characters, cut where it is too long.

    Formatting characters turn the direction of the text that follows, or hide in it.
    """
    kept = (c for c in text if unicodedata.category(c) != "Cf" or c in _JOINERS)
    spaced = (" " if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") else c for c in kept)
    line = " ".join("".join(spaced).split())
    if limit is not None and len(line) > limit:
        line = line[: limit - 1].rstrip() + "…"
    return line


def escape(text: str, limit: int = 120) -> str:
    """Text that Markdown and HTML show as it is, in one line and in a table, cut where it is too long."""
    return one_line(text, limit).translate(_SPECIAL)


def listed(values: Sequence[str], most: int = 5) -> str:
    """The first few values, joined for a message."""
    more = f" and {len(values) - most:,} more" if len(values) > most else ""
    return (", ".join(values[:most]) or "none") + more


def or_dash(value: float) -> str:
    """A figure with two decimals; a dash for exactly 0, which stands for what could not be measured."""
    return f"{value:.2f}" if value else "–"


def e_value(log_e: float) -> str:
    """An e-value, such as "38" and "10^12", from its natural logarithm."""
    if abs(log_e) >= math.log(10_000):
        return f"10^{log_e / math.log(10):.0f}"
    text = f"{math.exp(log_e):.2g}"
    return text if log_e < math.log(10) else f"{float(text):,.0f}"


def label_of(value: Any) -> str:
    """A class name, of one spelling: 0, 0.0 and "0.0" are "0", true and "TRUE" are "True"; "" for None, NaN and none.

    Spaces around it do not count, nor how accents are encoded.
    `TypeError` for what holds several values, such as a list.
    """
    if not isinstance(value, str) and hasattr(value, "__iter__"):
        raise TypeError(f"{type(value).__name__}: {str(value)[:60]}")
    if value is None or value != value:  # NaN differs from itself
        return ""
    text = f"{value + 0:.0f}" if isinstance(value, float) and value.is_integer() else str(value)
    text = unicodedata.normalize("NFC", text).strip()
    if text in ("nan", "NaN"):
        return ""
    if text.lower() in ("true", "false"):
        return text.capitalize()
    return re.sub(r"^(-?(?:0|[1-9]\d*))(\.0*)?$", r"\1", text)


def is_unicode(text: str) -> bool:
    """Whether it is text throughout: Python reads bytes of the command line that are not as lone surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in text)
