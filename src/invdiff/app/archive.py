"""One audit as the page shows it: read once, and changed by whoever looks at it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from ..auditing.edits import Curation, audit_fingerprint, check_curation, curated, read_curation
from ..auditing.words import AuditWords, read_words
from ..errors import AuditError, DataError
from ..files import fingerprint
from ..report.audit_reading import Page, pages_of, read_inferred, rows_by_name
from ..report.sources import Parts
from .pictures import nothing_to_show
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
        self._inferred, self._tensors, self._fingerprint = _read(self.folder)
        self.curation = read_curation(self.folder, self._inferred, self._tensors)
        self.words: AuditWords | None = read_words(self.folder, self.curation.audit)
        self.data = open_data(parts)
        self._rows = rows_by_name(self.names, list(self.data.names)) if self.data is not None else []
        self._lock = threading.Lock()
        # Prompts keep their places while images are left out, whatever their sizes are by then.
        self._as_inferred = pages_of(self._inferred, self._tensors)
        self._places = [_key(page) for page in self._as_inferred]
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

    @property
    def resolution(self) -> int:
        """Side of the images in pixels, as they were audited; 0 where that is not known."""
        side = self._inferred.get("settings", {}).get("resolution", 0)
        return side if isinstance(side, int) and side > 0 else 0

    def is_movable(self, page: Page) -> bool:
        """Whether scores alone part the groups of a page, so that the cuts between them can be moved."""
        inferred = next(other for other in self._as_inferred if _key(other) == _key(page))
        needed = sum(group.size > 0 for group in inferred.groups) - 1
        return page.factor_index == 0 and len(page.cuts) == needed > 0

    def preview(self, page: Page, cuts: Sequence[float]) -> Page:
        """Return a page as it would be with other cuts; nothing is saved.

        Raises:
            AuditError: Its groups cannot be parted so.
            ConfigError: The cuts are not rising.
        """
        changed = self.curation.with_cuts(page.index, cuts)
        pages = pages_of(*curated(self._inferred, self._tensors, changed), changed)
        return next(other for other in pages if _key(other) == _key(page))

    def rename(self, factor: int, group: int, name: str) -> None:
        """Name a group and save that; "" for its number.

        Raises:
            ConfigError: The name is too long, or another group has it.
        """
        self._change(lambda curation: curation.with_name(factor, group, name))

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
            # Somebody else may have changed the files since they were read.
            if _read(self.folder)[2] != self._fingerprint:
                raise AuditError(
                    f"Expected the audit that was opened in {self.folder}, found another: it was made anew meanwhile. "
                    "Start the page again."
                )
            changed = change(read_curation(self.folder, self._inferred, self._tensors))
            check_curation(changed, self._inferred, self._tensors)
            changed.save(self.folder)
            self.curation = changed
            self._refresh()

    def _refresh(self) -> None:
        pages = pages_of(*curated(self._inferred, self._tensors, self.curation), self.curation)
        self._pages = sorted(pages, key=lambda page: self._places.index(_key(page)))

    def _image(self, position: int) -> Image.Image:
        """Return an image small enough for a gallery; a crossed-out tile where it cannot be shown.

        That is where it is damaged, or lies outside the folder of its data set: a page may be seen by others.
        """
        assert self.data is not None
        row = self._rows[position]
        try:
            if self.data.is_own(row):
                image = self.data.image(row)
                image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
                return image
        except DataError:
            pass  # what is wrong with it is the audit's and the training's to say
        return nothing_to_show(SIDE // 4)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Return an audit as inferred, and a digest of everything that places in it depend on."""
    try:
        document, tensors = read_inferred(folder)
        places = [prompt["prompt"] for prompt in document["prompts"]]
        digest = fingerprint(audit_fingerprint(tensors), json.dumps([document["names"], places]))
        pages_of(document, tensors)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise AuditError(
            f"Expected an audit in {folder}, found something else ({error!r}). Run `invdiff audit` again."
        ) from error
    return document, tensors, digest


def _key(page: Page) -> tuple[int, int]:
    return page.index, page.factor_index
