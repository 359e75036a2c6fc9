"""What each key may use a minute: requests, and tokens of prompts and answers together.

Counted over a sliding minute, of which the part before the clock's minute is an estimate, by the
`limits` library, in this process or, so that several services
share one count, in Redis.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple, TypeVar

from limits import RateLimitItem, RateLimitItemPerMinute
from limits.aio.storage import MemoryStorage, RedisStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter
from limits.errors import StorageError

from server import metrics
from server.errors import RateLimited
from server.keys import Key

logger = logging.getLogger(__name__)

T = TypeVar("T")

_MINUTE_S = 60.0
_ANSWER_WITHIN_S = 0.5  # of Redis; a request waits for it
_AGAIN_S = 10.0  # until Redis is asked again after it failed


class Budgets:
    """Counts what keys use.

    While Redis is away each service counts for itself: answering too much for a while is better
    than answering nothing.

    Args:
        url: `redis://…`, or None to count in this process.
    """

    def __init__(self, url: str | None) -> None:
        self._here = SlidingWindowCounterRateLimiter(MemoryStorage())
        self._shared: SlidingWindowCounterRateLimiter | None = None
        self._away_until = 0.0
        if url is not None:
            storage = RedisStorage(
                f"redis+{url}" if url.startswith("unix:") else url,  # as `limits` writes it
                wrap_exceptions=True,
                implementation="redispy",
                key_prefix="demur-budgets",
                socket_timeout=_ANSWER_WITHIN_S,
                socket_connect_timeout=_ANSWER_WITHIN_S,
            )
            self._shared = SlidingWindowCounterRateLimiter(storage)

    async def request(self, key: Key) -> None:
        """Count a request; `RateLimited` if the key has made too many."""
        if key.requests_per_minute is not None:
            await self._use(key, "requests", key.requests_per_minute, 1)

    async def tokens(self, key: Key | None, count: int) -> None:
        """Count tokens before the engine sees them; `RateLimited` if they are too many."""
        if key is None:
            return
        if key.tokens_per_minute is not None:
            await self._use(key, "tokens", key.tokens_per_minute, count)
        metrics.KEY_TOKENS.labels(key.name).inc(count)

    async def _use(self, key: Key, what: str, amount: int, cost: int) -> None:
        limit = RateLimitItemPerMinute(amount)
        if await self._ask(lambda limiter: limiter.hit(limit, what, key.name, cost=cost)):
            return
        metrics.KEY_REFUSED.labels(key.name, what).inc()
        if cost > amount:
            raise RateLimited(
                f"this request counts {cost} {what} and the key may use {amount} a minute: "
                "it will never fit; send less, or name a smaller max_tokens"
            )
        window = await self._ask(lambda limiter: _window(limiter, limit, what, key.name))
        raise RateLimited(
            f"the key may use {amount} {what} a minute and {window.left(amount)} are left; this "
            f"request counts {cost}",
            retry_after_s=window.wait_s(amount, cost),
        )

    async def _ask(self, ask: Callable[[SlidingWindowCounterRateLimiter], Awaitable[T]]) -> T:
        if self._shared is not None and time.monotonic() >= self._away_until:
            try:
                return await ask(self._shared)
            except StorageError as error:
                if time.monotonic() < self._away_until:  # another request has told it
                    return await ask(self._here)
                self._away_until = time.monotonic() + _AGAIN_S
                logger.error(
                    "budgets cannot be shared (%s); counting here for %g s",
                    type(error.storage_error).__name__,
                    _AGAIN_S,
                )
        return await ask(self._here)


class _Window(NamedTuple):
    """What was used in this minute and in the one before it, which counts less the older it is:
    by the share of the minute that its end still has before it."""

    before: int
    before_left_s: float  # until the minute before counts no more, which is when this one ends
    now: int
    now_left_s: float  # until this one counts no more, a minute after its end

    def left(self, amount: int) -> int:
        return max(amount - math.floor(self.before * self.before_left_s / _MINUTE_S + self.now), 0)

    def wait_s(self, amount: int, cost: int) -> int:
        """Until `cost` fits, if nothing else is used."""
        too_much = amount - cost + 1  # parts of a token are not counted
        if self.now < too_much:  # once enough of the minute before has gone
            wait = self.before_left_s - _MINUTE_S * (too_much - self.now) / max(self.before, 1)
        else:
            wait = self.now_left_s - _MINUTE_S * too_much / self.now
        return max(math.floor(wait) + 1, 1)


async def _window(
    limiter: SlidingWindowCounterRateLimiter, limit: RateLimitItem, *names: str
) -> _Window:
    storage: Any = limiter.storage
    return _Window(*await storage.get_sliding_window(limit.key_for(*names), limit.get_expiry()))
