"""Edits that people make to an audit: names of groups, images left out, scores at which groups part. No torch here.

They lie in `curation.json` beside the audit, which itself stays as inferred; `apply` carries them out.
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
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import AuditError, ConfigError, DataError
from ..files import read_json
from ..options import typed
from ..text import one_line

if TYPE_CHECKING:
    from .result import Audit

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


def apply(audit: Audit, edits: Edits) -> Audit:
    """An audit with people's edits, applied to it as inferred; earlier edits are dropped.

    Where cuts were moved, W is one-hot by where an image's score lies: the intervals belong, from low to high, to the
    prompt's groups as inferred in the order of their mean scores. The rows of W of an image that was left out are
    zeros, of every factor. Shares and numbers of images of the prompts concerned are those of the images kept; scores
    and all else stay.

    Raises:
        AuditError: They are edits to another audit, or to images, prompts or groups that this one lacks; or they leave
            out all images of a prompt, or part its groups into another number.
    """
    plain = audit.inferred or audit
    here, scores, prompt_ids = plain.fingerprint, plain.scores, plain.prompt_ids
    names = edits.names or tuple(("",) * size for size in plain.num_groups)
    if edits.audit not in ("", here) or tuple(map(len, names)) != plain.num_groups:
        raise AuditError(f"Expected changes to this audit (fingerprint {here}), got changes to {edits.audit}.")
    if any(not 0 <= position < len(scores) for position in edits.left_out):
        raise AuditError(f"Expected to leave out some of {len(scores)} images, got number {edits.left_out[-1]}.")
    weights = [w.copy() for w in plain.group_weights]
    first = weights[0]
    for index, cuts in edits.cuts.items():
        if not 0 <= index < len(plain.prompts):
            raise AuditError(f"Expected to part groups of {len(plain.prompts)} prompts, got number {index}.")
        rows = np.flatnonzero(plain.kept & (prompt_ids == index))
        order = np.array(ladder(first[rows], scores[rows]), dtype=np.int64)
        if len(cuts) != len(order) - 1:
            prompt = one_line(plain.prompts[index].prompt, 80)
            raise AuditError(
                f"Expected {max(len(order) - 1, 0)} cuts between the groups of “{prompt}”, got {len(cuts)}."
            )
        first[rows] = np.eye(first.shape[1], dtype=first.dtype)[order[np.searchsorted(cuts, scores[rows], "right")]]
    gone = list(edits.left_out)
    for w in weights:
        w[gone] = 0
    prompts = list(plain.prompts)
    for index in {*edits.cuts, *prompt_ids[gone].tolist()}:
        own = first[first.any(axis=1) & (prompt_ids == index)]
        if not len(own):
            prompt = one_line(prompts[index].prompt, 80)
            raise AuditError(f"Expected at least one image of “{prompt}” to keep, got all left out. Put one back.")
        shares = [round(float(share), 4) for share in own.mean(axis=0, dtype=np.float64)]
        shares = shares if prompts[index].found else prompts[index].shares
        prompts[index] = replace(prompts[index], num_images=len(own), shares=shares)
    edits = replace(edits, audit=here, names=names)
    inferred = plain if edits.changed else None
    return replace(plain, group_weights=tuple(weights), prompts=prompts, edits=edits, inferred=inferred)


def ladder(weights: NDArray[Any], scores: NDArray[Any]) -> list[int]:
    """The groups of a prompt that have images, from the lowest mean score to the highest.

    Args:
        weights: (n, E) the prompt's rows of W.
        scores: (n,).
    """
    labels = weights.argmax(axis=1)
    filled = [index for index in range(weights.shape[1]) if (labels == index).any()]
    return sorted(filled, key=lambda index: float(scores[labels == index].mean()))


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
        left_out = [typed(int, entry["position"]) for entry in stated["left_out"]]
        if [images[position] for position in left_out] != [entry["image"] for entry in stated["left_out"]]:
            raise ValueError("an image left out has another name than in the audit")
        edits = plain.without_images(left_out)
        for factor, of_factor in enumerate(names):
            for group, name in enumerate(of_factor):
                edits = edits.with_name(factor, group, name)
        for entry in stated["cuts"]:
            if typed(int, entry["prompt"]) in edits.cuts:
                raise ValueError(f"cuts of prompt {entry['prompt']} twice")
            edits = edits.with_cuts(entry["prompt"], typed(list[float], entry["scores"]))
    except DataError as error:
        raise AuditError(f"{error} {remedy}") from error
    except (KeyError, IndexError, TypeError, ValueError, ConfigError) as error:
        raise AuditError(
            f"Expected people's changes to an audit in {path}, found something else ({error!r}). {remedy}"
        ) from error
    return edits


def rename_aside(path: Path) -> Path:
    """Rename a file of edits after its audit, such as to `curation-0123456789abcdef.json`; the new path."""
    try:
        audit = str(read_json(path)["audit"])
    except (DataError, TypeError, KeyError):
        audit = ""
    stem = f"{path.stem}-{audit if re.fullmatch('[0-9a-f]{16}', audit) else 'damaged'}"
    place, number = path.with_name(f"{stem}.json"), 1
    while place.exists():
        number += 1
        place = path.with_name(f"{stem}-{number}.json")
    return path.rename(place)


def _look(name: str) -> str:
    """What two names that look alike have in common."""
    return unicodedata.normalize("NFKC", name.translate(_JOINERS)).casefold().strip()
