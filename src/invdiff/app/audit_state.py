"""One audit as the page holds it: read once, edited by people, saved beside the audit."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from ..auditing.edits import Edits, apply
from ..auditing.result import Audit
from ..data.captioned import CaptionedImages, load_captioned_images
from ..errors import AuditError, DataError
from ..report.groups import Split, rows_by_name, splits_of
from ..report.plots import INK, RULE
from ..report.read import Parts

SIDE = 256
"""The most pixels of an image in a gallery."""
MOST_KEPT = 1024
"""Such images in memory."""


class AuditBook:
    """An audit with its images, read once, and people's edits, which are saved beside it.

    Args:
        parts: A run with an audit.

    Raises:
        AuditError: The audit or the edits are damaged, or the data are other images.
        DataError: The data cannot be used as given.
    """

    def __init__(self, parts: Parts) -> None:
        assert parts.audit is not None
        self.folder = Path(parts.audit)
        self.audit = Audit.load(self.folder)
        self.data: CaptionedImages | None = parts.data
        if parts.data is not None and not isinstance(parts.data, CaptionedImages):
            self.data = load_captioned_images(parts.data)
        self.rows = rows_by_name(self.audit.names, list(self.data.names)) if self.data is not None else []
        self.image = lru_cache(maxsize=MOST_KEPT)(self._image)
        self._lock = threading.Lock()

    @property
    def inferred(self) -> Audit:
        """The audit without people's edits."""
        return self.audit.inferred or self.audit

    @property
    def group_names(self) -> list[list[str]]:
        """Names of the groups of each factor, a number where people gave none."""
        edits, sizes = self.audit.edits, enumerate(self.audit.num_groups)
        return [[edits.group_name(group, factor) for group in range(count)] for factor, count in sizes]

    def page(self, index: int, factor: int, cuts: Sequence[float] | None = None) -> Split:
        """One prompt under one hidden factor; with other cuts than those kept, if given.

        Raises:
            AuditError: Its groups cannot be parted so.
            ConfigError: The cuts are not rising.
        """
        edits = self.audit.edits
        audit = self.audit if cuts is None else apply(self.audit, edits.with_cuts(index, cuts))
        return next(page for page in splits_of(audit) if (page.index, page.factor_index) == (index, factor))

    def is_movable(self, page: Split) -> bool:
        """Whether scores alone part the groups of a page, so that the cuts between them can be moved."""
        weights = self.inferred.group_weights[0][self.inferred.prompt_ids == page.index]
        needed = len(np.unique(weights.argmax(axis=1))) - 1
        return page.factor_index == 0 and len(page.cuts) == needed > 0

    def edit(self, change: Callable[[Edits], Edits]) -> None:
        """Change people's edits, those that others made meanwhile included, and save them.

        Raises:
            AuditError: The edits do not fit the audit, or it is another than the one that was opened.
            ConfigError: A name is too long or taken.
        """
        with self._lock:
            found, opened = Audit.load(self.folder), self.inferred
            plain = found.inferred or found
            if (plain.fingerprint, plain.names) != (
                opened.fingerprint,
                opened.names,
            ) or plain.prompts != opened.prompts:
                raise AuditError(
                    f"Expected the audit that was opened in {self.folder}, found another: it was made anew meanwhile. "
                    "Start the page again."
                )
            edited = apply(found, change(found.edits))
            edited.save_edits(self.folder)
            self.audit = edited

    def _image(self, position: int) -> Image.Image:
        """An image small enough for a gallery; a crossed-out tile where it is damaged or lies outside its data set."""
        assert self.data is not None
        row = self.rows[position]
        try:
            if self.data.is_own(row):
                image = self.data.image(row)
                image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
                return image
        except DataError:
            pass  # audit and training state what is wrong with it
        tile = Image.new("RGB", (SIDE // 4, SIDE // 4), RULE)
        for ends in ((0, 0, *tile.size), (0, tile.height, tile.width, 0)):
            ImageDraw.Draw(tile).line(ends, fill=INK)
        return tile
