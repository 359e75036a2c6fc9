"""What the notebook fragment and the page of a heat map have in common."""

from __future__ import annotations

from html import escape

from demur._measures import DISTRIBUTION_MEASURES
from demur._visible import visible
from demur.heatmap import Cell


def safe(text: str) -> str:
    """Text for an element or a quoted attribute."""
    return escape(visible(text), quote=True)


def number(value: float) -> str:
    """A value in nats; no minus before what rounds to zero."""
    return f"{round(value, 4) + 0.0:.4f}"


def described(cell: Cell) -> str:
    """All numbers of a cell's tokens, one line each."""
    lines = []
    for token in cell.tokens:
        parts = [f"{name} {number(token.value(name))}" for name in DISTRIBUTION_MEASURES]
        rank = [] if token.rank is None else [f"rank {token.rank}"]
        lines.append(", ".join([*parts, f"logprob {number(token.logprob)}", *rank]))
    return "\n".join(lines)
