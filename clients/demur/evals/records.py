"""What a run has found out, a line a question, and the file that it is kept in.

A line is written when its question is done, in one piece. A run that is interrupted at any time
loses at most what was under way, and going on with it asks nothing twice.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from demur.evals.sets import Asked, Question

if sys.platform != "win32":
    import fcntl

ANSWERS = "answers.jsonl"
RUN = "run.json"


class RunError(Exception):
    """A run cannot be read or gone on with; the message says what to do."""


class Columns(BaseModel):
    """The tokens of an answer, a list of length T for each thing known of them, in nats.

    `top_logprob_mean` is the mean log-prob of the 20 likeliest tokens in a place, where the
    service gave them.
    """

    model_config = ConfigDict(extra="forbid")

    text: list[str]
    logprob: list[float]
    entropy: list[float]
    total: list[float]
    jsd: list[float]
    kl: list[float]
    top_logprob_mean: list[float] | None = None


class Record(Asked):
    """A question, the answer to it, and what is known of both.

    Attributes:
        correct: the label: the given response's own, else by the grader.
        flexible: the grader's finding, which for a given response may differ from the label.
        p_true: the probability that the target calls its answer true, if it was asked.
        samples: other answers to the question, drawn at the run's temperature.
        sample_answers: the final answers found in them, None where there is none.
        error: why there is no answer, where the service refused the question.
    """

    response: str = ""
    finish_reason: str | None = None
    correct: bool = False
    flexible: bool = False
    strict: bool | None = None
    extracted: str | None = None
    tokens: Columns | None = None
    hallucination_score: float | None = None
    p_true: float | None = None
    samples: list[str] | None = None
    sample_answers: list[str | None] | None = None
    weights_version: str | None = None
    seconds: float = 0.0
    error: str | None = None


class Run:
    """A folder with a run's settings and its lines. Reading it changes nothing in it.

    Args:
        folder: made when something is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def answers(self) -> Path:
        """The file of lines."""
        return self.folder / ANSWERS

    def settings(self) -> dict[str, Any] | None:
        """How it is run, or None if it has not begun.

        Raises:
            RunError: if that cannot be told.
        """
        file = self.folder / RUN
        if not file.exists():
            if self.answers.exists():
                raise RunError(f"{self.folder} has answers and no {RUN}; give another --out")
            return None
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RunError(f"{file} is damaged ({error}); give another --out") from error
        if not isinstance(found, dict):
            raise RunError(f"{file} is damaged (it holds no object); give another --out")
        return found

    def write_settings(self, settings: dict[str, Any]) -> None:
        """Keep how it is run, in one piece."""
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / f"{RUN}.partial"
        with partial.open("w", encoding="utf-8") as file:
            file.write(json.dumps(settings, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave the name without what it names
        partial.replace(self.folder / RUN)

    def records(self) -> Iterator[Record]:
        """Each line; not what comes after the last, which is being written or was broken off.

        Raises:
            RunError: if one is damaged.
        """
        if not self.answers.exists():
            return
        with self.answers.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.endswith(b"\n"):
                    return
                try:
                    yield Record.model_validate_json(line)
                except ValidationError as error:
                    first = error.errors(include_url=False)[0]
                    where = "".join(f"{part}: " for part in first["loc"])
                    raise RunError(
                        f"{self.answers}, line {number} is damaged ({where}{first['msg']}); "
                        "without that line, its question is asked again"
                    ) from error

    def given(self) -> list[Question]:
        """Its answers with their labels, to be scored by other drafts or another target."""
        return [
            Question(
                **record.model_dump(include=set(Asked.model_fields)),
                response=record.response,
                correct=record.correct,
            )
            for record in self.records()
            if record.error is None and record.response
        ]

    def done(self) -> set[str]:
        """The ids of questions that have a line."""
        return {record.id for record in self.records()}

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Go on with the run, and keep other processes from doing so at the same time.

        Raises:
            RunError: if one is at it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with _held(self.folder):
            self._drop_torn_line()
            yield

    def add(self, record: Record) -> None:
        """Append a line, whole, and have it on the disk."""
        self.folder.mkdir(parents=True, exist_ok=True)
        line = record.model_dump_json(exclude_none=True) + "\n"
        with self.answers.open("ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())

    def _drop_torn_line(self) -> None:
        """Cut off what a run that was killed had begun to write."""
        if not self.answers.exists():
            return
        with self.answers.open("rb+") as file:
            content = file.read()
            if content and not content.endswith(b"\n"):
                file.truncate(content.rfind(b"\n") + 1)


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """A lock that ends with the process, however that ends; none where there are no such locks."""
    if sys.platform == "win32":
        yield
    else:
        opened = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(opened)
            raise RunError(f"another process is going on with {folder}; wait for it") from error
        except OSError:
            pass  # some network file systems have none
        try:
            yield
        finally:
            os.close(opened)
