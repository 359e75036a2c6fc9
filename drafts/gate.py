"""A gate between requests and weight swaps: many requests share it, a swap has it alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Gate:
    """Readers-writer lock for one event loop.

    A waiting `alone` keeps new `shared` holders out, so that steady traffic cannot starve it.
    """

    def __init__(self) -> None:
        self._changed = asyncio.Condition()
        self._holders = 0
        self._waiting = 0
        self._closed = False

    @asynccontextmanager
    async def shared(self) -> AsyncIterator[None]:
        """Hold the gate beside others; waits while somebody has it alone or waits for that."""
        async with self._changed:
            await self._changed.wait_for(lambda: not self._closed and not self._waiting)
            self._holders += 1
        try:
            yield
        finally:
            # No await before the count is right: a cancelled request must not leave it wrong.
            self._holders -= 1
            await asyncio.shield(self._notify())

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Wait until nobody holds the gate, then hold it alone."""
        self._waiting += 1
        try:
            async with self._changed:
                await self._changed.wait_for(lambda: not self._closed and not self._holders)
                self._closed = True
        finally:
            self._waiting -= 1
            if not self._closed:
                await asyncio.shield(self._notify())
        try:
            yield
        finally:
            self._closed = False
            await asyncio.shield(self._notify())

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()
