"""What is asked of the service about one question, and the line that comes of it."""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception,
    stop_after_attempt,
    stop_after_delay,
    wait_exponential_jitter,
)

from demur.async_client import AsyncClient
from demur.chat_types import ChatChoice
from demur.errors import APIConnectionError, APIStatusError, BadRequestError, RequestTooLargeError
from demur.evals.records import Columns, Record
from demur.evals.sets import Asked, EvalSet, Question
from demur.types import Score

TOP_LOGPROBS = 20  # as DeepConf takes, and as many as OpenAI gives
P_TRUE = (
    "Question: {question}\n\nProposed answer: {answer}\n\n"
    "Is the proposed answer correct? Answer with one word, True or False."
)
# One try. A little longer than the service's own deadline of 300 s: its 504 is heard, and what it
# has nearly done is not thrown away. For a place among its own connections the client waits as
# long as it takes.
TIMEOUT = httpx.Timeout(330.0, connect=10.0, pool=None)
# All tries of a request: at least so many, and for so long, in which a service can be restarted and
# load its model. So one that refuses connections is given up after 5 minutes, one that hangs after
# 3 time-outs.
_FEWEST_TRIES = 3
_PATIENCE_S = 300.0
_FIRST_WAIT_S = 0.5
_LONGEST_WAIT_S = 30.0
_MEASURES = ("entropy", "total", "jsd", "kl")

_T = TypeVar("_T")


@dataclass(frozen=True)
class Asking:
    """How questions are asked.

    Attributes:
        samples: how many further answers are drawn.
        temperature: what they are drawn at; the first answer is greedy.
        p_true: ask the target whether its answer is true (Kadavath et al. 2022).
        max_tokens: of an answer; None is the set's own.
    """

    samples: int = 0
    temperature: float = 0.7
    p_true: bool = False
    max_tokens: int | None = None


async def ask(client: AsyncClient, eval_set: EvalSet, question: Question, asking: Asking) -> Record:
    """All that a run wants to know of one question.

    What may pass (no answer, 408, 429, 5xx) is tried again; a refusal is the line's `error`.

    Args:
        client: one that does not try again by itself, or each try here would be several.

    Raises:
        APIError: if the service did not answer for minutes, or would refuse any question.
    """
    began = time.monotonic()
    about: dict[str, Any] = question.model_dump(include=set(Asked.model_fields))
    try:
        if question.response is None:
            found = await _generated(client, eval_set, question, asking)
        else:
            found = await _given(client, question.prompt, question.response)
        if asking.p_true:
            plain = question.question or question.prompt
            found["p_true"] = await _p_true(client, plain, found["response"])
    except (BadRequestError, RequestTooLargeError) as error:
        return Record(**about, error=str(error), seconds=round(time.monotonic() - began, 3))
    grade = eval_set.grade(found["response"], question)
    return Record(
        **about,
        **found,
        correct=grade.correct if question.correct is None else question.correct,
        flexible=grade.correct,
        strict=grade.strict,
        extracted=grade.extracted,
        seconds=round(time.monotonic() - began, 3),
    )


async def _generated(
    client: AsyncClient, eval_set: EvalSet, question: Question, asking: Asking
) -> dict[str, Any]:
    limit = asking.max_tokens or eval_set.max_tokens
    greedy = await patiently(
        lambda: client.chat(
            question.prompt,
            temperature=0.0,
            max_tokens=limit,
            logprobs=True,
            top_logprobs=TOP_LOGPROBS,
            store=False,
        )
    )
    (choice,) = greedy.choices
    found = _from_choice(choice)
    if asking.samples:
        drawn = await patiently(
            lambda: client.chat(
                question.prompt,
                temperature=asking.temperature,
                n=asking.samples,
                max_tokens=limit,
                uncertainty=False,
                store=False,
            )
        )
        found["samples"] = [sample.text for sample in drawn.choices]
        found["sample_answers"] = [
            eval_set.grade(text, question).extracted for text in found["samples"]
        ]
    return found


def _from_choice(choice: ChatChoice) -> dict[str, Any]:
    assert choice.uncertainty is not None
    tokens = choice.tokens
    columns: dict[str, list[float]] = {
        "logprob": [_short(token.logprob) for token in tokens],
        "top_logprob_mean": [
            _short(math.fsum(top.logprob for top in token.top_logprobs) / len(token.top_logprobs))
            for token in tokens
        ],
    }
    for name in _MEASURES:
        columns[name] = [_short(getattr(token.uncertainty, name)) for token in tokens]
    return {
        "response": choice.text,
        "finish_reason": choice.finish_reason,
        "tokens": Columns.model_validate({"text": [token.token for token in tokens], **columns}),
        "hallucination_score": choice.uncertainty.hallucination_score,
        "weights_version": choice.uncertainty.estimator.weights_version,
    }


async def _given(client: AsyncClient, prompt: str, response: str) -> dict[str, Any]:
    score = await _score(client, prompt, response)
    columns = {
        name: [_short(getattr(token, name)) for token in score.tokens]
        for name in ("logprob", *_MEASURES)
    }
    return {
        "response": score.text,
        "tokens": Columns.model_validate(
            {"text": [token.token for token in score.tokens], **columns}
        ),
        "hallucination_score": score.hallucination_score,
        "weights_version": score.estimator.weights_version,
    }


async def _p_true(client: AsyncClient, question: str, answer: str) -> float:
    """The target's probability of True, against False, for its own judgement of an answer."""
    prompt = P_TRUE.format(question=question, answer=answer)
    scores = [await _score(client, prompt, word) for word in ("True", "False")]
    true, false = (score.sequence["logprob_sum"] for score in scores)
    return 1.0 / (1.0 + math.exp(min(false - true, 700.0)))


async def _score(client: AsyncClient, prompt: str, response: str) -> Score:
    return await patiently(lambda: client.score(response, messages=prompt, store=False))


def may_pass(error: BaseException) -> bool:
    """Can it help to ask again? Not if the service wants to be left alone for too long."""
    if isinstance(error, APIStatusError):
        passing = error.status_code in (408, 429) or error.status_code >= 500
        return passing and (error.retry_after or 0.0) <= _PATIENCE_S
    return isinstance(error, APIConnectionError)


async def patiently(
    call: Callable[[], Awaitable[_T]], passing: Callable[[BaseException], bool] = may_pass
) -> _T:
    """What `call` gives; errors that are `passing` are waited out, for minutes."""

    async def once() -> _T:  # tenacity awaits what it sees is a coroutine function
        return await call()

    retrying = AsyncRetrying(
        stop=stop_after_attempt(_FEWEST_TRIES) & stop_after_delay(_PATIENCE_S),
        wait=_wait,
        retry=retry_if_exception(passing),
        reraise=True,
    )
    return await retrying(once)


def _wait(state: RetryCallState) -> float:
    """As long as the service asks for, or ever longer."""
    own = wait_exponential_jitter(initial=_FIRST_WAIT_S, max=_LONGEST_WAIT_S)(state)
    error = state.outcome.exception() if state.outcome else None
    asked = error.retry_after if isinstance(error, APIStatusError) else None
    return max(own, asked or 0.0)


def _short(value: float) -> float:
    """Five digits after the point: bfloat16 gives no more, and files stay small."""
    return round(value, 5)
