"""One audit as the page shows it: read once, and changed by whoever looks at it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import AuditError
from ..groups.curation import Curation, check_curation, curated, read_curation
from ..groups.words import AuditWords, read_words
from ..report.audit_reading import Page, pages_of, read_inferred, rows_by_name
from ..report.sources import Parts
from .workspace import open_data

SIDE = 256
"""The most pixels of an image in a gallery."""
_KEPT = 1024


class AuditBook:
    """An audit, its images, and people's changes to it.

    Args:
        parts: What was found in a run; its audit is not None.

    Raises:
        AuditError: The audit or the changes to it are damaged, or the data are other images.
        DataError: The data cannot be used as given.
    """

    def __init__(self, parts: Parts) -> None:
        assert parts.audit is not None
        self.folder = Path(parts.audit)
        self._inferred, self._tensors = read_inferred(self.folder)
        self.curation = read_curation(self.folder, self._inferred, self._tensors)
        self.words: AuditWords | None = read_words(self.folder, self.curation.audit)
        self.data = open_data(parts)
        self._rows = rows_by_name(self.names, list(self.data.names)) if self.data is not None else []
        self._lock = threading.Lock()
        # Prompts keep their places while images are left out, whatever their sizes are by then.
        self._places = [_key(page) for page in pages_of(self._inferred, self._tensors)]
        self._pages: list[Page] = []
        self._refresh()
        self.image = lru_cache(maxsize=_KEPT)(self._image)

    @property
    def names(self) -> list[str]:
        """File names of the images."""
        return list(self._inferred["names"])

    @property
    def num_groups(self) -> tuple[int, ...]:
        """Groups of each hidden factor."""
        return tuple(self._inferred["num_groups"])

    @property
    def prompts(self) -> Sequence[dict[str, Any]]:
        """Everything the audit states of each prompt."""
        return list(self._inferred["prompts"])

    @property
    def pages(self) -> list[Page]:
        """Prompts that hide a group, the largest as inferred first."""
        return self._pages

    def group_names(self) -> list[list[str]]:
        """Return what the groups of each factor are called."""
        return [
            [self.curation.group_name(group, factor) for group in range(count)]
            for factor, count in enumerate(self.num_groups)
        ]

    def preview(self, page: Page, cuts: Sequence[float]) -> Page:
        """Return a page as it would be with other cuts; nothing is saved.

        Raises:
            AuditError: Its groups cannot be parted so.
            ConfigError: The cuts are not rising.
        """
        changed = self.curation.with_cuts(page.index, cuts)
        pages = pages_of(*curated(self._inferred, self._tensors, changed), changed)
        return next(other for other in pages if _key(other) == _key(page))

    def rename(self, factor: int, names: Sequence[str]) -> None:
        """Name the groups of a factor and save the names; "" for a number.

        Raises:
            ConfigError: A name is too long, or two are the same.
        """

        def renamed(curation: Curation) -> Curation:
            for group in range(len(names)):  # so that two groups may swap their names
                curation = curation.with_name(factor, group, "")
            for group, name in enumerate(names):
                curation = curation.with_name(factor, group, name)
            return curation

        self._change(renamed)

    def leave_out(self, positions: Iterable[int]) -> None:
        """Leave images out, and save that.

        Raises:
            AuditError: No image of their prompt would be left.
        """
        self._change(lambda curation: curation.without_images(positions))

    def put_back(self, positions: Iterable[int]) -> None:
        """Take images in again that were left out, and save that."""
        self._change(lambda curation: curation.with_images(positions))

    def part_at(self, page: Page, cuts: Sequence[float] | None) -> None:
        """Part the groups of a page at other scores, or as they were inferred, and save that.

        Raises:
            AuditError: They cannot be parted so.
        """
        self._change(lambda curation: curation.with_cuts(page.index, cuts))

    def row(self, position: int) -> int:
        """Return where an image of the audit stands in the data."""
        return self._rows[position]

    def score(self, position: int) -> float:
        """Return an image's score."""
        return float(self._tensors["scores"][position])

    def prompt_of(self, position: int) -> str:
        """Return the prompt that an image is under."""
        return str(self._inferred["prompts"][int(self._tensors["prompt_ids"][position])]["prompt"])

    def _change(self, change: Callable[[Curation], Curation]) -> None:
        with self._lock:
            # Somebody else may have changed the file since it was read.
            changed = change(read_curation(self.folder, self._inferred, self._tensors))
            check_curation(changed, self._inferred, self._tensors)
            changed.save(self.folder)
            self.curation = changed
            self._refresh()

    def _refresh(self) -> None:
        pages = pages_of(*curated(self._inferred, self._tensors, self.curation), self.curation)
        self._pages = sorted(pages, key=lambda page: self._places.index(_key(page)))

    def _image(self, position: int) -> Image.Image:
        """Return an image of the audit, small enough for a gallery.

        Raises:
            AuditError: The data was not given.
        """
        if self.data is None:
            raise AuditError("Expected the audited images, got none. Give them with --data.")
        image = self.data.image(self._rows[position])
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        return image


def _key(page: Page) -> tuple[int, int]:
    return page.index, page.factor_index
