"""People's changes to an audit: names of groups, images left out, scores at which groups part. No torch here.

They lie in `curation.json` beside the audit, which itself stays as it was inferred. Whoever reads the audit applies
them: training, pictures and reports.
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

import numpy as np
from numpy.typing import NDArray

from ..errors import AuditError, ConfigError, DataError
from ..files import fingerprint, read_json, write_json
from ..text import one_line

CURATION = "curation.json"
NAME_LIMIT = 60
"""Characters of a group's name."""
_NUMBERED = re.compile(r"group (\d{1,9})")
_JOINERS = {0x200C: None, 0x200D: None}

_Array = NDArray[Any]


@dataclass(frozen=True)
class Curation:
    """What people changed about an audit."""

    audit: str = ""
    """Fingerprint of the audit as it was inferred."""
    names: tuple[tuple[str, ...], ...] = ()
    """[factor][group], "" where nobody named it."""
    left_out: tuple[int, ...] = ()
    """Positions in the audit of images that count nowhere, rising."""
    cuts: Mapping[int, tuple[float, ...]] = field(default_factory=dict)
    """Index of a prompt to the scores at which its groups part, rising; of factor 0."""

    @property
    def changed(self) -> bool:
        """Whether anything was changed at all."""
        return bool(self.named or self.left_out or self.cuts)

    @property
    def named(self) -> bool:
        """Whether any group has a name."""
        return any(name for names in self.names for name in names)

    def group_name(self, group: int, factor: int = 0) -> str:
        """Return what people called a group, or its number in words, such as "group 0"."""
        names = self.names[factor] if factor < len(self.names) else ()
        return (names[group] if group < len(names) else "") or f"group {group}"

    def with_name(self, factor: int, group: int, name: str) -> Curation:
        """Return these changes with a group named; "" takes its name away.

        Raises:
            ConfigError: There is no such group, or the name is too long, taken, or the number of another group.
        """
        if not (0 <= factor < len(self.names) and 0 <= group < len(self.names[factor])):
            raise ConfigError(f"Expected a group of the audit to name, got group {group} of factor {factor}.")
        name = one_line(name)
        key = _key(name)
        if len(name) > NAME_LIMIT:
            raise ConfigError(f"Expected a name of at most {NAME_LIMIT} characters, got {len(name)}. Shorten it.")
        numbered = _NUMBERED.fullmatch(key)
        if numbered and int(numbered[1]) != group:
            raise ConfigError(f"Expected a name for group {group}, got the number of another. Choose another name.")
        names = list(self.names[factor])
        if key and key in (_key(other) for index, other in enumerate(names) if index != group):
            raise ConfigError(f"Expected a name that no other group has, got {name!r} twice. Choose another name.")
        names[group] = "" if numbered or not key else name
        return replace(self, names=(*self.names[:factor], tuple(names), *self.names[factor + 1 :]))

    def without_images(self, positions: Iterable[int]) -> Curation:
        """Return these changes with images left out.

        Args:
            positions: Rows in the audit.

        Raises:
            ConfigError: A position is negative.
        """
        chosen = {operator.index(position) for position in positions}
        if chosen and min(chosen) < 0:
            raise ConfigError(f"Expected positions of images from 0, got {min(chosen)}.")
        return replace(self, left_out=tuple(sorted({*self.left_out, *chosen})))

    def with_images(self, positions: Iterable[int]) -> Curation:
        """Return these changes with images put back; those that were never left out stay."""
        chosen = {operator.index(position) for position in positions}
        return replace(self, left_out=tuple(position for position in self.left_out if position not in chosen))

    def with_cuts(self, prompt: int, cuts: Sequence[float] | None) -> Curation:
        """Return these changes with the groups of one prompt parted elsewhere.

        Args:
            prompt: Its index in the audit.
            cuts: Scores, rising, one fewer than the prompt has groups; a score at a cut belongs above it. None parts
                the groups as they were inferred.

        Raises:
            ConfigError: The scores are none, not finite or not rising.
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

    def save(self, audit_folder: Path) -> None:
        """Write the changes beside the audit that lies in `audit_folder`; where there are none, remove the file.

        Raises:
            AuditError: An image left out is not in that audit.
            DataError: The folder holds no audit, or cannot be written.
        """
        path = Path(audit_folder) / CURATION
        if not self.changed:
            path.unlink(missing_ok=True)
            return
        document = read_json(Path(audit_folder) / "audit.json")
        images, prompts = document["names"], document["prompts"]
        if any(position >= len(images) for position in self.left_out):
            raise AuditError(f"Expected to leave out some of {len(images)} images, got number {self.left_out[-1]}.")
        if any(index >= len(prompts) for index in self.cuts):
            raise AuditError(f"Expected to part groups of {len(prompts)} prompts, got number {max(self.cuts)}.")
        write_json(
            path,
            {
                "audit": self.audit,
                "names": self.names,
                "left_out": [{"position": position, "image": images[position]} for position in self.left_out],
                "cuts": [
                    {"prompt": index, "caption": prompts[index]["prompt"], "scores": cuts}
                    for index, cuts in self.cuts.items()
                ],
            },
        )


def audit_fingerprint(tensors: Mapping[str, _Array]) -> str:
    """Return 16 hex digits that name an audit's groups and prompts: `Audit.fingerprint`, without torch."""
    parts = [*weights_of(tensors).values(), tensors["prompt_ids"]]
    return fingerprint(*(part.tobytes() for part in parts))


