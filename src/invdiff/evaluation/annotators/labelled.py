"""Images with labels, to train and measure annotators on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import PurePosixPath

import numpy as np
from numpy.typing import NDArray

from ...data.captioned import CAPTION_COLUMNS, CaptionedImages, load_captioned_images
from ...data.sources import Source
from ...errors import DataError
from .annotations import label_of

MAX_CLASSES = 50
FOLDER_ATTRIBUTE = "label"
"""The attribute that names of sub-folders are values of."""


def load_labelled_images(
    source: Source,
    *,
    image_column: str | None = None,
    caption_column: str | None = None,
    split: str = "train",
    max_unreadable: float = 0.01,
    limit: int | None = None,
) -> CaptionedImages:
    """Open images with attributes; captions are not needed, and are no attribute where there are some.

    A folder without a metadata file but with one sub-folder per class (`photos/cat/1.png`) has one attribute,
    "label". Arguments are as for `load_captioned_images`.

    Raises:
        DataError: The source is absent, or has no images where they were expected.
    """
    images = load_captioned_images(
        source,
        image_column=image_column,
        captions=False,
        split=split,
        max_unreadable=max_unreadable,
        limit=limit,
    )
    captions = CAPTION_COLUMNS if caption_column is None else (caption_column,)
    attributes = {name: values for name, values in images.attributes.items() if name not in captions}
    if not images.attributes:
        folders = [PurePosixPath(name).parent.name for name in images.names]
        attributes = {FOLDER_ATTRIBUTE: folders} if any(folders) else {}
    return dataclasses.replace(images, attributes=attributes)


def read_targets(
    data: CaptionedImages, attributes: Sequence[str] | None = None
) -> tuple[dict[str, tuple[str, ...]], NDArray[np.int64]]:
    """Class names by attribute, names sorted, and class indices, (N, attributes), in that order.

    Args:
        data: Images with attributes, one value for each image.
        attributes: Which of them; all when None.

    Raises:
        DataError: An attribute is absent, lacks values, or has one class or more than 50.
    """
    known = ", ".join(data.attributes) or "none"
    names = sorted(set(data.attributes if attributes is None else attributes))
    if not names:
        raise DataError(
            f"Expected at least one attribute to learn, got none; the data has {known}. "
            "Give images with columns of classes, or one sub-folder of images per class."
        )
    classes: dict[str, tuple[str, ...]] = {}
    columns = []
    for name in names:
        if name not in data.attributes:
            raise DataError(f"Expected attribute {name!r} in the data, found {known}. Choose one of these.")
        values = [label_of(value) for value in data.attributes[name]]
        if "" in values:
            raise DataError(
                f"Expected a value of attribute {name!r} for every image, found none for {values.count('')} of "
                f"{len(values)}. Fill them in or leave those images out."
            )
        found, column = np.unique(values, return_inverse=True)
        if not 2 <= len(found) <= MAX_CLASSES:
            raise DataError(
                f"Expected attribute {name!r} to have 2 to {MAX_CLASSES} classes, "
                f"found {len(found)}. Choose other attributes, or put numbers into a few bins first."
            )
        classes[name] = tuple(found.tolist())
        columns.append(column)
    return classes, np.stack(columns, axis=1).astype(np.int64)
