"""A deterministic engine for HTTP tests: measures are simple functions of the token ids."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path

import numpy as np

from drafts.errors import EngineNotReady, NonFiniteError, WeightsError
from drafts.manifest import ExitDraft, Manifest, ResidualDraft, Source, read_manifest
from drafts.scores import Generated, Sampling, TokenScores

END = 1  # id of the end-of-text token


class FakeEngine:
    n_drafts = 4
    max_tokens = 64
    vocab_size = 320
    takes_seed = False
    weights_version = "fake-1"

    def __init__(self) -> None:
        self.alive = True
        self.broken_numbers = False
        self.refuses_swaps = False
        self.calls = 0
        self.cancelled = 0
        self.running = 0
        self.most_running = 0
        self.release = asyncio.Event()
        self.release.set()
        self.aborted = asyncio.Event()
        self.stopping = False
        # What it generates, over and over until max_new_tokens; END ends it.
        self.answer = [40, 41, 42, END]
        self.per_step = 1
        self.fails_after: int | None = None
        self.pauses_after: int | None = None  # until released
        self.samplings: list[Sampling] = []
        drafts = [ExitDraft(kind="exit", name="early", source="exit", layer=3)]
        drafts += [
            ResidualDraft(kind="residual", name=f"draft_{letter}", source="student", draw=draw)
            for draw, letter in enumerate("abc")
        ]
        self.added_passes = 0.25
        self.manifest = Manifest(
            format=1,
            name="tiny",
            weights_version=self.weights_version,
            target=Source(source="target"),
            drafts=drafts,
        )

    async def score(self, token_ids: Sequence[int], response_start: int) -> TokenScores:
        await self._work()
        return self._scores(token_ids[response_start:])

    async def stream(
        self, token_ids: Sequence[int], sampling: Sampling
    ) -> AsyncGenerator[Generated, None]:
        self.samplings.append(sampling)
        made: list[int] = []
        while True:
            if len(made) == self.pauses_after:
                self.release.clear()
            await self._work()
            if self.fails_after is not None and len(made) >= self.fails_after:
                raise NonFiniteError("a forward pass gave NaN or infinity")
            ids: list[int] = []
            while len(ids) < self.per_step and len(made) < sampling.max_new_tokens:
                ids.append(self.answer[len(made) % len(self.answer)])
                made.append(ids[-1])
                if ids[-1] == END:
                    break
            reason = "stop" if made[-1] == END else None
            reason = reason or ("length" if len(made) == sampling.max_new_tokens else None)
            scores = self._scores(ids) if sampling.measured else None
            likeliest = [[(token_id, -0.5), (7, -1.5)][: sampling.top] for token_id in ids]
            yield Generated(ids, scores, likeliest, reason, self.weights_version)
            if reason:
                return

    async def swap(self, folder: Path, target_path: Path | None = None) -> None:
        if self.refuses_swaps:
            raise WeightsError("draft 'early': tensors are missing")
        self.manifest = read_manifest(folder)
        self.weights_version = self.manifest.weights_version

    async def check_health(self) -> None:
        if not self.alive:
            raise EngineNotReady("the engine has died")
        if self.stopping:
            raise EngineNotReady("the engine is stopping")

    async def ping(self, within_s: float) -> None:
        await self.check_health()

    async def abort_all(self) -> None:
        self.stopping = True
        aborted, self.aborted = self.aborted, asyncio.Event()
        aborted.set()  # for those under way; later ones see `stopping`

    async def kill(self) -> None:
        self.alive = False

    async def shutdown(self) -> None:
        self.alive = False

    async def _work(self) -> None:
        await self.check_health()
        self.calls += 1
        self.running += 1
        self.most_running = max(self.running, self.most_running)
        try:
            await self._released_or_aborted()
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
        await self.check_health()
        if self.broken_numbers:
            raise NonFiniteError("a forward pass gave NaN or infinity")

    async def _released_or_aborted(self) -> None:
        aborted = self.aborted
        waits = [asyncio.ensure_future(event.wait()) for event in (self.release, aborted)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        if aborted.is_set():
            raise EngineNotReady("the engine is stopping")

    def _scores(self, token_ids: Sequence[int]) -> TokenScores:
        x = np.asarray(token_ids, dtype=np.float64) % 7 + 1
        return TokenScores(-x, x.astype(np.int64), x / 2, x, x / 4, x / 8, self.weights_version)
