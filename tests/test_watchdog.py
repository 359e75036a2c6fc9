"""An engine that dies or hangs is started again, and meanwhile nothing waits for it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from drafts.errors import EngineNotReady
from drafts.text import TextEncoder
from server.app import create_app
from server.settings import Settings
from server.watchdog import Backoff
from tests.fake_engine import FakeEngine
from tests.serving import gauge_of
from tests.test_http import GOOD, error_of


class Starts:
    """Brings up fakes; each start can be made to fail or to wait."""

    def __init__(self, encoder: TextEncoder) -> None:
        self.encoder = encoder
        self.engines: list[FakeEngine] = []
        self.fails = 0
        self.may = asyncio.Event()
        self.may.set()

    async def __call__(self, _: Settings) -> tuple[str, FakeEngine, TextEncoder]:
        await self.may.wait()
        if self.fails:
            self.fails -= 1
            raise EngineNotReady("no memory")
        self.engines.append(FakeEngine())
        return "tiny", self.engines[-1], self.encoder


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.watchdog._LOOK_EVERY_S", 0.01)
    monkeypatch.setattr("server.watchdog._PING_EVERY_S", 0.02)
    monkeypatch.setattr("server.watchdog._WAITS_S", (0.0, 0.01))


@asynccontextmanager
async def watched(
    encoder: TextEncoder, **settings: Any
) -> AsyncIterator[tuple[httpx.AsyncClient, Starts, Any]]:
    starts = Starts(encoder)
    app = create_app(Settings(**{"ensemble": Path("unused")} | settings), starts)
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            await until(client, "/ready", 200)
            yield client, starts, app.state.demur


async def until(client: httpx.AsyncClient, path: str, status: int) -> httpx.Response:
    async with asyncio.timeout(30):
        while (answer := await client.get(path)).status_code != status:
            await asyncio.sleep(0.005)
    return answer


async def test_an_engine_that_dies_is_started_again(encoder: TextEncoder) -> None:
    async with watched(encoder) as (client, starts, _):
        failures = gauge_of("demur_engine_failures_total")
        starts.may.clear()
        starts.engines[0].alive = False
        for path in ("/v1/score", "/v1/completions"):
            body = GOOD if path == "/v1/score" else {"prompt": "a"}
            refused = await client.post(path, json=body)
            assert error_of(refused, 503)["code"] == "not_ready"
            assert int(refused.headers["Retry-After"]) > 0
        await until(client, "/ready", 503)
        async with asyncio.timeout(30):
            while gauge_of("demur_engine_failures_total") == failures:
                await asyncio.sleep(0.005)
        assert gauge_of("demur_ready") == 0
        # The process mends it by itself: no supervisor should end it.
        assert (await client.get("/health")).status_code == 200
        starts.may.set()
        await until(client, "/ready", 200)
        assert gauge_of("demur_ready") == 1
        assert len(starts.engines) == 2
        assert (await client.post("/v1/score", json=GOOD)).status_code == 200
        assert starts.engines[1].calls == 1


async def test_an_engine_that_hangs_is_killed_and_what_waits_is_told(
    encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with watched(encoder, engine_hang_s=0.05) as (client, starts, _):
        first = starts.engines[0]
        first.release.clear()

        async def ping(within_s: float) -> None:
            await asyncio.sleep(within_s)
            raise EngineNotReady(f"the engine has not answered for {within_s:g} s")

        async def kill() -> None:
            await first.abort_all()
            first.alive = False

        monkeypatch.setattr(first, "kill", kill)
        waiting = asyncio.create_task(client.post("/v1/score", json=GOOD))
        while not first.running:
            await asyncio.sleep(0)
        monkeypatch.setattr(first, "ping", ping)
        refused = await waiting
        assert error_of(refused, 503)["code"] == "not_ready"
        assert refused.headers["Retry-After"]
        await until(client, "/ready", 200)
        assert (await client.post("/v1/score", json=GOOD)).status_code == 200


async def test_starts_that_fail_again_and_again_are_unhealthy(encoder: TextEncoder) -> None:
    async with watched(encoder) as (client, starts, state):
        starts.fails = 10**9
        starts.engines[0].alive = False
        unhealthy = await until(client, "/health", 503)
        assert "no memory" in error_of(unhealthy, 503)["message"]
        # It goes on trying.
        starts.fails = 0
        await until(client, "/ready", 200)
        assert (await client.get("/health")).status_code == 200
        assert state.failure is None


async def test_it_can_end_while_the_engine_is_started_again(encoder: TextEncoder) -> None:
    async with watched(encoder) as (client, starts, _):
        starts.may.clear()
        starts.engines[0].alive = False
        await until(client, "/ready", 503)
        await asyncio.sleep(0.1)
        asyncio.get_running_loop().call_later(0.2, starts.may.set)
    assert not starts.engines[-1].alive  # the one that came up too late was stopped, too


async def test_an_error_that_nobody_expected_is_a_failure_too(
    encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The watchdog must not die of what vLLM raises while a worker dies."""

    async def explode(*_: object) -> None:
        raise RuntimeError("cancelled")

    async with watched(encoder) as (client, starts, _):
        monkeypatch.setattr(starts.engines[0], "kill", explode)
        monkeypatch.setattr(starts.engines[0], "ping", explode)
        async with asyncio.timeout(30):
            while len(starts.engines) < 2:
                await asyncio.sleep(0.005)
        await until(client, "/ready", 200)
        starts.engines[1].alive = False
        async with asyncio.timeout(30):
            while len(starts.engines) < 3:
                await asyncio.sleep(0.005)
        await until(client, "/ready", 200)


async def test_waits_grow_and_start_over(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("server.watchdog.time.monotonic", lambda: now[0])
    monkeypatch.setattr("server.watchdog._WAITS_S", (0.0, 5.0, 30.0))
    backoff = Backoff()
    waits = []
    for _ in range(4):  # each comes up, and dies soon
        backoff.begin()
        now[0] += 10
        waits.append(backoff.wait_s())
    assert waits == [0.0, 5.0, 30.0, 30.0]
    for _ in range(10):  # none comes up: that takes time, and is no life
        now[0] += 100
        assert backoff.wait_s() == 30.0
    backoff.begin()
    now[0] += 1000
    assert [backoff.wait_s(), backoff.wait_s()] == [0.0, 5.0]
