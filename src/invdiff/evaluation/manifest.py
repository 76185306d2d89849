"""Folders of generated images and their manifests: ours, or any other tool's."""

from __future__ import annotations

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import EvaluationError
from ..files import is_inside
from .results import UNSTATED as UNSTATED
from .results import scale_order

MANIFESTS = ("manifest.jsonl", "metadata.jsonl", "metadata.csv")
"""What may list a folder's images, in order of preference."""
PROMPT_COLUMNS = ("prompt", "text", "caption")

Folders = str | Path | Sequence[str | Path]
"""Where a model's images lie."""


@dataclass(frozen=True)
class Row:
    """One generated image."""

    path: Path
    prompt: str
    guidance_scale: float | None
    """Strength of classifier-free guidance; None where the manifest does not say."""
    scale: float | None
    """Strength of the guidance module; None where the manifest does not say."""
    seed: str | None
    """What its starting noise was drawn from; None where the manifest does not say."""
    values: Mapping[str, Any]
    """All columns of the manifest."""

    @property
    def scale_key(self) -> str:
        """The guidance scale as results name it: `str(float)`, or "unstated"."""
        return UNSTATED if self.guidance_scale is None else str(self.guidance_scale)


def read_model(folders: Sequence[Path]) -> list[Row]:
    """Return the images of one model, from all its folders.

    Raises:
        EvaluationError: As for `read_manifest`; or folders share an image or hold several module scales.
    """
    rows = [row for folder in folders for row in read_manifest(folder)]
    if len(folders) > 1:
        _check_together(rows, " and ".join(map(str, folders)))
    return rows


def resolve_folders(folders: Mapping[str, Folders] | str | Path) -> dict[str, list[Path]]:
    """Return model name to folders, from a mapping, one folder of images, or a folder of such folders.

    Raises:
        EvaluationError: There is none.
    """
    if isinstance(folders, Mapping):
        if not folders or any(not isinstance(given, str | Path) and not given for given in folders.values()):
            raise EvaluationError("Expected at least one folder of images of each model, got none.")
        return {
            model: [Path(given)] if isinstance(given, str | Path) else [Path(folder) for folder in given]
            for model, given in folders.items()
        }
    folder = Path(folders)
    inside = {child.name: child for child in sorted(folder.glob("*")) if _manifest_in(child) is not None}
    if inside and _manifest_in(folder) is None:
        for child in sorted(folder.iterdir()):
            if child.is_dir() and child.name not in inside and any(child.rglob("*.png")):
                raise EvaluationError(
                    f"Expected a manifest in every folder of images inside {folder}, found none in {child}. Write "
                    "one, or name the folders to evaluate one by one."
                )
        return {model: [child] for model, child in inside.items()}
    return {folder.resolve().name: [folder]}


def read_manifest(folder: Path) -> list[Row]:
    """Return the images that `folder` lists, in its order.

    The manifest is manifest.jsonl, metadata.jsonl or metadata.csv. Each row has `file_name` and `prompt` (or `text`
    or `caption`), and may have `guidance_scale`, `seed` and `scale`; further columns may hold given labels. Images
    outside the folder are refused, links followed: a manifest that someone sent must not bring a private file into
    figures and reports.

    Raises:
        EvaluationError: There is no manifest, it is damaged, names absent images, images outside the folder, an image
            twice, a prompt with one image only, or images of several module scales; or a folder inside is empty.
    """
    manifest = _manifest_in(folder)
    if manifest is None:
        raise EvaluationError(
            f"Expected {MANIFESTS[0]} in {folder}, found none. Give a folder that `invdiff generate` wrote, or list "
            "the images of another tool in a manifest.jsonl or metadata.csv with file_name and prompt."
        )
    try:
        text = manifest.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise EvaluationError(f"Expected UTF-8 in {manifest}, found something else. Write it again.") from error
    rows = [_row(values, folder, where) for values, where in _records(manifest, text)]
    if not rows:
        raise EvaluationError(f"Expected images in {manifest}, found none. Generate them first.")
    _check(rows, folder, manifest)
    return rows


def common_prompts(rows_by_model: Mapping[str, Sequence[Row]]) -> list[str]:
    """Return the prompts in order.

    Raises:
        EvaluationError: A model lacks a prompt at a guidance scale that it has others at.
    """
    prompts = list(dict.fromkeys(row.prompt for rows in rows_by_model.values() for row in rows))
    for model, rows in rows_by_model.items():
        for key in scale_keys(rows):
            present = {row.prompt for row in rows if row.scale_key == key}
            absent = [prompt for prompt in prompts if prompt not in present]
            if absent:
                raise EvaluationError(
                    f"Expected images of the same prompts everywhere, found none of {absent[0]!r} in {model} "
                    f"at guidance scale {key}. Generate them, or evaluate the folders apart: "
                    "averages over different prompts cannot be compared."
                )
    return prompts


