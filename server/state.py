"""What one running service holds, and how it comes up, recovers and goes down."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass

from drafts.calibration import Calibration, load_calibration
from drafts.engine import Engine
from drafts.errors import DraftsError, EngineNotReady
from drafts.launch import abandon_start
from drafts.manifest import load_ensemble
from drafts.scores import ServingEngine
from drafts.text import TextEncoder
from server import metrics
from server.admission import Admission
from server.budgets import Budgets
from server.errors import NotReady
from server.generation import Generator
from server.keys import Keyring, keys_of
from server.online import Online
from server.scoring import Scorer
from server.served import Served
from server.settings import Settings
from server.watchdog import UNHEALTHY_AFTER, Backoff, until_it_fails

logger = logging.getLogger(__name__)

_ABANDON_EVERY_S = 0.2
_ABANDON_WITHIN_S = 10.0  # then by SIGKILL
_START_WITHIN_S = 1800.0  # with a large target's weights from a slow disk
_RETRY_S = 5  # for clients of an engine that is coming up
_RESTART_RETRY_S = 30

Started = tuple[str, ServingEngine, TextEncoder]
# What brings up an engine and the texts' encoder: `start_engine`, or a fake in HTTP tests.
Start = Callable[[Settings], Awaitable[Started]]


async def start_engine(settings: Settings) -> Started:
    """The model's name, its engine and its encoder."""
    # The encoder first: what is wrong with it shows at once, and not after the engine has loaded.
    ensemble = await asyncio.to_thread(load_ensemble, settings.ensemble)
    encoder = await asyncio.to_thread(TextEncoder, ensemble.target_path)
    engine = await Engine.start(settings.engine_config())
    return ensemble.manifest.name, engine, encoder


@dataclass(frozen=True)
class Serving:
    """What answers requests once the engine is up."""

    settings: Settings
    served: Served
    scorer: Scorer
    generator: Generator
    online: Online


