"""When to give a generation up: doubt that stays high."""

from __future__ import annotations

from collections import deque


class EarlyStop:
    """The mean of a measure over the last `window` tokens is above `threshold`, in nats.

    A mean and not each of them: even in a passage that the model does not know, every other token
    (a space, the rest of a word) is certain.
    """

    def __init__(self, threshold: float, window: int) -> None:
        self._threshold = threshold
        self._last: deque[float] = deque(maxlen=window)

    def add(self, value: float) -> bool:
        """Take a token's value; should the generation end here? Never before `window` tokens."""
        self._last.append(value)
        if len(self._last) < (self._last.maxlen or 0):
            return False
        return sum(self._last) / len(self._last) > self._threshold