def weights_of(tensors: Mapping[str, _Array]) -> dict[str, _Array]:
    """Return W (N, E_m) of each hidden factor by its name in the file, in order."""
    count = sum(name.startswith("group_weights.") for name in tensors)
    return {name: tensors[name] for name in (f"group_weights.{factor}" for factor in range(count))}


def is_kept(weights: Mapping[str, _Array]) -> _Array:
    """Return which images count, (N,) bool: the rows of W of an image that was left out are zeros.

    Args:
        weights: W (N, E_m) of each hidden factor.
    """
    kept: _Array = np.logical_and.reduce([w.any(axis=1) for w in weights.values()])
    return kept


def ladder(weights: _Array, scores: _Array) -> list[int]:
    """Return the groups of a prompt that have images, from the lowest mean score to the highest.

    Args:
        weights: (n, E) the prompt's rows of W.
        scores: (n,).
    """
    labels = weights.argmax(axis=1)
    filled = [index for index in range(weights.shape[1]) if (labels == index).any()]
    return sorted(filled, key=lambda index: float(scores[labels == index].mean()))


def read_curation(audit_folder: Path, document: Mapping[str, Any], tensors: Mapping[str, _Array]) -> Curation:
    """Return what people changed about an audit; no changes where nobody made any.

    Args:
        audit_folder: Where the audit lies.
        document: Its `audit.json`, as inferred.
        tensors: Its tensors, as inferred.

    Raises:
        AuditError: `curation.json` is damaged, or was made for another audit.
    """
    sizes = [weights.shape[1] for weights in weights_of(tensors).values()]
    plain = Curation(audit_fingerprint(tensors), tuple(("",) * size for size in sizes))
    path = Path(audit_folder) / CURATION
    if not path.is_file():
        return plain
    remedy = "Mend it or move it elsewhere, and make the changes again."
    try:
        stated = read_json(path)
        if not isinstance(stated, dict) or not isinstance(stated["audit"], str):
            raise TypeError("no audit is named")
        if stated["audit"] != plain.audit:
            raise AuditError(
                f"Expected changes to the audit beside them (fingerprint {plain.audit}) in {path}, found changes to "
                f"another ({one_line(stated['audit'], 20)}). Move that file elsewhere, or run `invdiff audit` again, "
                "which does."
            )
        found = _named(plain, stated["names"])
        found = found.without_images(_positions(stated["left_out"], document["names"]))
        for entry in stated["cuts"]:
            prompt, scores = entry["prompt"], entry["scores"]
            if type(prompt) is not int or prompt in found.cuts or not isinstance(scores, list):
                raise TypeError(f"cuts that are of no prompt or given twice: {one_line(repr(prompt), 40)}")
            if not all(type(score) in (int, float) for score in scores):
                raise TypeError(f"cuts that are no numbers under prompt {prompt}")
            found = found.with_cuts(prompt, scores)
        check_curation(found, document, tensors)
    except DataError as error:
        raise AuditError(f"{error} {remedy}") from error
    except (KeyError, TypeError, ValueError, OverflowError, ConfigError) as error:
        raise AuditError(
            f"Expected people's changes to an audit in {path}, found something else ({error!r}). {remedy}"
        ) from error
    return found


def _named(curation: Curation, names: Any) -> Curation:
    """Return changes with the names of a file; they are checked like names just given."""
    sizes = [len(factor) for factor in curation.names]
    if names == []:
        return curation
    if not isinstance(names, list) or [len(factor) for factor in names if isinstance(factor, list)] != sizes:
        raise TypeError(f"no names for factors of {sizes} groups")
    for factor, given in enumerate(names):
        for group, name in enumerate(given):
            if not isinstance(name, str):
                raise TypeError(f"a name of group {group} that is no text")
            curation = curation.with_name(factor, group, name)
    return curation


def _positions(entries: Any, images: Sequence[str]) -> list[int]:
    """Return the positions in a file; each must still be of the image that the file says."""
    positions = []
    for entry in entries:
        position = entry["position"]
        if type(position) is not int or not 0 <= position < len(images):
            raise TypeError(f"a position outside the {len(images)} images: {one_line(repr(position), 40)}")
        if entry["image"] != images[position]:
            raise ValueError(f"image {position} has another name than in the audit")
        positions.append(position)
    return positions


