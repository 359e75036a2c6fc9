"""Bounds on what is under way: a queue that says no, and clients that hang up."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from fastapi import Request

from server import metrics
from server.errors import QueueFull
from server.queue_wait import QueueWait

T = TypeVar("T")

# Of the deadline: what waits longer would hardly be done in time.
_OF_DEADLINE = 0.8
_LONGEST_RETRY_S = 60
_ALWAYS_IN = 8


class Admission:
    """Counts items that wait for the engine or are in it, and says no in time.

    Args:
        max_pending: bounds memory.
        within_s: the deadline. What could not be answered by then is refused at once: an answer
            that comes too late costs as much as one in time, and helps nobody.
    """

    def __init__(self, max_pending: int, within_s: float) -> None:
        self.max_pending = max_pending
        self.within_s = within_s
        self.wait = QueueWait()
        self.pending = 0
        self.tell: Callable[[int], None] | None = None  # who else wants to know

    @contextmanager
    def take(self, items: int) -> Iterator[None]:
        """Hold places for `items` items.

        Raises:
            QueueFull: if there are not so many; none is held then.
        """
        if self.pending + items > self.max_pending:
            metrics.REFUSED.labels("queue").inc()
            raise QueueFull(
                f"{self.pending} items are pending and at most {self.max_pending} may be; "
                "try again later",
                retry_after_s=1 + self.pending // 100,
            )
        wait, bound = self.wait.estimate_s(), _OF_DEADLINE * self.within_s
        # A few always get in: only side by side do they show at what pace an engine batches.
        if wait > bound and self.wait.waiting >= _ALWAYS_IN:
            metrics.REFUSED.labels("wait").inc()
            raise QueueFull(
                f"it would wait for the engine for about {wait:.0f} s and has to be done within "
                f"{self.within_s:g} s; try again later",
                retry_after_s=min(math.ceil(wait - bound), _LONGEST_RETRY_S),
            )
        try:
            self._add(items)
            yield
        finally:
            self._add(-items)

    def _add(self, items: int) -> None:
        self.pending += items
        metrics.PENDING.set(self.pending)
        if self.tell is not None:
            self.tell(self.pending)


class ClientGone(Exception):
    """The client hung up; nobody reads an answer."""


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """Run `work`, and cancel it when the client hangs up.

    Raises:
        ClientGone: if it did.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_hung_up(request))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        for pending in (task, watch):
            pending.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _hung_up(request: Request) -> None:
    # The body has been read: the next message, whenever it comes, is the disconnect.
    while (await request.receive())["type"] != "http.disconnect":
        pass
