"""What both clients share: where the service is, the bodies they send, the answers they read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from demur.errors import APIConnectionError, APIError, APITimeoutError, DemurError
from demur.params import ScoreItem

_Answer = TypeVar("_Answer", bound=BaseModel)

_DEFAULT_URL = "http://127.0.0.1:8000"
_ITEM_KEYS = ScoreItem.__required_keys__ | ScoreItem.__optional_keys__
# What `score` and `score_many` give an item that is none.
_NO_ITEM = "is no item to score: give a mapping with `response`, and `messages` or `prompt`"


def service_url(base_url: str | None) -> str:
    """Where the service is, without the `/v1` that OpenAI's base URLs end in."""
    given = base_url or os.environ.get("DEMUR_BASE_URL") or _DEFAULT_URL
    try:
        url = httpx.URL(given)
    except httpx.InvalidURL as error:
        raise DemurError(f"{given!r} is no URL ({error}); {_DEFAULT_URL} is one") from error
    if url.scheme not in ("http", "https") or not url.host:
        raise DemurError(f"{given!r} is no URL of a service; {_DEFAULT_URL} is one")
    return given.rstrip("/").removesuffix("/v1").rstrip("/")


def headers(api_key: str | None) -> dict[str, str]:
    """The headers of every request."""
    key = api_key or os.environ.get("DEMUR_API_KEY")
    if not key:
        return {}
    if not key.isascii() or not key.isprintable():
        raise DemurError(
            "the API key holds characters that no header can carry; "
            "check DEMUR_API_KEY or api_key= for a line end or a letter that is not ASCII"
        )
    return {"Authorization": f"Bearer {key}"}


def content(body: Mapping[str, Any] | None) -> dict[str, Any]:
    """httpx's arguments for a body as JSON, without what is None in it.

    Raises:
        DemurError: if no JSON can hold it.
    """
    if body is None:
        return {}
    given = {name: value for name, value in body.items() if value is not None}
    if "messages" in given:
        given["messages"] = _messages(given["messages"])
    try:
        text = json.dumps(given, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError as error:
        raise DemurError(f"the text is not valid Unicode ({error})") from error
    except (TypeError, ValueError) as error:
        raise DemurError(f"the request cannot be written as JSON ({error})") from error
    return {"content": text, "headers": {"Content-Type": "application/json"}}


def _messages(given: Any) -> Any:
    """One user's message for a string. What is no list of mappings the service refuses better."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if isinstance(given, Mapping) or not isinstance(given, Iterable):
        return given
    return [dict(turn) if isinstance(turn, Mapping) else turn for turn in given]


def checked_item(item: Any) -> Mapping[str, Any]:
    """An item of `score_many` as arguments of `score`.

    Raises:
        DemurError: if it is none; an item that is an error already is raised as it is.
    """
    if isinstance(item, DemurError):
        raise item
    if not isinstance(item, Mapping):
        raise DemurError(f"{type(item).__name__} {_NO_ITEM}")
    if unknown := [str(key) for key in item if key not in _ITEM_KEYS]:
        known = ", ".join(sorted(_ITEM_KEYS))
        raise DemurError(f"unknown in an item: {', '.join(unknown)}; it may have {known}")
    if "response" not in item:
        raise DemurError(f"what has no response {_NO_ITEM}")
    return item


def chat_body(messages: Any, stream: bool, options: Mapping[str, Any]) -> dict[str, Any]:
    """The body of POST /v1/chat/completions."""
    body = {"messages": messages, **options}
    if isinstance(body.get("stop"), Iterable) and not isinstance(body["stop"], str):
        body["stop"] = list(body["stop"])
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return body


def parsed(kind: type[_Answer], response: httpx.Response) -> _Answer:
    """The answer, read to its end, as an object."""
    try:
        return kind.model_validate_json(response.content)
    except ValidationError as error:
        raise APIError(
            f"{response.url} answered {response.status_code} with something that is no "
            f"{kind.__name__}; is it a demur service, of this version?"
        ) from error


def no_answer(error: httpx.RequestError, url: str) -> APIConnectionError:
    """The error that a failure of the network stands for."""
    reason = str(error) or type(error).__name__
    if isinstance(error, httpx.TimeoutException):
        return APITimeoutError(f"no answer from {url} in time ({reason})")
    return APIConnectionError(f"no answer from {url} ({reason})")
