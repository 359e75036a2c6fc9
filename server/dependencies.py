"""What several routes need."""

from __future__ import annotations

from typing import Any

from fastapi import Request

from server import schemas
from server.keys import Key
from server.state import Serving, State


def state_of(request: Request) -> State:
    """The state of the app that a request came to."""
    state: State = request.app.state.demur
    return state


async def serving(request: Request) -> Serving:
    """What answers requests; `NotReady` before it is up and while it is not."""
    return await state_of(request).answering()


def key_of(request: Request) -> Key | None:
    """The key that a request was let in with; None where the service has none."""
    key: Key | None = request.state.key
    return key


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Errors that a route can answer with, for the OpenAPI document."""
    return {status: {"model": schemas.ErrorResponse} for status in statuses}
