"""What the training images of a prompt show, where the data's own labels say it: audit and training see none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..evaluation.annotators.annotations import CANNOT_TELL, label_of
from ..evaluation.results import Results
from .document import Share
from .sources import AuditSource
from .words import counted, quoted, share_of

NAME = "Training data"
COLOUR = "#a9793f"
"""Of no group, class or model."""


@dataclass(frozen=True)
class Labels:
    """The measured attribute of every audited image, as the data's own column has it."""

    source: AuditSource
    attribute: str
    classes: frozenset[str]
    """Those that were measured."""
    values: Sequence[str]
    """By position in the audit; "" where nothing is known."""

    @property
    def origin(self) -> str:
        """Where they come from, in words."""
        column = quoted(self.attribute)
        return (
            f"Shares of training data are counts of the data's own column {column}, which was read for this report "
            "only, never by audit or training. Counted are the images whose captions mean the prompt to "
            "the model; captions that say more, such as the class itself, are prompts of their own."
        )

    def under(self, prompt: str) -> Counter[str]:
        """Return label to number of images under a prompt, those without a label left out."""
        index = self._index_of.get(prompt)
        audit = self.source.audit
        rows: list[int] = [] if index is None else np.flatnonzero(audit.kept & (audit.prompt_ids == index)).tolist()
        return Counter(self.values[row] for row in rows if self.values[row])

    def share(self, prompt: str, name: str, *, confidence: float) -> Share | None:
        """Return a class's share of a prompt's labelled images; None where there are none."""
        counts = self.under(prompt)
        total = sum(counts.values())
        return share_of(NAME, counts[name], total, confidence=confidence, colour=COLOUR) if total else None

    def note(self, prompt: str) -> str:
        """Return how many images a prompt's shares are of, and which are of no class; "" where there are none."""
        counts = self.under(prompt)
        total = sum(counts.values())
        if not total:
            return ""
        words = f"{NAME}: {counted(total, 'labelled image')} under this prompt"
        others = [(name, count) for name, count in counts.most_common() if name not in self.classes]
        if others:
            number = sum(count for _, count in others)
            words += f"; {number:,} of them show other classes, such as {quoted(others[0][0])}, and count in the total"
        return f"{words}."

    @cached_property
    def _index_of(self) -> dict[str, int]:
        """Return caption to the audit's prompt."""
        entries = list(enumerate(self.source.audit.prompts))
        return {caption: k for k, entry in reversed(entries) for caption in (*entry.captions, entry.prompt)}


def labels(source: AuditSource | None, results: Results) -> Labels | None:
    """Return the data's labels of the attribute that was measured; None where it has none of its classes."""
    column = None if source is None or source.data is None else source.data.attributes.get(results.attribute)
    if source is None or column is None:
        return None
    found = [label_of(column[row]) for row in source.rows]
    values = ["" if value == CANNOT_TELL else value for value in found]
    measured = (measures for by_key in results.models.values() for measures in by_key.values())
    classes = frozenset(name for entry in measured for shares in entry.shares.values() for name in shares)
    return Labels(source, results.attribute, classes, values) if classes & set(values) else None
