"""What is too much, too slow or too late is refused, and costs nobody else anything."""

import asyncio
import json
import resource
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from drafts.text import TextEncoder
from server.admission import Admission
from server.app import create_app
from server.connections import DrainingServer, listening_server, raise_file_limit
from server.errors import QueueFull
from server.queue_wait import QueueWait
from server.settings import Settings
from tests.conftest import run_service
from tests.fake_engine import FakeEngine
from tests.serving import gauge_of
from tests.test_http import GOOD, error_of


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@given(
    pace=st.floats(0.1, 100.0),
    waiting=st.integers(2, 500),
    idle=st.floats(0, 1e5),
    cancelled=st.integers(0, 50),
)
def test_the_estimate_is_what_it_takes(
    pace: float, waiting: int, idle: float, cancelled: int
) -> None:
    """An engine that takes one after the other; idle time and cancelled items say nothing."""
    clock = Clock()
    queue = QueueWait(clock)
    assert queue.estimate_s() == 0
    items = []

    def enter() -> None:
        item = queue.waits()
        items.append((item, item.__enter__()))

    def leave(answered: bool = True) -> None:
        item, first_answer = items.pop(0)
        if answered:
            first_answer()
        item.__exit__(None, None, None)

    for _ in range(20 + waiting + cancelled):
        enter()
    for _ in range(20):
        clock.now += 1 / pace
        leave()
    for _ in range(cancelled):
        leave(answered=False)
    assert queue.waiting == waiting
    assert queue.estimate_s() == pytest.approx((waiting + 1) / pace, rel=0.3)
    while items:
        leave()
    clock.now += idle
    assert queue.estimate_s() == 0
    enter()
    assert queue.estimate_s() <= 2.6 / pace


async def test_a_pace_measured_one_at_a_time_does_not_keep_an_engine_from_batching() -> None:
    """An answer takes 0.42 s however many there are, and the deadline is a second."""
    clock = Clock()
    admission = Admission(1000, 1.0)
    admission.wait = QueueWait(clock)
    under_way: list[tuple[float, Any, Any]] = []
    refused, most = [], 0
    for turn in range(2000):
        clock.now += 0.02
        while under_way and under_way[0][0] <= clock.now:
            _, item, first_answer = under_way.pop(0)
            first_answer()
            item.__exit__(None, None, None)
        if turn < 500 and under_way:  # quiet at first: one after the other
            continue
        try:
            with admission.take(1):
                item = admission.wait.waits()
                under_way.append((clock.now + 0.42, item, item.__enter__()))
        except QueueFull:
            refused.append(turn)
        most = max(most, len(under_way))
    assert max(refused, default=0) < 1000  # a while, until it knows better
    assert most > 15


async def test_what_would_come_too_late_is_refused_at_once(encoder: TextEncoder) -> None:
    async for service in run_service(encoder, request_timeout_s=100.0):
        wait = service.app.state.demur.admission.wait
        clock = Clock()
        wait._clock = clock
        wait._since = 0.0
        service.engine.release.clear()
        tasks = [asyncio.create_task(service.score(**GOOD)) for _ in range(20)]
        while service.engine.running < 20:
            await asyncio.sleep(0)
        # They come through at one in ten seconds: the wait for the next is over the deadline.
        for _ in range(10):
            clock.now += 10.0
            with wait.waits() as first_answer:
                first_answer()
        before = gauge_of("demur_refused_total", reason="wait")
        refused = await service.score(**GOOD)
        assert error_of(refused, 429)["code"] == "queue_full"
        assert gauge_of("demur_refused_total", reason="wait") == before + 1
        assert 1 <= int(refused.headers["Retry-After"]) <= 60
        for stream in (False, True):
            body = {"prompt": "a", "stream": stream}
            refused = await service.client.post("/v1/completions", json=body)
            assert error_of(refused, 429)["code"] == "queue_full"
        service.engine.release.set()
        assert {answer.status_code for answer in await asyncio.gather(*tasks)} == {200}
        assert (await service.score(**GOOD)).status_code == 200


@dataclass
class Listening:
    port: int
    engine: FakeEngine
    server: DrainingServer
    task: asyncio.Task[None]
    client: httpx.AsyncClient


