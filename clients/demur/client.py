"""The synchronous client."""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import TracebackType
from typing import Any, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from demur.errors import APIConnectionError, DemurError, from_response
from demur.types import Score

_Answer = TypeVar("_Answer", bound=BaseModel)

_DEFAULT_URL = "http://127.0.0.1:8000"


class Client:
    """Talks to a demur service.

    Args:
        base_url: where it is; default `DEMUR_BASE_URL`, else http://127.0.0.1:8000.
        api_key: bearer key; default `DEMUR_API_KEY`.
        timeout: seconds for one call.
        transport: replaces the network, for tests.
    """

    def __init__(
        self,
        base_url: str | None = None,
        *,
        api_key: str | None = None,
        timeout: float = 300.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        key = api_key or os.environ.get("DEMUR_API_KEY")
        url = base_url or os.environ.get("DEMUR_BASE_URL") or _DEFAULT_URL
        if key and not key.isascii():
            raise DemurError("the API key holds characters that no header can carry")
        try:
            self._http = httpx.Client(
                base_url=url,
                headers={"Authorization": f"Bearer {key}"} if key else {},
                timeout=timeout,
                transport=transport,
            )
        except httpx.InvalidURL as error:
            raise DemurError(f"{url!r} is no URL ({error})") from error

    def score(
        self,
        response: str,
        *,
        messages: Sequence[dict[str, Any]] | None = None,
        prompt: str | None = None,
        model: str | None = None,
        threshold: float | None = None,
        store: bool = True,
    ) -> Score:
        """Score a response to messages or to a prompt.

        Raises:
            APIStatusError: if the service refuses it.
            APIConnectionError: if the service gives no answer.
        """
        body = {
            "response": response,
            "messages": None if messages is None else list(messages),
            "prompt": prompt,
            "model": model,
            "threshold": threshold,
            "store": store,
        }
        given = {name: value for name, value in body.items() if value is not None}
        return self._parsed(Score, self._call("POST", "/v1/score", json=given))

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

    def _call(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        try:
            response = self._http.request(method, path, **arguments)
        except UnicodeEncodeError as error:
            raise DemurError(f"the text is not valid Unicode ({error})") from error
        except httpx.RequestError as error:
            raise APIConnectionError(
                f"no answer from {self._http.base_url} ({error or type(error).__name__}); "
                "is the service running? `demur serve` starts one"
            ) from error
        if not response.is_success:
            raise from_response(response)
        return response

    def _parsed(self, kind: type[_Answer], response: httpx.Response) -> _Answer:
        try:
            return kind.model_validate_json(response.content)
        except ValidationError as error:
            raise DemurError(
                f"{self._http.base_url} answered {response.status_code} with something that is no "
                f"{kind.__name__}; is it a demur service, of this version?"
            ) from error
