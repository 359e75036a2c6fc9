"""The processes of an engine, so that it can be ended when it does not end by itself."""

from __future__ import annotations

import multiprocessing
from contextlib import suppress

import psutil

_WITHIN_S = 10.0


class Processes:
    """Those that this process has started since, and all below them."""

    def __init__(self) -> None:
        self._before = {child.pid for child in multiprocessing.active_children()}
        self._found: list[psutil.Process] = []

    def remember(self) -> None:
        """Look them up while all are there: a worker whose parent has died is nobody's child."""
        for child in multiprocessing.active_children():
            if child.pid not in self._before:
                with suppress(psutil.NoSuchProcess):
                    process = psutil.Process(child.pid)
                    self._found += [process, *process.children(recursive=True)]

    def kill(self) -> None:
        """SIGKILL, which a process that is stopped gets too. Waits until they are gone."""
        for process in self._found:
            with suppress(psutil.NoSuchProcess):
                process.kill()  # it checks that the id was not given to another process since
        psutil.wait_procs(self._found, timeout=_WITHIN_S)
