"""The HTTP contract, against the real app and a fake engine."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import REGISTRY

from drafts.text import TextEncoder
from server.app import create_app
from server.settings import Settings
from tests.conftest import Service, run_service
from tests.hang_up import hang_up

QUESTION = [{"role": "user", "content": "Capital?"}]
GOOD: dict[str, Any] = {"messages": QUESTION, "response": "Tokyo."}


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error object, once its shape has been checked."""
    assert response.status_code == status, response.text
    body = response.json()
    assert list(body) == ["error"]
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    return dict(body["error"])


async def test_a_score_has_the_contracts_shape(service: Service) -> None:
    response = await service.score(**GOOD, threshold=0.5)
    assert response.status_code == 200
    score = response.json()
    assert score["object"] == "uncertainty.score"
    assert score["model"] == "tiny"
    assert score["estimator"] == {
        "name": "epistemic",
        "drafts": 4,
        "weights_version": "fake-1",
        "support": "full",
    }
    # Nothing is called a probability without a calibrator.
    assert score["hallucination_score"] is None
    assert score["flagged"] is None
    assert score["threshold"] == 0.5
    tokens = score["tokens"]
    assert "".join(token["token"] for token in tokens) == "Tokyo."
    assert b"".join(bytes(token["bytes"]) for token in tokens) == b"Tokyo."
    for token in tokens:
        assert token["epistemic"] == pytest.approx(token["jsd"] + token["kl"])
        assert token["total"] == pytest.approx(token["aleatoric"] + token["jsd"])
    usage = score["usage"]
    assert usage["completion_tokens"] == len(tokens) == score["sequence"]["n_tokens"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    mean = sum(token["epistemic"] for token in tokens) / len(tokens)
    assert score["sequence"]["epistemic_mean"] == pytest.approx(mean)
    assert score["sequence"]["epistemic_sum"] == pytest.approx(mean * len(tokens))


async def test_prompt_and_text_parts(service: Service) -> None:
    assert (await service.score(prompt="The capital is", response=" Tokyo.")).status_code == 200
    parts = [{"role": "user", "content": [{"type": "text", "text": "Capital?"}]}]
    one = (await service.score(messages=parts, response="Tokyo.")).json()
    other = (await service.score(**GOOD)).json()
    assert one["tokens"] == other["tokens"]


def _user(content: object) -> dict[str, object]:
    return {"role": "user", "content": content}


BAD: list[tuple[str, dict[str, Any], int, str | None]] = [
    ("empty response", {**GOOD, "response": ""}, 400, "response"),
    ("no response", {"messages": QUESTION}, 400, "response"),
    ("no messages", {"response": "x"}, 400, None),
    ("empty messages", {"messages": [], "response": "x"}, 400, "messages"),
    ("both", {**GOOD, "prompt": "x"}, 400, None),
    ("role", {**GOOD, "messages": [{"role": "wizard", "content": "x"}]}, 400, "messages[0].role"),
    ("model", {**GOOD, "model": "gpt-17"}, 404, "model"),
    ("too long", {**GOOD, "response": "word " * 200}, 413, None),
    ("wrong type", {**GOOD, "response": 7}, 400, "response"),
    ("messages type", {**GOOD, "messages": "hello"}, 400, "messages"),
    ("threshold type", {**GOOD, "threshold": "high"}, 400, "threshold"),
    ("threshold as text", {**GOOD, "threshold": "0.5"}, 400, "threshold"),
    ("threshold as truth", {**GOOD, "threshold": True}, 400, "threshold"),
    ("store as number", {**GOOD, "store": 1}, 400, "store"),
    (
        "content type",
        {"messages": [{"role": "user", "content": 7}], "response": "x"},
        400,
        "messages[0].content",
    ),
    (
        "part",
        {"messages": [{"role": "user", "content": [{"type": "text"}]}], "response": "x"},
        400,
        "messages[0].content[0].text",
    ),
    ("named item", {**GOOD, "item": 1}, 400, "item"),
    ("named list", {**GOOD, "list": 1}, 400, "list"),
    ("C1 control", {**GOOD, "response": "a\x9b2J"}, 400, "response"),
    ("threshold range", {**GOOD, "threshold": 1.5}, 400, "threshold"),
    ("seed", {**GOOD, "seed": 7}, 400, "seed"),
    ("control", {**GOOD, "response": "a\x00b"}, 400, "response"),
    ("escape", {"prompt": "\x1b[2J", "response": "b"}, 400, "prompt"),
    ("control in message", {**GOOD, "messages": [{"role": "user", "content": "\x07"}]}, 400, None),
]


@pytest.mark.parametrize(
    ("body", "status", "param"), [row[1:] for row in BAD], ids=[r[0] for r in BAD]
)
async def test_bad_items(
    service: Service, body: dict[str, Any], status: int, param: str | None
) -> None:
    error = error_of(await service.client.post("/v1/score", json=body), status)
    if param is not None:
        assert error["param"] == param
    assert (await service.score(**GOOD)).status_code == 200


RAW = [
    ("invalid JSON", b'{"response": ', "invalid_json"),
    ("no body", b"", None),
    ("a number", b"7", None),
    ("null", b"null", None),
    ("a string", b'"hello"', None),
    ("empty list", b"[]", None),
    ("deep", b"[" * 100_000, None),
    ("NaN threshold", b'{"prompt": "a", "response": "b", "threshold": NaN}', None),
    ("infinite threshold", b'{"prompt": "a", "response": "b", "threshold": 1e999}', None),
    ("surrogate", b'{"prompt": "a", "response": "\\ud800"}', None),
    (
        "surrogate in message",
        b'{"messages": [{"role": "user", "content": "\\udc00"}], "response": "b"}',
        None,
    ),
    ("surrogate in model", b'{"prompt": "a", "response": "b", "model": "\\ud800"}', None),
    ("not UTF-8", b'{"prompt": "a", "response": "\xff\xfe"}', None),
    ("huge integer", b'{"prompt": "a", "response": ' + b"9" * 10_000 + b"}", None),
]


@pytest.mark.parametrize(("content", "code"), [row[1:] for row in RAW], ids=[row[0] for row in RAW])
async def test_bad_bodies(service: Service, content: bytes, code: str | None) -> None:
    headers = {"Content-Type": "application/json"}
    response = await service.client.post("/v1/score", content=content, headers=headers)
    error = error_of(response, 400)
    if code is not None:
        assert error["code"] == code
    assert (await service.score(**GOOD)).status_code == 200


async def test_a_body_without_its_type_is_explained(service: Service) -> None:
    response = await service.client.post("/v1/score", content=json.dumps(GOOD).encode())
    error = error_of(response, 400)
    assert error["code"] == "not_json"
    assert "Content-Type: application/json" in error["message"]


async def test_a_bad_item_of_a_list_fails_alone(service: Service) -> None:
    items: list[Any] = [{"prompt": "a", "response": f"answer {i}"} for i in range(1000)]
    items[500] = {"prompt": "a", "response": "b", "model": "\ud800"}
    headers = {"Content-Type": "application/json"}  # httpx's own JSON refuses surrogates
    content = json.dumps(items).encode()
    response = await service.client.post("/v1/score", content=content, headers=headers)
    assert response.status_code == 200
    data = response.json()["data"]
    assert [item["index"] for item in data] == list(range(1000))
    assert [item["index"] for item in data if item["error"] is not None] == [500]
    assert data[500]["error"]["param"] == "model"
    assert data[500]["score"] is None
    texts = [
        "".join(token["token"] for token in item["score"]["tokens"])
        for item in data
        if item["score"]
    ]
    assert texts == [f"answer {i}" for i in range(1000) if i != 500]
    # A list leaves room in the engine for others.
    assert 1 < service.engine.most_running <= 32


async def test_items_of_a_list_fail_each_in_their_way(service: Service) -> None:
    items = [
        7,
        {"prompt": "a", "response": "x", "model": "nope"},
        {"prompt": "a", "response": "w " * 99},
    ]
    data = (await service.client.post("/v1/score", json=items)).json()["data"]
    assert [item["error"]["code"] for item in data] == [
        "invalid_request",
        "model_not_found",
        "context_length_exceeded",
    ]


async def test_the_answers_of_a_list_are_bounded_together(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = (await service.score(**GOOD)).json()["usage"]["completion_tokens"]
    monkeypatch.setattr("server.scoring._MAX_LIST_TOKENS", 2 * alone + 1)
    data = (await service.client.post("/v1/score", json=[GOOD] * 4)).json()["data"]
    # Which two is not told: the items are tokenised side by side.
    refused = [item["error"]["code"] for item in data if item["score"] is None]
    assert refused == ["list_too_long"] * 2
    assert (await service.score(**GOOD)).status_code == 200


def failing_once(score: Callable[..., Any]) -> Callable[..., Any]:
    asked = []

    async def fails_once(token_ids: Any, response_start: int) -> Any:
        asked.append(token_ids)
        if len(asked) == 1:
            raise RuntimeError("an accident")
        return await score(token_ids, response_start)

    return fails_once


async def test_an_item_that_fails_leaves_its_room_to_the_others(
    encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    async for service in run_service(encoder, batch_concurrency=1):
        alone = (await service.score(**GOOD)).json()["usage"]["completion_tokens"]
        monkeypatch.setattr("server.scoring._MAX_LIST_TOKENS", alone)
        monkeypatch.setattr(service.engine, "score", failing_once(service.engine.score))
        outcome = {"outcome": "internal_error"}
        before = REGISTRY.get_sample_value("demur_items_total", outcome) or 0
        data = (await service.client.post("/v1/score", json=[GOOD] * 3)).json()["data"]
        assert [item["error"] and item["error"]["code"] for item in data] == [
            "internal_error",
            None,
            "list_too_long",
        ]
        assert REGISTRY.get_sample_value("demur_items_total", outcome) == before + 1


async def test_a_list_over_the_limit_is_refused(service: Service) -> None:
    response = await service.client.post("/v1/score", json=[GOOD] * 1001)
    assert error_of(response, 400)["code"] == "too_many_items"


@pytest.mark.parametrize("declared", [True, False])
async def test_a_large_body_is_refused(service: Service, declared: bool) -> None:
    body = json.dumps({"prompt": "a", "response": "x" * 10_000_000}).encode()

    async def chunks() -> Any:
        for start in range(0, len(body), 65536):
            yield body[start : start + 65536]

    content = body if declared else chunks()
    headers = {"Content-Type": "application/json"}
    response = await service.client.post("/v1/score", content=content, headers=headers)
    assert error_of(response, 413)["code"] == "body_too_large"


async def test_unknown_routes_and_methods(service: Service) -> None:
    error_of(await service.client.get("/v1/nothing"), 404)
    error_of(await service.client.get("/v1/score"), 405)


async def test_request_ids(service: Service) -> None:
    given = await service.client.get("/health", headers={"X-Request-Id": "abc-1"})
    assert given.headers["X-Request-Id"] == "abc-1"
    made = [(await service.client.get("/health")).headers["X-Request-Id"] for _ in range(2)]
    assert made[0] != made[1]
    # What could break a log line is not echoed; errors carry an id as well.
    odd = await service.client.get("/v1/nothing", headers={"X-Request-Id": "x" * 500})
    assert 0 < len(odd.headers["X-Request-Id"]) < 100


async def test_keys(encoder: TextEncoder) -> None:
    async for service in run_service(encoder, api_keys=["right", "also-right"]):
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic right"}):
            response = await service.client.post("/v1/score", json=GOOD, headers=headers)
            assert error_of(response, 401)["code"] == "invalid_api_key"
        headers = {"Authorization": "Bearer also-right"}
        assert (
            await service.client.post("/v1/score", json=GOOD, headers=headers)
        ).status_code == 200
        assert (await service.client.get("/v1/models")).status_code == 401
        assert (await service.client.get("/health")).status_code == 200


async def test_a_full_queue_says_when_to_come_back(encoder: TextEncoder) -> None:
    async for service in run_service(encoder, max_pending=3, max_batch_items=3):
        service.engine.release.clear()
        waiting = [asyncio.create_task(service.score(**GOOD)) for _ in range(3)]
        while service.engine.running < 3:
            await asyncio.sleep(0.001)
        refused = await service.score(**GOOD)
        assert error_of(refused, 429)["code"] == "queue_full"
        assert int(refused.headers["Retry-After"]) >= 1
        service.engine.release.set()
        assert [(await task).status_code for task in waiting] == [200] * 3
        assert (await service.score(**GOOD)).status_code == 200


async def test_a_deadline(encoder: TextEncoder) -> None:
    async for service in run_service(encoder, request_timeout_s=0.05):
        service.engine.release.clear()
        assert error_of(await service.score(**GOOD), 504)["code"] == "deadline_exceeded"
        assert service.engine.cancelled == 1
        assert service.engine.running == 0


async def test_a_client_that_hangs_up_frees_its_place(service: Service) -> None:
    service.engine.release.clear()
    await hang_up(service.app, "/v1/score", GOOD, lambda _: service.engine.running == 1)
    assert service.engine.running == 0
    assert service.engine.cancelled == 1
    assert service.app.state.demur.admission.pending == 0


async def test_a_list_for_a_dead_engine_is_refused_whole(service: Service) -> None:
    service.engine.alive = False
    answer = await service.client.post("/v1/score", json=[GOOD])
    assert error_of(answer, 503)["code"] == "not_ready"
    assert answer.headers["Retry-After"]


async def test_broken_numbers_are_an_error_and_not_json_nan(service: Service) -> None:
    service.engine.broken_numbers = True
    assert error_of(await service.score(**GOOD), 500)["code"] == "not_finite"


async def test_an_unexpected_error_hides_its_insides(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(*_: object) -> None:
        raise RuntimeError("secret path /root/keys")

    monkeypatch.setattr("server.scoring.find_spans", explode)
    failed = await service.score(**GOOD)
    assert "secret" not in error_of(failed, 500)["message"]
    assert failed.headers["X-Request-Id"]
    counted = 'demur_requests_total{route="/v1/score",status="500"}'
    assert counted in (await service.client.get("/metrics")).text
    (item,) = (await service.client.post("/v1/score", json=[GOOD])).json()["data"]
    assert item["error"]["code"] == "internal_error"
    monkeypatch.undo()
    assert (await service.score(**GOOD)).status_code == 200


async def test_not_ready_while_starting_and_after_a_failed_start(encoder: TextEncoder) -> None:
    gate = asyncio.Event()
    failed = asyncio.Event()

    async def start(_: Settings) -> Any:
        await gate.wait()
        raise OSError("no such ensemble")

    app = create_app(Settings(ensemble=Path("unused")), start, failed.set)
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            starting = await client.get("/ready")
            assert "starting" in error_of(starting, 503)["message"]
            assert starting.headers["Retry-After"]
            error_of(await client.post("/v1/score", json=GOOD), 503)
            assert (await client.get("/health")).status_code == 200
            gate.set()
            await asyncio.wait_for(failed.wait(), 5)
            assert "no such ensemble" in error_of(await client.get("/ready"), 503)["message"]
            error_of(await client.get("/health"), 503)


async def test_models_version_metrics(service: Service) -> None:
    (model,) = (await service.client.get("/v1/models")).json()["data"]
    assert model["id"] == "tiny"
    assert model["weights_version"] == "fake-1"
    assert model["added_passes"] == service.engine.added_passes
    version = (await service.client.get("/version")).json()
    assert version["torch"].startswith("2.13.0")
    await service.score(**GOOD)
    text = (await service.client.get("/metrics")).text
    assert 'demur_items_total{outcome="ok"}' in text
    assert 'demur_requests_total{route="/v1/score",status="200"}' in text
