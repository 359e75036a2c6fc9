"""The OpenAPI document and the pages that show it, for those with a key."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.openapi.docs import get_redoc_html, get_swagger_ui_html
from fastapi.responses import HTMLResponse

from server.auth import KeyRoute

documents = APIRouter(route_class=KeyRoute, include_in_schema=False)

_URL = "/openapi.json"


@documents.get(_URL)
async def openapi(request: Request) -> dict[str, Any]:
    document: dict[str, Any] = request.app.openapi()
    return document


@documents.get("/docs")
async def swagger() -> HTMLResponse:
    return get_swagger_ui_html(openapi_url=_URL, title="demur")


@documents.get("/redoc")
async def redoc() -> HTMLResponse:
    return get_redoc_html(openapi_url=_URL, title="demur")
