"""What a call can raise.

DemurError
├── APIConnectionError         no answer: refused, reset, timed out
└── APIStatusError             an answer other than 2xx
    ├── BadRequestError        400
    ├── AuthenticationError    401
    ├── NotFoundError          404
    ├── RequestTooLargeError   413
    ├── RateLimitError         429
    └── ServerError            5xx
"""

from __future__ import annotations

import httpx


class DemurError(Exception):
    """Base of all errors of this package."""


class APIConnectionError(DemurError):
    """The service gave no answer."""


class APIStatusError(DemurError):
    """The service answered with an error; its fields are those of the error object."""

    def __init__(self, response: httpx.Response) -> None:
        self.status_code = response.status_code
        self.request_id = response.headers.get("x-request-id")
        self.retry_after = response.headers.get("retry-after")
        body = _error_object(response)
        self.message = str(body.get("message") or f"HTTP {response.status_code}")
        self.type = body.get("type")
        self.param = body.get("param")
        self.code = body.get("code")
        super().__init__(f"{self.status_code}: {self.message}")


class BadRequestError(APIStatusError):
    """400: the request is not valid; `param` names what is wrong with it."""


class AuthenticationError(APIStatusError):
    """401: a valid key is needed."""


class NotFoundError(APIStatusError):
    """404: no such model or route."""


class RequestTooLargeError(APIStatusError):
    """413: more text than the model or the service takes."""


class RateLimitError(APIStatusError):
    """429: the queue is full; try again after `retry_after` seconds."""


class ServerError(APIStatusError):
    """5xx: the service is starting (503), too slow (504) or broken."""


_BY_STATUS: dict[int, type[APIStatusError]] = {
    400: BadRequestError,
    401: AuthenticationError,
    404: NotFoundError,
    413: RequestTooLargeError,
    429: RateLimitError,
}


def from_response(response: httpx.Response) -> APIStatusError:
    """The error that an answer other than 2xx stands for."""
    fallback = ServerError if response.status_code >= 500 else APIStatusError
    return _BY_STATUS.get(response.status_code, fallback)(response)


def _error_object(response: httpx.Response) -> dict[str, str | None]:
    try:
        error = response.json()["error"]
    except (ValueError, KeyError, TypeError):
        return {}  # not our service's body: a proxy's page, say
    return error if isinstance(error, dict) else {}
