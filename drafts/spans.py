"""Doubtful stretches of a response.

The rule: a word is doubtful if the epistemic uncertainty of one of its tokens exceeds the
response's mean by more than one standard deviation. Doubtful words with nothing but white space
between them are one span. A word is a number with its separators (`1,234.5`), a run of letters, or
a single other character; characters of scripts written without spaces are words by themselves.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"\d+(?:[.,]\d+)*|[{_UNSPACED}]|[^\W\d{_UNSPACED}]+|[^\w\s]|_", re.UNICODE)


@dataclass(frozen=True)
class Span:
    """Characters [start, end) of the response, and the epistemic uncertainty of their tokens."""

    start: int
    end: int
    epistemic_mean: float
    epistemic_max: float


def find_spans(
    text: str, offsets: Sequence[tuple[int, int]], epistemic: NDArray[np.float64]
) -> list[Span]:
    """Doubtful spans of a response, in order.

    Args:
        text: the response.
        offsets: characters of each token, as `drafts.text` gives them.
        epistemic: epistemic uncertainty of each token, in nats, shape [T].
    """
    begins = [begin for begin, _ in offsets]
    ends = [end for _, end in offsets]

    def tokens_in(start: int, end: int) -> slice:
        """Tokens that hold a character of [start, end), empty ones that lead up to it included."""
        first = bisect_right(ends, start)
        while first > 0 and begins[first - 1] == ends[first - 1] == start:
            first -= 1
        return slice(first, bisect_left(begins, end, lo=first))

    limit = float(epistemic.mean() + epistemic.std())
    merged: list[tuple[int, int]] = []
    for word in _WORD.finditer(text):
        start, end = word.span()
        if not (epistemic[tokens_in(start, end)] > limit).any():
            continue
        if merged and not text[merged[-1][1] : start].strip():
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((start, end))
    spans = []
    for start, end in merged:
        values = epistemic[tokens_in(start, end)]
        spans.append(Span(start, end, float(values.mean()), float(values.max())))
    return spans
