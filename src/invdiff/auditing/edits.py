"""Edits that people make to an audit: names of groups, images left out, scores at which groups part. No torch here.

They lie in `curation.json` beside the audit, which itself stays as inferred; `apply` in `result` carries them out.
"""

from __future__ import annotations

import math
import operator
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..errors import AuditError, ConfigError, DataError
from ..files import read_json, typed
from ..text import one_line

CURATION = "curation.json"
NAME_LIMIT = 60
"""Characters of a group's name."""
_NUMBERED = re.compile(r"group (\d{1,9})")
_JOINERS = {0x200C: None, 0x200D: None}


@dataclass(frozen=True)
class Edits:
    """People's edits to one audit."""

    audit: str = ""
    """Fingerprint of the audit as inferred."""
    names: tuple[tuple[str, ...], ...] = ()
    """Names of groups, [factor][group], "" for none."""
    left_out: tuple[int, ...] = ()
    """Positions in the audit of images that do not count, rising."""
    cuts: Mapping[int, tuple[float, ...]] = field(default_factory=dict)
    """Index of a prompt to the scores at which its groups part, rising; of factor 0."""

    @property
    def changed(self) -> bool:
        """Whether there is any edit."""
        return bool(self.named or self.left_out or self.cuts)

    @property
    def named(self) -> bool:
        """Whether any group has a name."""
        return any(name for names in self.names for name in names)

    def group_name(self, group: int, factor: int = 0) -> str:
        """The name of a group, or its number in words, such as "group 0"."""
        names = self.names[factor] if factor < len(self.names) else ()
        return (names[group] if group < len(names) else "") or f"group {group}"

    def with_name(self, factor: int, group: int, name: str) -> Edits:
        """These edits with a group named; "" removes its name.

        Raises:
            ConfigError: There is no such group, or the name is too long, taken, or the number of another group.
        """
        if not (0 <= factor < len(self.names) and 0 <= group < len(self.names[factor])):
            raise ConfigError(f"Expected a group of the audit to name, got group {group} of factor {factor}.")
        name = one_line(name)
        if len(name) > NAME_LIMIT:
            raise ConfigError(f"Expected a name of at most {NAME_LIMIT} characters, got {len(name)}. Shorten it.")
        key, names = _look(name), list(self.names[factor])
        numbered = _NUMBERED.fullmatch(key)
        if numbered and int(numbered[1]) != group:
            raise ConfigError(f"Expected a name for group {group}, got the number of another. Choose another name.")
        if key and key in (_look(other) for index, other in enumerate(names) if index != group):
            raise ConfigError(f"Expected a name that no other group has, got {name!r} twice. Choose another name.")
        names[group] = "" if numbered or not key else name
        return replace(self, names=(*self.names[:factor], tuple(names), *self.names[factor + 1 :]))

    def without_images(self, positions: Iterable[int]) -> Edits:
        """These edits with the images at `positions` in the audit left out.

        Raises:
            ConfigError: A position is negative.
        """
        chosen = {operator.index(position) for position in positions}
        if chosen and min(chosen) < 0:
            raise ConfigError(f"Expected positions of images from 0, got {min(chosen)}.")
        return replace(self, left_out=tuple(sorted({*self.left_out, *chosen})))

    def with_images(self, positions: Iterable[int]) -> Edits:
        """These edits with the images at `positions` counted again."""
        chosen = {operator.index(position) for position in positions}
        return replace(self, left_out=tuple(position for position in self.left_out if position not in chosen))

    def with_cuts(self, prompt: int, cuts: Sequence[float] | None) -> Edits:
        """These edits with the groups of one prompt parted elsewhere.

        Args:
            prompt: Its index in the audit.
            cuts: Scores, rising, one fewer than the prompt has groups; a score at a cut belongs above it. None parts
                the groups as inferred.

        Raises:
            ConfigError: The scores are absent, not finite or not rising.
        """
        others = {index: parted for index, parted in self.cuts.items() if index != prompt}
        if cuts is None:
            return replace(self, cuts=others)
        chosen = tuple(float(cut) for cut in cuts)
        rising = all(low < high for low, high in pairwise(chosen))
        if prompt < 0 or not chosen or not rising or not all(map(math.isfinite, chosen)):
            raise ConfigError(
                f"Expected finite, rising scores at which the groups of a prompt part, got {list(chosen)} for prompt "
                f"{prompt}."
            )
        return replace(self, cuts=dict(sorted({**others, operator.index(prompt): chosen}.items())))

    def to_dict(self, images: Sequence[str], captions: Sequence[str]) -> dict[str, Any]:
        """The content of `curation.json`, with names of images and captions of prompts for whoever reads the file."""
        return {
            "audit": self.audit,
            "names": self.names,
            "left_out": [{"position": position, "image": images[position]} for position in self.left_out],
            "cuts": [{"prompt": k, "caption": captions[k], "scores": cuts} for k, cuts in self.cuts.items()],
        }


