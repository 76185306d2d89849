"""Labels that are given by clicks: which images to ask about, and the file that keeps the answers. No torch here."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..data.tables import read_table
from ..errors import DataError
from ..files import write_text
from .asked import known_rows

_Array = NDArray[Any]


def random_order(prompt_ids: _Array, seed: int = 0) -> _Array:
    """All images, (N,) positions, in an order of which any beginning is a random sample spread over prompts (N,)."""
    rng, place = np.random.default_rng(seed), np.empty(len(prompt_ids))
    for prompt in np.unique(prompt_ids):
        own = np.flatnonzero(prompt_ids == prompt)
        place[own] = (rng.permutation(len(own)) + rng.random()) / len(own)
    return np.argsort(place, kind="stable")


def next_to_label(weights: _Array, prompt_ids: _Array, asked: _Array, *, count: int = 10, seed: int = 0) -> _Array:
    """Positions of the `count` images to ask about next, or of as many as are left, rising.

    Half are those with the least certain posterior `weights` (N, E), from each cell of prompt (N,) and likeliest group
    in turn; images of which nothing is known, whose posterior is even, come last. The others, and all where none was
    `asked` about before, (N,) of bool, are the next in `random_order`.
    """
    order = random_order(prompt_ids, seed)
    order = order[~asked[order]]
    chosen = order[:0]
    if asked.any():
        certainty = np.where(known_rows(weights), weights.max(axis=1), np.inf)
        doubtful = order[np.argsort(certainty[order], kind="stable")]
        turn = np.empty(len(doubtful), dtype=int)
        cells = np.unique([prompt_ids, weights.argmax(axis=1)], axis=1, return_inverse=True)[1].reshape(-1)[doubtful]
        for cell in np.unique(cells):
            turn[cells == cell] = np.arange(np.count_nonzero(cells == cell))
        chosen = doubtful[np.argsort(turn, kind="stable")][: count // 2]
    drawn = order[~np.isin(order, chosen)][: count - len(chosen)]
    return np.sort(np.concatenate([chosen, drawn]))


def random_sample(prompt_ids: _Array, asked: _Array, seed: int = 0) -> _Array:
    """Positions of the images that were asked about as a random draw would have it: a beginning of `random_order`."""
    order = random_order(prompt_ids, seed)
    return order[: np.argmin(asked[order])] if not asked.all() else order


def labels_of(folder: Path) -> Path:
    """The file of the labels by which an audit in `folder` is made."""
    return folder.with_name(f"{folder.name.replace('audit', 'labels', 1)}.csv")


def read_clicks(path: Path, name: str) -> dict[str, str]:
    """Image to value of the attribute `name`, "" where nobody could tell; none where there is no file."""
    if not path.exists():
        return {}
    table = read_table(path, required=("file_name", name))
    if others := [column for column in table.columns if column not in ("file_name", name)]:
        wanted = f"columns file_name and {name} alone in {path}, which clicks write anew"
        remedy = "Rename the file, and give it to `invdiff audit --labels`."
        raise DataError(f"Expected {wanted}, found also {', '.join(others)}. {remedy}")
    return {row["file_name"]: row[name] for row in table.rows}


def write_clicks(path: Path, name: str, labels: Mapping[str, str]) -> None:
    """Write labels as `audit(labels=...)` takes them, atomically."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([("file_name", name), *labels.items()])
    write_text(path, text.getvalue())
