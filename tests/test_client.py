"""The SDK against the real app (fake engine), in this process: one client, and the other."""

from __future__ import annotations

import asyncio
import inspect
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import demur
import httpx
import pytest
from demur import AsyncClient, Client, DemurError, Score
from starlette.testclient import TestClient

from drafts.text import TextEncoder
from server.app import create_app
from server.settings import Settings
from tests.fake_engine import END, FakeEngine

QUESTION = [{"role": "user", "content": "Capital?"}]
GOOD = {"prompt": "The capital is", "response": " Tokyo."}


class Caller:
    """A client of either kind, whose calls are awaited all the same."""

    def __init__(self, client: Client | AsyncClient, engine: FakeEngine) -> None:
        self.client = client
        self.engine = engine

    async def __call__(self, name: str, *arguments: Any, **options: Any) -> Any:
        if isinstance(self.client, Client):
            # In a thread, so that the loop goes on.
            return await asyncio.to_thread(getattr(self.client, name), *arguments, **options)
        return await getattr(self.client, name)(*arguments, **options)

    async def each(self, iterator: Any) -> list[Any]:
        if hasattr(iterator, "__aiter__"):
            return [item async for item in iterator]
        return await asyncio.to_thread(list, iterator)


def bridge(server: TestClient) -> httpx.MockTransport:
    """What a synchronous client sends, into the app."""

    def forward(request: httpx.Request) -> httpx.Response:
        path, headers = str(request.url.raw_path, "ascii"), dict(request.headers)
        answer = server.request(request.method, path, content=request.read(), headers=headers)
        return httpx.Response(
            answer.status_code, headers=dict(answer.headers), content=answer.content
        )

    return httpx.MockTransport(forward)


@pytest.fixture(params=["sync", "async"])
async def call(encoder: TextEncoder, request: pytest.FixtureRequest) -> AsyncIterator[Caller]:
    engine = FakeEngine()

    async def start(_: Settings) -> tuple[str, FakeEngine, TextEncoder]:
        return "tiny", engine, encoder

    app = create_app(Settings(ensemble=Path("unused"), api_keys=["key"], admin_keys=["key"]), start)
    if request.param == "sync":
        with TestClient(app) as server:
            while server.get("/ready").status_code != 200:
                pass
            with Client("http://testserver", api_key="key", transport=bridge(server)) as client:
                yield Caller(client, engine)
        return
    async with app.router.lifespan_context(app):
        while app.state.demur.serving is None:
            await asyncio.sleep(0)
        transport = httpx.ASGITransport(app)
        async with AsyncClient("http://demur", api_key="key", transport=transport) as client:
            yield Caller(client, engine)


def speak(call: Caller, encoder: TextEncoder, text: str) -> None:
    call.engine.answer = [*encoder.tokenizer.encode(text).ids, END]


async def test_score(call: Caller) -> None:
    score = await call("score", "Tokyo.", messages=QUESTION)
    assert score.text == "Tokyo."
    assert score.hallucination_score is None
    assert score.sequence["n_tokens"] == len(score.tokens) == score.usage.completion_tokens
    assert (await call("score", " Tokyo.", prompt="The capital is")).tokens
    as_string = await call("score", "Tokyo.", messages="Capital?", store=False)
    assert as_string.tokens == score.tokens
    assert await call("ready")


@pytest.mark.parametrize(
    ("arguments", "error", "param"),
    [
        ({"response": ""}, demur.BadRequestError, "response"),
        ({"response": "x", "model": "other"}, demur.NotFoundError, "model"),
        ({"response": "word " * 99}, demur.RequestTooLargeError, None),
    ],
)
async def test_errors(
    call: Caller, arguments: dict[str, Any], error: type[demur.APIStatusError], param: str | None
) -> None:
    with pytest.raises(error) as caught:
        await call("score", messages=QUESTION, **arguments)
    assert caught.value.param == param
    assert caught.value.request_id
    assert caught.value.request_id in str(caught.value)
    assert isinstance(caught.value, demur.DemurError)


