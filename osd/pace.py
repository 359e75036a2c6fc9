"""How fast the online trainer goes: a share of the time, less of it while the service is busy.

The service writes how many requests it has under way into a file (`Load`), and the trainer reads it
(`is_busy`): one number of eight bytes, so that telling costs a request next to nothing.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

logger = logging.getLogger(__name__)

_SLICE_S = 0.2


class Load:
    """The service's side: a file of this process in a folder.

    Args:
        folder: made if it is not there.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / str(os.getpid())
        self._file = os.open(self._path, os.O_CREAT | os.O_RDWR | os.O_TRUNC, 0o644)
        self.tell(0)

    def tell(self, pending: int) -> None:
        """Write how many requests are under way."""
        os.pwrite(self._file, pending.to_bytes(8, "little"), 0)

    def close(self) -> None:
        os.close(self._file)
        self._path.unlink(missing_ok=True)


def is_busy(folder: Path) -> bool:
    """Whether a process that told its load to a folder, and still lives, has requests under way."""
    for file in folder.glob("*"):
        try:
            pending = int.from_bytes(file.read_bytes(), "little")
        except FileNotFoundError:  # it has ended
            continue
        if pending and Path("/proc", file.name).exists():
            return True
    return False


class Pace:
    """Keeps work to a share of the time by resting after it.

    Args:
        share: of the time, while the service has nothing to do.
        busy_share: while it has.
        busy: whether it has.
    """

    def __init__(self, share: float, busy_share: float, busy: Callable[[], bool]) -> None:
        self._share, self._busy_share, self._busy = share, busy_share, busy
        self._worked = 0.0

    def worked(self, seconds: float) -> None:
        """Work was done; rest is owed for it."""
        self._worked += seconds

    def rest(self, stop: threading.Event) -> None:
        """Rest until the work is within the share. A service that becomes idle shortens it."""
        while self._worked > 0 and not stop.is_set():
            share = self._busy_share if self._busy() else self._share
            if share == 1:
                break
            # A second of rest at this share makes up for so much work.
            rate = share / (1 - share)
            slept = min(_SLICE_S, self._worked / rate)
            started = time.monotonic()
            stop.wait(slept)
            self._worked -= (time.monotonic() - started) * rate
        self._worked = 0.0


def step_aside() -> None:
    """Run this process only where the cores have nothing else to do, as far as Linux lets it."""
    os.nice(19)
    try:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    except (AttributeError, OSError) as error:  # another system, or a container that forbids it
        logger.info("SCHED_IDLE is not to be had (%s); nice 19 is", error)
