"""The online trainer as a process of the service: started with it, started again if it dies."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time

from server import metrics
from server.settings import Settings

logger = logging.getLogger(__name__)

_WAITS_S = (1.0, 5.0, 30.0, 120.0)  # before it is started again, after deaths in a row
_WELL_S = 300.0  # a trainer that lived so long was well
_GRACE_S = 30.0
# The engine keeps all memory that it ever had (`drafts.launch`), and its environment is ours. The
# trainer works now and then: what it does not need goes back to the system.
_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_TRIM_THRESHOLD_": str(2**24)}


def command(settings: Settings) -> list[str]:
    """The command line of the trainer."""
    folder = settings.osd_place
    arguments = {
        "--ensemble": settings.ensemble.expanduser(),
        "--folder": folder / "trainer",
        "--corpus": settings.corpus,
        "--load": folder / "load",
        "--config": settings.osd_config,
    }
    given = [str(part) for pair in arguments.items() if pair[1] is not None for part in pair]
    return [sys.executable, "-m", "osd", *given, "--parent", str(os.getpid())]


def environment(settings: Settings) -> dict[str, str]:
    """Its environment: URLs can hold passwords, which a command line would show to everybody."""
    assert settings.store is not None
    places = {"DEMUR_DRAFTS_STORE": settings.store, "DEMUR_SPOOL": settings.spool_place}
    return os.environ | _MEMORY | places | {"TQDM_DISABLE": "1"}  # no bars in a log


async def keep_training(settings: Settings) -> None:
    """Run the trainer until cancelled; it then gets a while to write its checkpoint."""
    deaths = 0
    while True:
        started = time.monotonic()
        try:
            how = f"ended with status {await _train(settings)}"
        except OSError as error:  # no process to be had
            how = f"did not start ({error})"
        deaths = 0 if time.monotonic() - started > _WELL_S else deaths
        wait = _WAITS_S[min(deaths, len(_WAITS_S) - 1)]
        deaths += 1
        metrics.TRAINER_DEATHS.inc()
        logger.error("the trainer %s; starting it again in %g s", how, wait)
        await asyncio.sleep(wait)


async def _train(settings: Settings) -> int:
    """One trainer, from its start to its end; its exit status."""
    process = await asyncio.create_subprocess_exec(
        *command(settings),
        stdin=asyncio.subprocess.DEVNULL,
        start_new_session=True,
        env=environment(settings),
    )
    try:
        return await process.wait()
    finally:
        if process.returncode is None:
            process.terminate()
            try:
                async with asyncio.timeout(_GRACE_S):
                    await process.wait()
            except TimeoutError:
                process.kill()