async def test_a_wrong_key_is_told_where_to_put_a_right_one(call: Caller) -> None:
    call.client._http.headers["Authorization"] = "Bearer wrong"
    with pytest.raises(demur.AuthenticationError, match=r"valid key.*DEMUR_API_KEY.*api_key="):
        await call("score", **GOOD)


async def test_many_items_keep_their_order_and_fail_alone(call: Caller) -> None:
    items: list[Any] = [GOOD | {"response": f" {n}"} for n in range(30)]
    items[3] = GOOD | {"seed": 1}
    items[4] = "no mapping"
    items[5] = {"prompt": "no response"}
    items[6] = GOOD | {"response": ""}
    items[7] = GOOD | {"response": "\ud800"}
    items[8] = DemurError("bad before")
    items[9] = GOOD | {"threshold": object()}
    seen: list[int] = []
    results = await call(
        "score_many", items, concurrency=4, on_done=lambda index, _: seen.append(index)
    )
    bad = {3, 4, 5, 6, 7, 8, 9}
    assert {i for i, result in enumerate(results) if isinstance(result, DemurError)} == bad
    assert [r.text for r in results if isinstance(r, Score)] == [
        f" {n}" for n in range(30) if n not in bad
    ]
    assert seen == list(range(30))
    assert "seed" in str(results[3])
    assert "str is no item" in str(results[4])
    assert "no response" in str(results[5])
    assert isinstance(results[6], demur.BadRequestError)
    assert "Unicode" in str(results[7])
    assert results[8] is items[8]
    assert "JSON" in str(results[9])


async def test_items_are_taken_as_they_are_needed(call: Caller) -> None:
    taken = 0

    def endless() -> Any:
        nonlocal taken
        while True:
            taken += 1
            yield GOOD

    results = call.client.score_iter(endless(), concurrency=3)
    for _ in range(10):
        if isinstance(call.client, Client):
            await asyncio.to_thread(next, results)  # type: ignore[call-overload]
        else:
            await anext(results)  # type: ignore[arg-type]
    assert 10 <= taken <= 10 + 2 * 3
    assert call.engine.most_running <= 3
    await (asyncio.to_thread(results.close) if hasattr(results, "close") else results.aclose())
    with pytest.raises(ValueError, match="at least 1"):
        call.client.score_iter([], concurrency=0)


async def test_chat(call: Caller, encoder: TextEncoder) -> None:
    speak(call, encoder, "The capital is 東京 🎉.")
    answer = await call("chat", "Capital?", temperature=0)
    assert answer.text == "The capital is 東京 🎉."
    (choice,) = answer.choices
    assert "".join(token.token for token in choice.tokens) == answer.text
    assert choice.finish_reason == "stop"
    assert choice.uncertainty.sequence["n_tokens"] == len(choice.tokens)
    assert str(choice.heatmap()).startswith(answer.text)
    bare = await call("chat", QUESTION, uncertainty=False, n=2, stop=["is"])
    assert [choice.text for choice in bare.choices] == ["The capital "] * 2
    with pytest.raises(DemurError, match="uncertainty=True"):
        bare.heatmap()


async def test_a_stream_adds_up_to_the_whole_answer(call: Caller, encoder: TextEncoder) -> None:
    speak(call, encoder, "The capital is 東京 🎉.")
    options = {"top_logprobs": 1, "logprobs": True, "n": 2}
    whole = await call("chat", QUESTION, **options)
    stream = await call("chat", QUESTION, stream=True, **options)
    with pytest.raises(DemurError, match="read to its end"):
        stream.completion()
    chunks = await call.each(stream)
    assert len(chunks) > 5
    assert "".join(chunk.text for chunk in chunks) == whole.text
    own = {"id", "created"}
    assert stream.completion().model_dump(exclude=own | {"choices"}) == whole.model_dump(
        exclude=own | {"choices"}
    )
    for streamed, choice in zip(stream.completion().choices, whole.choices, strict=True):
        assert streamed.text == choice.text
        assert streamed.tokens == choice.tokens
        assert streamed.uncertainty == choice.uncertainty
        assert streamed.finish_reason == choice.finish_reason
    assert await call.each(stream) == []


