"""What a call can raise.

DemurError                         and itself: an argument that no request can carry
└── APIError                       and itself: an answer that no demur service gives
    ├── APIConnectionError         no answer: refused, reset, broken off
    │   └── APITimeoutError        no answer in time
    ├── StreamError                an error in the middle of a stream
    └── APIStatusError             an answer other than 2xx
        ├── BadRequestError        400
        ├── AuthenticationError    401
        ├── PermissionDeniedError  403
        ├── NotFoundError          404
        ├── RequestTooLargeError   413
        ├── RateLimitError         429
        └── ServerError            5xx

Each says what to do next, and each can be pickled.
"""

from __future__ import annotations

from typing import Any, ClassVar

import httpx

from demur._retry_after import seconds_of


class DemurError(Exception):
    """Base of all errors of this package."""


class APIError(DemurError):
    """The exchange with the service failed.

    `message`, `type`, `param` and `code` are those of the service's error object, where it sent
    one; `param` names the field that is wrong.
    """

    advice: ClassVar[str] = ""

    def __init__(
        self,
        message: str,
        *,
        error_type: str | None = None,
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.type = error_type
        self.param = param
        self.code = code

    def __str__(self) -> str:
        return f"{self.message}; {self.advice}" if self.advice else self.message


class APIConnectionError(APIError):
    """The service gave no answer, or broke it off."""

    advice = "is the service running? `demur serve` starts one"


class APITimeoutError(APIConnectionError):
    """The service gave no answer in time; it may still be working on it."""

    advice = "give the client a longer timeout=, or send less"


class StreamError(APIError):
    """The service reported an error in the middle of a stream; what came before it is good."""

    advice = "ask again; the service's log tells more"


class APIStatusError(APIError):
    """The service answered with an error.

    `request_id` finds it in the service's log; `retry_after` is the wait it asks for, in seconds.
    """

    advice = "is base_url right?"

    def __init__(
        self,
        message: str,
        status_code: int,
        *,
        request_id: str | None = None,
        retry_after: float | None = None,
        error_type: str | None = None,
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message, error_type=error_type, param=param, code=code)
        self.args = (message, status_code)  # what pickle calls the class with
        self.status_code = status_code
        self.request_id = request_id
        self.retry_after = retry_after

    def __str__(self) -> str:
        identified = f" (request id {self.request_id})" if self.request_id else ""
        return f"{self.status_code}: {super().__str__()}{identified}"


class BadRequestError(APIStatusError):
    """400: the request is not valid; `param` names what is wrong with it."""

    advice = "correct it: sent again as it is, it will be refused again"


class AuthenticationError(APIStatusError):
    """401: a valid key is needed."""

    advice = "set DEMUR_API_KEY, or give the client api_key=, to a key that the service knows"


class PermissionDeniedError(APIStatusError):
    """403: the key is known, and may not do this."""

    advice = "set DEMUR_API_KEY, or give the client api_key=, to a key that may do this"


class NotFoundError(APIStatusError):
    """404: no such model or route."""

    advice = "is base_url right? `demur models` lists what is served there"


class RequestTooLargeError(APIStatusError):
    """413: more text than the model or the service takes."""

    advice = "send a shorter text"


class RateLimitError(APIStatusError):
    """429: the queue is full; try again after `retry_after` seconds."""

    advice = "try again later, with fewer requests at once"


class ServerError(APIStatusError):
    """5xx: the service is starting (503), too slow (504) or broken."""

    advice = "try again later (503: it is not ready yet); the service's log tells more"


_BY_STATUS: dict[int, type[APIStatusError]] = {
    400: BadRequestError,
    401: AuthenticationError,
    403: PermissionDeniedError,
    404: NotFoundError,
    413: RequestTooLargeError,
    429: RateLimitError,
}


def from_response(response: httpx.Response) -> APIStatusError:
    """The error that an answer other than 2xx, read to its end, stands for."""
    status = response.status_code
    kind = _BY_STATUS.get(status, ServerError if status >= 500 else APIStatusError)
    try:
        body = error_object(response.json())
    except ValueError:  # not our service's body: a proxy's page, say
        body = {}
    return kind(
        body.pop("message", None) or f"HTTP {status}",
        status,
        request_id=response.headers.get("x-request-id"),
        retry_after=seconds_of(response.headers.get("retry-after")),
        **body,
    )


def error_object(body: Any) -> dict[str, Any]:
    """An answer's `error` object as arguments of an APIError; {} without one."""
    error = body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict):
        return {}
    fields = {"message": "message", "error_type": "type", "param": "param", "code": "code"}
    known = {argument: error.get(field) for argument, field in fields.items()}
    return {name: None if value is None else str(value) for name, value in known.items()}
