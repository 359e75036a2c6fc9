"""OpenAI's routes. They translate between HTTP and the service, and decide nothing."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from contextlib import closing
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response

from server import openai_schemas as schemas
from server.admission import ClientGone, unless_gone
from server.auth import GenerateRoute, bearer
from server.choice import Job
from server.dependencies import errors, key_of, serving
from server.event_stream import EventStream
from server.jobs import chat_job, completion_job, n_choices
from server.openai_answers import Answer, ChatAnswer, TextAnswer, events, whole
from server.served import Served
from server.state import Serving

generated = APIRouter(
    prefix="/v1",
    route_class=GenerateRoute,
    dependencies=[Depends(bearer)],
    responses=errors(400, 401, 403, 404, 408, 413, 429, 500, 503, 504),
)


def _or_events(chunk: str) -> dict[int | str, dict[str, Any]]:
    description = f"With `stream`, server-sent events, each a {chunk}; `[DONE]` is the last."
    return {200: {"description": description, "content": {"text/event-stream": {}}}}


@generated.post(
    "/chat/completions",
    summary="Go on with a conversation",
    response_model=schemas.ChatCompletion,
    responses=_or_events("chat.completion.chunk"),
)
async def chat_completions(
    body: schemas.ChatRequest,
    request: Request,
    serving: Annotated[Serving, Depends(serving)],
) -> Response:
    """OpenAI's, with the uncertainty of each token as it is generated."""
    return await _respond(request, body, serving, chat_job(body, serving.served), ChatAnswer)


@generated.post(
    "/completions",
    summary="Go on with a text",
    response_model=schemas.TextCompletion,
    responses=_or_events("text_completion"),
)
async def completions(
    body: schemas.CompletionRequest,
    request: Request,
    serving: Annotated[Serving, Depends(serving)],
) -> Response:
    """OpenAI's, with the uncertainty of each token as it is generated."""
    job = completion_job(body, serving.served)
    return await _respond(request, body, serving, job, TextAnswer)


async def _respond(
    request: Request,
    body: schemas.ChatRequest | schemas.CompletionRequest,
    serving: Serving,
    job: Coroutine[Any, Any, Job],
    contract: Callable[[Served, Job], Answer],
) -> Response:
    try:
        with closing(job), serving.generator.admission.take(n_choices(body, serving.settings)):
            answer = contract(serving.served, await unless_gone(request, job))
        parts = serving.generator.run(answer.job, key_of(request))
        if not body.stream:
            content = await unless_gone(request, whole(answer, parts))
            return Response(content, media_type="application/json")
        include_usage = bool(body.stream_options and body.stream_options.include_usage)
        stream = events(answer, parts, include_usage)
        # The first event before the answer begins: until then an error can have its own status.
        first = await unless_gone(request, anext(stream))
    except ClientGone:
        return Response(status_code=499)  # nobody reads it; the log and the metrics do
    return EventStream(first, stream, within_s=serving.settings.request_timeout_s)
