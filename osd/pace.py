"""How fast the online trainer goes: a share of the time, less of it while the service is busy.

The service writes how many requests it has under way into a file (`Load`), and the trainer reads it
(`is_busy`): one number of eight bytes, so that telling costs a request next to nothing.
"""

from __future__ import annotations

import fcntl
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

logger = logging.getLogger(__name__)

_SLICE_S = 0.2
_NICE = 15


class Load:
    """The service's side: a file of this process in a folder.

    Args:
        folder: made if it is not there.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / uuid.uuid4().hex
        unlocked = self._path.with_suffix(".new")
        self._file = os.open(unlocked, os.O_CREAT | os.O_RDWR, 0o644)
        # Held for as long as this process lives; in another container its number means nothing.
        fcntl.flock(self._file, fcntl.LOCK_EX)
        self.tell(0)
        unlocked.rename(self._path)

    def tell(self, pending: int) -> None:
        """Write how many requests are under way."""
        with suppress(OSError):  # a trainer that does not know is no reason to fail a request
            os.pwrite(self._file, pending.to_bytes(8, "little"), 0)

    def close(self) -> None:
        os.close(self._file)
        self._path.unlink(missing_ok=True)


def is_busy(folder: Path) -> bool:
    """Whether a process that told its load to a folder, and still lives, has requests under way."""
    return any(_is_busy(file) for file in folder.glob("*") if file.suffix != ".new")


def _is_busy(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            pending = int.from_bytes(file.read(8), "little")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:  # it lives
                return pending > 0
            path.unlink(missing_ok=True)  # it was killed
    except FileNotFoundError:  # it has ended
        pass
    return False


class Pace:
    """Keeps work to a share of the time by resting after it.

    A share of 0.1 allows a tenth of a second of work for each second that passes, those of the work
    itself included: work that Linux holds up for others has rested meanwhile.

    Args:
        share: of the time, while the service has nothing to do.
        busy_share: while it has.
        busy: whether it has.
    """

    def __init__(self, share: float, busy_share: float, busy: Callable[[], bool]) -> None:
        self._share, self._busy_share, self._busy = share, busy_share, busy
        self._owed = 0.0

    def worked(self, seconds: float, within: float) -> None:
        """Work was done.

        Args:
            seconds: of work.
            within: in so much time.
        """
        self._owed += seconds - within * self._now()

    def rest(self, stop: threading.Event, most_s: float = float("inf")) -> bool:
        """Rest until the work is within the share; a service that becomes idle shortens it.

        Returns:
            Whether it is, after at most so many seconds.
        """
        until = time.monotonic() + most_s
        while self._owed > 0 and not stop.is_set():
            if time.monotonic() >= until:
                return False
            share = self._now()
            started = time.monotonic()
            stop.wait(min(_SLICE_S, self._owed / share))
            self._owed -= (time.monotonic() - started) * share
        self._owed = 0.0
        return True

    def _now(self) -> float:
        return self._busy_share if self._busy() else self._share


def step_aside() -> None:
    """Give way to services on this machine: about a thirtieth of a core that they want as well.

    Where Linux groups processes by session, `nice` counts within a session only, so the session's
    own value is set, too; `demur serve` starts its trainer in a session of its own.
    """
    os.nice(_NICE)
    try:
        Path("/proc/self/autogroup").write_text(str(_NICE))
    except OSError as error:  # no such grouping, or a container that forbids it
        logger.debug("autogroup is left as it is (%s)", error)
