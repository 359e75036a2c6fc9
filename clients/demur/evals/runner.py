"""A run: the questions of a set that are not done yet, several at a time, each kept when it is."""

from __future__ import annotations

import asyncio
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from importlib import metadata
from typing import Any

from demur.async_client import AsyncClient
from demur.errors import APIConnectionError
from demur.evals.ask import Asking, ask, may_pass, patiently
from demur.evals.records import Record, Run, RunError
from demur.evals.sets import Asked, EvalSet, Question

# A session that is killed leaves no later word than this of how long it took.
_TELL_TIME_EVERY_S = 10.0


async def carry_on(
    client: AsyncClient,
    eval_set: EvalSet,
    questions: Sequence[Question],
    run: Run,
    asking: Asking,
    *,
    concurrency: int = 32,
    on_done: Callable[[Record], None] = lambda record: None,
) -> int:
    """Ask what the run has not asked yet, and return how many questions that were.

    Where there is nothing left to ask, the service is not needed.

    Args:
        client: see `ask`.
        concurrency: questions under way at once.
        on_done: called with each new line.

    Raises:
        APIError: if the service does not answer any more. What is done is kept: call again.
        RunError: if the run was begun with other settings or data, by another model, or another
            process is at it.
    """
    with run.alone():
        settings = run.settings()
        wanted = {
            "set": eval_set.name,
            "mode": "score" if any(each.response is not None for each in questions) else "generate",
            "asking": asdict(asking),
        }
        _check(run, settings, wanted)
        left = _left(run, questions)
        if not left:
            return 0
        wanted |= await _served(client)
        _check(run, settings, wanted)
        if settings is None:
            settings = wanted | {"begun": _now(), "environment": environment(), "sessions": []}
            run.write_settings(settings)
        session = _Session(run, settings)

        async def work(waiting: Iterator[Question]) -> None:
            for question in waiting:
                record = await ask(client, eval_set, question, asking)
                if record.error is None:
                    # Drafts can be changed while the service runs.
                    _check(run, settings, {"weights_version": record.weights_version})
                run.add(record)
                session.count()
                on_done(record)

        waiting = iter(left)
        workers = [asyncio.create_task(work(waiting)) for _ in range(concurrency)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
            session.tell()
        return session.questions


def _check(run: Run, found: dict[str, Any] | None, wanted: dict[str, Any]) -> None:
    """See that a run that has begun is gone on with in the same way."""
    for name, value in wanted.items():
        if found is not None and found.get(name) != value:
            again = "repeat its options, or " if name == "asking" else ""
            raise RunError(
                f"{run.folder} was begun with {name} = {found.get(name)}, and now it is {value}; "
                f"{again}give another --out"
            )


def _left(run: Run, questions: Sequence[Question]) -> list[Question]:
    """The questions that have no line. Ids are numbers in many sets: other data has them too."""
    asked = {record.id: record for record in run.records()}
    for question in questions:
        record = asked.get(question.id)
        if record is None:
            continue
        same = all(getattr(record, name) == getattr(question, name) for name in Asked.model_fields)
        if question.response is not None and record.error is None:
            same &= (record.response, record.correct) == (question.response, question.correct)
        if not same:
            raise RunError(
                f"{run.folder} was begun with other data, in which {question.id} is another "
                "question or has another answer or label; give another --out"
            )
    return [question for question in questions if question.id not in asked]


async def _served(client: AsyncClient) -> dict[str, Any]:
    """What answers. A service that is starting is waited for."""

    def passing(error: BaseException) -> bool:
        # Where nobody is at all, the address may be wrong: that is told at once.
        return may_pass(error) and type(error) is not APIConnectionError

    model = (await patiently(client.models, passing))[0]
    return {
        "model": model.id,
        "weights_version": model.weights_version,
        "drafts": model.drafts,
        "added_passes": model.added_passes,
        "calibration": model.calibration,
    }


class _Session:
    """Questions and wall time of one call, kept among the run's settings for the report."""

    def __init__(self, run: Run, settings: dict[str, Any]) -> None:
        self.questions = 0
        self._run = run
        self._settings = settings
        self._began = self._told = time.monotonic()

    def count(self) -> None:
        """One more question is done."""
        self.questions += 1
        if time.monotonic() - self._told >= _TELL_TIME_EVERY_S:
            self.tell()

    def tell(self) -> None:
        """Write down how far it is, if it has come to anything."""
        if self.questions:
            self._told = time.monotonic()
            seconds = round(self._told - self._began, 1)
            mine = {"ended": _now(), "questions": self.questions, "seconds": seconds}
            before = self._settings["sessions"]
            self._run.write_settings(self._settings | {"sessions": [*before, mine]})


def environment() -> dict[str, Any]:
    """What the harness itself ran on."""
    return {
        "demur": metadata.version("demur"),
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
