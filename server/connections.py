"""Connections that are slow, or too many, and the way a service stops."""

from __future__ import annotations

import asyncio
import logging
import resource
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server.settings import Settings
from server.state import State

logger = logging.getLogger(__name__)

# After the requests that did not end by themselves were cut off: to tell their clients.
_TELL_S = 5
# A connection that was made just before the end may bring its request for so long.
_FIRST_REQUEST_S = 1.0
_OPEN_FILES = 65_536
_MAX_HEADER_BYTES = 64 * 2**10


def raise_file_limit() -> None:
    """Let this process open more files than the usual 1,024, fewer than its connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def protocol(settings: Settings) -> type[HttpToolsProtocol]:
    """uvicorn's protocol, which by itself waits for a request's headers for ever."""

    class BoundedProtocol(HttpToolsProtocol):
        _deadline: asyncio.TimerHandle | None = None
        _header_bytes = 0
        _is_ending = False

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > settings.max_connections:
                transport.abort()
                return
            self._expect_headers()

        def connection_lost(self, exc: Exception | None) -> None:
            self._headers_came()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self._deadline is None and (self.cycle is None or self.cycle.response_complete):
                # The next request of a connection, or what is left of a body that nobody wants:
                # any byte has ended uvicorn's keep-alive timeout.
                self._expect_headers()
            elif self._deadline is not None:
                self._header_bytes += len(data)
                if self._header_bytes > _MAX_HEADER_BYTES:
                    self.transport.abort()

        def on_headers_complete(self) -> None:
            self._headers_came()
            super().on_headers_complete()
            if self._is_ending:
                super().shutdown()  # once this request has its answer

        def shutdown(self) -> None:
            if self.cycle is not None:
                super().shutdown()
                return
            # Closed now, a request that is on its way would be neither answered nor refused.
            self._is_ending = True
            self.loop.call_later(_FIRST_REQUEST_S, self._close_if_unused)

        def _close_if_unused(self) -> None:
            if self.cycle is None:
                self.transport.close()

        def _expect_headers(self) -> None:
            self._header_bytes = 0
            self._deadline = self.loop.call_later(settings.header_timeout_s, self.transport.abort)

        def _headers_came(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

    return BoundedProtocol


class DrainingServer(uvicorn.Server):
    """Stops in order.

    SIGTERM: `/ready` says 503 and everything is still answered for `drain_s`, in which load
    balancers look elsewhere; then no more connections, and what is under way may end within
    `shutdown_grace_s`; what does not is told so. SIGINT, or a second SIGTERM: no wait at first.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        settings: Settings,
        state: State,
        at_end: Callable[[], None],
    ) -> None:
        super().__init__(config)
        self._at_end = at_end
        self._settings = settings
        self._state = state
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        self._at_end()
        # uvicorn would end the process by the signal, and nothing that waits for its end would
        # run. A stop in order has status 0.
        self._captured_signals[:] = [s for s in self._captured_signals if s != signal.SIGTERM]

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        again = self._state.draining
        self._state.draining = True
        loop = self._loop
        if sig != signal.SIGTERM or again or loop is None:
            self._stop(sig, frame)
            return
        logger.info("draining for %g s", self._settings.drain_s)
        loop.call_soon_threadsafe(loop.call_later, self._settings.drain_s, self._stop, sig, frame)

    def _stop(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        if self._loop is not None:
            self._loop.call_soon_threadsafe(
                self._loop.call_later, self._settings.shutdown_grace_s, self._cut_off
            )

    def _cut_off(self) -> None:
        if self._state.admission.pending:
            logger.warning("%d items were not done in time", self._state.admission.pending)
        self._cutting = asyncio.ensure_future(self._state.cut_off())


def listening_server(
    app: FastAPI, settings: Settings, at_end: Callable[[], None] = lambda: None
) -> DrainingServer:
    """A server for the app, not running yet; at its end it does one thing more."""
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,  # the service's own line has the request id
        server_header=False,
        http=protocol(settings),
        # Nothing here speaks it, and its own limits would have to be minded.
        ws="none",
        timeout_graceful_shutdown=settings.shutdown_grace_s + _TELL_S,
    )
    return DrainingServer(config, settings, app.state.demur, at_end)
