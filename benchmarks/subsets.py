"""Parts of a captioned set, for experiments on its size and on the strength of its spurious attribute."""

from __future__ import annotations

from collections import Counter

import numpy as np

from invdiff.data.captioned import CaptionedImages
from invdiff.errors import DataError


def random_subset(data: CaptionedImages, num_images: int, *, seed: int = 0) -> CaptionedImages:
    """Draw images without replacement, in their order; a smaller set is part of a larger one.

    Raises:
        DataError: There are fewer.
    """
    if not 1 <= num_images <= len(data):
        raise DataError(f"Expected a number of images from 1 to the {len(data)} there are, got {num_images}.")
    chosen = np.random.default_rng(seed).permutation(len(data))[:num_images]
    return data.select(np.sort(chosen).tolist())


def with_severity(data: CaptionedImages, attribute: str, severity: float, *, seed: int = 0) -> CaptionedImages:
    """The largest part in which each caption's most frequent class has a `severity` share of its images.

    The column is read to build the experiment, never by audit or training.

    Args:
        data: Images with the column.
        attribute: The column.
        severity: A share above 0, up to 1.
        seed: Seed of which images are left out.

    Raises:
        DataError: There is no such column, or a caption has too few images for that share.
    """
    if attribute not in data.attributes:
        known = ", ".join(data.attributes) or "none"
        raise DataError(f"Expected attribute {attribute!r} in the data, found {known}. Choose one of these.")
    if not 0 < severity <= 1:
        raise DataError(f"Expected a severity above 0, up to 1, got {severity}.")
    rng = np.random.default_rng(seed)
    classes = np.array([str(value) for value in data.attributes[attribute]])
    captions = np.array(data.captions)
    chosen: list[int] = []
    for caption in dict.fromkeys(data.captions):
        rows = rng.permutation(np.flatnonzero(captions == caption))
        usual = str(Counter(classes[np.sort(rows)]).most_common(1)[0][0])
        often, rarely = rows[classes[rows] == usual], rows[classes[rows] != usual]
        kept, others = len(often), round(len(often) * (1 - severity) / severity)
        if others > len(rarely):
            kept, others = round(len(rarely) * severity / (1 - severity)), len(rarely)
        if kept < 1 or (others < 1 and severity < 1):
            raise DataError(
                f"Expected images of {caption!r} for a share of {severity:g} {usual!r} ({attribute}), found "
                f"{len(often)} and {len(rarely)} others. Choose another severity, or add images."
            )
        chosen += [*often[:kept].tolist(), *rarely[:others].tolist()]
    return data.select(sorted(chosen))
