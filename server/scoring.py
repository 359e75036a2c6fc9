"""The path of a scoring request.

tokenize → engine (target and drafts, one pass) → measures per token → spans → aggregate
→ calibrate → respond
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from typing import Any

from pydantic import ValidationError

from drafts.aggregate import aggregate
from drafts.errors import EngineNotReady, NonFiniteError
from drafts.scores import ScoringEngine, TokenScores
from drafts.spans import Span, find_spans
from drafts.text import EncodedText, TextEncoder, TextError, TooManyTokens
from server import metrics, schemas
from server.errors import (
    ApiError,
    BadRequest,
    DeadlineExceeded,
    NotFound,
    NotReady,
    TooLarge,
    from_validation,
)
from server.settings import Settings

logger = logging.getLogger(__name__)


class Scorer:
    """Scores validated requests with one engine."""

    def __init__(
        self, name: str, engine: ScoringEngine, encoder: TextEncoder, settings: Settings
    ) -> None:
        self.name = name
        self.engine = engine
        self.encoder = encoder
        self.settings = settings
        self.created = int(time.time())

    async def score(self, request: schemas.ScoreRequest) -> schemas.ScoreResponse:
        """Score one response within the deadline; `ApiError` says why it could not be."""
        try:
            async with asyncio.timeout(self.settings.request_timeout_s):
                answer = await self._score(request)
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

    async def _score(self, request: schemas.ScoreRequest) -> schemas.ScoreResponse:
        self._check_model(request.model)
        text = await asyncio.to_thread(self._encode, request)
        scores = await self._measure(text)
        offsets = [(token.start, token.end) for token in text.tokens]
        spans = find_spans(request.response, offsets, scores.epistemic)
        sequence = aggregate(scores)
        # A calibrator turns the sequence into a probability; without one there is none to give.
        hallucination_score = None
        _observe(text, scores, sequence)
        return schemas.ScoreResponse(
            id=f"score-{uuid.uuid4().hex}",
            created=int(time.time()),
            model=self.name,
            estimator=schemas.Estimator(
                drafts=self.engine.n_drafts, weights_version=scores.weights_version
            ),
            hallucination_score=hallucination_score,
            flagged=None,
            threshold=request.threshold,
            sequence=sequence,
            tokens=_tokens(request.response, text, scores),
            spans=_spans(request.response, spans),
            usage=_usage(text.response_start, len(scores)),
        )

    async def score_list(self, items: list[Any]) -> schemas.ScoreList:
        """Score a list; a bad item fails alone."""
        # A bound on each list, so that a long one leaves the engine room for other clients.
        room = asyncio.Semaphore(self.settings.batch_concurrency)

        async def one(index: int, item: Any) -> schemas.ScoreListItem:
            try:
                request = schemas.ScoreRequest.model_validate(item)
                async with room:
                    return schemas.ScoreListItem(index=index, score=await self.score(request))
            except ValidationError as error:
                failure: ApiError = from_validation(error)
                metrics.ITEMS.labels(failure.code).inc()
            except ApiError as error:
                failure = error
            except Exception:  # one item's accident must not cost the others their scores
                logger.exception("item %d failed", index)
                failure = ApiError("internal error; the server's log has the details")
            return schemas.ScoreListItem(index=index, error=schemas.ErrorBody(**failure.body()))

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(index, item)) for index, item in enumerate(items)]
        data = [task.result() for task in tasks]
        usages = [item.score.usage for item in data if item.score is not None]
        return schemas.ScoreList(
            data=data,
            usage=_usage(
                sum(usage.prompt_tokens for usage in usages),
                sum(usage.completion_tokens for usage in usages),
            ),
        )

    def _check_model(self, model: str | None) -> None:
        if model is not None and model != self.name:
            raise NotFound(
                f"model '{model}' is not served here; '{self.name}' is",
                param="model",
                code="model_not_found",
            )

    def _encode(self, request: schemas.ScoreRequest) -> EncodedText:
        try:
            prompt, rendered = request.prompt or "", False
            if request.messages is not None:
                messages = [{"role": turn.role, "content": turn.text} for turn in request.messages]
                prompt, rendered = self.encoder.render(messages), True
            return self.encoder.encode(
                prompt, request.response, rendered=rendered, max_tokens=self.engine.max_tokens
            )
        except TooManyTokens as error:
            raise TooLarge(str(error), code="context_length_exceeded") from error
        except TextError as error:
            raise BadRequest(str(error), code="invalid_text") from error

    async def _measure(self, text: EncodedText) -> TokenScores:
        try:
            return await self.engine.score(text.token_ids, text.response_start)
        except EngineNotReady as error:
            raise NotReady(str(error), retry_after_s=30) from error
        except NonFiniteError as error:
            raise ApiError(str(error), code="not_finite") from error


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


def _spans(response: str, spans: list[Span]) -> list[schemas.SpanOut]:
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


def _usage(prompt: int, completion: int) -> schemas.Usage:
    return schemas.Usage(
        prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion
    )
