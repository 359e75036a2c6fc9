"""How often the swap to a version was begun and never ended, because the engine died of it.

It is kept on the disk: the whole process may have died, of too little memory say, and a version
that ends it at each start must not be tried at each start. Services of one machine share it, and
may try a version at the same time: an attempt that goes on is locked by the process that makes it,
and only those that nobody holds any more have failed.
"""

from __future__ import annotations

import fcntl
import uuid
from pathlib import Path
from typing import IO

_AT_MOST = 2  # once may have been chance


class Attempts:
    """Those of this machine; a file each, named by version.

    Args:
        folder: where they are kept.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._own: IO[str] | None = None
        self._file = folder

    def too_many(self, version: str) -> bool:
        """Whether a version is not to be tried again."""
        return sum(_has_failed(file) for file in self._of(version)) >= _AT_MOST

    def begin(self, version: str) -> None:
        """Note that it is tried. Raises `OSError` if that cannot be kept."""
        self._folder.mkdir(parents=True, exist_ok=True)
        name = uuid.uuid4().hex
        own = (self._folder / name).open("w")
        fcntl.flock(own, fcntl.LOCK_EX)
        # It is seen once it is locked.
        self._file = (self._folder / name).rename(self._folder / f"{version}@{name}")
        self._own = own

    def failed(self) -> None:
        """The engine has not outlived it."""
        if self._own is not None:
            self._own.close()
            self._own = None

    def end(self) -> None:
        """The engine has outlived it."""
        if self._own is not None:
            self._file.unlink()
            self.failed()

    def forgive(self, version: str) -> None:
        """Try a version again: somebody asks for it."""
        for file in self._of(version):
            if _has_failed(file):
                file.unlink(missing_ok=True)

    def _of(self, version: str) -> list[Path]:
        return [file for file in self._folder.glob("*@*") if file.name.startswith(f"{version}@")]


def _has_failed(file: Path) -> bool:
    try:
        with file.open() as attempt:
            fcntl.flock(attempt, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return True
    except (BlockingIOError, FileNotFoundError):
        return False  # it goes on, or has ended a moment ago
