"""The bundled biased model and the annotator that judges it; `scripts/rebuild_assets.py` makes both."""

from pathlib import Path

BIRDS_MODEL = Path(__file__).parent / "birds"
"""A tiny Stable Diffusion pipeline fitted to the birds world at severity 0.95."""
BIRDS_ANNOTATOR = Path(__file__).parent / "birds-annotator"
"""A classifier of subject and background, fitted to a separate balanced set."""
