"""Server-sent events in pieces of any size, and chat streams that go wrong."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from itertools import pairwise
from typing import Any

import demur
import httpx
import pytest
from demur import AsyncClient, Client
from demur._sse import Decoder
from hypothesis import example, given
from hypothesis import strategies as st

HEAD = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "tiny"}


def chunk(text: str, finish_reason: str | None = None) -> str:
    delta = {"content": text}
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
    return json.dumps(HEAD | {"choices": [choice]}, ensure_ascii=False)


def sse(*events: str) -> bytes:
    return "".join(f"data: {event}\n\n" for event in events).encode()


class Pieces(httpx.SyncByteStream, httpx.AsyncByteStream):
    """A body in pieces; an error among them is raised. Remembers whether it was closed."""

    def __init__(self, *pieces: bytes | Exception) -> None:
        self.pieces = pieces
        self.given = 0
        self.closed = False

    def __iter__(self) -> Iterator[bytes]:
        for piece in self.pieces:
            if isinstance(piece, Exception):
                raise piece
            self.given += 1
            yield piece

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self:
            yield piece

    def close(self) -> None:
        self.closed = True

    async def aclose(self) -> None:
        self.closed = True


class Talk:
    """Streams of either kind of client."""

    def __init__(self, kind: type[Client] | type[AsyncClient]) -> None:
        self.kind = kind
        self.waits: list[float] = []

    async def open(self, *bodies: Pieces, content_type: str = "text/event-stream") -> Any:
        left = iter(bodies)
        headers = {"Content-Type": content_type}
        transport = httpx.MockTransport(
            lambda _: httpx.Response(200, headers=headers, stream=next(left))
        )
        client = self.kind(transport=transport)
        if isinstance(client, Client):
            return client.chat("Hi", stream=True)
        return await client.chat("Hi", stream=True)

    async def read(self, *bodies: Pieces) -> tuple[list[demur.ChatChunk], Any]:
        stream = await self.open(*bodies)
        if self.kind is Client:
            with stream:
                return list(stream), stream
        async with stream:
            return [chunk async for chunk in stream], stream


@pytest.fixture(params=[Client, AsyncClient])
def talk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Talk:
    talk = Talk(request.param)

    async def sleep(seconds: float) -> None:
        talk.waits.append(seconds)

    monkeypatch.setattr(time, "sleep", talk.waits.append)
    monkeypatch.setattr(asyncio, "sleep", sleep)
    return talk


# What a stream can hold: comments, other fields, several lines of data, all three line ends, and
# characters that str.splitlines would end a line at.
TEXT = (
    "\ufeffdata: one\n\n: hello\r\n\r\ndata:two\r\n\r\nevent: x\nid: 7\ndata: a\r\ndata: b\r\n\r\n"
    "data:  spaced\r\rretry: 5\n\ndata\n\ndata: 東京🎉\u2028\x0c\x85end\n\nnothing: here\n\n"
    "data: [DONE]\r\n\r\n"
)
EVENTS = ["one", "two", "a\nb", " spaced", "", "東京🎉\u2028\x0c\x85end", "[DONE]"]


@example(cuts=list(range(len(TEXT.encode()))))
@given(cuts=st.lists(st.integers(0, len(TEXT.encode())), max_size=60))
def test_events_do_not_depend_on_how_the_bytes_are_cut(cuts: list[int]) -> None:
    raw, decoder = TEXT.encode(), Decoder()
    bounds = [0, *sorted(cuts), len(raw)]
    pieces = [raw[start:end] for start, end in pairwise(bounds)]
    assert [event for piece in pieces for event in decoder.feed(piece)] == EVENTS
    assert decoder.end() == []


@given(
    lines=st.lists(st.lists(st.text(st.characters(exclude_characters="\r\n"))), max_size=5),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
)
def test_what_is_sent_is_what_is_read(lines: list[list[str]], end: str) -> None:
    raw = "".join("".join(f"data: {line}{end}" for line in event) + end for event in lines)
    decoder = Decoder()
    events = decoder.feed(raw.encode(errors="replace")) + decoder.end()
    sent = ["\n".join(event).encode(errors="replace").decode() for event in lines if event]
    assert events == sent


@given(size=st.integers(1, 9))
def test_a_stream_in_pieces_of_any_size(size: int) -> None:
    usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
    last = json.dumps(HEAD | {"choices": [], "usage": usage})
    raw = sse(chunk("東京 "), chunk("🎉"), chunk("", "stop"), last, "[DONE]")
    body = Pieces(*(raw[at : at + size] for at in range(0, len(raw), size)))
    chunks, stream = asyncio.run(Talk(Client).read(body))
    assert [chunk.text for chunk in chunks] == ["東京 ", "🎉", "", ""]
    answer = stream.completion()
    assert (answer.text, answer.choices[0].finish_reason) == ("東京 🎉", "stop")
    assert answer.usage.total_tokens == 3
    assert answer.model_extra == {"object": "chat.completion"}
    assert body.closed
    assert body.given == len(body.pieces)


async def test_leaving_early_closes_the_connection(talk: Talk) -> None:
    body = Pieces(sse(chunk("one")), sse(chunk("two")), sse("[DONE]"))
    stream = await talk.open(body)
    if talk.kind is Client:
        with stream:
            assert next(stream).text == "one"
        assert list(stream) == []
    else:
        async with stream:
            assert (await anext(stream)).text == "one"
        assert [chunk async for chunk in stream] == []
    assert body.closed
    assert body.given == 1
    with pytest.raises(demur.DemurError, match="read to its end"):
        stream.completion()


@pytest.mark.parametrize(
    ("pieces", "error", "says"),
    [
        ([sse(chunk("one"))], demur.APIConnectionError, "broke off"),
        ([sse(chunk("one")) + b'data: {"id": "half'], demur.APIConnectionError, "broke off"),
        ([sse(chunk("one")), httpx.ReadError("reset")], demur.APIConnectionError, "reset"),
        ([sse(chunk("one")), httpx.ReadTimeout("slow")], demur.APITimeoutError, "slow"),
        ([sse(chunk("one"), "{no JSON")], demur.APIError, "no chunk"),
        ([sse(chunk("one"), "[1]")], demur.APIError, "no chunk"),
        (
            [sse(chunk("one"), '{"error": {"message": "dead", "code": "not_ready"}}')],
            demur.StreamError,
            "dead",
        ),
        ([sse(chunk("one"), '{"error": {"message": null}}')], demur.StreamError, "an error"),
        ([], demur.APIConnectionError, "broke off"),
    ],
)
async def test_streams_that_go_wrong(
    talk: Talk, pieces: list[Any], error: type[demur.APIError], says: str
) -> None:
    body = Pieces(*pieces)
    with pytest.raises(error, match=says) as caught:
        await talk.read(body)
    assert type(caught.value) is error
    assert body.closed
    assert talk.waits == []


async def test_a_stream_is_tried_again_before_its_first_event_alone(talk: Talk) -> None:
    broken = [Pieces(httpx.ReadError("reset")), Pieces(b": hello\n\n", httpx.ReadError("reset"))]
    chunks, _ = await talk.read(*broken, Pieces(sse(chunk("one"), "[DONE]")))
    assert [chunk.text for chunk in chunks] == ["one"]
    assert len(talk.waits) == 2
    assert all(body.closed for body in broken)


async def test_a_page_in_place_of_a_stream(talk: Talk) -> None:
    body = Pieces(b"<h1>Log in</h1>")
    with pytest.raises(demur.APIError, match="text/html, not a stream"):
        await talk.open(body, content_type="text/html")
    assert body.closed


async def test_the_last_event_needs_no_blank_line(talk: Talk) -> None:
    _, stream = await talk.read(Pieces(sse(chunk("one", "stop")) + b"data: [DONE]"))
    assert stream.completion().text == "one"
    with pytest.raises(demur.APIError, match="held no answer"):
        (await talk.read(Pieces(sse("[DONE]"))))[1].completion()


async def test_a_break_after_the_end_is_none(talk: Talk) -> None:
    _, stream = await talk.read(Pieces(sse(chunk("one", "stop"), "[DONE]"), httpx.ReadError("x")))
    assert stream.completion().text == "one"
