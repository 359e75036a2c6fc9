"""The traffic spool, on both of its backends."""

from __future__ import annotations

import os
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from osd.corpus import Text
from osd.errors import SpoolError
from osd.spool import START, Limits, Spool, open_spool, order
from tests.redis_server import RedisServer

Open = Callable[..., Spool]


def text(number: int, length: int = 8) -> Text:
    return Text(key=number, response_start=2, token_ids=[number % 300, *range(1, length)])


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.kill()


@pytest.fixture(params=["sqlite", "redis"])
def opens(request: Any, tmp_path: Path) -> Open:
    """Opens one spool, as often as it is called."""
    if request.param == "sqlite":
        return lambda limits=None: open_spool(str(tmp_path / "spool.sqlite"), limits)
    server: RedisServer = request.getfixturevalue("redis_server")
    client = __import__("redis").Redis.from_url(server.url)
    client.flushall()
    return lambda limits=None: open_spool(server.url, limits)


def test_what_was_appended_is_read_in_order_by_any_process(opens: Open) -> None:
    with opens() as one, opens() as other:
        one.append([text(1), text(2)])
        other.append([text(3)])
        found = other.read(START, 10)
        assert [entry.text for entry in found] == [text(1), text(2), text(3)]
        positions = [order(entry.position) for entry in found]
        assert positions == sorted(set(positions))
        assert [e.text for e in one.read(found[0].position, 1)] == [text(2)]
        assert one.read(found[-1].position, 5) == []
        assert one.newest(2) == found[1:]
        assert one.identity() == other.identity()
        assert one.stats().texts == 3
        assert one.stats().bytes >= 3 * 8 * 4


def test_a_clear_leaves_nothing_and_positions_go_on(opens: Open) -> None:
    with opens() as spool:
        spool.append([text(n) for n in range(5)])
        last = spool.newest(1)[0].position
        assert spool.cleared() == 0
        assert spool.clear() == 5
        assert spool.cleared() == 1
        assert spool.read(START, 10) == []
        assert spool.stats() == (0, 0, 0.0)
        spool.append([text(9)])
        [entry] = spool.read(last, 10)
        assert entry.text == text(9)
        assert order(entry.position) > order(last)


@hypothesis.settings(max_examples=20)
@hypothesis.given(lengths=st.lists(st.integers(3, 400), min_size=1, max_size=60))
def test_its_size_is_bounded_and_the_oldest_go(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int]
) -> None:
    limits = Limits(max_bytes=4000)
    with open_spool(str(tmp_path_factory.mktemp("spool") / "s.sqlite"), limits) as spool:
        for number, length in enumerate(lengths):
            spool.append([text(number, length)])
            assert spool.stats().bytes <= limits.max_bytes
        kept = [entry.text.key for entry in spool.read(START, 100)]
        assert kept == list(range(len(lengths)))[len(lengths) - len(kept) :]
        sizes = sum(4 * length + 64 for length in lengths[len(lengths) - len(kept) :])
        assert spool.stats().bytes == sizes


def test_size_is_bounded_in_redis_too(redis_server: RedisServer) -> None:
    with open_spool(redis_server.url, Limits(max_bytes=20_000)) as spool:
        spool.clear()
        for number in range(200):
            spool.append([text(number, 100)])
            assert spool.stats().bytes <= 20_000
        assert spool.newest(1)[0].text == text(199, 100)
        assert 0 < spool.stats().texts < 60


def test_old_entries_go(opens: Open) -> None:
    with opens(Limits(max_age_s=3.0)) as spool:
        spool.append([text(1)])
        time.sleep(3.2)
        spool.append([text(2)])
        assert 3 <= spool.stats().oldest_age_s < 60
        assert spool.trim() == 1
        assert [entry.text for entry in spool.read(START, 5)] == [text(2)]
        assert spool.stats().bytes == 8 * 4 + 64


def test_a_batch_that_is_given_again_is_added_once(redis_server: RedisServer) -> None:
    with open_spool(redis_server.url) as spool:
        spool.clear()
        spool.append([text(1)], "batch-1")
        spool.append([text(1)], "batch-1")  # as after an answer that was lost
        assert spool.stats().texts == 1
        spool.append([text(1)], "batch-2")
        assert spool.stats().texts == 2
        with open_spool(redis_server.url) as other:  # another writer's batches are its own
            other.append([text(3)], "batch-3")
        spool.append([text(1)], "batch-2")
        assert spool.stats().texts == 3


def test_batches_leave_nothing_behind(redis_server: RedisServer) -> None:
    with open_spool(redis_server.url) as spool:
        spool.append([text(0)])
        keys = spool._redis.dbsize()
        for number in range(20):
            spool.append([text(number)])
        assert spool._redis.dbsize() == keys
        spool.clear()


