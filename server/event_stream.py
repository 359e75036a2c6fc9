"""Server-sent events, as OpenAI's clients read them."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator

from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from server.admission import ClientGone, unless_gone
from server.errors import ApiError

logger = logging.getLogger(__name__)


class EventStream(Response):
    """Sends events as they come; what makes them is closed when the client hangs up.

    Args:
        first: the first event. It came before the answer began, so that an error before it could
            still have a status of its own.
        rest: the others.
        within_s: how long sending may take; a client that does not read holds its place no longer.
    """

    media_type = "text/event-stream"

    def __init__(self, first: str, rest: AsyncGenerator[str, None], within_s: float) -> None:
        # No proxy may hold events back.
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._first = first
        self._rest = rest
        self._within_s = within_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(self._within_s):
                await unless_gone(Request(scope, receive), self._send(send))
        except ClientGone:
            logger.info("the client hung up")
        except TimeoutError:
            logger.warning("the client did not read its stream within %g s", self._within_s)
        finally:
            await self._rest.aclose()

    async def _send(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": self.status_code}
        await send(start | {"headers": self.raw_headers})
        await _send_event(send, self._first)
        try:
            async for event in self._rest:
                await _send_event(send, event)
        except ApiError as error:
            await _send_event(send, json.dumps({"error": error.body()}))
        except Exception:  # the status is sent: an event is what is left to tell it by
            logger.exception("a stream broke off")
            failure = ApiError("internal error; the server's log has the details")
            await _send_event(send, json.dumps({"error": failure.body()}))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _send_event(send: Send, event: str) -> None:
    body = f"data: {event}\n\n".encode()
    await send({"type": "http.response.body", "body": body, "more_body": True})
