"""What several routes need."""

from __future__ import annotations

from typing import Any

from fastapi import Request

from server import schemas
from server.errors import NotReady
from server.state import Serving, State

_STARTING_RETRY_S = 5


def state_of(request: Request) -> State:
    """The state of the app that a request came to."""
    state: State = request.app.state.demur
    return state


async def serving(request: Request) -> Serving:
    """What answers requests; `NotReady` before it is up and after it died."""
    state = state_of(request)
    if state.serving is None or not await state.healthy():
        raise NotReady(state.why_not_ready(), retry_after_s=_STARTING_RETRY_S)
    return state.serving


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Errors that a route can answer with, for the OpenAPI document."""
    return {status: {"model": schemas.ErrorResponse} for status in statuses}
