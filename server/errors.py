"""Errors as OpenAI's clients know them: `{"error": {"message", "type", "param", "code"}}`.

ApiError
├── BadRequest        400
├── Unauthorized      401
├── Forbidden         403
├── NotFound          404
├── TooSlow           408
├── TooLarge          413
├── QueueFull         429, with Retry-After
├── RateLimited       429, with Retry-After
├── NotReady          503, with Retry-After
└── DeadlineExceeded  504
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException


class ApiError(Exception):
    """An answer other than 2xx; as it stands, a 500."""

    status = 500
    type = "server_error"
    code = "internal_error"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or type(self).code
        self.headers = {} if retry_after_s is None else {"Retry-After": str(retry_after_s)}

    def body(self) -> dict[str, Any]:
        """The `error` object."""
        return {
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.code,
        }

    def response(self) -> JSONResponse:
        """The whole answer."""
        return JSONResponse({"error": self.body()}, self.status, self.headers)


class BadRequest(ApiError):
    status, type, code = 400, "invalid_request_error", "invalid_request"


class Unauthorized(ApiError):
    status, type, code = 401, "authentication_error", "invalid_api_key"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.headers["WWW-Authenticate"] = "Bearer"


class Forbidden(ApiError):
    status, type, code = 403, "permission_error", "forbidden"


class NotFound(ApiError):
    status, type, code = 404, "invalid_request_error", "not_found"


class TooLarge(ApiError):
    status, type, code = 413, "invalid_request_error", "too_large"


class TooSlow(ApiError):
    status, type, code = 408, "invalid_request_error", "body_too_slow"


class BodyRefused(HTTPException):
    """Raised while a body is read. FastAPI turns any other exception there into a plain 400."""

    def __init__(self, error: ApiError) -> None:
        # What is left of the body is not read, so the connection cannot be used again.
        super().__init__(error.status, headers={"Connection": "close"})
        self.error = error

    def response(self) -> JSONResponse:
        """The whole answer."""
        self.error.headers.update(self.headers or {})
        return self.error.response()


class QueueFull(ApiError):
    status, type, code = 429, "rate_limit_error", "queue_full"


class RateLimited(ApiError):
    status, type, code = 429, "rate_limit_error", "rate_limit_exceeded"


class NotReady(ApiError):
    status, type, code = 503, "server_error", "not_ready"


class DeadlineExceeded(ApiError):
    status, type, code = 504, "server_error", "deadline_exceeded"


def from_validation(error: ValidationError | RequestValidationError) -> BadRequest:
    """The first of pydantic's findings, as a sentence that names the parameter."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "cannot be parsed")
        return BadRequest(f"the body is not valid JSON: {reason}", code="invalid_json")
    location = list(first["loc"])
    if isinstance(error, RequestValidationError):
        # FastAPI puts "body" first, and the union of the two bodies the name of its member.
        location = location[2:] if location[1:2] in (["item"], ["list"]) else location[1:]
    param = _path(location) or None
    if first["type"] == "extra_forbidden":
        return BadRequest(f"unknown parameter: {param}", param=param, code="unknown_parameter")
    if first["type"] == "missing":
        what = f"{param} is missing" if param else "the body is missing"
        return BadRequest(what, param=param, code="missing_parameter")
    if first["type"] == "value_error":
        reason = str(first["ctx"]["error"])
        return BadRequest(f"{param}: {reason}" if param else reason, param=param)
    return BadRequest(f"{param or 'body'}: {first['msg']}", param=param)


def _path(location: list[Any]) -> str:
    """("messages", 0, "role") as messages[0].role"""
    path = ""
    for before, part in zip([None, *location], location, strict=False):
        if before in ("content", "prompt", "stop") and isinstance(part, str):
            continue  # the name of a member of the union that it is
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
    return path.lstrip(".")


def install_handlers(app: FastAPI) -> None:
    """Give every error, the framework's own included, the contract's shape."""

    @app.exception_handler(ApiError)
    async def _api(request: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def _validation(request: Request, error: RequestValidationError) -> JSONResponse:
        kind = request.headers.get("content-type", "")
        if error.body and "json" not in kind:
            # Clients that forget the header would else be told that their object is none.
            return BadRequest(
                "send JSON, with the header Content-Type: application/json", code="not_json"
            ).response()
        return from_validation(error).response()

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        if isinstance(error, BodyRefused):
            return error.response()
        answer = ApiError(str(error.detail))
        answer.status = error.status_code
        answer.code = HTTPStatus(error.status_code).name.lower()
        if error.status_code < 500:
            answer.type = "invalid_request_error"
        answer.headers = dict(error.headers or {})
        return answer.response()
