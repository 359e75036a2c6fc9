"""The traffic spool: conversations that the service has answered, waiting to be learned from.

    with open_spool("~/.cache/demur/osd/spool.sqlite", limits) as spool:    # or redis://host/0
        spool.append([Text(...)])                 # durable once it returns
        for position, text in spool.read(after="0", limit=100):
            ...

It holds users' text, as token ids. It is bounded by age and by size, and the oldest go first. Who
reads it keeps its own position, together with what it has made of what it read.
`osd/spool_sqlite.py` and `osd/spool_redis.py` are the two that there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple, Protocol, Self

from osd.corpus import Text

START = "0"  # the position before all entries
MAX_TOKENS = 2**20  # of an entry; the service takes no text as long, and none such is read


@dataclass(frozen=True)
class Limits:
    """What a spool keeps at most."""

    max_bytes: int = 256 * 2**20
    max_age_s: float = 7 * 24 * 3600.0


class Entry(NamedTuple):
    """A conversation and where it stands; positions grow, and none is used twice."""

    position: str
    text: Text


class SpoolStats(NamedTuple):
    """What a spool holds."""

    texts: int
    bytes: int
    oldest_age_s: float  # 0 if it is empty


class Spool(Protocol):
    """Any of its methods raises `SpoolError` if the spool cannot be reached or is full."""

    def append(self, texts: Sequence[Text], batch: str | None = None) -> None:
        """Add conversations, all or none; they outlive this process once it returns.

        After an error it is not known whether they were added: give them again under the name of
        the same `batch`, before any others, and they are added once.
        """
        ...

    def read(self, after: str, limit: int) -> list[Entry]:
        """The oldest entries behind a position."""
        ...

    def newest(self, limit: int) -> list[Entry]:
        """The last entries, oldest first."""
        ...

    def identity(self) -> str:
        """A name that no other spool has: positions in this one mean nothing in another."""
        ...

    def trim(self) -> int:
        """Drop what is too old or too much; how many that were."""
        ...

    def clear(self) -> int:
        """Drop all entries, for good; how many there were. Positions go on from where they were."""
        ...

    def cleared(self) -> int:
        """How often it was cleared: when it grows, a reader drops the texts that it holds."""
        ...

    def stats(self) -> SpoolStats: ...

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


def order(position: str) -> tuple[int, int]:
    """A key by which positions are compared."""
    first, _, second = position.partition("-")
    return int(first), int(second or 0)


def open_spool(where: str, limits: Limits | None = None, name: str = "demur") -> Spool:
    """The spool at a path (SQLite) or a `redis://`, `rediss://` or `unix://` URL (Redis Streams).

    Args:
        name: of the model whose traffic it is; in a Redis, keys begin with it.

    Raises:
        SpoolError: if it cannot be used.
    """
    limits = limits or Limits()
    if where.startswith(("redis://", "rediss://", "unix://")):
        from osd.spool_redis import RedisSpool

        return RedisSpool(where, limits, name)
    from osd.spool_sqlite import SqliteSpool

    return SqliteSpool(where, limits)
