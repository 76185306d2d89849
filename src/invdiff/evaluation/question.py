"""What is asked of every model's images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray


@dataclass(frozen=True)
class Question:
    """What is asked of every model's images."""

    attributes: tuple[str, ...]
    """Sensitive attributes; the first gives the headline figures."""
    classes: Mapping[str, tuple[str, ...]]
    """Attribute to class names."""
    confusion: Mapping[str, NDArray[Any] | None]
    """Attribute to held-out counts, (K, K + 1); None where there are none."""
    min_confidence: float
    subject_attribute: str | None
    subject_of: Mapping[str, str]
    """Prompt to its class of `subject_attribute`."""
    target: tuple[float, ...] | None
    """Shares of the first attribute's classes to measure against; None is uniform."""
    confidence: float
    num_resamples: int
    seed: int
