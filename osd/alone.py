"""One command at a time in a folder that it writes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from osd.errors import OsdError


@contextmanager
def alone(folder: Path, command: str, is_main: bool = True) -> Iterator[None]:
    """Make `folder`, and refuse it while another `demur <command>` works there.

    Args:
        is_main: the one of several processes of a command that holds the lock for all.
    """
    if not is_main:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise OsdError(f"another `demur {command}` is at work in {folder}") from error
    try:
        yield
    finally:
        lock.release()
