"""One audit as the page shows it: read once, and changed by whoever looks at it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path

from PIL import Image

from ..auditing.edits import Edits, apply
from ..auditing.result import Audit, PromptAudit
from ..errors import AuditError, DataError
from ..files import fingerprint
from ..report.groups import Split, rows_by_name, splits_of
from ..report.read import Parts
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
        self._audit = Audit.load(self.folder)
        self._opened = _digest(self._audit)
        self.words = self._audit.words
        self.data = open_data(parts)
        self._rows = rows_by_name(self.names, list(self.data.names)) if self.data is not None else []
        self._lock = threading.Lock()
        # Prompts keep their places while images are left out, whatever their sizes are by then.
        self._as_inferred = splits_of(apply(self._audit, Edits()))
        self._places = [_key(page) for page in self._as_inferred]
        self._pages = self._in_place(self._audit)
        self.image = lru_cache(maxsize=_KEPT)(self._image)

    @property
    def edits(self) -> Edits:
        """People's edits."""
        return self._audit.edits

    @property
    def names(self) -> list[str]:
        """File names of the images."""
        return self._audit.names

    @property
    def num_groups(self) -> tuple[int, ...]:
        """Groups of each hidden factor."""
        return self._audit.num_groups

    @property
    def prompts(self) -> Sequence[PromptAudit]:
        """The result under each prompt, as inferred."""
        return (self._audit.inferred or self._audit).prompts

    @property
    def pages(self) -> list[Split]:
        """Prompts that hide a group, the largest as inferred first."""
        return self._pages

    def group_names(self) -> list[list[str]]:
        """Return what the groups of each factor are called."""
        return [
            [self.edits.group_name(group, factor) for group in range(count)]
            for factor, count in enumerate(self.num_groups)
        ]

    @property
    def resolution(self) -> int:
        """Side of the images in pixels, as they were audited; 0 where that is not known."""
        side = self._audit.settings.get("resolution", 0)
        return side if isinstance(side, int) and side > 0 else 0

    def is_movable(self, page: Split) -> bool:
        """Whether scores alone part the groups of a page, so that the cuts between them can be moved."""
        inferred = next(other for other in self._as_inferred if _key(other) == _key(page))
        needed = sum(group.size > 0 for group in inferred.groups) - 1
        return page.factor_index == 0 and len(page.cuts) == needed > 0

    def preview(self, page: Split, cuts: Sequence[float]) -> Split:
        """Return a page as it would be with other cuts; nothing is saved.

        Raises:
            AuditError: Its groups cannot be parted so.
            ConfigError: The cuts are not rising.
        """
        pages = splits_of(apply(self._audit, self.edits.with_cuts(page.index, cuts)))
        return next(other for other in pages if _key(other) == _key(page))

    def rename(self, factor: int, group: int, name: str) -> None:
        """Name a group and save that; "" for its number.

        Raises:
            ConfigError: The name is too long, or another group has it.
        """
        self._change(lambda edits: edits.with_name(factor, group, name))

    def leave_out(self, positions: Iterable[int]) -> None:
        """Leave images out, and save that.

        Raises:
            AuditError: No image of their prompt would be left.
        """
        self._change(lambda edits: edits.without_images(positions))

    def put_back(self, positions: Iterable[int]) -> None:
        """Take images in again that were left out, and save that."""
        self._change(lambda edits: edits.with_images(positions))

    def part_at(self, page: Split, cuts: Sequence[float] | None) -> None:
        """Part the groups of a page at other scores, or as they were inferred, and save that.

        Raises:
            AuditError: They cannot be parted so.
        """
        self._change(lambda edits: edits.with_cuts(page.index, cuts))

    def row(self, position: int) -> int:
        """Return where an image of the audit stands in the data."""
        return self._rows[position]

    def score(self, position: int) -> float:
        """Return an image's score."""
        return float(self._audit.scores[position])

    def prompt_of(self, position: int) -> str:
        """Return the prompt that an image is under."""
        return self._audit.prompts[self._audit.prompt_ids[position]].prompt

    def _change(self, change: Callable[[Edits], Edits]) -> None:
        with self._lock:
            # Somebody else may have changed the files since they were read.
            found = Audit.load(self.folder)
            if _digest(found) != self._opened:
                raise AuditError(
                    f"Expected the audit that was opened in {self.folder}, found another: it was made anew meanwhile. "
                    "Start the page again."
                )
            changed = apply(found, change(found.edits))
            changed.save_edits(self.folder)
            self._audit, self._pages = changed, self._in_place(changed)

    def _in_place(self, audit: Audit) -> list[Split]:
        return sorted(splits_of(audit), key=lambda page: self._places.index(_key(page)))

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


def _digest(audit: Audit) -> str:
    """A digest of everything in an audit as inferred that edits refer to."""
    plain = audit.inferred or audit
    return fingerprint(plain.fingerprint, json.dumps([plain.names, [prompt.prompt for prompt in plain.prompts]]))


def _key(page: Split) -> tuple[int, int]:
    return page.index, page.factor_index
