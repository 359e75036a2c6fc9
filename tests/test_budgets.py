"""What a key may use a minute."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drafts.text import TextEncoder
from server.budgets import Budgets
from server.errors import RateLimited
from server.keys import Key, digest_of
from tests.conftest import Service, run_service
from tests.redis_server import RedisServer
from tests.serving import gauge_of
from tests.test_auth import keys_file
from tests.test_http import error_of

SCORE = {"prompt": "abcd", "response": "efgh"}


async def post(service: Service, path: str, body: Any, key: str = "admin") -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"}
    return await service.client.post(path, json=body, headers=headers)


async def test_requests(encoder: TextEncoder, tmp_path: Path) -> None:
    file = keys_file(tmp_path, requests_per_minute=3)
    async for service in run_service(encoder, keys_file=file):
        for _ in range(3):
            assert (await post(service, "/v1/score", SCORE)).status_code == 200
        refused = await post(service, "/v1/score", SCORE)
        assert error_of(refused, 429)["code"] == "rate_limit_exceeded"
        assert 1 <= int(refused.headers["Retry-After"]) <= 120
        # Others have budgets of their own, and what asks the engine nothing is not counted.
        assert (await post(service, "/v1/score", SCORE, "score")).status_code == 200
        headers = {"Authorization": "Bearer admin"}
        assert (await service.client.get("/v1/models", headers=headers)).status_code == 200


async def test_tokens_of_scores(encoder: TextEncoder, tmp_path: Path) -> None:
    file = keys_file(tmp_path, tokens_per_minute=20)
    async for service in run_service(encoder, keys_file=file):
        first = await post(service, "/v1/score", SCORE)
        used = first.json()["usage"]["total_tokens"]
        assert used == 7
        # In a list each item counts for itself.
        items = (await post(service, "/v1/score", [SCORE] * 3)).json()["data"]
        codes = sorted(str(item["error"] and item["error"]["code"]) for item in items)
        assert codes == ["None", "rate_limit_exceeded", "rate_limit_exceeded"]
        calls = service.engine.calls
        error_of(await post(service, "/v1/score", SCORE), 429)
        assert service.engine.calls == calls  # the engine did not see it


async def test_tokens_of_generations_count_as_they_may_come_to(
    encoder: TextEncoder, tmp_path: Path
) -> None:
    file = keys_file(tmp_path, tokens_per_minute=20)
    async for service in run_service(encoder, keys_file=file):
        body = {"prompt": "abcd", "max_tokens": 8}
        assert (await post(service, "/v1/completions", body)).status_code == 200
        for stream in (False, True):
            refused = await post(service, "/v1/completions", body | {"stream": stream})
            assert error_of(refused, 429)["code"] == "rate_limit_exceeded"
        # What can never fit says so, and is not worth a wait.
        refused = await post(service, "/v1/completions", body | {"n": 9})
        assert "never fit" in error_of(refused, 429)["message"]
        assert "Retry-After" not in refused.headers
        before = gauge_of("demur_key_refused_total", key="admin", budget="tokens")
        await post(service, "/v1/completions", body)
        assert gauge_of("demur_key_refused_total", key="admin", budget="tokens") == before + 1


@settings(max_examples=60, deadline=None)
@given(
    amount=st.integers(1, 200),
    uses=st.lists(st.tuples(st.floats(0, 40), st.integers(1, 60)), min_size=1, max_size=30),
)
async def test_who_waits_as_told_is_let_in_and_not_much_sooner(
    amount: int, uses: list[tuple[float, int]]
) -> None:
    now = 1_000_000.0
    clock = SimpleNamespace(time=lambda: now)
    budgets = Budgets(None)
    key = Key(name="k", sha256=digest_of("k"), scopes=frozenset(), tokens_per_minute=amount)

    async def wait_for(cost: int) -> int | None:
        try:
            await budgets.tokens(key, cost)
        except RateLimited as refused:
            return int(refused.headers["Retry-After"])
        return None

    with patch("limits.aio.storage.memory.time", clock):
        for pause, cost in uses:
            now += pause
            cost = min(cost, amount)
            wait = await wait_for(cost)
            if wait is None:
                continue
            assert 1 <= wait <= 120
            if wait > 1:
                now += wait - 1.01
                assert await wait_for(cost) is not None
                now -= wait - 1.01
            now += wait
            assert await wait_for(cost) is None


def _key(requests: int) -> Key:
    return Key(
        name="shared", sha256=digest_of("k"), scopes=frozenset(), requests_per_minute=requests
    )


async def allowed(budgets: Budgets, key: Key) -> bool:
    try:
        await budgets.request(key)
    except RateLimited:
        return False
    return True


async def test_several_services_share_one_count(tmp_path: Path) -> None:
    redis = RedisServer(tmp_path)
    try:
        services = [Budgets(redis.url), Budgets(redis.url)]
        answers = [await allowed(services[i % 2], _key(5)) for i in range(8)]
        assert answers == [True] * 5 + [False] * 3
    finally:
        redis.kill()


async def test_while_redis_is_away_each_counts_for_itself(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    redis = RedisServer(tmp_path)
    try:
        budgets = Budgets(redis.url)
        key = _key(3)
        assert await allowed(budgets, key)
        redis.kill()
        answers = [await allowed(budgets, key) for _ in range(5)]
        assert answers == [True] * 3 + [False] * 2
        assert len([r for r in caplog.records if "cannot be shared" in r.message]) == 1
        redis.start()
        monkeypatch.setattr(budgets, "_away_until", 0.0)
        # What was counted before it went away is there still.
        assert [await allowed(budgets, key) for _ in range(3)] == [True, True, False]
    finally:
        redis.kill()
