"""The path of a generation request.

render and tokenise → engine (target and drafts, one pass a token) → text and measures of each
token → stop? → respond; at the end spans and aggregate, as for a given text
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

from drafts.scores import Generated, Sampling
from server import metrics, tracing
from server.admission import Admission
from server.budgets import Budgets
from server.capture import Capture
from server.choice import Choice, Job, Part, Prompt
from server.errors import ApiError, DeadlineExceeded
from server.keys import Key
from server.served import Served, told_to_clients
from server.settings import Settings


class Generator:
    """Answers jobs with one engine."""

    def __init__(
        self,
        served: Served,
        settings: Settings,
        admission: Admission,
        budgets: Budgets,
        capture: Capture | None = None,
    ) -> None:
        self.served = served
        self.settings = settings
        self.admission = admission
        self.budgets = budgets
        self.capture = capture

    async def run(self, job: Job, key: Key | None = None) -> AsyncGenerator[Part, None]:
        """The parts of all choices, as they come. Closing it ends what is under way.

        Raises:
            ApiError: if there is no place, the deadline has passed or the engine fails.
        """
        parts: asyncio.Queue[Part | None] = asyncio.Queue()
        with self.admission.take(job.n_choices):
            # What it may come to, as it is not known yet what it will.
            await self.budgets.tokens(key, job.most_tokens)
            work = asyncio.create_task(self._work(job, parts))
            try:
                while (part := await parts.get()) is not None:
                    yield part
                await work
            finally:
                work.cancel()
                await asyncio.wait({work})

    async def _work(self, job: Job, parts: asyncio.Queue[Part | None]) -> None:
        outcome = "cancelled"
        done: list[tuple[Prompt, Choice]] = []
        try:
            with tracing.operation(job.operation, self.served.name) as span:
                tracing.describe_job(span, job)
                await self._all_choices(job, parts, done)
                choices = [choice for _, choice in done]
                tracing.describe_choices(
                    span,
                    [str(choice.finish_reason) for choice in choices],
                    sum(choice.n_generated for choice in choices),
                )
            outcome = "ok"
            self._keep(job, done)
        except Exception as error:
            outcome = error.code if isinstance(error, ApiError) else ApiError.code
            raise
        finally:
            metrics.ITEMS.labels(outcome).inc(job.n_choices)
            parts.put_nowait(None)

    async def _all_choices(
        self, job: Job, parts: asyncio.Queue[Part | None], done: list[tuple[Prompt, Choice]]
    ) -> None:
        # A bound on each request, so that one with many choices leaves the engine room for others.
        room = asyncio.Semaphore(self.settings.batch_concurrency)
        try:
            async with (
                asyncio.timeout(self.settings.request_timeout_s),
                asyncio.TaskGroup() as group,
            ):
                for index in range(job.n_choices):
                    group.create_task(self._choice(job, index, parts, room, done))
        except TimeoutError:
            raise DeadlineExceeded(
                f"not generated within {self.settings.request_timeout_s:g} s; ask for fewer tokens"
            ) from None
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def _choice(
        self,
        job: Job,
        index: int,
        parts: asyncio.Queue[Part | None],
        room: asyncio.Semaphore,
        done: list[tuple[Prompt, Choice]],
    ) -> None:
        """One choice from its first token to its last; it is then put with those that are done."""
        prompt = job.prompts[index // job.n]
        choice = Choice(self.served, job, prompt)
        metrics.TOKENS.labels("prompt").inc(len(prompt.token_ids))
        sampling = job.sampling
        if sampling.seed is not None:  # as vLLM does: choices by one seed would all be the same
            sampling = replace(sampling, seed=(sampling.seed + index % job.n) % 2**63)
        with told_to_clients():
            async with room, aclosing(self._steps(prompt, sampling)) as steps:
                async for step in steps:
                    pieces = choice.take(step)
                    if choice.finish_reason is not None:
                        break
                    if pieces:
                        parts.put_nowait(choice.part(index, pieces))
        parts.put_nowait(choice.last_part(index, pieces))
        metrics.TOKENS.labels("generated").inc(choice.n_generated)
        metrics.GENERATIONS.labels(choice.finish_reason).inc()
        done.append((prompt, choice))

    async def _steps(self, prompt: Prompt, sampling: Sampling) -> AsyncGenerator[Generated, None]:
        """What the engine answers; until it begins to, the choice counts as waiting."""
        with self.admission.wait.waits() as first_answer:
            stream = self.served.engine.stream(prompt.token_ids, sampling)
            async with aclosing(stream) as steps:
                with tracing.stage("first_token"):
                    first = await anext(steps)
                first_answer()
                yield first
                async for step in steps:
                    yield step

    def _keep(self, job: Job, done: list[tuple[Prompt, Choice]]) -> None:
        """Offer the choices of a job that has ended well for distillation, if that is allowed."""
        if self.capture is not None and job.store:
            for prompt, choice in done:
                ids = prompt.token_ids + choice.token_ids
                self.capture.offer(prompt.conversation, ids, len(prompt.token_ids))
