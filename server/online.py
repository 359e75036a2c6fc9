"""Online distillation in a running service: the spool, the store that is followed, the trainer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from drafts.errors import DraftsError
from drafts.manifest import load_ensemble
from drafts.store import DraftsStore
from osd.control import STALE_S, Control, TrainerStatus
from osd.errors import SpoolError
from osd.pace import Load
from osd.spool import Limits, Spool, open_spool
from server import metrics, schemas
from server.admission import Admission
from server.aside import aside
from server.capture import Capture
from server.errors import BadRequest, NotFound, NotReady
from server.follower import Follower, follow
from server.served import Served
from server.settings import Settings
from server.trainer_process import keep_training

logger = logging.getLogger(__name__)

_FLUSH_S = 5.0


class Online:
    """What of online distillation this service does: all of it, or parts, or nothing."""

    def __init__(self, settings: Settings, served: Served, admission: Admission) -> None:
        self.settings = settings
        self._admission = admission
        self._folder = settings.osd_place
        self._name = served.engine.manifest.name
        self._tasks: list[asyncio.Task[None]] = []
        self._spool: Spool | None = None
        self._load: Load | None = None
        self.capture: Capture | None = None
        self.follower: Follower | None = None
        self.control: Control | None = None
        if settings.osd != "off":
            self.capture = Capture(self._open_spool, settings.spool_queue)
        if settings.store is not None:
            store = DraftsStore(settings.store)
            self.control = Control(store)
            ensemble = load_ensemble(settings.ensemble)
            self.follower = Follower(store, ensemble, served, self._folder / "served")

    async def begin(self) -> None:
        """Start all parts. A store or spool that is away does not keep the service from serving."""
        if self.capture is not None:
            self.capture.start()
            try:
                self._load = Load(self._folder / "load")
                self._admission.tell = self._load.tell
            except OSError as error:  # the trainer will not know that this service is busy
                logger.error("the load cannot be told: %s", error)
        if self.follower is not None:
            await self.catch_up()
            every = self.settings.follow_every_s
            self._tasks.append(asyncio.create_task(follow(self.follower, every)))
            self._tasks.append(asyncio.create_task(self._observe(every)))
        if self.settings.osd == "train":
            self._tasks.append(asyncio.create_task(keep_training(self.settings)))

    async def catch_up(self) -> None:
        """Serve with the store's current version, if there is one that can be used."""
        if self.follower is None:
            return
        try:
            await self.follower.look(again=True)
        except (OSError, DraftsError) as error:
            logger.error("the drafts store: %s; serving with the ensemble's own drafts", error)
        except Exception:  # `follow` looks again
            logger.exception("unexpected error while following the drafts store")

    async def end(self) -> None:
        """Stop all parts; what waits for the spool is written."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.capture is not None:
            await aside(self.capture.end, _FLUSH_S)
        if self._load is not None:
            self._admission.tell = None
            self._load.close()
        if self._spool is not None:
            self._spool.close()

    async def roll_back(self, version: str | None) -> None:
        """Make a version current, the present one's parent if none is named, and serve with it."""
        follower = self.follower
        if follower is None:
            raise BadRequest("this service follows no drafts store (osd is off)", code="osd_off")
        with _told_to_clients():
            name = await aside(_to_go_back_to, follower.store, version)
        try:
            await follower.check(name)
        except DraftsError as error:
            raise BadRequest(
                f"version {name} cannot be used: {error}", code="unusable_version"
            ) from error
        with _told_to_clients():
            await aside(_make_current, follower.store, name)
            await follower.forgive(name)
            await follower.look(again=True)

    async def versions(self) -> list[schemas.DraftVersion] | None:
        """The store's versions; None without a store."""
        if self.follower is None:
            return None
        with _told_to_clients():
            return await aside(_versions, self.follower.store)

    async def status(self) -> schemas.OsdStatus:
        """Everything that is known of it."""
        trainer, paused, store_error = None, None, None
        if self.control is not None:
            try:
                paused = await aside(self.control.paused)
                trainer = await aside(self.control.status)
            except (OSError, DraftsError) as error:
                store_error = str(error)
        return schemas.OsdStatus(
            mode=self.settings.osd,
            paused=paused,
            store_error=store_error,
            spool=await aside(self._spool_status),
            trainer_alive=_is_alive(trainer),
            trainer=trainer,
        )

    async def pause(self, reason: str | None) -> None:
        """Let the trainer rest, or go on if there is no reason not to."""
        control = self.required_control()
        with _told_to_clients():
            if reason is None:
                await aside(control.resume)
            else:
                await aside(control.pause, reason)

    async def clear(self) -> int:
        """Drop all conversations: those in the spool, and those on their way into it.

        Those of a spool that was filled before `osd` was turned off, too.
        """
        if self.capture is None and not await aside(self._has_spool):
            raise BadRequest("this service keeps no conversations (osd is off)", code="osd_off")
        waiting = 0 if self.capture is None else await aside(self.capture.forget)
        with _told_to_clients():
            return waiting + await aside(lambda: self._shared_spool().clear())

    def required_control(self) -> Control:
        """The trainer's control; `BadRequest` if nothing is followed here."""
        if self.control is None:
            raise BadRequest("this service follows no drafts store (osd is off)", code="osd_off")
        return self.control

    def _open_spool(self) -> Spool:
        limits = Limits(self.settings.spool_max_bytes, self.settings.spool_max_age_s)
        return open_spool(self.settings.spool_place, limits, self._name)

    def _shared_spool(self) -> Spool:
        """For status and clearing; the capture's thread has its own."""
        if self._spool is None:
            self._spool = self._open_spool()
        return self._spool

    def _has_spool(self) -> bool:
        place = self.settings.spool_place
        return "://" in place or Path(place).exists()

    def _spool_status(self) -> schemas.SpoolStatus | None:
        if self.capture is None:
            return None
        texts, size, age, error = 0, 0, 0.0, self.capture.error
        try:
            texts, size, age = self._shared_spool().stats()
        except SpoolError as failure:
            error = str(failure)
        return schemas.SpoolStatus(
            texts=texts, bytes=size, oldest_age_s=age, queued=self.capture.queued, error=error
        )

    async def _observe(self, every_s: float) -> None:
        while True:
            try:
                metrics.observe_osd(await self.status())
            except Exception:
                logger.exception("unexpected error while observing online distillation")
            await asyncio.sleep(every_s)


