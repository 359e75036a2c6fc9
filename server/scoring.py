"""The path of a scoring request.

tokenize → engine (target and drafts, one pass) → measures per token → spans → aggregate
→ calibrate → respond
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from pydantic import ValidationError

from drafts.aggregate import aggregate
from drafts.scores import TokenScores
from drafts.spans import Span, find_spans
from drafts.text import EncodedText
from server import metrics, schemas, tracing
from server.admission import Admission
from server.budgets import Budgets
from server.capture import Capture
from server.errors import ApiError, DeadlineExceeded, TooLarge, from_validation
from server.judgement import judge
from server.keys import Key
from server.served import Served, told_to_clients
from server.settings import Settings

logger = logging.getLogger(__name__)

# Of all answers of a list together: each becomes an object and some 300 bytes of JSON.
_MAX_LIST_TOKENS = 2**18


class _ListRoom:
    """The tokens that a list's answer still has room for."""

    def __init__(self) -> None:
        self._left = _MAX_LIST_TOKENS

    @contextmanager
    def holds(self, tokens: int) -> Iterator[None]:
        """Room for an item's answer, given back if there is none.

        Raises:
            TooLarge: if too little is left.
        """
        if tokens > self._left:
            raise TooLarge(
                f"the responses of a list may have {_MAX_LIST_TOKENS} tokens together; send this "
                "one in another request",
                code="list_too_long",
            )
        self._left -= tokens
        try:
            yield
        except BaseException:
            self._left += tokens
            raise


class Scorer:
    """Scores validated requests with one engine."""

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

    async def score(
        self,
        request: schemas.ScoreRequest,
        key: Key | None = None,
        room: _ListRoom | None = None,
    ) -> schemas.ScoreResponse:
        """Score one response within the deadline; `ApiError` says why it could not be."""
        try:
            async with asyncio.timeout(self.settings.request_timeout_s):
                answer = await self._score(request, key, room)
        except TimeoutError:
            metrics.ITEMS.labels(DeadlineExceeded.code).inc()
            raise DeadlineExceeded(
                f"not scored within {self.settings.request_timeout_s:g} s"
            ) from None
        except ApiError as error:
            metrics.ITEMS.labels(error.code).inc()
            raise
        metrics.ITEMS.labels("ok").inc()
        return answer

    async def _score(
        self, request: schemas.ScoreRequest, key: Key | None, room: _ListRoom | None
    ) -> schemas.ScoreResponse:
        self.served.check_model(request.model)
        with tracing.operation("score", self.served.name) as span:
            with told_to_clients():
                with tracing.stage("tokenise"):
                    text = await asyncio.to_thread(self._encode, request)
                with nullcontext() if room is None else room.holds(len(text.tokens)):
                    await self.budgets.tokens(key, len(text.token_ids))
                    with tracing.stage("engine"), self.admission.wait.waits() as first_answer:
                        scores = await self.served.engine.score(text.token_ids, text.response_start)
                        first_answer()
            with tracing.stage("measure"):
                answer = self._answer(request, text, scores)
            tracing.describe_score(span, answer)
        if self.capture is not None and request.store:
            self.capture.offer(request.conversation, text.token_ids, text.response_start)
        return answer

    def _answer(
        self, request: schemas.ScoreRequest, text: EncodedText, scores: TokenScores
    ) -> schemas.ScoreResponse:
        offsets = [(token.start, token.end) for token in text.tokens]
        spans = find_spans(request.response, offsets, scores.epistemic)
        sequence = aggregate(scores)
        judgement = judge(
            self.served, scores, [request.response[a:b] for a, b in offsets], request.asked
        )
        _observe(text, scores, sequence)
        return schemas.ScoreResponse(
            id=f"score-{uuid.uuid4().hex}",
            created=int(time.time()),
            model=self.served.name,
            estimator=self.served.estimator(scores.weights_version),
            hallucination_score=judgement.hallucination_score,
            flagged=judgement.flagged(request.threshold),
            threshold=request.threshold,
            warnings=judgement.warnings,
            calibration=self.served.calibrated_by(scores.weights_version),
            sequence=sequence,
            tokens=_tokens(request.response, text, scores),
            spans=spans_out(request.response, spans),
            usage=usage_out(text.response_start, len(scores)),
        )

    async def score_list(self, items: list[Any], key: Key | None = None) -> schemas.ScoreList:
        """Score a list; a bad item fails alone."""
        # A bound on each list, so that a long one leaves the engine room for other clients.
        turn = asyncio.Semaphore(self.settings.batch_concurrency)
        room = _ListRoom()

        async def one(index: int, item: Any) -> schemas.ScoreListItem:
            try:
                request = schemas.ScoreRequest.model_validate(item)
                async with turn:
                    score = await self.score(request, key, room)
                return schemas.ScoreListItem(index=index, score=score)
            except ValidationError as error:
                failure: ApiError = from_validation(error)
                metrics.ITEMS.labels(failure.code).inc()
            except ApiError as error:
                failure = error
            except Exception:  # one item's accident must not cost the others their scores
                logger.exception("item %d failed", index)
                metrics.ITEMS.labels("internal_error").inc()
                failure = ApiError("internal error; the server's log has the details")
            return schemas.ScoreListItem(index=index, error=schemas.ErrorBody(**failure.body()))

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(index, item)) for index, item in enumerate(items)]
        data = [task.result() for task in tasks]
        usages = [item.score.usage for item in data if item.score is not None]
        return schemas.ScoreList(
            data=data,
            usage=usage_out(
                sum(usage.prompt_tokens for usage in usages),
                sum(usage.completion_tokens for usage in usages),
            ),
        )

    def _encode(self, request: schemas.ScoreRequest) -> EncodedText:
        prompt, rendered = request.prompt or "", False
        if request.messages is not None:
            prompt, rendered = self.served.render(request.messages), True
        return self.served.encoder.encode(
            prompt,
            request.response,
            rendered=rendered,
            max_tokens=self.served.engine.max_tokens,
        )


def _tokens(response: str, text: EncodedText, scores: TokenScores) -> list[schemas.Token]:
    aleatoric, epistemic = scores.aleatoric, scores.epistemic
    return [
        schemas.Token(
            token=response[token.start : token.end],
            token_id=token.token_id,
            bytes=list(token.raw),
            text_offset=(token.start, token.end),
            logprob=float(scores.logprob[i]),
            rank=int(scores.rank[i]),
            entropy=float(scores.entropy[i]),
            total=float(scores.total[i]),
            aleatoric=float(aleatoric[i]),
            jsd=float(scores.jsd[i]),
            kl=float(scores.kl[i]),
            epistemic=float(epistemic[i]),
        )
        for i, token in enumerate(text.tokens)
    ]


def spans_out(response: str, spans: list[Span]) -> list[schemas.SpanOut]:
    """Spans as they are answered, with their text."""
    return [
        schemas.SpanOut(
            start=span.start,
            end=span.end,
            text=response[span.start : span.end],
            epistemic_mean=span.epistemic_mean,
            epistemic_max=span.epistemic_max,
        )
        for span in spans
    ]


def _observe(text: EncodedText, scores: TokenScores, sequence: dict[str, float | int]) -> None:
    metrics.TOKENS.labels("prompt").inc(text.response_start)
    metrics.TOKENS.labels("response").inc(len(scores))
    metrics.EPISTEMIC.observe(sequence["epistemic_mean"])
    metrics.JSD.observe(sequence["jsd_mean"])


def usage_out(prompt: int, completion: int) -> schemas.Usage:
    """Token counts as they are answered."""
    return schemas.Usage(
        prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion
    )