@pytest.mark.parametrize("years", [-10, 10])
def test_a_clock_that_jumps_neither_drops_entries_nor_keeps_them_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, years: int
) -> None:
    with open_spool(str(tmp_path / "s.sqlite"), Limits(max_age_s=100)) as spool:
        spool.trim()  # looks at the clock
        spool.append([text(1)])
        real = time.time
        jump = years * 365 * 86400
        monkeypatch.setattr(time, "time", lambda: real() + jump)
        spool.append([text(3)])  # before anything has looked at the clock again
        assert spool.trim() == 0
        assert spool.stats().texts == 2
        assert spool.stats().oldest_age_s < 50
        spool.append([text(2)])
        monkeypatch.setattr(time, "time", lambda: real() + jump + 200)
        # Time that passed, and was not set: the machine's own clock went on as well.
        boot = time.clock_gettime(time.CLOCK_BOOTTIME)
        monkeypatch.setattr(time, "clock_gettime", lambda _: boot + 200)
        assert spool.trim() == 3


def test_the_file_is_its_owners_alone_and_a_clear_removes_the_text(tmp_path: Path) -> None:
    path = tmp_path / "new" / "spool.sqlite"
    secret = [123456 + n for n in range(50)]
    needle = b"".join(n.to_bytes(4, "little") for n in secret)
    with open_spool(str(path)) as spool:
        spool.append([Text(key=1, response_start=1, token_ids=secret)])
        spool.append([text(2)])
        files = list(path.parent.iterdir())
        assert len(files) > 1  # the log beside it, too
        assert all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in files)
        assert any(needle in file.read_bytes() for file in files)
        spool.clear()
        assert not any(needle in file.read_bytes() for file in path.parent.iterdir())


def test_what_was_acknowledged_outlives_a_killed_writer(tmp_path: Path) -> None:
    path = tmp_path / "spool.sqlite"
    script = (
        "import sys; from osd.spool import open_spool; from osd.corpus import Text\n"
        "spool = open_spool(sys.argv[1]); n = 0\n"
        "while True:\n"
        "    spool.append([Text(key=n, response_start=1, token_ids=[n, n])]); n += 1\n"
        "    print(n, flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for _ in range(50):
        process.stdout.readline()
    os.kill(process.pid, signal.SIGKILL)
    acknowledged = 50 + len(process.stdout.read().splitlines())
    with open_spool(str(path)) as spool:
        keys = [entry.text.key for entry in spool.read(START, 10_000)]
        # One more may have been committed whose answer nobody saw.
        assert keys in (list(range(acknowledged)), list(range(acknowledged + 1)))


def test_what_was_acknowledged_outlives_a_killed_redis(tmp_path: Path) -> None:
    server = RedisServer(tmp_path)
    try:
        with open_spool(server.url) as spool:
            for number in range(100):
                spool.append([text(number)])
            server.kill()
            with pytest.raises(SpoolError, match="Redis cannot be used"):
                spool.append([text(100)], "last")
            server.start()
            spool.append([text(100)], "last")
            assert [e.text.key for e in spool.read(START, 200)] == list(range(101))
    finally:
        server.kill()


def test_a_full_disk_is_an_error_and_nothing_is_half_there(tmp_path: Path) -> None:
    path = tmp_path / "spool.sqlite"
    with open_spool(str(path)) as spool:
        spool.append([text(1)])
        spool._db.execute("PRAGMA max_page_count = 20")  # type: ignore[attr-defined]
        with pytest.raises(SpoolError, match="full"):
            spool.append([text(number, 4000) for number in range(50)])
        assert [entry.text for entry in spool.read(START, 100)] == [text(1)]
        spool._db.execute("PRAGMA max_page_count = 100000")  # type: ignore[attr-defined]
        spool.append([text(2)])
        assert spool.stats().texts == 2


@pytest.mark.parametrize("content", [b"no database at all" * 100, None])
def test_a_spool_that_cannot_be_used_says_so(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "spool.sqlite"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    with pytest.raises(SpoolError, match=r"spool.sqlite cannot be used"):
        open_spool(str(path))
    with pytest.raises(SpoolError, match="Redis cannot be used"):
        open_spool("unix:///nowhere/socket")


def test_an_entry_that_nothing_here_wrote_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "spool.sqlite"
    with open_spool(str(path)) as spool:
        spool.append([text(1)])
        with sqlite3.connect(path) as database:
            row = (1.0, -5, 9, b"\x01\x02")
            database.execute(
                "INSERT INTO conversations (created, key, response_start, token_ids) "
                "VALUES (?, ?, ?, ?)",
                row,
            )
        database.close()
        spool.append([text(2)])
        assert [entry.text for entry in spool.read(START, 9)] == [text(1), text(2)]
        # Not even where a reader finds nothing else.
        assert [entry.text for entry in spool.read("1", 1)] == [text(2)]
