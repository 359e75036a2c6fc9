"""What one running service holds, and how it comes up and goes down."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from drafts.calibration import load_calibration
from drafts.engine import Engine
from drafts.errors import DraftsError, EngineNotReady
from drafts.launch import abandon_start
from drafts.manifest import load_ensemble
from drafts.scores import ServingEngine
from drafts.text import TextEncoder
from server import metrics
from server.admission import Admission
from server.generation import Generator
from server.online import Online
from server.scoring import Scorer
from server.served import Served
from server.settings import Settings

logger = logging.getLogger(__name__)

_ABANDON_EVERY_S = 0.2

# What brings up an engine and the texts' encoder: `start_engine`, or a fake in HTTP tests.
Start = Callable[[Settings], Awaitable[tuple[str, ServingEngine, TextEncoder]]]


async def start_engine(settings: Settings) -> tuple[str, ServingEngine, TextEncoder]:
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
    """Settings, admission and, once it is up, what is served and what answers with it."""

    def __init__(self, settings: Settings, start: Start) -> None:
        self.settings = settings
        self.admission = Admission(settings.max_pending)
        self.serving: Serving | None = None
        self.failure: str | None = None
        self._start = start
        self._starting: asyncio.Task[None] | None = None
        self._ending = False

    def begin(self, on_failure: Callable[[], None]) -> None:
        """Bring the engine up in the background, so that /health and /ready answer meanwhile."""
        self._starting = asyncio.create_task(self._bring_up(on_failure))

    async def _bring_up(self, on_failure: Callable[[], None]) -> None:
        try:
            # Before the engine, which takes long: a damaged one ends the process at once.
            calibration = await asyncio.to_thread(load_calibration, self.settings.ensemble)
            name, engine, encoder = await self._start(self.settings)
        except DraftsError as error:
            self._fail(str(error), on_failure)
            return
        except Exception as error:  # whatever it was, nobody else would hear of it
            logger.exception("unexpected error while starting")
            self._fail(f"{type(error).__name__}: {error}", on_failure)
            return
        served = Served(name, engine, encoder, calibration=calibration)
        try:
            online = await asyncio.to_thread(Online, self.settings, served, self.admission)
            await online.begin()
        except Exception as error:  # as above
            if not isinstance(error, DraftsError):
                logger.exception("unexpected error while starting online distillation")
            self._fail(str(error), on_failure)
            await engine.shutdown()
            return
        capture = online.capture
        self.serving = Serving(
            settings=self.settings,
            served=served,
            scorer=Scorer(served, self.settings, capture),
            generator=Generator(served, self.settings, self.admission, capture),
            online=online,
        )
        if self._ending:
            return
        metrics.READY.set(1)
        how = "no calibration" if calibration is None else f"calibration {calibration.id}"
        logger.info("ready: %s, %d drafts, %s", name, engine.n_drafts, how)

    def _fail(self, reason: str, on_failure: Callable[[], None]) -> None:
        if self._ending:
            return  # stopped on purpose
        self.failure = f"the engine did not start: {reason}"
        logger.error(self.failure)
        on_failure()

    async def healthy(self) -> bool:
        """Starting counts as healthy; a failed start or a dead engine does not."""
        if self.serving is None:
            return self.failure is None
        try:
            await self.serving.served.engine.check_health()
        except EngineNotReady as error:
            if self.failure is None:
                logger.error("%s", error)
            self.failure = str(error)
            metrics.READY.set(0)
            return False
        return True

    def why_not_ready(self) -> str:
        """A sentence for a 503."""
        return self.failure or "the engine is still starting"

    async def end(self) -> None:
        """Stop the engine, started or not."""
        metrics.READY.set(0)
        self._ending = True
        while self._starting is not None and not self._starting.done():
            # A thread that builds the engine cannot be stopped, what it waits for can.
            abandon_start()
            await asyncio.wait({self._starting}, timeout=_ABANDON_EVERY_S)
        if self.serving is not None:
            await self.serving.online.end()
            await self.serving.served.engine.shutdown()