def scale_keys(rows: Sequence[Row]) -> list[str]:
    """Return the guidance scales present, ascending, "unstated" last."""
    return sorted({row.scale_key for row in rows}, key=scale_order)


def module_scale(rows: Sequence[Row]) -> float | None:
    """Return the strength of the guidance module of one model's images; None where not all manifests say it."""
    scales = {row.scale for row in rows}
    return scales.pop() if len(scales) == 1 else None


def _manifest_in(folder: Path) -> Path | None:
    return next((folder / name for name in MANIFESTS if (folder / name).is_file()), None)


def _records(manifest: Path, text: str) -> list[tuple[Any, str]]:
    """Return each row's values beside the words that name its place."""
    if manifest.suffix == ".csv":
        records: list[tuple[Any, str]] = []
        for number, row in enumerate(csv.DictReader(io.StringIO(text, newline="")), start=1):
            where = f"row {number} of {manifest}"
            if None in row or None in row.values():
                raise _no_row(where, ValueError("other cells than columns: put text with commas in quotes"))
            records.append(({name: value for name, value in row.items() if value != ""}, where))
        return records
    records = []
    for number, line in enumerate(text.split("\n"), start=1):  # captions may hold other line breaks
        if not line.strip():
            continue
        where = f"line {number} of {manifest}"
        try:
            records.append((json.loads(line), where))
        except ValueError as error:
            raise _no_row(where, error) from error
    return records


def _row(values: Any, folder: Path, where: str) -> Row:
    try:
        prompt = next(values[name] for name in PROMPT_COLUMNS if name in values)
        if not isinstance(prompt, str):
            raise TypeError(f"the prompt is {prompt!r}")
        prompt.encode("utf-8")  # what cannot be written later is refused now
        seed = values.get("seed")
        path = folder / values["file_name"]
        if not is_inside(path, folder):
            raise EvaluationError(
                f"Expected images inside {folder}, found {values['file_name']!r} in {where}, which lies outside it. "
                "Copy the image into the folder (no link) and give its path relative to it."
            )
        return Row(
            path=path,
            prompt=prompt,
            guidance_scale=_number(values.get("guidance_scale")),
            scale=_number(values.get("scale")),
            seed=None if seed is None else str(seed),
            values=values,
        )
    except StopIteration as error:
        raise _no_row(where, KeyError("prompt")) from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _no_row(where, error) from error


def _number(value: Any) -> float | None:
    if value is None:
        return None
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{value!r} is not a finite number")
    return number


def _no_row(where: str, error: Exception) -> EvaluationError:
    return EvaluationError(
        f"Expected an image's file_name and prompt, and numbers where it has guidance_scale and scale, in {where}, "
        f"found something else ({error!r}). Mend or remove the row, or generate again."
    )


def _check(rows: Sequence[Row], folder: Path, manifest: Path) -> None:
    _check_together(rows, str(manifest))
    absent = [row.path for row in rows if not _is_file(row.path)]
    if absent:
        raise EvaluationError(
            f"Expected the {len(rows)} images that {manifest} names, found {len(absent)} absent, first "
            f"{absent[0]}. Draw them (the same `invdiff generate` again makes what is missing), or remove their rows."
        )
    for child in sorted(folder.iterdir()):
        if child.is_dir() and not child.name.startswith(".") and not any(child.iterdir()):
            raise EvaluationError(
                f"Expected images in {child}, found none: generation stopped early. Run it again, or remove "
                "the folder."
            )
    for key in scale_keys(rows):
        prompt, fewest = Counter(row.prompt for row in rows if row.scale_key == key).most_common()[-1]
        if fewest < 2:
            raise EvaluationError(
                f"Expected at least 2 images per prompt in {folder}, found {fewest} of {prompt!r} at "
                f"guidance scale {key}. Generate more."
            )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long for the file system
        return False


def _check_together(rows: Sequence[Row], where: str) -> None:
    seen: set[Path] = set()
    for row in rows:
        path = row.path.resolve()
        if path in seen:
            raise EvaluationError(f"Expected each image once in {where}, found {row.path} again. Remove it.")
        seen.add(path)
    scales = sorted({row.scale for row in rows if row.scale is not None})
    if len(scales) > 1:
        raise EvaluationError(
            f"Expected images of one module scale in {where}, found {scales}. Generate each scale into a "
            "folder of its own and give each a name: {name: folder}, or NAME=FOLDER."
        )
