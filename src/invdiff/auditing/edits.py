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
from itertools import count, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import AuditError, ConfigError, DataError, found_else
from ..files import CURATION, read_json
from ..options import typed
from ..text import one_line
from .asked import known_rows

if TYPE_CHECKING:
    from .result import Audit, PromptSplit

NAME_LIMIT = 60  # characters of a group's name


@dataclass(frozen=True)
class Edits:
    """People's edits to one audit."""

    audit: str = ""
    """Fingerprint of the audit as inferred."""
    names: tuple[tuple[str, ...], ...] = ()
    """Names of groups, [factor][group], "" for none."""
    left_out: tuple[int, ...] = ()
    """Positions in the audit of images that do not count, rising."""
    cuts: Mapping[tuple[int, int], tuple[float, ...]] = field(default_factory=dict)
    """Factor and prompt, by index, to the scores at which the groups part, rising."""

    @property
    def changed(self) -> bool:
        """Whether there is any edit."""
        return bool(self.named or self.left_out or self.cuts)

    @property
    def prompts_cut(self) -> set[int]:
        """The prompts whose cuts people moved, of whatever factors."""
        return {prompt for _, prompt in self.cuts}

    @property
    def named(self) -> bool:
        """Whether any group has a name."""
        return any(name for names in self.names for name in names)

    def with_name(self, factor: int, group: int, name: str) -> Edits:
        """These edits with a group named, "" for no name; a `ConfigError` where it cannot have that name."""
        if not (0 <= factor < len(self.names) and 0 <= group < len(self.names[factor])):
            raise ConfigError(f"Expected a group of the audit to name, got group {group} of factor {factor}.")
        name, names = one_line(name), list(self.names[factor])
        if len(name) > NAME_LIMIT:
            raise ConfigError(f"Expected a name of at most {NAME_LIMIT} characters, got {len(name)}. Shorten it.")
        number = re.fullmatch(r"group (\d{1,9})", _look(name))
        if number and int(number[1]) != group:
            raise ConfigError(f"Expected a name for group {group}, got the number of another. Choose another name.")
        if _look(name) in {_look(other) for index, other in enumerate(names) if index != group} - {""}:
            raise ConfigError(f"Expected a name that no other group has, got {name!r} twice. Choose another name.")
        names[group] = "" if number or not _look(name) else name
        return replace(self, names=(*self.names[:factor], tuple(names), *self.names[factor + 1 :]))

    def without_images(self, positions: Iterable[int]) -> Edits:
        """These edits with the images at `positions`, from 0 in the audit, left out."""
        chosen = {operator.index(position) for position in positions}
        if chosen and min(chosen) < 0:
            raise ConfigError(f"Expected positions of images from 0, got {min(chosen)}.")
        return replace(self, left_out=tuple(sorted({*self.left_out, *chosen})))

    def with_images(self, positions: Iterable[int]) -> Edits:
        """These edits with the images at `positions` counted again."""
        return replace(self, left_out=tuple(sorted(set(self.left_out) - set(positions))))

    def with_cuts(self, factor: int, prompt: int, cuts: Sequence[float] | None) -> Edits:
        """These edits with the groups of a factor under a prompt, by index, parted at other scores.

        `cuts` rise, one fewer than groups; a score at a cut belongs above it. None parts the groups as inferred.
        """
        edited = {place: parted for place, parted in self.cuts.items() if place != (factor, prompt)}
        if cuts is not None:
            place = operator.index(factor), operator.index(prompt)
            chosen = edited[place] = tuple(map(float, cuts))
            rising = all(low < high for low, high in pairwise(chosen)) and all(map(math.isfinite, chosen))
            if min(place) < 0 or not chosen or not rising:
                expected = "Expected finite, rising scores at which the groups of a prompt part"
                raise ConfigError(f"{expected}, got {list(chosen)} for prompt {prompt} of factor {factor}.")
        return replace(self, cuts=dict(sorted(edited.items())))


