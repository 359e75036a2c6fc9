"""Families of detectors, and how they are told apart: by colour, by shape and in words."""

from __future__ import annotations

from typing import NamedTuple


class Family(NamedTuple):
    """Detectors of one kind; their colours, for light pages and dark ones, are in _report.css.

    Attributes:
        meaning: what its detectors go by, in a few words.
        marker: its shape in figures, as matplotlib calls it.
        sign: the same shape as a character.
    """

    meaning: str
    marker: str
    sign: str


FAMILIES = {
    "demur": Family("the drafts' measures, from one forward pass", "o", "●"),
    "calibrated": Family("the same, fitted on labelled answers of the other half", "D", "◆"),
    "target": Family("the target's own next-token distribution", "s", "■"),
    "rival": Family("other published estimators", "^", "▲"),
    "tokur": Family("TokUR: the target with its weights drawn several times", "v", "▼"),
    "samples": Family("further answers to the same question", "P", "✚"),
    "baseline": Family("what any detector has to beat", "X", "✖"),
}
# Of several lines of one family, in units of a line's width; the first is solid.
DASHES = ((), (4.0, 2.0), (1.0, 1.5), (6.0, 1.5, 1.0, 1.5), (8.0, 3.0))
