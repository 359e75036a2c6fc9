"""What each key may use a minute: requests, and tokens of prompts and answers together.

Counted over a sliding minute by the `limits` library, in this process or, so that several services
share one count, in Redis.
"""

from __future__ import annotations

import logging
import math
import time
from typing import Any

from limits import RateLimitItemPerMinute
from limits.aio.storage import MemoryStorage, RedisStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter
from limits.errors import StorageError

from server import metrics
from server.errors import RateLimited
from server.keys import Key

logger = logging.getLogger(__name__)

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
        if await self._ask("hit", limit, what, key.name, cost=cost):
            return
        metrics.KEY_REFUSED.labels(key.name, what).inc()
        if cost > amount:
            raise RateLimited(
                f"this request counts {cost} {what} and the key may use {amount} a minute: "
                "it will never fit; send less, or name a smaller max_tokens"
            )
        stats = await self._ask("get_window_stats", limit, what, key.name)
        # The window slides: what has to leave it does so at the pace at which it may fill.
        wait = 60.0 * max(cost - stats.remaining, 0) / amount
        raise RateLimited(
            f"the key may use {amount} {what} a minute and {stats.remaining} are left; this "
            f"request counts {cost}",
            retry_after_s=min(max(math.ceil(wait), 1), 60),
        )

    async def _ask(self, method: str, *arguments: Any, **named: Any) -> Any:
        if self._shared is not None and time.monotonic() >= self._away_until:
            try:
                return await getattr(self._shared, method)(*arguments, **named)
            except StorageError as error:
                if time.monotonic() < self._away_until:  # another request has told it
                    return await getattr(self._here, method)(*arguments, **named)
                self._away_until = time.monotonic() + _AGAIN_S
                logger.error(
                    "budgets cannot be shared (%s); counting here for %g s",
                    type(error.storage_error).__name__,
                    _AGAIN_S,
                )
        return await getattr(self._here, method)(*arguments, **named)
