"""What an annotator sees in the images drawn so far, as bars of both models beside each other."""

from __future__ import annotations

from collections.abc import Sequence

from ..evaluation.annotators.annotations import CANNOT_TELL, Annotator
from ..report.charts import BASE_COLOUR, SERIES_COLOURS
from ..report.document import Share
from ..report.words import counted, share_of
from ..text import one_line
from .pieces import notice, piece
from .studio import Shot, Shown

CONFIDENCE = 0.95
_Side = tuple[str, Sequence[Shot], str]


def shares_seen(shown: Shown, annotator: Annotator | None) -> str:
    """Return the share of each class in base and guided images, with Wilson's intervals, as HTML."""
    if annotator is None:
        return notice("No annotator was given, so images are not counted. `invdiff ui --annotator` opens one.")
    drawn: list[_Side] = [
        ("Base model", shown.base, BASE_COLOUR),
        ("With guidance", shown.guided, SERIES_COLOURS[0]),
    ]
    sides = [side for side in drawn if side[1]]
    attributes = [
        (attribute, [(name, _bars(attribute, name, sides)) for name in classes])
        for attribute, classes in annotator.attributes.items()
    ]
    unsure = sum(CANNOT_TELL in shot.classes.values() for _, shots, _ in sides for shot in shots)
    note = f"Read by {one_line(annotator.name, 60)}. Whiskers: {CONFIDENCE:.0%} intervals."
    note += f" {counted(unsure, 'image')} could not be told." if unsure else ""
    return piece("shares", attributes, note)


def _bars(attribute: str, name: str, sides: Sequence[_Side]) -> list[Share]:
    bars = []
    for side, shots, colour in sides:
        told = [shot.classes[attribute] for shot in shots if shot.classes[attribute] != CANNOT_TELL]
        if told:
            bars.append(share_of(side, told.count(name), len(told), confidence=CONFIDENCE, colour=colour))
    return bars