@asynccontextmanager
async def listening(encoder: TextEncoder, **settings: Any) -> AsyncIterator[Listening]:
    """The app behind the real server, on a port."""
    engine = FakeEngine()

    async def start(_: Settings) -> tuple[str, FakeEngine, TextEncoder]:
        return "tiny", engine, encoder

    chosen = Settings(**{"ensemble": Path("unused"), "port": 0} | settings)
    app = create_app(chosen, start)
    server = listening_server(app, chosen)
    sock = socket.create_server(("127.0.0.1", 0))
    port = sock.getsockname()[1]
    task = asyncio.create_task(server._serve([sock]))  # `serve` would take the test's signals
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            while not await _is_ready(client):
                await asyncio.sleep(0.01)
            yield Listening(port, engine, server, task, client)
    finally:
        server.should_exit = True
        await task


async def _is_ready(client: httpx.AsyncClient) -> bool:
    try:
        return (await client.get("/ready")).status_code == 200
    except httpx.TransportError:
        return False


async def send(port: int, *parts: bytes, every_s: float = 0.0) -> bytes:
    """What comes back for bytes that are sent bit by bit, until the other side closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    answer = asyncio.create_task(_all_of(reader))
    try:
        with suppress(ConnectionError):
            for part in parts:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(every_s)
                if answer.done():
                    break
        return await asyncio.wait_for(answer, 30)
    finally:
        writer.close()


async def _all_of(reader: asyncio.StreamReader) -> bytes:
    """Also what came before the other side, to which we still wrote, had closed."""
    came = b""
    with suppress(ConnectionError):
        while part := await reader.read(2**16):
            came += part
    return came


HEAD = b"POST /v1/score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


async def test_a_body_that_trickles_in_gets_a_408(encoder: TextEncoder) -> None:
    async with listening(encoder, body_timeout_s=0.3) as it:
        trickle = [HEAD + b"Content-Length: 1000\r\n\r\n"] + [b" "] * 999
        answer = await send(it.port, *trickle, every_s=0.02)
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b'"code":"body_too_slow"' in answer
        assert b"connection: close" in answer.lower()
        chunked = [HEAD + b"Transfer-Encoding: chunked\r\n\r\n"] + [b"1\r\n \r\n"] * 999
        assert (await send(it.port, *chunked, every_s=0.02)).startswith(b"HTTP/1.1 408 ")


async def test_headers_that_do_not_come_end_the_connection(encoder: TextEncoder) -> None:
    async with listening(encoder, header_timeout_s=0.3) as it:
        assert await send(it.port) == b""
        assert (
            await send(it.port, *[HEAD[i : i + 1] for i in range(len(HEAD))], every_s=0.02) == b""
        )
        # An answer that takes longer than headers may is none of its business.
        whole = HEAD + b"Connection: close\r\nContent-Length: 35\r\n\r\n"
        whole += b'{"prompt": "abc", "response": "de"}'
        assert (await send(it.port, whole)).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    "first",
    [
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n",
        # Refused before its body, of which a byte comes now and then.
        HEAD + b"Content-Length: 1000\r\n\r\n",
    ],
)
async def test_a_second_request_that_does_not_come_ends_the_connection(
    encoder: TextEncoder, first: bytes
) -> None:
    async with listening(encoder, header_timeout_s=0.3, api_keys=["key"]) as it:
        trickle = [first] + [b"\r\n" if b"GET" in first else b" "] * 500
        answer = await send(it.port, *trickle, every_s=0.02)
        assert answer.startswith((b"HTTP/1.1 200 ", b"HTTP/1.1 401 "))


async def test_headers_without_end_end_the_connection(encoder: TextEncoder) -> None:
    async with listening(encoder) as it:
        assert await send(it.port, HEAD, *[b"x: " + b"a" * 10_000 + b"\r\n"] * 100) == b""
        assert it.engine.calls == 0
        # A large body that comes with its headers is none of that.
        body = b'{"prompt": "a", "response": "b"' + b" " * 500_000 + b"}"
        whole = HEAD + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        assert (await send(it.port, whole)).startswith(b"HTTP/1.1 200 ")


async def test_a_slow_answer_outlives_the_time_for_headers(encoder: TextEncoder) -> None:
    async with listening(encoder, header_timeout_s=0.1) as it:
        it.engine.release.clear()
        asyncio.get_running_loop().call_later(0.5, it.engine.release.set)
        for _ in range(2):  # the second on the connection of the first
            assert (await it.client.post("/v1/score", json=GOOD)).status_code == 200


async def test_connections_beyond_the_limit_are_closed(encoder: TextEncoder) -> None:
    async with listening(encoder, max_connections=3) as it:
        assert (await it.client.get("/ready")).status_code == 200
        held = [await asyncio.open_connection("127.0.0.1", it.port) for _ in range(2)]
        assert await send(it.port, b"GET /ready HTTP/1.1\r\nHost: localhost\r\n\r\n") == b""
        for _, writer in held:
            writer.close()
        assert (await it.client.get("/ready")).status_code == 200


def test_more_files_may_be_open_than_is_usual() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, before[1]))
    try:
        raise_file_limit()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert hard == before[1]
    assert soft > Settings.model_fields["max_connections"].default


async def test_sigterm_drains(encoder: TextEncoder) -> None:
    """Readiness drops first, all is answered meanwhile, what is under way ends."""
    async with listening(encoder, drain_s=0.5) as it:
        it.engine.release.clear()
        under_way = asyncio.create_task(it.client.post("/v1/score", json=GOOD))
        while not it.engine.running:
            await asyncio.sleep(0.01)
        it.server.handle_exit(signal.SIGTERM, None)
        stopping = await it.client.get("/ready")
        assert "stopping" in error_of(stopping, 503)["message"]
        assert (await it.client.get("/health")).status_code == 200
        late = asyncio.create_task(it.client.post("/v1/score", json=GOOD))
        while it.engine.running < 2:
            await asyncio.sleep(0.01)
        while it.server.servers[0].is_serving():
            await asyncio.sleep(0.01)
        assert not it.task.done()
        it.engine.release.set()
        assert (await under_way).status_code == (await late).status_code == 200
        await asyncio.wait_for(it.task, 30)
        assert not it.engine.alive


async def test_a_request_on_its_way_at_the_end_is_answered(encoder: TextEncoder) -> None:
    body = json.dumps(GOOD).encode()
    head = b"POST /v1/score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    request = head + b"Content-Length: %d\r\n\r\n" % len(body) + body
    async with listening(encoder, drain_s=0) as it:
        reader, writer = await asyncio.open_connection("127.0.0.1", it.port)
        unused, unused_writer = await asyncio.open_connection("127.0.0.1", it.port)
        while len(it.server.server_state.connections) < 3:  # ours, and one of httpx
            await asyncio.sleep(0.01)
        it.server.handle_exit(signal.SIGTERM, None)
        while it.server.servers[0].is_serving():
            await asyncio.sleep(0.01)
        writer.write(request)
        answer = await asyncio.wait_for(reader.read(), 10)
        assert answer.startswith(b"HTTP/1.1 200")
        assert b"connection: close" in answer.lower()
        assert await asyncio.wait_for(unused.read(), 10) == b""
        writer.close()
        unused_writer.close()
        await asyncio.wait_for(it.task, 30)


async def test_what_does_not_end_in_time_is_told_so(encoder: TextEncoder) -> None:
    settings: dict[str, Any] = {"drain_s": 0, "shutdown_grace_s": 1}
    async with listening(encoder, **settings) as it:
        it.engine.pauses_after = 2
        body = {"prompt": "ab", "max_tokens": 20, "stream": True}
        async with it.client.stream("POST", "/v1/completions", json=body) as stream:
            lines = stream.aiter_lines()
            first = await anext(lines)
            scored = asyncio.create_task(it.client.post("/v1/score", json=GOOD))
            while it.engine.running < 2:
                await asyncio.sleep(0.01)
            it.server.handle_exit(signal.SIGTERM, None)
            rest = [line async for line in lines if line]
        assert first.startswith("data: {")
        assert '"error"' in rest[-1]
        assert "stopping" in rest[-1]
        assert "stopping" in error_of(await scored, 503)["message"]
        await asyncio.wait_for(it.task, 30)


async def test_what_a_list_still_has_is_told_so(encoder: TextEncoder) -> None:
    settings: dict[str, Any] = {"drain_s": 0, "shutdown_grace_s": 1, "batch_concurrency": 4}
    async with listening(encoder, **settings) as it:
        it.engine.release.clear()
        listed = asyncio.create_task(it.client.post("/v1/score", json=[GOOD] * 20))
        while it.engine.running < 4:
            await asyncio.sleep(0.01)
        it.server.handle_exit(signal.SIGTERM, None)
        answer = await listed
        assert answer.status_code == 200
        assert {item["error"]["code"] for item in answer.json()["data"]} == {"not_ready"}
        assert it.engine.calls == 4  # none began after the end
        await asyncio.wait_for(it.task, 30)


async def test_a_second_signal_does_not_wait(encoder: TextEncoder) -> None:
    async with listening(encoder, drain_s=1e6) as it:
        it.server.handle_exit(signal.SIGTERM, None)
        await asyncio.sleep(0.1)
        assert not it.task.done()
        it.server.handle_exit(signal.SIGTERM, None)
        await asyncio.wait_for(it.task, 30)