def check_curation(curation: Curation, document: Mapping[str, Any], tensors: Mapping[str, _Array]) -> None:
    """Raise `AuditError` where changes cannot be applied to an audit, as inferred.

    That is where they were made for another audit, name images or prompts that it has not, leave out all images
    of a prompt, or part groups into another number.
    """
    prompt_ids, count = tensors["prompt_ids"], len(tensors["prompt_ids"])
    if curation.audit and curation.audit != (here := audit_fingerprint(tensors)):
        raise AuditError(f"Expected changes to this audit (fingerprint {here}), got changes to {curation.audit}.")
    if any(not 0 <= position < count for position in curation.left_out):
        raise AuditError(f"Expected to leave out some of {count} images, got number {curation.left_out[-1]}.")
    gone = np.zeros(count, dtype=bool)
    gone[list(curation.left_out)] = True
    for index in np.unique(prompt_ids[gone]):
        if gone[prompt_ids == index].all():
            prompt = one_line(str(document["prompts"][int(index)]["prompt"]), 80)
            raise AuditError(f"Expected at least one image of “{prompt}” to keep, got all left out. Put one back.")
    kept = is_kept(weights_of(tensors))
    for index, cuts in curation.cuts.items():
        if not 0 <= index < len(document["prompts"]):
            raise AuditError(f"Expected to part groups of {len(document['prompts'])} prompts, got number {index}.")
        rows = kept & (prompt_ids == index)
        needed = len(ladder(tensors["group_weights.0"][rows], tensors["scores"][rows])) - 1
        if len(cuts) != needed:
            prompt = one_line(str(document["prompts"][index]["prompt"]), 80)
            raise AuditError(f"Expected {max(needed, 0)} cuts between the groups of “{prompt}”, got {len(cuts)}.")


def curated(
    document: Mapping[str, Any], tensors: Mapping[str, _Array], curation: Curation
) -> tuple[dict[str, Any], dict[str, _Array]]:
    """Apply people's changes to an audit as inferred; what is given stays as it is.

    Where cuts were moved, W is one-hot by where an image's score lies: the intervals belong, from low to high, to the
    prompt's groups as inferred in the order of their mean scores. The rows of W of an image that was left out are
    zeros, of every factor. Shares and numbers of images of the prompts concerned are those of the images kept; scores
    and all else stay.

    Args:
        document: `audit.json`.
        tensors: W (N, E_m) as "group_weights.m", "scores" (N,) and "prompt_ids" (N,).
        curation: The changes.

    Raises:
        AuditError: As `check_curation`.
    """
    document, tensors = dict(document), dict(tensors)
    check_curation(curation, document, tensors)
    if not (curation.left_out or curation.cuts):
        return document, tensors
    scores, prompt_ids = tensors["scores"], tensors["prompt_ids"]
    weights = {name: w.copy() for name, w in weights_of(tensors).items()}
    first, kept = weights["group_weights.0"], is_kept(weights)
    for index, cuts in curation.cuts.items():
        rows = np.flatnonzero(kept & (prompt_ids == index))
        order = np.array(ladder(first[rows], scores[rows]))
        first[rows] = np.eye(first.shape[1], dtype=first.dtype)[order[np.searchsorted(cuts, scores[rows], "right")]]
    left_out = list(curation.left_out)
    for w in weights.values():
        w[left_out] = 0
    kept = is_kept(weights)
    prompts = list(document["prompts"])
    for index in {*curation.cuts, *prompt_ids[left_out].tolist()}:
        own = kept & (prompt_ids == index)
        shares = [round(float(share), 4) for share in first[own].mean(axis=0, dtype=np.float64)]
        prompts[index] = {
            **prompts[index],
            "num_images": int(own.sum()),
            "shares": shares if prompts[index]["found"] else prompts[index]["shares"],
        }
    return document | {"prompts": prompts}, tensors | weights


def put_aside(audit_folder: Path, document: Mapping[str, Any], tensors: Mapping[str, _Array]) -> Path | None:
    """Rename `curation.json` where it is not of this audit, or damaged, so that it is neither applied nor lost.

    Args:
        audit_folder: Where it may lie.
        document: What the audit states that is about to lie there, as inferred.
        tensors: Its arrays.

    Returns:
        Its new name; None where nothing was moved.
    """
    try:
        read_curation(audit_folder, document, tensors)
    except AuditError:
        return rename_aside(Path(audit_folder) / CURATION)
    return None


def rename_aside(path: Path) -> Path:
    """Rename a file of changes after their own audit, such as to `curation-0123456789abcdef.json`.

    A name that is taken is counted on. Returns the new one.
    """
    try:
        stated = read_json(path)
    except DataError:
        stated = None
    audit = str(stated.get("audit")) if isinstance(stated, dict) else ""
    stem = f"{path.stem}-{audit if re.fullmatch('[0-9a-f]{16}', audit) else 'damaged'}"
    place = path.with_name(f"{stem}.json")
    number = 1
    while place.exists():
        number += 1
        place = path.with_name(f"{stem}-{number}.json")
    path.rename(place)
    return place


def _key(name: str) -> str:
    """Return what two names that look alike have in common."""
    return unicodedata.normalize("NFKC", name.translate(_JOINERS)).casefold().strip()
