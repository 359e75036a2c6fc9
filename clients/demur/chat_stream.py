"""Streams of chat: iterators of chunks, which close their connection when they are left."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator
from contextlib import suppress
from types import TracebackType

import httpx

from demur._assembly import DONE, Assembly
from demur._base import no_answer
from demur._sse import Decoder
from demur.chat_types import ChatChunk, ChatCompletion
from demur.errors import APIError


class ChatStream:
    """Chunks of an answer, as they come.

    Leaving it early (the `with` block, or `close`) closes the connection, and with it ends the
    generation on the service. Iterating raises StreamError if the service reports an error, and
    APIConnectionError if the stream breaks off.
    """

    def __init__(
        self, response: httpx.Response, first: str | None, rest: Generator[str, None, None]
    ) -> None:
        self._response = response
        self._first = first
        self._rest = rest
        self._assembly = Assembly()
        self._closed = False

    def completion(self) -> ChatCompletion:
        """The whole answer, once the stream has been read to its end; before that a DemurError."""
        return self._assembly.completion()

    def close(self) -> None:
        """Close the connection."""
        self._closed = True
        # First, and whoever is reading: it is what ends the generation.
        self._response.close()
        with suppress(ValueError):  # another thread is in the generator, and is about to leave it
            self._rest.close()

    def __iter__(self) -> Iterator[ChatChunk]:
        return self

    def __next__(self) -> ChatChunk:
        if self._closed:
            raise StopIteration
        try:
            data = self._first if self._first is not None else next(self._rest, None)
            self._first = None
            chunk = self._assembly.take(data)
        except httpx.RequestError as error:
            self.close()
            raise no_answer(error, str(self._response.url)) from error
        except APIError:
            self.close()
            raise
        if chunk is None:
            self._drain()
            raise StopIteration
        return chunk

    def _drain(self) -> None:
        """What follows the last event is nothing; read, it lets the service end in order."""
        with suppress(httpx.RequestError):
            for _ in self._rest:
                pass
        self.close()

    def __enter__(self) -> ChatStream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class AsyncChatStream:
    """The same for asyncio."""

    def __init__(
        self, response: httpx.Response, first: str | None, rest: AsyncGenerator[str, None]
    ) -> None:
        self._response = response
        self._first = first
        self._rest = rest
        self._assembly = Assembly()
        self._closed = False

    def completion(self) -> ChatCompletion:
        """The whole answer, once the stream has been read to its end; before that a DemurError."""
        return self._assembly.completion()

    async def aclose(self) -> None:
        """Close the connection."""
        self._closed = True
        await self._response.aclose()
        with suppress(RuntimeError):  # as above, another task
            await self._rest.aclose()

    def __aiter__(self) -> AsyncIterator[ChatChunk]:
        return self

    async def __anext__(self) -> ChatChunk:
        if self._closed:
            raise StopAsyncIteration
        try:
            data = self._first if self._first is not None else await anext(self._rest, None)
            self._first = None
            chunk = self._assembly.take(data)
        except httpx.RequestError as error:
            await self.aclose()
            raise no_answer(error, str(self._response.url)) from error
        except APIError:
            await self.aclose()
            raise
        if chunk is None:
            await self._drain()
            raise StopAsyncIteration
        return chunk

    async def _drain(self) -> None:
        with suppress(httpx.RequestError):
            async for _ in self._rest:
                pass
        await self.aclose()

    async def __aenter__(self) -> AsyncChatStream:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()


def opened(response: httpx.Response) -> ChatStream:
    """The stream of an answer whose first event has come; httpx's errors if none comes."""
    check_is_stream(response)
    rest = _events(response)
    return ChatStream(response, next(rest, None), rest)


async def aopened(response: httpx.Response) -> AsyncChatStream:
    """The same for asyncio."""
    check_is_stream(response)
    rest = _aevents(response)
    return AsyncChatStream(response, await anext(rest, None), rest)


def check_is_stream(response: httpx.Response) -> None:
    """An APIError if the answer is anything but events, a page to log in, say."""
    kind = response.headers.get("content-type", "nothing")
    if not kind.startswith("text/event-stream"):
        raise APIError(f"{response.url} answered with {kind}, not a stream; is it a demur service?")


def _events(response: httpx.Response) -> Generator[str, None, None]:
    decoder = Decoder()
    for piece in response.iter_bytes():
        yield from decoder.feed(piece)
    yield from _ending(decoder)


async def _aevents(response: httpx.Response) -> AsyncGenerator[str, None]:
    decoder = Decoder()
    async for piece in response.aiter_bytes():
        for data in decoder.feed(piece):
            yield data
    for data in _ending(decoder):
        yield data


def _ending(decoder: Decoder) -> list[str]:
    """The last event, where a service left out its blank line; half of any other is none."""
    return [data for data in decoder.end() if data == DONE]
