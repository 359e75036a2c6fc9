"""Bearer keys: who may score and generate, and who may look at and change the drafts."""

from __future__ import annotations

import hmac
from typing import Annotated
from urllib.parse import urlsplit

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import SecretStr

from server.errors import Forbidden, Unauthorized
from server.settings import Settings

_bearer = HTTPBearer(auto_error=False, description="Needed where the service has keys.")
_Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]


def authorise(request: Request, credentials: _Credentials) -> None:
    """Let in whoever has one of `api_keys` or `admin_keys`; everybody if there are no `api_keys`.

    Raises:
        Unauthorized: without a key that fits.
    """
    settings: Settings = request.app.state.demur.settings
    if settings.api_keys and not _fits(credentials, settings.api_keys + settings.admin_keys):
        raise Unauthorized("a valid key is needed: `Authorization: Bearer <key>`")


def authorise_admin(request: Request, credentials: _Credentials) -> None:
    """Let in whoever has one of `admin_keys`; everybody if the service has no keys at all.

    Raises:
        Forbidden: with a key that is good for scoring only; without keys, for a page of another
            site that a browser on this machine shows.
        Unauthorized: without a key that fits.
    """
    settings: Settings = request.app.state.demur.settings
    if not settings.api_keys and not settings.admin_keys:
        origin = request.headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
            raise Forbidden(f"pages of {origin} may not administer this service: set `admin_keys`")
        return
    if _fits(credentials, settings.admin_keys):
        return
    if _fits(credentials, settings.api_keys):
        has = "one of the service's `admin_keys`" if settings.admin_keys else "it has none set"
        raise Forbidden(f"this key may score and generate; here an admin key is needed: {has}")
    raise Unauthorized("an admin key is needed: one of the service's `admin_keys`")


def _fits(credentials: HTTPAuthorizationCredentials | None, keys: list[SecretStr]) -> bool:
    given = credentials.credentials.encode() if credentials else b""
    # Every key is compared, whichever fits, so that the time taken tells nothing.
    matches = [hmac.compare_digest(given, key.get_secret_value().encode()) for key in keys]
    return any(matches)