async def test_doubt_ends_an_answer(call: Caller) -> None:
    stop = {"threshold": 0.0, "window": 2}
    answer = await call("chat", QUESTION, uncertainty_stop=stop)
    assert answer.choices[0].finish_reason == "uncertainty"
    stream = await call("chat", QUESTION, uncertainty_stop=stop, stream=True)
    await call.each(stream)
    assert stream.completion().choices[0].finish_reason == "uncertainty"


async def test_an_error_in_the_middle_of_a_stream(call: Caller) -> None:
    call.engine.fails_after = 2
    stream = await call("chat", QUESTION, stream=True)
    with pytest.raises(demur.StreamError, match="NaN") as caught:
        await call.each(stream)
    assert caught.value.code == "not_finite"


async def test_a_stream_that_cannot_begin(call: Caller) -> None:
    with pytest.raises(demur.BadRequestError, match="temperature"):
        await call("chat", QUESTION, stream=True, temperature=9)


async def test_what_is_served(call: Caller) -> None:
    (model,) = await call("models")
    assert (model.id, model.drafts, model.added_passes) == ("tiny", 4, 0.25)
    drafts = await call("drafts")
    assert drafts.weights_version == model.weights_version
    assert [draft.name for draft in drafts.data] == ["early", "draft_a", "draft_b", "draft_c"]
    assert drafts.data[0].layer == 3


def test_both_clients_have_one_shape() -> None:
    def public(kind: type) -> dict[str, Any]:
        return {
            name: list(inspect.signature(member).parameters.values())
            for name, member in vars(kind).items()
            if callable(member) and not name.startswith("_")
        }

    one, other = public(Client), public(AsyncClient)
    one["aclose"] = one.pop("close")
    names = {name: [p.name for p in parameters] for name, parameters in one.items()}
    assert names == {name: [p.name for p in parameters] for name, parameters in other.items()}
    for name in ("score", "chat"):
        assert one[name] == other[name]


def test_the_sdk_needs_no_torch_no_server_and_no_terminal() -> None:
    # httpx imports rich and click itself where they are installed, for a command of its own.
    check = (
        "import sys; sys.modules.update(dict.fromkeys(['rich', 'typer', 'click'])); import demur;"
        "heavy = {'torch', 'numpy', 'transformers', 'vllm', 'fastapi', 'server', 'drafts'}"
        "& set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", check], check=True)


def test_exports() -> None:
    assert demur.__all__ == sorted(demur.__all__)
    for name in demur.__all__:
        assert getattr(demur, name).__module__.startswith("demur.")


def test_base_urls_as_people_paste_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for given in ("http://a:1", "http://a:1/", "http://a:1/v1", "http://a:1/v1/"):
        assert Client(given)._http.base_url == "http://a:1"
        assert AsyncClient(given)._http.base_url == "http://a:1"
    assert Client("https://a/demur/v1/")._http.base_url == "https://a/demur/"
    monkeypatch.setenv("DEMUR_BASE_URL", "http://b/v1")
    monkeypatch.setenv("DEMUR_API_KEY", "secret")
    assert Client()._http.base_url == "http://b"
    assert Client()._http.headers["Authorization"] == "Bearer secret"
    assert AsyncClient("http://c", api_key="own")._http.headers["Authorization"] == "Bearer own"


def test_what_no_request_can_carry_is_said() -> None:
    for url in ("http://[::1", "localhost:8000", "ftp://a", "http://"):
        with pytest.raises(DemurError, match="is no URL"):
            Client(url)
    for key in ("\u00e9", "line\n"):
        with pytest.raises(DemurError, match="no header can carry"):
            Client(api_key=key)
    with Client() as client, pytest.raises(DemurError, match="not valid Unicode"):
        client.score("a\udcff", prompt="b")
    with Client() as client, pytest.raises(DemurError, match="as JSON"):
        client.score("a", prompt="b", threshold=float("nan"))
