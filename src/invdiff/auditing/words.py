"""Words that a CLIP model chose for hidden groups, as an object and as `words.json` beside an audit. No torch here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import AuditError, DataError
from ..files import read_json, write_json
from ..text import one_line

WORDS = "words.json"
WORD_LIMIT = 60
"""Characters of a word, or of a few words that belong together."""


@dataclass(frozen=True)
class Word:
    """One word that tells a group from the others, in a CLIP model's opinion."""

    word: str
    effect: float
    """How much nearer the group's images are to it than the others': difference of means, in standard deviations of
    its score under the prompt."""
    p_value: float
    """Corrected for the number of words and groups that were tried (max-statistic permutation test)."""


@dataclass(frozen=True)
class GroupWords:
    """What tells one group from the others."""

    prompt: int | None
    """Index of the prompt in the audit; None over all prompts that hide a group."""
    caption: str
    """The prompt itself; "" over all prompts."""
    factor: int
    group: int
    """The column of W."""
    words: tuple[Word, ...]
    """Best first; none where no word passes the test."""
    note: str
    """Why there is none, in words; else ""."""

    @property
    def line(self) -> str:
        """The words in one line, such as "water, sea, boat"; else why there is none."""
        return ", ".join(word.word for word in self.words) or self.note


@dataclass(frozen=True)
class AuditWords:
    """Words for every group of an audit: opinions of one CLIP model, tested but not proven."""

    model: str
    """The last part of the CLIP model's hub id or folder."""
    audit: str
    """Fingerprint of the audit, as it was inferred."""
    vocabulary: int
    """How many words it chose from."""
    images: int
    """How many images were looked at."""
    level: float
    """Chance, for one prompt, that any word passes where groups look alike to the model."""
    groups: tuple[GroupWords, ...]

    def of(self, prompt: int | None, group: int, factor: int = 0) -> GroupWords | None:
        """Return what tells a group apart under a prompt, None where that was not asked.

        Args:
            prompt: Index of the prompt in the audit; None for all prompts together.
            group: The column of W.
            factor: The hidden factor.
        """
        wanted = (prompt, factor, group)
        return next((entry for entry in self.groups if (entry.prompt, entry.factor, entry.group) == wanted), None)

    def save(self, folder: str | Path) -> None:
        """Write `words.json` beside the audit in `folder`."""
        write_json(Path(folder) / WORDS, asdict(self))


def read_words(folder: str | Path, audit: str) -> AuditWords | None:
    """Return the words beside an audit; None where none were asked for.

    Args:
        folder: Where the audit lies.
        audit: Its fingerprint, as it was inferred.

    Raises:
        AuditError: `words.json` is damaged, or of another audit.
    """
    path = Path(folder) / WORDS
    if not path.is_file():
        return None
    remedy = "Delete it, or run `invdiff audit` again with --words-model."
    try:
        stated = read_json(path)
        found = AuditWords(
            model=one_line(_of_type(stated["model"], str), 200),
            audit=_of_type(stated["audit"], str),
            vocabulary=_of_type(stated["vocabulary"], int),
            images=_of_type(stated["images"], int),
            level=_finite(stated["level"]),
            groups=tuple(_group(entry) for entry in stated["groups"]),
        )
    except (KeyError, TypeError, ValueError, DataError) as error:
        raise AuditError(f"Expected words for groups in {path}, found something else ({error!r}). {remedy}") from error
    if found.audit != audit:
        raise AuditError(
            f"Expected words for the audit beside them (fingerprint {audit}) in {path}, found those of another "
            f"({one_line(found.audit, 20)}). {remedy}"
        )
    return found


def remove_words_of_others(folder: str | Path, audit: str) -> None:
    """Delete `words.json` where it is damaged or of another audit than the one that is about to lie in `folder`."""
    try:
        read_words(folder, audit)
    except AuditError:
        (Path(folder) / WORDS).unlink()


def _group(entry: Mapping[str, Any]) -> GroupWords:
    return GroupWords(
        prompt=None if entry["prompt"] is None else _of_type(entry["prompt"], int),
        caption=_of_type(entry["caption"], str),
        factor=_of_type(entry["factor"], int),
        group=_of_type(entry["group"], int),
        words=tuple(
            Word(one_line(_of_type(word["word"], str), WORD_LIMIT), _finite(word["effect"]), _finite(word["p_value"]))
            for word in entry["words"]
        ),
        note=one_line(_of_type(entry["note"], str), 200),
    )


def _of_type(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"expected {kind.__name__}, got {one_line(repr(value), 40)}")
    return value


def _finite(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise TypeError(f"expected a finite number, got {one_line(repr(value), 40)}")
    return float(value)
