"""Many items scored at once, lazily: results in the items' order, and a bounded look-ahead."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    Awaitable,
    Callable,
    Generator,
    Iterable,
)
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing
from typing import Any

from demur.errors import DemurError
from demur.types import Score

Result = Score | DemurError

# Items taken for each that may be under way: work for the others while the first takes long.
_AHEAD = 2


def check_concurrency(concurrency: int) -> None:
    """How many items may be under way."""
    if concurrency < 1:
        raise ValueError(f"concurrency is {concurrency}; it must be at least 1")


def in_threads(
    items: Iterable[Any], score: Callable[[Any], Score], stop: Callable[[], None], concurrency: int
) -> Generator[Result, None, None]:
    """Results of a blocking `score`; `stop` keeps it from trying again.

    No thread outlives this generator, but where Ctrl-C ends it: then each ends with its request.
    """
    pool = ThreadPoolExecutor(concurrency, thread_name_prefix="demur")
    pending: deque[Future[Result]] = deque()
    wait = True

    def one(item: Any) -> Result:
        try:
            return score(item)
        except DemurError as error:
            return error

    try:
        for item in items:
            pending.append(pool.submit(one, item))
            # What is done is given before another item is taken, which may take its time to come.
            while pending and (pending[0].done() or len(pending) >= _AHEAD * concurrency):
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except KeyboardInterrupt:
        wait = False
        raise
    finally:
        stop()
        pool.shutdown(wait=wait, cancel_futures=True)


async def in_tasks(
    items: Iterable[Any] | AsyncIterable[Any],
    score: Callable[[Any], Awaitable[Score]],
    concurrency: int,
) -> AsyncGenerator[Result, None]:
    """Results of a coroutine function `score`; no task outlives this generator."""
    room = asyncio.Semaphore(concurrency)
    pending: deque[asyncio.Task[Result]] = deque()

    async def one(item: Any) -> Result:
        async with room:
            try:
                return await score(item)
            except DemurError as error:
                return error

    try:
        async with aclosing(_each(items)) as given:
            async for item in given:
                pending.append(asyncio.create_task(one(item)))
                while pending and (pending[0].done() or len(pending) >= _AHEAD * concurrency):
                    yield await pending.popleft()
        while pending:
            yield await pending.popleft()
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)


async def _each(items: Iterable[Any] | AsyncIterable[Any]) -> AsyncGenerator[Any, None]:
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield item
    else:
        for item in items:
            yield item
