"""The synchronous client."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

import httpx

from demur import _base, _batch
from demur._retry import wait_before_retry
from demur.chat_stream import ChatStream, opened
from demur.chat_types import ChatCompletion
from demur.errors import APIStatusError, DemurError, from_response
from demur.params import Messages, ScoreItem, UncertaintyStop
from demur.types import Drafts, Model, ModelList, Score

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from demur.params import ChatOptions

_T = TypeVar("_T")


class Client:
    """Talks to a demur service. Threads may share one.

    A request is sent again, whole, if the connection cannot be made or is lost (a stream: before
    its first event), and after a 408, 429, 502 or 503, when the service asks for it; a wait of over
    60 s is left to the caller.

    Args:
        base_url: where it is, with or without `/v1`; default `DEMUR_BASE_URL`, else
            http://127.0.0.1:8000.
        api_key: bearer key; default `DEMUR_API_KEY`.
        timeout: seconds without an answer, or httpx's own kind of timeout.
        max_retries: how often a request is tried again.
        transport: replaces the network, for tests.
    """

    def __init__(
        self,
        base_url: str | None = None,
        *,
        api_key: str | None = None,
        timeout: float | httpx.Timeout = 300.0,
        max_retries: int = 2,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._max_retries = max_retries
        self._http = httpx.Client(
            base_url=_base.service_url(base_url),
            headers=_base.headers(api_key),
            timeout=timeout,
            transport=transport,
        )

    def score(
        self,
        response: str,
        *,
        messages: Messages | None = None,
        prompt: str | None = None,
        model: str | None = None,
        threshold: float | None = None,
        store: bool | None = None,
    ) -> Score:
        """Score a response to messages (a string is one user's message) or to a prompt.

        Args:
            threshold: flag the response if its hallucination_score is above it, 0 to 1.
            store: False keeps the text out of distillation.

        Raises:
            APIStatusError: if the service refuses it.
            APIConnectionError: if the service gives no answer.
        """
        body = {
            "response": response,
            "messages": messages,
            "prompt": prompt,
            "model": model,
            "threshold": threshold,
            "store": store,
        }
        return self._score(body)

    def score_many(
        self,
        items: Iterable[ScoreItem | Mapping[str, Any] | DemurError],
        *,
        concurrency: int = 8,
        on_done: Callable[[int, Score | DemurError], None] | None = None,
    ) -> list[Score | DemurError]:
        """Score many responses, several at once; see `score_iter`.

        Args:
            on_done: called with each index and result, in order, in this thread.
        """
        results = []
        for index, result in enumerate(self.score_iter(items, concurrency=concurrency)):
            results.append(result)
            if on_done is not None:
                on_done(index, result)
        return results

    def score_iter(
        self, items: Iterable[ScoreItem | Mapping[str, Any] | DemurError], *, concurrency: int = 8
    ) -> Generator[Score | DemurError, None, None]:
        """Scores of items in their order, taking few items ahead.

        An item has the arguments of `score`. What goes wrong with one stands in its place, and so
        does an item that is an error already. Closing the iterator waits for what is under way.

        Args:
            concurrency: how many may be under way at once.
        """
        _batch.check_concurrency(concurrency)
        stopped = threading.Event()

        def pause(seconds: float) -> None:
            if stopped.wait(seconds):
                raise DemurError("the batch was closed")

        def score(item: Any) -> Score:
            return self._score(_base.checked_item(item), pause)

        return _batch.in_threads(items, score, stopped.set, concurrency)

    @overload
    def chat(
        self,
        messages: Messages,
        *,
        stream: Literal[False] = False,
        **options: Unpack[ChatOptions],
    ) -> ChatCompletion: ...

    @overload
    def chat(
        self, messages: Messages, *, stream: Literal[True], **options: Unpack[ChatOptions]
    ) -> ChatStream: ...

    @overload
    def chat(
        self, messages: Messages, *, stream: bool, **options: Unpack[ChatOptions]
    ) -> ChatCompletion | ChatStream: ...

    def chat(
        self,
        messages: Messages,
        *,
        model: str | None = None,
        uncertainty: bool = True,
        temperature: float | None = None,
        top_p: float | None = None,
        max_tokens: int | None = None,
        n: int | None = None,
        stop: str | Sequence[str] | None = None,
        seed: int | None = None,
        logprobs: bool | None = None,
        top_logprobs: int | None = None,
        uncertainty_stop: UncertaintyStop | None = None,
        store: bool | None = None,
        stream: bool = False,
    ) -> ChatCompletion | ChatStream:
        """Go on with a conversation (a string is one user's message).

        Args:
            uncertainty: ask for the measures of each token.
            uncertainty_stop: end the answer where it becomes too doubtful.
            store: False keeps the text out of distillation.
            stream: give a `ChatStream` of chunks as they come, for a `with` block.

        The others are OpenAI's.

        Raises:
            APIStatusError: if the service refuses it.
            APIConnectionError: if the service gives no answer.
        """
        options = {
            "model": model,
            "uncertainty": uncertainty,
            "temperature": temperature,
            "top_p": top_p,
            "max_tokens": max_tokens,
            "n": n,
            "stop": stop,
            "seed": seed,
            "logprobs": logprobs,
            "top_logprobs": top_logprobs,
            "uncertainty_stop": uncertainty_stop,
            "store": store,
        }
        body = _base.chat_body(messages, stream, options)
        if stream:
            return self._call("POST", "/v1/chat/completions", opened, body)
        answer = self._call("POST", "/v1/chat/completions", _whole, body)
        return _base.parsed(ChatCompletion, answer)

    def models(self) -> list[Model]:
        """The ensembles that are served."""
        return _base.parsed(ModelList, self._call("GET", "/v1/models", _whole)).data

    def drafts(self) -> Drafts:
        """The drafts of the served ensemble."""
        return _base.parsed(Drafts, self._call("GET", "/v1/drafts", _whole))

    def ready(self) -> bool:
        """Can the service score now? False too if nobody answers."""
        try:
            return self._http.get("/ready").status_code == httpx.codes.OK
        except httpx.RequestError:
            return False

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _score(
        self, body: Mapping[str, Any], pause: Callable[[float], None] | None = None
    ) -> Score:
        return _base.parsed(Score, self._call("POST", "/v1/score", _whole, body, pause))

    def _call(
        self,
        method: str,
        path: str,
        read: Callable[[httpx.Response], _T],
        body: Mapping[str, Any] | None = None,
        pause: Callable[[float], None] | None = None,
    ) -> _T:
        """What `read` makes of the answer; tried again after `pause` where that can help."""
        request = self._http.build_request(method, path, **_base.content(body))
        attempt = 0
        while True:
            try:
                return self._once(request, read)
            except httpx.RequestError as error:
                wait = wait_before_retry(error, attempt, self._max_retries)
                if wait is None:
                    raise _base.no_answer(error, str(self._http.base_url)) from error
            except APIStatusError as error:
                wait = wait_before_retry(error, attempt, self._max_retries)
                if wait is None:
                    raise
            (pause or time.sleep)(wait)
            attempt += 1

    def _once(self, request: httpx.Request, read: Callable[[httpx.Response], _T]) -> _T:
        response = self._http.send(request, stream=True)
        try:
            if not response.is_success:
                response.read()
                raise from_response(response)
            return read(response)
        except BaseException:
            response.close()
            raise


def _whole(response: httpx.Response) -> httpx.Response:
    response.read()
    return response
