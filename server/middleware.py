"""What happens to every request before and after its route: id, trace, bounded body, metrics.

Plain ASGI: Starlette's BaseHTTPMiddleware would hide a client that hangs up from the routes.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from contextvars import ContextVar

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server import metrics, tracing
from server.errors import ApiError, BodyRefused, TooLarge, TooSlow

logger = logging.getLogger(__name__)

REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="-")
_PROBES = {"/health", "/ready", "/metrics"}
_ID = re.compile(r"[\x21-\x7e]{1,128}")


class RequestContext:
    """X-Request-Id in and out, a bounded body, a span, one log line and metrics for each request.

    Args:
        max_body_bytes: a larger body gets a 413.
        body_timeout_s: to send it; then a 408. Else a client that sends a byte now and then would
            hold memory and a connection for as long as it likes.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int, body_timeout_s: float) -> None:
        self.app = app
        self.max_body_bytes = max_body_bytes
        self.body_timeout_s = body_timeout_s

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

        async def tagged_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        with tracing.http_request(scope["method"], headers, request_id) as span:
            try:
                body = _Body(receive, self.max_body_bytes, self.body_timeout_s)
                body.check_declared(headers.get("content-length", ""))
                await self.app(scope, body.receive, tagged_send)
            except BodyRefused as error:  # by its declared length, before any route saw it
                await error.response()(scope, receive, tagged_send)
            except Exception:
                # Here and not in an exception handler: Starlette runs that one outside of us, and
                # its answer would carry no id and be counted as none.
                logger.exception("request failed")
                if status:
                    raise  # the answer has begun; all that is left is to break it off
                answer = ApiError("internal error; the server's log has the details").response()
                await answer(scope, receive, tagged_send)
            finally:
                # The route's template, not the path: paths are the client's and have no end.
                route = getattr(scope.get("route"), "path", "unknown")
                tracing.end_request(span, scope["method"], route, status)
                _observe(scope, route, status, time.perf_counter() - started)


class _Body:
    """A request's body as it comes in, neither too large nor too slow."""

    def __init__(self, receive: Receive, max_bytes: int, within_s: float) -> None:
        self._receive = receive
        self._max_bytes = max_bytes
        self._within_s = within_s
        self._until = asyncio.get_running_loop().time() + within_s
        self._received = 0
        self._whole = False

    def check_declared(self, length: str) -> None:
        if length.isdecimal() and int(length) > self._max_bytes:
            self._refuse_size()

    async def receive(self) -> Message:
        if self._whole:  # what comes now is the disconnect, for which a route may wait
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._until):
                message = await self._receive()
        except TimeoutError:
            error = TooSlow(f"the body did not come within {self._within_s:g} s")
            raise BodyRefused(error) from None
        self._received += len(message.get("body", b""))
        if self._received > self._max_bytes:
            self._refuse_size()
        self._whole = not message.get("more_body", False)
        return message

    def _refuse_size(self) -> None:
        raise BodyRefused(
            TooLarge(
                f"the body is over {self._max_bytes} bytes; send fewer or shorter items",
                code="body_too_large",
            )
        )


def _observe(scope: Scope, route: str, status: int, seconds: float) -> None:
    metrics.REQUESTS.labels(route, status).inc()
    metrics.REQUEST_SECONDS.labels(route).observe(seconds)
    # Probes come every few seconds and would bury the rest; not those that are refused.
    quiet = route in _PROBES and (status < 400 or status == 503)
    key = scope.get("state", {}).get("key")
    name = key.name if key is not None else None
    facts = {"method": scope["method"], "route": route, "status": status, "seconds": seconds}
    logger.log(
        logging.DEBUG if quiet else logging.INFO,
        "%s %s %d %.3fs %s",
        *facts.values(),
        name or "-",
        extra=facts | {"key": name},
    )
