"""Events of a chat stream: read one by one, and put together into the whole answer."""

from __future__ import annotations

import json
from typing import Any

from pydantic import ValidationError

from demur.chat_types import ChatChoice, ChatChunk, ChatChunkChoice, ChatCompletion, LogprobEntry
from demur.errors import APIConnectionError, APIError, DemurError, StreamError, error_object

DONE = "[DONE]"


def chunk_of(data: str) -> ChatChunk:
    """The chunk that an event holds.

    Raises:
        StreamError: if it holds an error.
        APIError: if it holds neither.
    """
    try:
        event = json.loads(data)
        if error := error_object(event):
            message = error.pop("message") or "the service reported an error"
            raise StreamError(message, **error)
        return ChatChunk.model_validate(event)
    except (ValueError, ValidationError) as problem:
        raise APIError(
            f"the stream holds an event that is no chunk: {data[:80]!r}; "
            "is it a demur service, of this version?"
        ) from problem


class Assembly:
    """What has come of a stream."""

    def __init__(self) -> None:
        self.finished = False
        self._head: dict[str, Any] = {}
        self._choices: dict[int, _Choice] = {}

    def take(self, data: str | None) -> ChatChunk | None:
        """The chunk of the next event, None at the end; `data` is None if no event came.

        Raises:
            APIError: see `chunk_of`; APIConnectionError if the stream ended before its end.
        """
        if data is None:
            raise APIConnectionError("the stream broke off before its end")
        if data == DONE:
            self.finished = True
            return None
        chunk = chunk_of(data)
        for choice in chunk.choices:
            self._choices.setdefault(choice.index, _Choice()).add(choice)
        # All but the choices are the same in each chunk, or come once.
        head = {name: value for name, value in chunk if name != "choices" and value is not None}
        self._head |= head
        return chunk

    def completion(self) -> ChatCompletion:
        """The whole answer."""
        if not self.finished:
            raise DemurError("the stream has not been read to its end; iterate over it first")
        if not self._choices:
            raise APIError("the stream held no answer; ask again")
        choices = [self._choices[index].whole(index) for index in sorted(self._choices)]
        head = self._head | {"object": "chat.completion"}
        return ChatCompletion(**head, choices=choices)


class _Choice:
    """What has come of one choice."""

    def __init__(self) -> None:
        self._text: list[str] = []
        self._tokens: list[LogprobEntry] = []
        self._has_tokens = False
        self._rest: dict[str, Any] = {}

    def add(self, part: ChatChunkChoice) -> None:
        self._text.append(part.text)
        self._tokens += part.tokens
        self._has_tokens |= part.logprobs is not None
        own = ("index", "delta", "logprobs")
        self._rest |= {name: value for name, value in part if name not in own and value is not None}

    def whole(self, index: int) -> ChatChoice:
        message = {"role": "assistant", "content": "".join(self._text)}
        logprobs = {"content": self._tokens} if self._has_tokens else None
        return ChatChoice.model_validate(
            {"index": index, "message": message, "logprobs": logprobs, **self._rest}
        )
