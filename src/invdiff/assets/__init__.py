"""The bundled biased model, the annotator that judges it (`scripts/rebuild_assets.sh` makes both), and word lists."""

from pathlib import Path

BIRDS_MODEL = Path(__file__).parent / "birds"  # a tiny Stable Diffusion pipeline fitted to birds at severity 0.95
BIRDS_ANNOTATOR = Path(__file__).parent / "birds-annotator"  # of subject and background, fitted to a balanced set
BIRDS_DEMO = Path(__file__).parent / "birds-demo"  # what `invdiff demo` writes by default, for the page to open
COMMON_WORDS = Path(__file__).parent / "words.txt"  # scenes, things, people and styles, one a line, to name groups
PROFESSIONS = Path(__file__).parent / "professions.txt"  # prompts for 40 professions, one a line
COMMON_QUESTIONS = Path(__file__).parent / "questions.txt"  # everyday attributes, such as "weather: sunny, cloudy"
EVERYDAY_CAPTIONS = Path(__file__).parent / "everyday.txt"  # captions of everyday things, one a line
