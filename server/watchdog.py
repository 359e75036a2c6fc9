"""Notices an engine that has died or hangs, and says how long to wait before the next start."""

from __future__ import annotations

import asyncio
import logging
import time

from drafts.errors import EngineNotReady
from drafts.scores import ServingEngine

logger = logging.getLogger(__name__)

UNHEALTHY_AFTER = 3  # failed starts in a row: then a supervisor should start the process anew

_LOOK_EVERY_S = 0.5
_PING_EVERY_S = 5.0
_WAITS_S = (0.0, 5.0, 30.0, 120.0)  # after failures in a row
_WELL_S = 300.0  # an engine that lived so long was well


async def until_it_fails(engine: ServingEngine, hang_s: float) -> str:
    """Wait until an engine is dead, or has been silent for so long; a sentence that says which."""
    pinged = time.monotonic()
    while True:
        await asyncio.sleep(_LOOK_EVERY_S)
        try:
            await engine.check_health()
            if time.monotonic() - pinged > _PING_EVERY_S:
                await engine.ping(hang_s)
                pinged = time.monotonic()
        except EngineNotReady as error:
            return str(error)
        except Exception as error:  # nobody else watches: what is not understood is a failure
            logger.exception("unexpected error while watching the engine")
            return f"the engine cannot be watched ({type(error).__name__})"


class Backoff:
    """Waits that grow from failure to failure, and start over after a good while."""

    def __init__(self) -> None:
        self._failures = 0
        self._began: float | None = None

    def begin(self) -> None:
        """The engine lives."""
        self._began = time.monotonic()

    def wait_s(self) -> float:
        """Before the next start."""
        if self._began is not None and time.monotonic() - self._began > _WELL_S:
            self._failures = 0
        self._began = None  # until then it does not live
        wait = _WAITS_S[min(self._failures, len(_WAITS_S) - 1)]
        self._failures += 1
        return wait
