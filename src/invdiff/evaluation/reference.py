"""Features of real images, to measure generated ones against."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..data.captioned import CaptionedImages, UnreadableImage
from ..errors import DataError
from ..progress import progress_bar
from .annotators import Annotator


def reference_features(annotator: Annotator, data: CaptionedImages, *, progress: bool = True) -> NDArray[Any]:
    """Return the annotator's features of all readable images, (M, D).

    Raises:
        DataError: More images are unreadable than `data` allows.
    """
    with progress_bar("reference", len(data), enabled=progress) as bar:

        def images() -> Iterator[Image.Image]:
            unreadable = 0
            for index in range(len(data)):
                bar.advance()
                try:
                    yield data.image(index)
                except UnreadableImage as error:
                    unreadable += 1
                    if unreadable > data.max_unreadable * len(data):
                        raise DataError(f"Too many images are unreadable; the last: {error}") from error

        return np.asarray(annotator.predict(images()).features)
