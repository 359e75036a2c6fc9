"""The traffic spool as a Redis stream: any number of machines share it.

Keys: `<prefix>:traffic` (the stream), `:bytes`, `:cleared`, `:identity`, and a `:batch:<writer>`
for each service that writes. What was appended outlives a Redis that is killed if it runs with
`appendonly yes`; without that, a warning says so. Age is by Redis's own clock, in which a stream's
ids never go back.
"""

from __future__ import annotations

import logging
import uuid
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import redis
from pydantic import ValidationError

from osd.corpus import Text
from osd.errors import SpoolError
from osd.spool import MAX_TOKENS, START, Entry, Limits, SpoolStats, order

logger = logging.getLogger(__name__)

_TIMEOUT_S = 5.0
_AT_ONCE = 64
_OVERHEAD = 64  # bytes of an entry beside its token ids
_SEEN_S = 30 * 86_400  # for how long a writer's last batch is remembered
# All or none, and once: an answer that was lost on its way does not say whether it was done.
_APPEND = """
if redis.call('GET', KEYS[3]) ~= ARGV[3] then
    redis.call('SET', KEYS[3], ARGV[3], 'EX', ARGV[2])
    for i = 4, #ARGV, 3 do
        redis.call('XADD', KEYS[1], '*', 'key', ARGV[i], 'start', ARGV[i + 1], 'ids', ARGV[i + 2])
    end
    redis.call('INCRBY', KEYS[2], ARGV[1])
end
"""
_DROP = """
local dropped = 0
for i = 1, #ARGV, 2 do
    if redis.call('XDEL', KEYS[1], ARGV[i]) == 1 then
        redis.call('DECRBY', KEYS[2], ARGV[i + 1])
        dropped = dropped + 1
    end
end
return dropped
"""


class RedisSpool:
    """A stream of conversations.

    Args:
        url: as redis-py reads it; a password in it is not repeated in errors.
        limits: kept to at each `trim`, and the size at each `append`.
        prefix: of its keys.
    """

    def __init__(self, url: str, limits: Limits, prefix: str) -> None:
        self.limits = limits
        self._stream, self._bytes, self._cleared, self._identity = (
            f"{prefix}:{name}" for name in ("traffic", "bytes", "cleared", "identity")
        )
        self._last_batch = f"{prefix}:batch:{uuid.uuid4().hex}"  # this writer's
        with self._told():
            self._redis: Any = redis.Redis.from_url(
                url,
                socket_timeout=_TIMEOUT_S,
                socket_connect_timeout=_TIMEOUT_S,
            )
            self._warn_if_volatile()

    def append(self, texts: Sequence[Text], batch: str | None = None) -> None:
        arguments: list[object] = []
        size = 0
        for text in texts:
            packed = array("I", text.token_ids).tobytes()
            size += len(packed) + _OVERHEAD
            arguments += [text.key, text.response_start, packed]
        batch = batch or uuid.uuid4().hex
        with self._told():
            keys = (self._stream, self._bytes, self._last_batch)
            self._redis.eval(_APPEND, len(keys), *keys, size, _SEEN_S, batch, *arguments)
            self._trim_size()

    def read(self, after: str, limit: int) -> list[Entry]:
        start = _next(after)  # not "(id", for which START would be no id
        with self._told():
            while found := self._redis.xrange(self._stream, start, "+", count=limit):
                if entries := _entries(found):
                    return entries
                start = _next(found[-1][0].decode())  # none of them can be read
        return []

    def newest(self, limit: int) -> list[Entry]:
        with self._told():
            return _entries(self._redis.xrevrange(self._stream, count=limit))[::-1]

    def trim(self) -> int:
        with self._told():
            oldest = int((self._now() - self.limits.max_age_s) * 1000)
            dropped = 0
            while found := self._redis.xrange(
                self._stream, "-", max(oldest - 1, 0), count=_AT_ONCE
            ):
                dropped += self._drop(found)
            return dropped + self._trim_size()

    def clear(self) -> int:
        with self._told():
            pipe = self._redis.pipeline(transaction=True)
            # Not DEL: the stream keeps its last id, so that positions never come again.
            pipe.xtrim(self._stream, maxlen=0, approximate=False)
            pipe.set(self._bytes, 0)
            pipe.incr(self._cleared)
            count = int(pipe.execute()[0])
            try:
                self._redis.bgrewriteaof()  # or the log would keep the texts
            except redis.ResponseError as error:  # one is under way, or it is forbidden
                logger.warning("Redis does not rewrite its log now: %s", error)
            return count

    def identity(self) -> str:
        with self._told():
            self._redis.set(self._identity, uuid.uuid4().hex, nx=True)
            return str(self._redis.get(self._identity).decode())

    def cleared(self) -> int:
        with self._told():
            return int(self._redis.get(self._cleared) or 0)

    def stats(self) -> SpoolStats:
        with self._told():
            count, size = self._redis.xlen(self._stream), self._redis.get(self._bytes)
            first = self._redis.xrange(self._stream, count=1)
            now = self._now()
        age = 0.0
        if first:
            age = max(0.0, now - order(first[0][0].decode())[0] / 1000)
        return SpoolStats(int(count), int(size or 0), age)

    def close(self) -> None:
        self._redis.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _now(self) -> float:
        seconds, micros = self._redis.time()
        return float(seconds + micros / 1e6)

    def _trim_size(self) -> int:
        dropped = 0
        while int(self._redis.get(self._bytes) or 0) > self.limits.max_bytes:
            found = self._redis.xrange(self._stream, count=_AT_ONCE)
            if not found:
                break
            dropped += self._drop(found)
        return dropped

    def _drop(self, found: list[Any]) -> int:
        """Drop entries; of two that trim at once, one counts each."""
        arguments: list[object] = []
        for position, fields in found:
            arguments += [position, len(fields.get(b"ids", b"")) + _OVERHEAD]
        return int(self._redis.eval(_DROP, 2, self._stream, self._bytes, *arguments))

    def _warn_if_volatile(self) -> None:
        try:
            kept = self._redis.config_get("appendonly").get("appendonly")
        except redis.ResponseError:  # a managed Redis that tells nobody its configuration
            return
        if kept != "yes":
            logger.warning("this Redis has appendonly off: if it is killed, traffic is lost")

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except (redis.RedisError, OSError, ValueError) as error:
            raise SpoolError(f"the spool on Redis cannot be used ({error})") from error


def _next(position: str) -> str:
    """The least position behind one."""
    if position == START:
        return "-"
    first, second = order(position)
    return f"{first}-{second + 1}"


def _entries(found: list[Any]) -> list[Entry]:
    entries = []
    for position, fields in found:
        try:
            if len(fields[b"ids"]) > 4 * MAX_TOKENS:
                raise ValueError("it is too long")
            text = Text(
                key=int(fields[b"key"]),
                response_start=int(fields[b"start"]),
                token_ids=array("I", fields[b"ids"]).tolist(),
            )
        except (KeyError, ValueError, ValidationError) as error:
            logger.warning("entry %s of the spool cannot be read (%s)", position, error)
            continue
        entries.append(Entry(position.decode(), text))
    return entries
