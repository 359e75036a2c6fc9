"""How long what comes now would wait for the engine, from how fast others came through."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_REMEMBER = 32  # first answers; older ones fade
_AT_LEAST = 8  # of them, before any estimate is made
_FADE = 1 - 1 / _REMEMBER


class QueueWait:
    """Items that were given to the engine and have had nothing from it yet.

    The pace at which they come to their first answer (of a text to score the only one, of a
    generation its first token) is measured only while some wait, so that an idle hour says nothing.
    By Little's law the wait is then their number over that pace.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since = clock()
        self.waiting = 0
        self._busy_s = 0.0  # both fade with each first answer, so that their ratio is a mean
        self._came = 0.0
        self._seen = 0

    @contextmanager
    def waits(self) -> Iterator[Callable[[], None]]:
        """An item in the engine; call what is given when its first answer has come."""
        came = False

        def first_answer() -> None:
            nonlocal came
            if not came:
                came = True
                self._change(-1)
                self._came = self._came * _FADE + 1
                self._busy_s *= _FADE
                self._seen += 1

        self._change(+1)
        try:
            yield first_answer
        finally:
            if not came:  # cancelled, or failed: it says nothing of the pace
                self._change(-1)

    def estimate_s(self) -> float:
        """Seconds until what comes now has its first answer; 0 as long as little is known."""
        self._change(0)
        if self._seen < _AT_LEAST or not self.waiting:
            return 0.0
        return (self.waiting + 1) * self._busy_s / self._came

    def _change(self, by: int) -> None:
        now = self._clock()
        if self.waiting:
            self._busy_s += now - self._since
        self._since = now
        self.waiting += by