class State:
    """Settings, keys, admission and, once it is up, what is served and what answers with it.

    An engine that dies or hangs is ended and started again, after waits that grow; until then
    nothing is ready, and what was under way has failed with a 503.
    """

    def __init__(self, settings: Settings, start: Start) -> None:
        self.settings = settings
        fixed = keys_of(settings.api_keys, "api", {"score", "generate"})
        fixed += keys_of(settings.admin_keys, "admin", {"admin"})
        self.keyring = Keyring(fixed, settings.keys_file)
        self.budgets = Budgets(settings.budgets_store)
        self.admission = Admission(settings.max_pending, settings.request_timeout_s)
        self.serving: Serving | None = None
        self.failure: str | None = None  # why nothing is ready, but for starting and ending
        self.draining = False
        self._start = start
        self._life: asyncio.Task[None] | None = None
        self._building: asyncio.Task[Started] | None = None
        self._failed_starts = 0
        self._ending = False

    def begin(self, on_failure: Callable[[], None]) -> None:
        """Bring the engine up in the background, so that /health and /ready answer meanwhile."""
        self._life = asyncio.create_task(self._live(on_failure))

    async def _live(self, on_failure: Callable[[], None]) -> None:
        try:
            serving, calibration = await self._bring_up()
        except Exception as error:  # whatever it was, nobody else would hear of it
            if self._ending:
                return  # stopped on purpose
            if not isinstance(error, DraftsError):
                logger.exception("unexpected error while starting")
            told = str(error) if isinstance(error, DraftsError) else f"{error!r}"
            self._failed_starts = UNHEALTHY_AFTER
            self._not_ready(f"the engine did not start: {told}")
            on_failure()
            return
        self.serving = serving
        if self._ending:
            return
        how = "no calibration" if calibration is None else f"calibration {calibration.id}"
        engine = serving.served.engine
        logger.info("ready: %s, %d drafts, %s", serving.served.name, engine.n_drafts, how)
        metrics.READY.set(1)
        await self._keep_alive(serving)

    async def _bring_up(self) -> tuple[Serving, Calibration | None]:
        # Before the engine, which takes long: a damaged one ends the process at once.
        calibration = await asyncio.to_thread(load_calibration, self.settings.ensemble)
        name, engine, encoder = await self._build()
        served = Served(name, engine, encoder, calibration=calibration)
        try:
            online = await asyncio.to_thread(Online, self.settings, served, self.admission)
            await online.begin()
        except BaseException:
            await engine.shutdown()
            raise
        capture = online.capture
        serving = Serving(
            settings=self.settings,
            served=served,
            scorer=Scorer(served, self.settings, self.admission, self.budgets, capture),
            generator=Generator(served, self.settings, self.admission, self.budgets, capture),
            online=online,
        )
        return serving, calibration

    async def _build(self) -> Started:
        # A task of its own: the thread that builds an engine goes on if whoever waits is cancelled.
        self._building = asyncio.create_task(_as_task(self._start(self.settings)))
        try:
            async with asyncio.timeout(_START_WITHIN_S):
                return await asyncio.shield(self._building)
        except TimeoutError:
            abandon_start(kill=True)
            raise EngineNotReady(f"it did not come up in {_START_WITHIN_S:g} s") from None

    async def _keep_alive(self, serving: Serving) -> None:
        """Start the engine again whenever it fails, until cancelled."""
        backoff = Backoff()
        while True:
            backoff.begin()
            reason = await until_it_fails(serving.served.engine, self.settings.engine_hang_s)
            self._not_ready(f"{reason}; it is started again")
            metrics.ENGINE_FAILURES.inc()
            try:
                await serving.served.engine.kill()
            except Exception:  # another one is started all the same
                logger.exception("unexpected error while ending the engine")
            await self._start_again(serving, backoff)
            self.failure, self._failed_starts = None, 0
            metrics.READY.set(1)
            logger.info("ready again: %s", serving.served.name)

    async def _start_again(self, serving: Serving, backoff: Backoff) -> None:
        while True:
            await asyncio.sleep(backoff.wait_s())
            try:
                _, engine, _ = await self._build()
                break
            except Exception as error:  # it is tried again, whatever it was
                if not isinstance(error, DraftsError):
                    logger.exception("unexpected error while starting the engine again")
                self._failed_starts += 1
                self._not_ready(f"the engine does not start again: {error}")
        serving.served.replace(engine)
        await serving.online.catch_up()

    def _not_ready(self, reason: str) -> None:
        self.failure = reason
        metrics.READY.set(0)
        # An engine that is told to stop while it starts has not failed.
        logger.log(logging.INFO if self.draining else logging.ERROR, reason)

    def healthy(self) -> bool:
        """Starting counts as healthy, and starting again; not if that fails again and again."""
        return self._failed_starts < UNHEALTHY_AFTER

    async def answering(self) -> Serving:
        """What answers requests; `NotReady` before it is up, and while it is not."""
        if self.serving is None:
            raise NotReady(self.failure or "the engine is still starting", retry_after_s=_RETRY_S)
        if self.failure is not None:
            raise NotReady(self.failure, retry_after_s=_RESTART_RETRY_S)
        try:
            await self.serving.served.engine.check_health()
        except EngineNotReady as error:  # the watchdog has not looked yet
            metrics.READY.set(0)
            raise NotReady(str(error), retry_after_s=_RESTART_RETRY_S) from error
        return self.serving

    async def cut_off(self) -> None:
        """End what is under way; each request or stream is told so."""
        if self.serving is not None:
            if self._life is not None:
                self._life.cancel()  # or it would start the engine again
            with suppress(EngineNotReady):
                await self.serving.served.engine.abort_all()

    async def end(self) -> None:
        """Stop the engine, started or not."""
        metrics.READY.set(0)
        self._ending = self.draining = True
        began = time.monotonic()
        while self._building is not None and not self._building.done():
            # A thread that builds the engine cannot be stopped, what it waits for can.
            abandon_start(kill=time.monotonic() - began > _ABANDON_WITHIN_S)
            await asyncio.wait({self._building}, timeout=_ABANDON_EVERY_S)
        if self._life is not None:
            if self.serving is not None:
                self._life.cancel()  # else it sees for itself that this is the end
            await asyncio.wait({self._life})
        if self.serving is not None:
            await self.serving.online.end()
        if self._building is not None and self._building.exception() is None:
            _, engine, _ = self._building.result()
            await engine.shutdown()


async def _as_task(started: Awaitable[Started]) -> Started:
    return await started
