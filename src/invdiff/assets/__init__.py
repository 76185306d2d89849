"""The bundled biased model, the annotator that judges it (`scripts/rebuild_assets.py` makes both), and word lists."""

from pathlib import Path

BIRDS_MODEL = Path(__file__).parent / "birds"
"""A tiny Stable Diffusion pipeline fitted to the birds world at severity 0.95."""
BIRDS_ANNOTATOR = Path(__file__).parent / "birds-annotator"
"""A classifier of subject and background, fitted to a separate balanced set."""
BIRDS_DEMO = Path(__file__).parent / "birds-demo"
"""Audit, module and results of `invdiff demo` with its defaults, for the page to open at once."""
COMMON_WORDS = Path(__file__).parent / "words.txt"
"""Common words for scenes, things, people and styles, one a line, to say what tells hidden groups apart."""
PROFESSIONS = Path(__file__).parent / "professions.txt"  # prompts for 40 professions, one a line
COMMON_QUESTIONS = Path(__file__).parent / "questions.txt"
"""Everyday attributes and their values, one attribute a line, such as "weather: sunny, cloudy"."""
EVERYDAY_CAPTIONS = Path(__file__).parent / "everyday.txt"  # captions of everyday things, one a line
