"""Folders of generated images and their manifests: ours, or any other tool's."""

import filecmp
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.tables import MANIFESTS, caption_of, image_name, read_table
from ..errors import EvaluationError, found_else
from ..text import label_of
from .results import UNSTATED, scale_order

PROMPT_COLUMNS = ("prompt", "text", "caption")

Folders = str | Path | Sequence[str | Path]  # the folder or folders of a model's images


@dataclass(frozen=True)
class Row:
    """One generated image."""

    path: Path
    prompt: str
    scale_key: str  # the guidance scale as results name it: `str(float)`, or "unstated"
    scale: float | None  # strength of the guidance module; None where the manifest does not say
    seed: str | None  # seed of its starting noise; None where the manifest does not say
    values: Mapping[str, Any]  # all columns of the manifest
    place: str  # the line and the file that it was read from, for messages


def resolve_folders(folders: Mapping[str, Folders] | str | Path) -> dict[str, list[Path]]:
    """Model name to folders, from a mapping or from one folder of images, named after it."""
    if not isinstance(folders, Mapping):
        folders = {Path(folders).resolve().name: folders}
    listed = {model: [given] if isinstance(given, str | Path) else given for model, given in folders.items()}
    several = {model: list(map(Path, given)) for model, given in listed.items()}
    if not several or not all(several.values()):
        raise EvaluationError("Expected at least one folder of images of each model, got none. Name them.")
    return several


def read_images(*folders: Path) -> list[Row]:
    """The images of one model, in the order that its folders list them.

    Each row of a manifest has `file_name` and `prompt` (or `text` or `caption`), and may have `guidance_scale`, `seed`
    and `scale`; further columns may hold given labels. Images outside the folder are refused, links followed: a
    manifest of another person must not bring a private file into figures and reports.
    """
    rows = [row for folder in folders for row in _read_folder(folder)]
    where = " and ".join(map(str, folders))
    ((path, times),) = Counter(row.path.resolve() for row in rows).most_common(1)
    if times > 1:
        raise EvaluationError(f"Expected each image once in {where}, found {path} again. Remove it.")
    scales = sorted({row.scale for row in rows if row.scale is not None})
    if len(scales) > 1:
        remedy = "Generate each scale into a folder of its own and name each: NAME=FOLDER."
        raise EvaluationError(f"Expected images of one module scale in {where}, found {scales}. {remedy}")
    drawn: dict[tuple[str, str, str | None], Path] = {}
    for row in rows:  # those of one batch may have one seed, and differ
        first = drawn.setdefault((row.prompt, row.scale_key, row.seed), row.path)
        if row.seed is not None and first is not row.path and filecmp.cmp(first, row.path, shallow=False):
            found = f"found {first} again as {row.path}, of the same prompt and seed"
            remedy = "A copy is no further evidence: draw more with another --seed, or remove its row."
            raise EvaluationError(f"Expected different images in {where}, {found}. {remedy}")
    return rows


def common_prompts(rows_by_model: Mapping[str, Sequence[Row]]) -> list[str]:
    """The prompts of all models, in order, each of which every model has at each of its guidance scales."""
    prompts = list(dict.fromkeys(row.prompt for rows in rows_by_model.values() for row in rows))
    for model, rows in rows_by_model.items():
        for key in scale_keys(rows):
            present = {row.prompt for row in rows if row.scale_key == key}
            if absent := [prompt for prompt in prompts if prompt not in present]:
                found = f"found none of {absent[0]!r} in {model} at guidance scale {key}"
                remedy = "Generate them, or evaluate the folders apart."
                raise EvaluationError(f"Expected images of the same prompts everywhere, {found}. {remedy}")
    return prompts


def pairs_of(rows: Sequence[Row], others: Sequence[Row]) -> list[tuple[int, int]]:
    """Places of what both drew of one prompt, guidance scale and seed, in the order of `rows`.

    A seed that is given twice is ambiguous, as where a tool notes that of a batch, and pairs nothing.
    """
    places = []
    for side in (rows, others):
        keys = [(row.prompt, row.scale_key, row.seed) for row in side]
        times = Counter(keys)
        places.append({key: k for k, key in enumerate(keys) if times[key] == 1 and key[2] is not None})
    return [(place, places[1][key]) for key, place in places[0].items() if key in places[1]]


def scale_keys(rows: Sequence[Row]) -> list[str]:
    """The guidance scales present, ascending, "unstated" last."""
    return sorted({row.scale_key for row in rows}, key=scale_order)


def _read_folder(folder: Path) -> list[Row]:
    manifest = next((folder / name for name in MANIFESTS if (folder / name).is_file()), None)
    if manifest is None:
        remedy = "Of another tool's images, list file_name and prompt in a manifest.jsonl or metadata.csv."
        found = "found none" if folder.is_dir() else "which is no folder. Check its name"
        raise EvaluationError(f"Expected {MANIFESTS[0]} in {folder}, {found}. {remedy}")
    table = read_table(manifest, required=("file_name", PROMPT_COLUMNS), error=EvaluationError)
    rows = [_row(values, folder, place) for values, place in zip(table.rows, table.places, strict=True)]
    if absent := [row.path for row in rows if not os.path.isfile(row.path)]:  # unlike a Path's, of names too long too
        found = f"{len(absent)} absent, first {absent[0]}. Draw them by the same command, or remove their rows."
        raise EvaluationError(f"Expected the {len(rows)} images that {manifest} names, found {found}")
    for key in scale_keys(rows):
        prompt, fewest = Counter(row.prompt for row in rows if row.scale_key == key).most_common()[-1]
        if fewest < 2:
            found = f"{fewest} of {prompt!r} at guidance scale {key}"
            raise EvaluationError(f"Expected at least 2 images per prompt in {folder}, found {found}. Draw more.")
    return rows


def _row(values: Mapping[str, Any], folder: Path, where: str) -> Row:
    def number(name: str) -> float | None:
        value = values.get(name)
        if value not in (None, "") and not math.isfinite(float(value)):
            raise ValueError(f"{value!r} is not a finite number")
        return None if value in (None, "") else float(value)

    try:
        prompt = caption_of(next((values[name] for name in PROMPT_COLUMNS if values.get(name, "") != ""), ""))
        prompt.encode("utf-8")  # text that cannot be written later is refused now
        name = image_name(values["file_name"], folder, where, EvaluationError, links=False)
        guidance_scale, seed = number("guidance_scale"), label_of(values.get("seed")) or None
        key = UNSTATED if guidance_scale is None else str(guidance_scale)
        return Row(folder / name, prompt, key, number("scale"), seed, values, where)
    except (AttributeError, OverflowError, TypeError, ValueError) as error:
        expected = f"an image's file_name and prompt, and any guidance_scale and scale as numbers, in {where}"
        raise EvaluationError(found_else(expected, error, "Correct the row.")) from error
