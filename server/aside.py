"""Threads for what no answer waits for: the store's and the spool's input and output.

`asyncio.to_thread` has few threads on a small machine, and requests tokenise in them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_threads = ThreadPoolExecutor(4, thread_name_prefix="demur-aside")


async def aside(work: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
    """Do blocking work in one of those threads."""
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(_threads, lambda: work(*arguments, **named))
