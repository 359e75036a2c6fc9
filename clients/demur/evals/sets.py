"""What a data set is to the harness, and the ones that it has.

A data set is a module with a function that gives its questions and one that grades an answer; see
docs/evaluation.md for another one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict

Half = Literal["dev", "test"]


class Asked(BaseModel):
    """What a question and the record of its answer both hold.

    Attributes:
        id: unique in its set, and the same in every run.
        task: the set, or the part of it that is judged by itself, such as `facts/capital`.
        group: what shares it must lie in one half; `half_of` draws it.
        prompt: what the user says.
        question: the prompt without how to answer it, where it says that.
        accepted: the right answer, and other forms of it.
        source: who wrote the given response, where one is given.
        gold: a worked solution, where there is one.
        annotated: the given response with what each of its steps computed, where that is known.
    """

    model_config = ConfigDict(extra="forbid")

    id: str
    task: str
    group: str
    half: Half
    prompt: str
    question: str | None = None
    accepted: list[str]
    source: str | None = None
    gold: str | None = None
    annotated: str | None = None


class Question(Asked):
    """One question, and with `response` an answer that is given to be scored.

    Attributes:
        response: the given response.
        correct: its label.
    """

    model_config = ConfigDict(frozen=True)

    response: str | None = None
    correct: bool | None = None


@dataclass(frozen=True)
class Grade:
    """How an answer was graded.

    Attributes:
        correct: is it right, by the set's main rule (for numbers, lm-eval's flexible filter)?
        strict: the same by lm-eval's strict filter; None where there is none.
        extracted: the final answer that was found, in a normal form; None if there was none.
    """

    correct: bool
    strict: bool | None
    extracted: str | None


@dataclass(frozen=True)
class EvalSet:
    """A data set.

    Attributes:
        questions: gives them all from a path or hub id; None is the set's own default.
        grade: grades an answer to one of them.
        max_tokens: how long a generated answer may become.
        given: gives questions with labelled responses, where there are such; as `questions`.
    """

    name: str
    questions: Callable[[str | None], list[Question]]
    grade: Callable[[str, Question], Grade]
    max_tokens: int
    given: Callable[[str | None], list[Question]] | None = None


class SetError(Exception):
    """A data set cannot be read; the message says what to do."""


def half_of(group: str) -> Half:
    """The half that a group belongs to: stable, and about even."""
    return "dev" if hashlib.sha256(group.encode()).digest()[0] % 2 else "test"


def all_sets() -> dict[str, EvalSet]:
    """The sets by name."""
    from demur.evals import arithmetic, facts, gsm8k, svamp

    sets = [gsm8k.GSM8K, svamp.SVAMP, facts.FACTS, *arithmetic.SETS]
    return {each.name: each for each in sets}