@dataclass(frozen=True)
class _LeftOut:
    position: int
    image: str


@dataclass(frozen=True)
class _Cuts:
    prompt: int
    caption: str
    scores: list[float]


def read_edits(folder: Path, plain: Edits, images: Sequence[str]) -> Edits:
    """The edits in `curation.json` beside an audit; `plain` where there is no such file.

    Args:
        folder: Of the audit.
        plain: No edits, with the audit's fingerprint and an empty name for each of its groups.
        images: Names of the audit's images.

    Raises:
        AuditError: The file is damaged, or holds edits to another audit.
    """
    path = folder / CURATION
    if not path.is_file():
        return plain
    remedy = "Mend it or move it elsewhere, and make the changes again."
    try:
        stated = read_json(path)
        if typed(str, stated["audit"]) != plain.audit:
            raise AuditError(
                f"Expected changes to the audit beside them (fingerprint {plain.audit}) in {path}, found changes to "
                f"another ({one_line(stated['audit'], 20)}). Move that file elsewhere, or run `invdiff audit` again, "
                "which does."
            )
        names = typed(list[list[str]], stated["names"])
        if [len(factor) for factor in names] != [len(factor) for factor in plain.names]:
            raise ValueError("names of other groups than the audit has")
        left_out = typed(list[_LeftOut], stated["left_out"])
        renamed = [entry.position for entry in left_out if images[entry.position] != entry.image]
        if renamed:
            raise ValueError(f"image {renamed[0]} has another name than in the audit")
        edits = plain.without_images(entry.position for entry in left_out)
        for factor, of_factor in enumerate(names):
            for group, name in enumerate(of_factor):
                edits = edits.with_name(factor, group, name)
        for entry in typed(list[_Cuts], stated["cuts"]):
            if entry.prompt in edits.cuts:
                raise ValueError(f"cuts of prompt {entry.prompt} twice")
            edits = edits.with_cuts(entry.prompt, entry.scores)
    except DataError as error:
        raise AuditError(f"{error} {remedy}") from error
    except (KeyError, IndexError, TypeError, ValueError, ConfigError) as error:
        raise AuditError(
            f"Expected people's changes to an audit in {path}, found something else ({error!r}). {remedy}"
        ) from error
    return edits


def rename_aside(path: Path) -> Path:
    """Rename a file of edits after its audit, such as to `curation-0123456789abcdef.json`; the new path.

    A name that is taken is counted on.
    """
    try:
        audit = str(read_json(path)["audit"])
    except (DataError, TypeError, KeyError):
        audit = ""
    stem = f"{path.stem}-{audit if re.fullmatch('[0-9a-f]{16}', audit) else 'damaged'}"
    place = path.with_name(f"{stem}.json")
    number = 1
    while place.exists():
        number += 1
        place = path.with_name(f"{stem}-{number}.json")
    return path.rename(place)


def _look(name: str) -> str:
    """What two names that look alike have in common."""
    return unicodedata.normalize("NFKC", name.translate(_JOINERS)).casefold().strip()