def _to_go_back_to(store: DraftsStore, name: str | None) -> str:
    """The version that is asked for, or the current one's parent."""
    if name is None:
        current = store.current()
        if current.parent is None:
            raise BadRequest(f"{current.name} has no parent to go back to", code="no_parent")
        return current.parent
    if name not in {version.name for version in store.versions()}:
        raise NotFound(f"there is no version {name} in the store", param="version")
    return name


def _make_current(store: DraftsStore, name: str) -> None:
    before = store.current_name()
    store.make_current(name)
    if before is not None and before != name:
        logger.warning("version %s is taken back by request, for %s", before, name)
        store.withdraw(before, f"taken back by request, for {name}")


def _versions(store: DraftsStore) -> list[schemas.DraftVersion]:
    current = store.current_name()
    return [
        schemas.DraftVersion(
            name=version.name,
            parent=version.parent,
            created=int(version.created),
            current=version.name == current,
            refused=[str(reason) for reason in version.about.get("refused", [])],
            withdrawn=store.withdrawn(version.name),
            calibration=version.about.get("calibration"),
            measured={
                name: version.about[name]
                for name in ("reference", "traffic")
                if isinstance(version.about.get(name), dict)
            },
        )
        for version in store.versions()
    ]


def _is_alive(trainer: TrainerStatus | None) -> bool:
    return trainer is not None and trainer.activity != "stopped" and trainer.age_s < STALE_S


@contextmanager
def _told_to_clients() -> Iterator[None]:
    """A store or a spool that is away, as an `ApiError`."""
    try:
        yield
    except (OSError, DraftsError, SpoolError) as error:
        raise NotReady(str(error), retry_after_s=30) from error
