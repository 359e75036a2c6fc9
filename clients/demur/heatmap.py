"""Heat maps: a text with each token shaded by a measure of its uncertainty.

`Score.heatmap()` and `ChatCompletion.heatmap()` make them. They show themselves in a terminal
(extra `cli`: rich), in a notebook, as plain text and as a page of HTML.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from demur._measures import MEASURES, Measure

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class HeatToken:
    """One token; `values` are its measures but for surprisal, in nats."""

    text: str
    logprob: float
    rank: int | None
    values: Mapping[Measure, float]

    def value(self, measure: Measure) -> float:
        """One of its measures, in nats."""
        return -self.logprob if measure == "surprisal" else self.values[measure]


@dataclass(frozen=True)
class Cell:
    """What has one shade: a token, with those before it that hold the bytes of its first character.

    Their own text is empty, and a cell of them alone (a text that ends within a character) shows
    the replacement character.
    """

    tokens: tuple[HeatToken, ...]

    @property
    def text(self) -> str:
        """Its characters."""
        return self.tokens[-1].text or "\ufffd"

    def value(self, measure: Measure) -> float:
        """The greatest of its tokens' values, in nats."""
        return max(token.value(measure) for token in self.tokens)


def cells_of(tokens: Iterable[HeatToken]) -> Iterator[Cell]:
    """The cells of a text, each as soon as its last token is there."""
    waiting: list[HeatToken] = []
    for token in tokens:
        waiting.append(token)
        if token.text:
            yield Cell(tuple(waiting))
            waiting = []
    if waiting:
        yield Cell(tuple(waiting))


class HeatMap:
    """A text with each token shaded by a measure.

    Attributes:
        cells: what is shaded, in order.
        spans: doubtful stretches, characters [start, end), which are underlined.
        sequence: number of tokens; mean, max and sum of the measures, in nats.
        source: the model and the drafts that it comes from, for people.
        measure: what it is shaded by.
        fixed_top: the value at the end of the scale of shades, in nats, if it was given.
    """

    def __init__(
        self,
        tokens: Sequence[HeatToken],
        *,
        spans: Sequence[tuple[int, int]],
        sequence: Mapping[str, float],
        source: str,
        measure: Measure = "epistemic",
        top: float | None = None,
    ) -> None:
        if measure not in MEASURES:
            raise ValueError(f"{measure!r} is no measure; these are: {', '.join(MEASURES)}")
        self.cells = list(cells_of(tokens))
        self.spans = list(spans)
        self.sequence = dict(sequence)
        self.source = source
        self.measure = measure
        self.fixed_top = top

    @property
    def tokens(self) -> list[HeatToken]:
        """All tokens, in order."""
        return [token for cell in self.cells for token in cell.tokens]

    @property
    def top(self) -> float:
        """The value at the end of the scale of shades, in nats."""
        return self.top_of(self.measure)

    def top_of(self, measure: Measure) -> float:
        """The same for any measure: as given, else the greatest value in this text."""
        if self.fixed_top is not None:
            return self.fixed_top
        return max((cell.value(measure) for cell in self.cells), default=0.0)

    def in_span(self) -> list[bool]:
        """Of each cell, whether it holds a character of a doubtful stretch."""
        marks, start = [], 0
        for cell in self.cells:
            end = start + len(cell.text)
            marks.append(any(start < last and first < end for first, last in self.spans))
            start = end
        return marks

    def to_html(self) -> str:
        """A page that needs nothing but itself."""
        from demur._page import page

        return page(self)

    def _repr_html_(self) -> str:
        from demur._fragment import fragment

        return fragment(self)

    def __rich__(self) -> RenderableType:
        from demur._terminal import render

        return render(self)

    def __str__(self) -> str:
        """With colours if standard output is a terminal and rich is there, else in words."""
        if sys.stdout.isatty():
            try:
                from rich.console import Console
            except ImportError:
                pass
            else:
                console = Console()
                with console.capture() as captured:
                    console.print(self)
                return captured.get().rstrip("\n")
        from demur._words import in_words

        return in_words(self)

    def __repr__(self) -> str:
        return f"<HeatMap of {len(self.tokens)} tokens by {self.measure}, top {self.top:.3f} nats>"
