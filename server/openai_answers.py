"""Parts of choices as OpenAI's two contracts write them, whole and streamed."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any, Literal, Protocol

from server import openai_schemas as schemas
from server.choice import Job, Part
from server.schemas import Usage
from server.scoring import usage_out
from server.served import Served


class Answer(Protocol):
    """How one contract writes the parts of a job's choices."""

    job: Job

    def whole(self, parts: list[Part]) -> str:
        """The JSON of an answer that is not streamed."""
        ...

    def chunk(self, part: Part) -> str:
        """The JSON of one event of a stream."""
        ...

    def usage_chunk(self, n_generated: int) -> str:
        """The JSON of the event that has the usage."""
        ...


async def whole(answer: Answer, parts: AsyncGenerator[Part, None]) -> str:
    """The answer to a request that is not streamed."""
    async with aclosing(parts):
        # In a thread: a long answer with log-probs takes a while to write.
        return await asyncio.to_thread(answer.whole, [part async for part in parts])


async def events(
    answer: Answer, parts: AsyncGenerator[Part, None], include_usage: bool
) -> AsyncGenerator[str, None]:
    """The events of a stream, up to the one that says it is complete."""
    n_generated = 0
    async with aclosing(parts):
        async for part in parts:
            n_generated += part.n_generated
            yield answer.chunk(part)
    if include_usage:
        yield answer.usage_chunk(n_generated)
    yield "[DONE]"


class _Answer:
    def __init__(self, served: Served, job: Job, prefix: str) -> None:
        self.job = job
        self._head: dict[str, Any] = {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": served.name,
        }

    def _headed(self, part: Part) -> dict[str, Any]:
        """What all answers and chunks begin with; a part knows which weights have made it."""
        self._head["system_fingerprint"] = part.weights_version
        return self._head

    def _usage(self, n_generated: int) -> Usage:
        return usage_out(sum(len(prompt.token_ids) for prompt in self.job.prompts), n_generated)

    def _by_choice(self, parts: list[Part]) -> Iterator[tuple[str, list[Part]]]:
        """Text and parts of each choice; the last part of each says how it ended."""
        by_choice: list[list[Part]] = [[] for _ in range(self.job.n_choices)]
        for part in parts:
            by_choice[part.index].append(part)
        for mine in by_choice:
            yield "".join(part.text for part in mine), mine


def _ending(parts: list[Part]) -> schemas.FinishReason:
    reason = parts[-1].finish_reason
    assert reason is not None, "a choice without an end"
    return reason


class ChatAnswer(_Answer):
    """Answers of /v1/chat/completions."""

    def __init__(self, served: Served, job: Job) -> None:
        super().__init__(served, job, "chatcmpl")
        self._begun: set[int] = set()

    def whole(self, parts: list[Part]) -> str:
        choices = [
            schemas.ChatChoice(
                index=mine[-1].index,
                message=schemas.AssistantMessage(content=text),
                logprobs=self._logprobs([entry for part in mine for entry in part.entries]),
                finish_reason=_ending(mine),
                uncertainty=mine[-1].uncertainty,
            )
            for text, mine in self._by_choice(parts)
        ]
        usage = self._usage(sum(part.n_generated for part in parts))
        return schemas.ChatCompletion(
            **self._headed(parts[-1]), choices=choices, usage=usage
        ).model_dump_json()

    def chunk(self, part: Part) -> str:
        # The first chunk of a choice says who speaks.
        role: Literal["assistant"] | None = None if part.index in self._begun else "assistant"
        self._begun.add(part.index)
        choice = schemas.ChatChunkChoice(
            index=part.index,
            delta=schemas.Delta(role=role, content=part.text),
            logprobs=self._logprobs(part.entries),
            finish_reason=part.finish_reason,
            uncertainty=part.uncertainty,
        )
        return schemas.ChatChunk(**self._headed(part), choices=[choice]).model_dump_json()

    def usage_chunk(self, n_generated: int) -> str:
        usage = self._usage(n_generated)
        return schemas.ChatChunk(**self._head, choices=[], usage=usage).model_dump_json()

    def _logprobs(self, entries: list[schemas.LogprobEntry]) -> schemas.ChatLogprobs | None:
        return schemas.ChatLogprobs(content=entries) if self.job.logprobs else None


class TextAnswer(_Answer):
    """Answers of /v1/completions."""

    def __init__(self, served: Served, job: Job) -> None:
        super().__init__(served, job, "cmpl")
        self._offsets: dict[int, int] = {}

    def whole(self, parts: list[Part]) -> str:
        choices = [
            schemas.TextChoice(
                index=mine[-1].index,
                text=text,
                logprobs=self._logprobs([entry for part in mine for entry in part.entries], 0),
                finish_reason=_ending(mine),
                uncertainty=mine[-1].uncertainty,
            )
            for text, mine in self._by_choice(parts)
        ]
        self._headed(parts[-1])
        return self._dump(choices, self._usage(sum(part.n_generated for part in parts)))

    def chunk(self, part: Part) -> str:
        begin = self._offsets.get(part.index, 0)
        self._offsets[part.index] = begin + len(part.text)
        choice = schemas.TextChoice(
            index=part.index,
            text=part.text,
            logprobs=self._logprobs(part.entries, begin),
            finish_reason=part.finish_reason,
            uncertainty=part.uncertainty,
        )
        self._headed(part)
        return self._dump([choice], None)

    def usage_chunk(self, n_generated: int) -> str:
        return self._dump([], self._usage(n_generated))

    def _dump(self, choices: list[schemas.TextChoice], usage: Usage | None) -> str:
        return schemas.TextCompletion(**self._head, choices=choices, usage=usage).model_dump_json()

    def _logprobs(
        self, entries: list[schemas.LogprobEntry], begin: int
    ) -> schemas.TextLogprobs | None:
        if not self.job.logprobs:
            return None
        offsets = [begin]
        for entry in entries:
            offsets.append(offsets[-1] + len(entry.token))
        measures = [entry.uncertainty for entry in entries if entry.uncertainty is not None]
        return schemas.TextLogprobs(
            tokens=[entry.token for entry in entries],
            token_logprobs=[entry.logprob for entry in entries],
            top_logprobs=[_by_text(entry) for entry in entries] if self.job.sampling.top else None,
            text_offset=offsets[:-1],
            uncertainty=measures if self.job.uncertainty else None,
        )


def _by_text(entry: schemas.LogprobEntry) -> dict[str, float]:
    """The likeliest tokens, and the token itself, by their text; of two with one, the likelier."""
    found = {top.token: top.logprob for top in reversed(entry.top_logprobs)}
    return found | {entry.token: max(entry.logprob, found.get(entry.token, entry.logprob))}
