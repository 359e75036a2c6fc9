"""What the clients try again, after how long, and what they say when it did not help."""

from __future__ import annotations

import asyncio
import copy
import inspect
import json
import pickle
import threading
import time
from collections.abc import AsyncIterator, Callable
from email.utils import formatdate
from typing import Any

import demur
import httpx
import pytest
from demur import AsyncClient, Client
from demur.errors import from_response

Act = Callable[[httpx.Request], httpx.Response]
SCORE = {
    "id": "score-1",
    "created": 1,
    "model": "tiny",
    "estimator": {"name": "epistemic", "drafts": 4, "weights_version": "w", "support": "full"},
    "hallucination_score": None,
    "flagged": None,
    "threshold": None,
    "sequence": {"n_tokens": 0},
    "tokens": [],
    "spans": [],
    "usage": {"prompt_tokens": 1, "completion_tokens": 0, "total_tokens": 1},
    "of_a_newer_service": 1,
}


def good() -> httpx.Response:
    return httpx.Response(200, json=SCORE)


def refused(status: int, **headers: str) -> httpx.Response:
    body = {"error": {"message": "no", "type": "t", "param": None, "code": "c"}}
    return httpx.Response(status, json=body, headers=headers)


class Line:
    """A client of either kind on a line that goes through a list of happenings."""

    def __init__(self, kind: type[Client] | type[AsyncClient]) -> None:
        self.kind = kind
        self.waits: list[float] = []
        self.requests: list[httpx.Request] = []

    async def call(self, happenings: list[Any], name: str = "score", **options: Any) -> Any:
        left = iter(happenings)

        def handle(request: httpx.Request) -> httpx.Response:
            self.requests.append(request)
            happens = next(left)
            if isinstance(happens, httpx.RequestError):
                raise happens
            # A new one each time: a response is read once.
            headers = happens.headers.raw
            return httpx.Response(happens.status_code, headers=headers, content=happens.content)

        client = self.kind("http://demur", transport=httpx.MockTransport(handle), **options)
        arguments: dict[str, Any] = {"response": "x", "prompt": "y"} if name == "score" else {}
        answer = getattr(client, name)(**arguments)
        return await answer if inspect.isawaitable(answer) else answer


