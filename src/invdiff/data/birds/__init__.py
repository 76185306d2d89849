"""The bundled world `birds`: captioned drawings of land birds and water birds with a known spurious attribute."""

from .drawing import BACKGROUNDS, SUBJECTS
from .world import NATURAL_BACKGROUND, BirdsWorld, canonical_prompts

__all__ = ["BACKGROUNDS", "NATURAL_BACKGROUND", "SUBJECTS", "BirdsWorld", "canonical_prompts"]
