"""The online trainer as a process of the service: started with it, started again if it dies."""

from __future__ import annotations

import asyncio
import logging
import os
import sys

from server import metrics
from server.settings import Settings

logger = logging.getLogger(__name__)

_WAITS_S = (1.0, 5.0, 30.0, 120.0)  # before it is started again, after deaths in a row
_WELL_S = 300.0  # a trainer that lived so long was well
_GRACE_S = 30.0


def command(settings: Settings) -> list[str]:
    """The command line of the trainer."""
    folder = settings.osd_folder.expanduser()
    arguments = {
        "--ensemble": settings.ensemble.expanduser(),
        "--store": settings.store,
        "--spool": settings.spool_place,
        "--folder": folder / "trainer",
        "--corpus": settings.corpus,
        "--load": folder / "load",
        "--config": settings.osd_config,
    }
    given = [str(part) for pair in arguments.items() if pair[1] is not None for part in pair]
    return [sys.executable, "-m", "osd", *given, "--child"]


async def keep_training(settings: Settings) -> None:
    """Run the trainer until cancelled; it then gets a while to write its checkpoint."""
    deaths = 0
    while True:
        started = asyncio.get_running_loop().time()
        process = await asyncio.create_subprocess_exec(
            *command(settings),
            stdin=asyncio.subprocess.DEVNULL,
            start_new_session=True,
            env=os.environ | {"TQDM_DISABLE": "1"},  # no bars in a log
        )
        try:
            status = await process.wait()
        finally:
            if process.returncode is None:
                process.terminate()
                try:
                    async with asyncio.timeout(_GRACE_S):
                        await process.wait()
                except TimeoutError:
                    process.kill()
        lived = asyncio.get_running_loop().time() - started
        deaths = 0 if lived > _WELL_S else deaths
        wait = _WAITS_S[min(deaths, len(_WAITS_S) - 1)]
        deaths += 1
        metrics.TRAINER_DEATHS.inc()
        logger.error("the trainer ended with status %d; starting it again in %g s", status, wait)
        await asyncio.sleep(wait)
