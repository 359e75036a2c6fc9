"""Engines measured in turns on one machine: each in a process of its own, one works at a time.

Rounds go through all rows, so that a machine that slows down slows them all. What a figure needs
beside it (machine, versions) is here, too.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import platform
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tqdm import tqdm

# Brings up an engine and gives a function that does a piece of work and tells what it measured.
Engine = Callable[[], AbstractAsyncContextManager[Callable[[Any], Awaitable[Any]]]]


def measure(
    engines: Mapping[str, Engine],
    rows: Mapping[str, tuple[str, Any]],
    rounds: int,
    title: str,
) -> dict[str, list[Any]]:
    """What each row measured in each round.

    Args:
        engines: by name; functions of a module, so that another process can import them.
        rows: by name, the engine that does it and the work it is given.
        rounds: counted ones; one more before them warms up.
    """
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    processes = {}
    bar = tqdm(total=len(engines) + len(rows) * (rounds + 1), desc=title, unit="run")
    for name, engine in engines.items():
        pipes[name], theirs = context.Pipe()
        processes[name] = context.Process(target=_worker, args=(engine, theirs))
        processes[name].start()
        theirs.close()  # or a worker that dies would leave us waiting for ever
        pipes[name].recv()  # it is up
        bar.update()
    measured: dict[str, list[Any]] = {name: [] for name in rows}
    for turn in range(rounds + 1):
        for name, (engine_name, work) in rows.items():
            pipes[engine_name].send(work)
            result = pipes[engine_name].recv()
            if turn > 0:
                measured[name].append(result)
            bar.update()
    for name, pipe in pipes.items():
        pipe.send(None)
        processes[name].join()
    bar.close()
    return measured


def _worker(engine: Engine, pipe: Connection) -> None:
    asyncio.run(_serve(engine, pipe))


async def _serve(engine: Engine, pipe: Connection) -> None:
    async with engine() as run:
        pipe.send(None)
        while (work := await asyncio.to_thread(pipe.recv)) is not None:
            pipe.send(await run(work))


def machine() -> dict[str, Any]:
    """The machine that a figure was measured on."""
    info = Path("/proc/cpuinfo").read_text()
    names = [line.split(":")[1].strip() for line in info.splitlines() if "model name" in line]
    flags = next(line for line in info.splitlines() if line.startswith("flags")).split()
    return {
        "cpu": names[0],
        "cores": len(os.sched_getaffinity(0)),
        "isa": [flag for flag in ("avx512f", "avx512_bf16", "amx_bf16") if flag in flags],
        "python": platform.python_version(),
    }


def versions(*packages: str) -> dict[str, str]:
    """Versions of the installed packages that a figure depends on."""
    return {name: metadata.version(name) for name in packages}
