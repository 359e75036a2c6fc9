"""A deterministic engine for HTTP tests: measures are simple functions of the token ids."""

import asyncio
from collections.abc import Sequence

import numpy as np

from drafts.errors import EngineNotReady, NonFiniteError
from drafts.scores import TokenScores


class FakeEngine:
    n_drafts = 4
    max_tokens = 64
    weights_version = "fake-1"

    def __init__(self) -> None:
        self.alive = True
        self.broken_numbers = False
        self.calls = 0
        self.cancelled = 0
        self.running = 0
        self.most_running = 0
        self.release = asyncio.Event()
        self.release.set()

    async def score(self, token_ids: Sequence[int], response_start: int) -> TokenScores:
        self.calls += 1
        self.running += 1
        self.most_running = max(self.running, self.most_running)
        try:
            await self.release.wait()
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
        if not self.alive:
            raise EngineNotReady("the engine has died; restart the service")
        if self.broken_numbers:
            raise NonFiniteError("a forward pass gave NaN or infinity")
        x = np.asarray(token_ids[response_start:], dtype=np.float64) % 7 + 1
        return TokenScores(-x, x.astype(np.int64), x / 2, x, x / 4, x / 8, self.weights_version)

    async def check_health(self) -> None:
        if not self.alive:
            raise EngineNotReady("the engine has died; restart the service")

    async def shutdown(self) -> None:
        self.alive = False
