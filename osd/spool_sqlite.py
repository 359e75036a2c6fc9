"""The traffic spool in one SQLite file, in WAL mode; any number of a machine's processes share it.

Entries grow old with time, whatever is done to the clock: `trim` notices by the time since the
machine started when the wall clock was set, and moves the entries' times along.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
import time
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from pydantic import ValidationError

from osd.corpus import Text
from osd.errors import SpoolError
from osd.spool import MAX_TOKENS, Entry, Limits, SpoolStats, order

logger = logging.getLogger(__name__)

# `bytes` is kept by triggers: counting it anew would read the whole file at each append.
_SCHEMA = """
CREATE TABLE IF NOT EXISTS conversations (
    id INTEGER PRIMARY KEY AUTOINCREMENT,  -- never used again, not even after a clear
    created REAL NOT NULL,                 -- seconds since 1970
    key INTEGER NOT NULL,
    response_start INTEGER NOT NULL,
    token_ids BLOB NOT NULL                -- unsigned 32-bit, little-endian
);
CREATE INDEX IF NOT EXISTS by_age ON conversations (created);
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value);
INSERT OR IGNORE INTO facts VALUES
    ('identity', lower(hex(randomblob(16)))), ('bytes', 0), ('cleared', 0), ('clock', '');
CREATE TRIGGER IF NOT EXISTS added AFTER INSERT ON conversations BEGIN
    UPDATE facts SET value = value + 64 + length(NEW.token_ids) WHERE name = 'bytes';
END;
CREATE TRIGGER IF NOT EXISTS dropped AFTER DELETE ON conversations BEGIN
    UPDATE facts SET value = value - 64 - length(OLD.token_ids) WHERE name = 'bytes';
END;
"""
_BUSY_S = 10.0
_JUMP_S = 30.0  # a clock that is corrected by less is let alone
_AT_ONCE = 64  # entries that are dropped for size before it is looked at again
_Row = tuple[int, int, int, bytes | None]
_BOOT = Path("/proc/sys/kernel/random/boot_id")


class SqliteSpool:
    """A file of conversations.

    Args:
        path: made if it is not there, readable by its owner only.
        limits: kept to at each `trim`, and the size at each `append`.
    """

    def __init__(self, path: str, limits: Limits) -> None:
        self.path = Path(path).expanduser()
        self.limits = limits
        self._lock = threading.Lock()  # one connection, whichever thread uses it
        with self._told():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Before SQLite does, which would give it the umask's mode; the WAL takes after it.
            os.close(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600))
            self._db = sqlite3.connect(
                self.path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False
            )
            self._db.execute("PRAGMA journal_mode = WAL")
            # A commit is on the disk: a machine that loses power keeps what was acknowledged.
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.execute("PRAGMA secure_delete = ON")  # dropped text is overwritten
            self._db.execute("PRAGMA journal_size_limit = 16777216")
            self._db.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} COMMIT;")

    def append(self, texts: Sequence[Text], batch: str | None = None) -> None:
        # `batch` is not needed here: a commit that fails has added nothing.
        now = time.time()
        rows = [(now, text.key, text.response_start, _packed(text.token_ids)) for text in texts]
        with self._transaction():
            self._follow_clock()
            self._db.executemany(
                "INSERT INTO conversations (created, key, response_start, token_ids) "
                "VALUES (?, ?, ?, ?)",
                rows,
            )
            self._trim_size()

    def read(self, after: str, limit: int) -> list[Entry]:
        start = order(after)[0]
        while rows := self._rows("WHERE id > ? ORDER BY id LIMIT ?", (start, limit)):
            if entries := self._entries(rows):
                return entries
            start = rows[-1][0]  # none of them can be read: on to the next
        return []

    def newest(self, limit: int) -> list[Entry]:
        return self._entries(self._rows("ORDER BY id DESC LIMIT ?", (limit,)))[::-1]

    def identity(self) -> str:
        with self._told(), self._lock:
            return self._fact("identity")

    def trim(self) -> int:
        with self._transaction():
            self._follow_clock()
            found = self._db.execute(
                "DELETE FROM conversations WHERE created < ?",
                (time.time() - self.limits.max_age_s,),
            )
            return found.rowcount + self._trim_size()

    def clear(self) -> int:
        with self._transaction():
            count = self._db.execute("DELETE FROM conversations").rowcount
            self._db.execute("UPDATE facts SET value = value + 1 WHERE name = 'cleared'")
        with self._told(), self._lock:
            # Out of the log beside the file, too, and the disk's space back.
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            self._db.execute("VACUUM")
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return count

    def cleared(self) -> int:
        with self._told(), self._lock:
            return int(self._fact("cleared"))

    def stats(self) -> SpoolStats:
        with self._told(), self._lock:
            count, oldest = self._db.execute(
                "SELECT count(*), min(created) FROM conversations"
            ).fetchone()
            age = 0.0 if oldest is None else max(0.0, time.time() - oldest)
            return SpoolStats(int(count), int(self._fact("bytes")), age)

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _rows(self, which: str, values: tuple[int, ...]) -> list[_Row]:
        with self._told(), self._lock:
            return self._db.execute(
                # What is too long is no text (NULL) before it is in memory.
                "SELECT id, key, response_start, CASE WHEN length(token_ids) <= ? THEN token_ids "
                f"END FROM conversations {which}",
                (4 * MAX_TOKENS, *values),
            ).fetchall()

    def _entries(self, rows: Sequence[_Row]) -> list[Entry]:
        entries = []
        for row, key, response_start, packed in rows:
            try:
                if packed is None:
                    raise ValueError("it is too long")
                text = Text(
                    key=key, response_start=response_start, token_ids=array("I", packed).tolist()
                )
            except (ValidationError, ValueError, TypeError) as error:
                # Nothing here writes such a row; one of them must not stop who reads the others.
                logger.warning("%s: entry %d cannot be read (%s)", self.path, row, error)
                continue
            entries.append(Entry(str(row), text))
        return entries

    def _trim_size(self) -> int:
        dropped = 0
        while int(self._fact("bytes")) > self.limits.max_bytes:
            found = self._db.execute(
                "DELETE FROM conversations WHERE id IN "
                "(SELECT id FROM conversations ORDER BY id LIMIT ?)",
                (_AT_ONCE,),
            )
            if not found.rowcount:
                break
            dropped += found.rowcount
        return dropped

    def _follow_clock(self) -> None:
        """Move all times along when somebody has set the clock since the last look."""
        if not _BOOT.exists():
            return
        boot, since_start = _BOOT.read_text().strip(), time.clock_gettime(time.CLOCK_BOOTTIME)
        started = time.time() - since_start
        last_boot, _, last_started = self._fact("clock").partition(" ")
        jump = started - float(last_started) if last_boot == boot else 0.0
        if abs(jump) > _JUMP_S:
            logger.warning("the clock was set by %+.0f s; the spool's times move along", jump)
            self._db.execute("UPDATE conversations SET created = created + ?", (jump,))
        if abs(jump) > _JUMP_S or last_boot != boot:
            self._db.execute(
                "UPDATE facts SET value = ? WHERE name = 'clock'", (f"{boot} {started}",)
            )

    def _fact(self, name: str) -> str:
        row = self._db.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return str(row[0])

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._told(), self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # a full disk has rolled it back already
                    self._db.execute("ROLLBACK")
                raise

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError, ValueError, TypeError) as error:  # facts that are none
            raise SpoolError(f"the spool {self.path} cannot be used ({error})") from error


def _packed(token_ids: Sequence[int]) -> bytes:
    return array("I", token_ids).tobytes()
