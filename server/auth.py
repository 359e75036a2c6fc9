"""Who may do what: every route is one of these, and looks at the key before it reads the body."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Coroutine
from typing import Any
from urllib.parse import urlsplit

from fastapi import Request, Response
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer

from server.errors import BadRequest, Forbidden, Unauthorized
from server.keys import Key, Scope
from server.state import State

# For the OpenAPI document; the routes below do the checking.
bearer = HTTPBearer(auto_error=False, description="Needed where the service has keys.")


class KeyRoute(APIRoute):
    """A route for whoever has a key; for everybody if the service has none."""

    needed: Scope | None = None

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def checked(request: Request) -> Response:
            state: State = request.app.state.demur
            # Before anything is refused, so that the log can say whose request it was.
            request.state.key = key = _key_of(state, request, self.needed)
            if key is not None:
                _check_scope(key, self.needed)
                if self.needed in ("score", "generate"):
                    await state.budgets.request(key)
            return await handle(request)

        return checked


class ScoreRoute(KeyRoute):
    needed = "score"


class GenerateRoute(KeyRoute):
    needed = "generate"


class AdminRoute(KeyRoute):
    needed = "admin"


def _key_of(state: State, request: Request, needed: Scope | None) -> Key | None:
    """The key of a request; None if the service has none. `Unauthorized` without one that fits."""
    if not state.keyring:
        _refuse_other_sites(state, request, needed)
        return None
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    key = state.keyring.find(given.strip()) if scheme.lower() == "bearer" else None
    if key is None:
        raise Unauthorized("a valid key is needed: `Authorization: Bearer <key>`")
    return key


def _check_scope(key: Key, needed: Scope | None) -> None:
    if needed is not None and not key.may(needed):
        raise Forbidden(
            f"the key '{key.name}' has no scope '{needed}'; it has: "
            f"{', '.join(sorted(key.scopes)) or 'none'}",
            code="scope_needed",
        )


def _refuse_other_sites(state: State, request: Request, needed: Scope | None) -> None:
    """Without keys, what keeps a page that a browser on this machine shows from asking here."""
    host = request.headers.get("host", "")
    name = _name_of(f"//{host}")
    # A name that is not ours may be another site's that has been made to lead here.
    if not (state.settings.allow_no_keys or _is_here(name) or name == state.settings.host):
        raise BadRequest(
            f"this service has no keys and does not answer for the host '{name}': ask by its "
            "address, set keys, or set allow_no_keys",
            code="unknown_host",
        )
    origin = request.headers.get("origin")
    if needed == "admin" and origin is not None and origin.partition("://")[2] != host:
        raise Forbidden(
            f"pages of {origin} may not administer this service: set keys",
            code="foreign_origin",
        )


def _name_of(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError as error:
        raise BadRequest(f"the Host header cannot be read: {error}", code="unknown_host") from error


def _is_here(name: str) -> bool:
    if name in ("localhost", ""):  # a browser always names the host
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
