"""The processes of an engine, so that it can be ended when it does not end by itself."""

from __future__ import annotations

import multiprocessing
from contextlib import suppress
from multiprocessing.process import BaseProcess

import psutil

_WITHIN_S = 10.0


class Processes:
    """Those that this process has started since, and all below them."""

    def __init__(self) -> None:
        self._before = set(multiprocessing.active_children())
        self._children: list[BaseProcess] = []
        self._below: list[psutil.Process] = []

    def remember(self) -> None:
        """Look them up while all are there: a worker whose parent has died is nobody's child."""
        self._children = [
            child for child in multiprocessing.active_children() if child not in self._before
        ]
        for child in self._children:
            with suppress(psutil.NoSuchProcess):
                self._below += psutil.Process(child.pid).children(recursive=True)

    def kill(self) -> None:
        """SIGKILL, which a process that is stopped gets too. Waits until they are gone."""
        for child in self._children:
            child.kill()
        for process in self._below:
            with suppress(psutil.NoSuchProcess):
                process.kill()  # it checks that the id was not given to another process since
        # By multiprocessing, which keeps books of its children, and by psutil for theirs.
        for child in self._children:
            child.join(_WITHIN_S)
        psutil.wait_procs(self._below, timeout=_WITHIN_S)
