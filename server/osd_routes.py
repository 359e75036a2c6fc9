"""Routes of the drafts' versions and of online distillation. All need an admin key."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends

from server import schemas
from server.auth import AdminRoute, bearer
from server.dependencies import errors, serving
from server.state import Serving

administered = APIRouter(
    prefix="/v1",
    route_class=AdminRoute,
    dependencies=[Depends(bearer)],
    responses=errors(400, 401, 403, 408, 413, 503),
)
_Serving = Annotated[Serving, Depends(serving)]


@administered.get("/drafts", summary="The drafts that serve")
async def drafts(serving: _Serving) -> schemas.DraftList:
    """The drafts beside the target, the version of their weights, and what versions there are."""
    return await _drafts(serving)


@administered.post(
    "/drafts/rollback", summary="Serve with an earlier version", responses=errors(404)
)
async def rollback(
    serving: _Serving, body: schemas.RollbackRequest | None = None
) -> schemas.DraftList:
    """Make a version of the store current, by default the current one's parent.

    This service serves with it when it answers; others that follow the store do within seconds. The
    trainer goes on from it.
    """
    await serving.online.roll_back(body.version if body is not None else None)
    return await _drafts(serving)


@administered.get("/osd", summary="How online distillation does")
async def osd(serving: _Serving) -> schemas.OsdStatus:
    """The spool, the trainer, and its last verdict on a version."""
    return await serving.online.status()


@administered.post("/osd/pause", summary="Let the trainer rest")
async def pause(serving: _Serving) -> schemas.OsdStatus:
    """It rests after the step that it is at. Conversations are kept meanwhile."""
    await serving.online.pause("by request")
    return await serving.online.status()


@administered.post("/osd/resume", summary="Let the trainer go on")
async def resume(serving: _Serving) -> schemas.OsdStatus:
    """After a pause."""
    await serving.online.pause(None)
    return await serving.online.status()


@administered.delete("/osd/spool", summary="Delete all kept conversations")
async def delete_spool(serving: _Serving) -> schemas.Deleted:
    """Those in the spool, those on their way into it, and those that the trainer holds."""
    return schemas.Deleted(deleted=await serving.online.clear())


async def _drafts(serving: Serving) -> schemas.DraftList:
    manifest = serving.served.engine.manifest
    return schemas.DraftList(
        weights_version=manifest.weights_version,
        target=serving.served.name,
        data=[
            schemas.Draft(
                name=draft.name,
                kind=draft.kind,
                layer=getattr(draft, "layer", None),
                draw=getattr(draft, "draw", None),
            )
            for draft in manifest.drafts
        ],
        versions=await serving.online.versions(),
    )