@pytest.fixture(params=[Client, AsyncClient])
def line(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Line:
    line = Line(request.param)

    async def sleep(seconds: float) -> None:
        line.waits.append(seconds)

    monkeypatch.setattr(time, "sleep", line.waits.append)
    monkeypatch.setattr(asyncio, "sleep", sleep)
    return line


@pytest.mark.parametrize(
    "failure",
    [
        httpx.ConnectError("refused"),
        httpx.ConnectTimeout("too long"),
        httpx.ReadError("reset"),
        httpx.RemoteProtocolError("disconnected"),
        *(refused(status) for status in (408, 429, 502, 503)),
    ],
    ids=str,
)
async def test_what_can_pass_is_tried_again(line: Line, failure: Any) -> None:
    score = await line.call([failure, failure, good()])
    assert score.model_extra == {"of_a_newer_service": 1}
    first, second = line.waits
    assert 0.3 < first < 0.7
    assert 0.7 < second < 1.3
    assert len({request.content for request in line.requests}) == 1


@pytest.mark.parametrize("failure", [httpx.ConnectError("refused"), refused(503)], ids=str)
async def test_tries_come_to_an_end(line: Line, failure: Any) -> None:
    with pytest.raises(demur.APIError):
        await line.call([failure] * 3)
    assert len(line.waits) == 2
    with pytest.raises(demur.APIError):
        await line.call([failure], max_retries=0)
    assert len(line.waits) == 2


@pytest.mark.parametrize(
    "failure",
    [
        httpx.ReadTimeout("slow"),
        httpx.WriteTimeout("slow"),
        httpx.DecodingError("no gzip"),
        *(refused(status) for status in (400, 401, 403, 404, 413, 500, 504)),
    ],
    ids=str,
)
async def test_what_cannot_pass_or_may_be_under_way_is_not(line: Line, failure: Any) -> None:
    with pytest.raises(demur.APIError):
        await line.call([failure])
    assert line.waits == []


async def test_the_service_says_how_long_to_wait(line: Line) -> None:
    await line.call([refused(429, **{"Retry-After": "7"}), good()])
    assert line.waits == [7]
    line.waits.clear()
    date = formatdate(time.time() + 30, usegmt=True)
    await line.call([refused(503, **{"Retry-After": date}), good()])
    assert 25 < line.waits[0] <= 30
    line.waits.clear()
    for nonsense in ("0", "soon", "-3", "inf", "²", "Sun, 06 Nov 1994 08:49:37 GMT"):
        header = [(b"Retry-After", nonsense.encode())]
        await line.call([httpx.Response(503, headers=header), good()])
    assert all(0.3 < wait < 0.7 for wait in line.waits)


async def test_a_long_wait_is_the_callers_to_decide(line: Line) -> None:
    with pytest.raises(demur.RateLimitError) as caught:
        await line.call([refused(429, **{"Retry-After": "61"})])
    assert caught.value.retry_after == 61
    assert line.waits == []


async def test_ready_asks_once(line: Line) -> None:
    assert await line.call([httpx.ConnectError("refused")], "ready") is False
    assert await line.call([refused(503)], "ready") is False
    assert line.waits == []


async def test_no_answer_in_time_is_an_error_of_its_own(line: Line) -> None:
    with pytest.raises(demur.APITimeoutError, match=r"http://demur.*timeout="):
        await line.call([httpx.ReadTimeout("slow")])
    with pytest.raises(demur.APIConnectionError, match="demur serve") as caught:
        await line.call([httpx.ConnectError("refused")] * 3)
    assert not isinstance(caught.value, demur.APITimeoutError)


async def test_answers_that_are_not_ours(line: Line) -> None:
    page = httpx.Response(200, text="<h1>Log in</h1>")
    for name in ("score", "models", "drafts"):
        with pytest.raises(demur.APIError, match="is it a demur service"):
            await line.call([page], name)
    with pytest.raises(demur.ServerError, match="500: HTTP 500"):
        await line.call([httpx.Response(500, text="<h1>Oops</h1>")])
    with pytest.raises(demur.APIStatusError, match=r"307.*base_url"):
        await line.call([httpx.Response(307, headers={"Location": "/login"})])
    for body in ([], {"error": "text"}, {"error": None}, "x"):
        with pytest.raises(demur.BadRequestError, match="400: HTTP 400"):
            await line.call([httpx.Response(400, json=body)])


@pytest.mark.parametrize(
    ("status", "kind", "advice"),
    [
        (400, demur.BadRequestError, "correct it"),
        (401, demur.AuthenticationError, "DEMUR_API_KEY"),
        (403, demur.PermissionDeniedError, "a key that may"),
        (404, demur.NotFoundError, "demur models"),
        (413, demur.RequestTooLargeError, "shorter"),
        (418, demur.APIStatusError, "base_url"),
        (429, demur.RateLimitError, "later"),
        (503, demur.ServerError, "later"),
    ],
)
def test_errors_say_what_to_do_and_travel(
    status: int, kind: type[demur.APIStatusError], advice: str
) -> None:
    answer = refused(status, **{"X-Request-Id": "abc", "Retry-After": "3"})
    error = from_response(answer)
    assert type(error) is kind
    assert str(error).startswith(f"{status}: no; ")
    assert advice in str(error)
    assert str(error).endswith("(request id abc)")
    for same in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(same) is kind
        assert str(same) == str(error)
        assert vars(same) == vars(error)
    assert (error.type, error.code, error.retry_after) == ("t", "c", 3)


def test_errors_without_a_status_travel_too() -> None:
    for kind in (demur.APIConnectionError, demur.APITimeoutError, demur.StreamError):
        error = kind("no", code="c")
        same = pickle.loads(pickle.dumps(error))
        assert (type(same), str(same), same.code) == (kind, str(error), "c")
        assert str(error) != "no"
    assert issubclass(demur.APITimeoutError, demur.APIConnectionError)
    for name in demur.__all__:
        if name.endswith("Error"):
            assert issubclass(getattr(demur, name), demur.DemurError)


ONE = {"response": "first", "prompt": ""}
REFUSED = {"response": "refused", "prompt": ""}


def test_a_closed_batch_leaves_no_thread() -> None:
    """One that waits to try again ends with the iterator, long before its time."""
    waiting = threading.Event()

    def handle(request: httpx.Request) -> httpx.Response:
        if b"first" in request.content:
            waiting.wait()
            return good()
        waiting.set()
        return refused(503, **{"Retry-After": "50"})

    before = set(threading.enumerate())
    client = Client(transport=httpx.MockTransport(handle))
    results = client.score_iter([ONE, *[REFUSED] * 20], concurrency=4)
    next(results)
    assert set(threading.enumerate()) - before
    started = time.monotonic()
    results.close()
    assert time.monotonic() - started < 25
    assert not set(threading.enumerate()) - before


async def test_a_closed_batch_leaves_no_task() -> None:
    waiting = asyncio.Event()

    async def handle(request: httpx.Request) -> httpx.Response:
        if b"first" in request.content:
            await waiting.wait()
            return good()
        waiting.set()
        return refused(503, **{"Retry-After": "50"})

    before = asyncio.all_tasks()
    client = AsyncClient(transport=httpx.MockTransport(handle))
    results = client.score_iter([ONE, *[REFUSED] * 20], concurrency=4)
    await anext(results)
    assert asyncio.all_tasks() - before
    await asyncio.wait_for(results.aclose(), 25)
    assert asyncio.all_tasks() == before


async def test_items_may_come_asynchronously() -> None:
    async def items() -> AsyncIterator[dict[str, Any]]:
        for n in range(5):
            await asyncio.sleep(0)
            yield {"response": str(n), "prompt": ""}

    def handle(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json=SCORE | {"id": json.loads(request.content)["response"]})

    client = AsyncClient(transport=httpx.MockTransport(handle))
    results = await client.score_many(items(), concurrency=2)
    assert [result.id for result in results if isinstance(result, demur.Score)] == list("01234")
