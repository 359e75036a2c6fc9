"""Keeps the engine at the drafts store's current version. Several services may follow one store."""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from pathlib import Path

from drafts.calibration import Calibration, load_calibration
from drafts.errors import DraftsError, EngineNotReady, StoreError
from drafts.manifest import Ensemble
from drafts.store import DraftsStore, Version
from osd.publish import first_version, open_version
from server import metrics
from server.aside import aside
from server.attempts import Attempts
from server.served import Served

logger = logging.getLogger(__name__)

_AGAIN_S = 60.0  # until a version that could not be used is tried again


class Follower:
    """Looks at the store, and swaps the engine's drafts when another version is current.

    Args:
        store: of the versions.
        ensemble: what the service was started with; it becomes the first version of an empty store.
        served: whose engine and calibration change.
        work: folder for versions on this machine.
    """

    def __init__(self, store: DraftsStore, ensemble: Ensemble, served: Served, work: Path) -> None:
        self.store = store
        self._ensemble = ensemble
        self._served = served
        self._work = work
        self._one_at_a_time = asyncio.Lock()
        self._refused: tuple[str, float] = ("", 0.0)
        self._attempts = Attempts(work / "attempts")

    async def look(self, *, again: bool = False) -> None:
        """Serve with the current version, if that is another one.

        Args:
            again: try also what could not be used a moment ago.

        Raises:
            OSError, DraftsError: if the store cannot be read, or the version not be used; the
                engine then serves on as it did.
            EngineNotReady: if the engine does not answer, or the swap was the end of it. A version
                that has ended it twice is not tried again, until `forgive`.
        """
        async with self._one_at_a_time:
            current = await aside(first_version, self.store, self._ensemble, self._work)
            metrics.CURRENT_VERSION.clear()
            metrics.CURRENT_VERSION.labels(self._served.engine.weights_version).set(1)
            is_served = current.name == self._served.engine.weights_version
            metrics.CURRENT_SERVED.set(is_served)
            if is_served:
                return
            name, until = self._refused
            if name == current.name and time.monotonic() < until and not again:
                return
            if await aside(self._attempts.too_many, current.name):
                raise StoreError(
                    f"version {current.name} has twice ended the engine when it was swapped in and "
                    "is not tried again, unless it is rolled back to"
                )
            try:
                await self._serve(current)
            except (OSError, DraftsError):
                self._refused = (current.name, time.monotonic() + _AGAIN_S)
                metrics.SWAPS.labels("failed").inc()
                raise

    async def _serve(self, version: Version) -> None:
        started = time.monotonic()
        opened, calibration = await aside(self._open, version)
        before = self._served.engine.weights_version
        # Before the swap: from its first answer on, a version is judged by its own calibration.
        self._served.calibrate(version.name, calibration)
        await self._swap(version.name, opened)
        metrics.SWAPS.labels("ok").inc()
        metrics.CURRENT_SERVED.set(1)
        metrics.SWAP_SECONDS.observe(time.monotonic() - started)
        metrics.CURRENT_VERSION.clear()
        metrics.CURRENT_VERSION.labels(version.name).set(1)
        logger.info("serving drafts %s, before %s", version.name, before)
        try:
            await aside(self._tidy, {version.name, before})
        except (OSError, DraftsError) as error:  # it serves; old copies can wait
            logger.warning("old versions are not removed: %s", error)

    async def _swap(self, name: str, opened: Ensemble) -> None:
        engine = self._served.engine
        await engine.check_health()  # one that was dead before has not died of this
        await aside(self._attempts.begin, name)
        try:
            await engine.swap(opened.folder, opened.target_path)
        except EngineNotReady:
            self._attempts.failed()
            raise
        except BaseException:
            self._attempts.end()
            raise
        self._attempts.end()

    async def forgive(self, name: str) -> None:
        """Try a version again that has ended the engine: somebody asks for it."""
        await aside(self._attempts.forgive, name)

    async def check(self, name: str) -> None:
        """Raise what is wrong with a version, if anything is; nothing changes."""
        await aside(lambda: self._open(self.store.version(name)))

    def _open(self, version: Version) -> tuple[Ensemble, Calibration | None]:
        opened = open_version(self.store, version, self._ensemble, self._work)
        # Of the version that the service was started with, the ensemble's may be the newer one.
        is_first = version.name == self._ensemble.manifest.weights_version
        return opened, load_calibration(self._ensemble.folder if is_first else opened.folder)

    def _tidy(self, spared: set[str]) -> None:
        """Remove this machine's copies of versions that the store no longer has."""
        kept = {version.name for version in self.store.versions()} | spared
        for folder in (self._work / "versions").iterdir():
            if folder.name not in kept and ".partial" not in folder.name:
                shutil.rmtree(folder, ignore_errors=True)


async def follow(follower: Follower, every_s: float) -> None:
    """Look again and again, until cancelled. What goes wrong is logged when it changes."""
    problem = ""
    while True:
        try:
            await follower.look()
            problem = ""
        except EngineNotReady as error:
            logger.debug("%s", error)  # it is started again; the next look is at the new one
        except (OSError, DraftsError) as error:
            if str(error) != problem:
                logger.error("the drafts store: %s; serving on with what serves", error)
            problem = str(error)
        except Exception:
            logger.exception("unexpected error while following the drafts store")
        await asyncio.sleep(every_s)
