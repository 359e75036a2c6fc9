"""What happens to every request before and after its route: id, size limit, metrics.

Plain ASGI: Starlette's BaseHTTPMiddleware would hide a client that hangs up from the routes.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from contextvars import ContextVar

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server import metrics
from server.errors import ApiError, BodyTooLarge

logger = logging.getLogger(__name__)

REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="-")
_PROBES = {"/health", "/ready", "/metrics"}
_ID = re.compile(r"[\x21-\x7e]{1,128}")


class RequestContext:
    """X-Request-Id in and out, a bounded body, one log line and metrics for each request."""

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self.app = app
        self.max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _ID.fullmatch(given) else uuid.uuid4().hex
        REQUEST_ID.set(request_id)
        started = time.perf_counter()
        status = 0
        received = 0

        async def bounded_receive() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_body_bytes:
                raise BodyTooLarge(self.max_body_bytes)
            return message

        async def tagged_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            declared = headers.get("content-length", "")
            if declared.isdecimal() and int(declared) > self.max_body_bytes:
                raise BodyTooLarge(self.max_body_bytes)
            await self.app(scope, bounded_receive, tagged_send)
        except BodyTooLarge as error:  # by its declared length, before any route saw it
            await error.response()(scope, receive, tagged_send)
        except Exception:
            # Here and not in an exception handler: Starlette runs that one outside of us, and its
            # answer would carry no id and be counted as none.
            logger.exception("request failed")
            if status:
                raise  # the answer has begun; all that is left is to break it off
            answer = ApiError("internal error; the server's log has the details").response()
            await answer(scope, receive, tagged_send)
        finally:
            # The route's template, not the path: paths are the client's and have no end.
            route = getattr(scope.get("route"), "path", "unknown")
            seconds = time.perf_counter() - started
            metrics.REQUESTS.labels(route, status).inc()
            metrics.REQUEST_SECONDS.labels(route).observe(seconds)
            # Probes come every few seconds and would bury the rest.
            level = logging.DEBUG if route in _PROBES else logging.INFO
            logger.log(level, "%s %s %d %.3fs", scope["method"], route, status, seconds)