def apply(audit: Audit, edits: Edits) -> Audit:
    """An audit with people's edits, applied to it as inferred; `AuditError` where it cannot take them.

    Between moved cuts, W is one-hot: the intervals belong, from low to high, to the groups in the order of their mean
    scores. Images left out have rows of zeros in every W; neither they nor those of which nothing is known, whose rows
    stay, count in shares.
    """
    plain = audit.inferred or audit
    here, prompt_ids = plain.fingerprint, plain.prompt_ids
    names = edits.names or tuple(("",) * size for size in plain.num_groups)
    captions = [one_line(prompt.prompt, 80) for prompt in plain.prompts]
    if edits.audit not in ("", here) or tuple(map(len, names)) != plain.num_groups:
        raise AuditError(f"Expected changes to this audit (fingerprint {here}), got changes to {edits.audit}.")
    if absent := [position for position in edits.left_out if not 0 <= position < len(prompt_ids)]:
        raise AuditError(f"Expected changes to some of {len(prompt_ids)} images, got number {absent[0]}.")
    weights = [w.copy() for w in plain.group_weights]
    for (factor, index), cuts in edits.cuts.items():
        if plain.split(factor, index) is None:
            raise AuditError(f"Expected cuts of split prompts, got one of prompt {index} by factor {factor}.")
        w = weights[factor]
        rows = np.flatnonzero(plain.kept & (prompt_ids == index) & known_rows(w))
        scores = plain.scores[factor, rows]
        order = np.array(ladder(w[rows], scores), dtype=np.int64)
        if len(cuts) != len(order) - 1:
            raise AuditError(f"Expected {len(order) - 1} cuts of groups of “{captions[index]}”, got {len(cuts)}.")
        w[rows] = np.eye(w.shape[1], dtype=w.dtype)[order[np.searchsorted(cuts, scores, "right")]]
    gone = list(edits.left_out)
    for w in weights:
        w[gone] = 0
    prompts, fewer = list(plain.prompts), set(prompt_ids[gone].tolist())
    counts = np.bincount(prompt_ids[weights[0].any(axis=1)], minlength=len(prompts)).tolist()
    for index in fewer:
        if not counts[index]:
            raise AuditError(f"Expected at least one image of “{captions[index]}” to keep, got none. Put one back.")
        prompts[index] = replace(prompts[index], num_images=counts[index])

    def edited(m: int, split: PromptSplit) -> PromptSplit:
        if split.prompt not in fewer and (m, split.prompt) not in edits.cuts:
            return split
        own = weights[m][prompt_ids == split.prompt]
        if not known_rows(own).any():
            wanted = f"an image of “{captions[split.prompt]}” of which {plain.factors[m].name} is known"
            raise AuditError(f"Expected {wanted}, got none. Put one back.")
        return split.with_shares_of(own)

    found = [replace(of, splits=[edited(m, split) for split in of.splits]) for m, of in enumerate(plain.factors)]
    edits = replace(edits, audit=here, names=names)
    inferred = plain if edits.changed else None
    return replace(plain, group_weights=tuple(weights), prompts=prompts, factors=found, edits=edits, inferred=inferred)


def ladder(weights: NDArray[Any], scores: NDArray[Any]) -> list[int]:
    """The groups that have images, from the lowest mean score up, of one prompt's W (n, E) and scores (n,)."""
    labels = weights.argmax(axis=1)
    return sorted(np.unique(labels).tolist(), key=lambda group: float(scores[labels == group].mean()))


def read_edits(plain: Audit, folder: Path) -> Audit:
    """An audit as inferred, with the edits to it in `folder`; `AuditError` where they are damaged or to another."""
    unedited = apply(plain, Edits())
    edits, path = unedited.edits, folder / CURATION
    if not path.is_file():
        return unedited
    try:
        stated = read_json(path)
        if typed(str, stated["audit"]) != edits.audit:
            raise AuditError(
                f"Expected changes to the audit beside them (fingerprint {edits.audit}) in {path}, found changes to "
                f"another ({one_line(stated['audit'], 20)}). Move that file elsewhere, or run `invdiff audit` again."
            )
        names = typed(list[list[str]], stated["names"])
        if tuple(map(len, names)) != plain.num_groups:
            raise ValueError("names of other groups than the audit has")
        for factor, of_factor in enumerate(names):
            for group, name in enumerate(of_factor):
                edits = edits.with_name(factor, group, name)
        positions = typed(list[int], [entry["position"] for entry in stated["left_out"]])
        edits = edits.without_images(positions)
        if [plain.names[position] for position in positions] != [entry["image"] for entry in stated["left_out"]]:
            raise ValueError("an image left out has another name than in the audit")
        for entry in stated["cuts"]:
            place = typed(int, entry["factor"]), typed(int, entry["prompt"])
            edits = edits.with_cuts(*place, typed(list[float], entry["scores"]))
    except (KeyError, IndexError, TypeError, ValueError, ConfigError, DataError) as error:
        remedy = "Mend it or move it elsewhere, and make the changes again."
        raise AuditError(found_else(f"people's changes to an audit in {path}", error, remedy)) from error
    return apply(plain, edits)


def put_aside(path: Path) -> Path:
    """Rename a file of edits after its audit, such as to `curation-0123456789abcdef.json`; the new path."""
    try:
        audit = str(read_json(path)["audit"])
    except (DataError, TypeError, KeyError):
        audit = ""
    stem = f"{path.stem}-{audit if re.fullmatch('[0-9a-f]{16}', audit) else 'damaged'}"
    places = (path.with_name(f"{stem}{f'-{number}' if number > 1 else ''}.json") for number in count(1))
    return path.rename(next(place for place in places if not place.exists()))


def _look(name: str) -> str:
    """What two names that look alike have in common."""
    return unicodedata.normalize("NFKC", re.sub("[\u200c\u200d]", "", name)).casefold().strip()
