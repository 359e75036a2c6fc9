"""The app factory.

app = create_app(Settings())            # the real engine
app = create_app(Settings(), fake)      # HTTP tests
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib import metadata

from fastapi import FastAPI

from server import documents, openai_routes, osd_routes, routes
from server.errors import install_handlers
from server.middleware import RequestContext
from server.settings import Settings
from server.state import Start, State, start_engine


def create_app(
    settings: Settings,
    start: Start = start_engine,
    on_failure: Callable[[], None] = lambda: None,
) -> FastAPI:
    """The service as an ASGI app.

    Args:
        start: brings up the engine, in the background of the app's lifespan.
        on_failure: called if that fails; `demur serve` then stops.
    """
    state = State(settings, start)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        state.begin(on_failure)
        yield
        await state.end()

    app = FastAPI(
        title="demur",
        summary="Token by token, how much a language model does not know what it is saying.",
        version=metadata.version("demur-server"),
        lifespan=lifespan,
        redirect_slashes=False,
        # FastAPI's own pages would stand open; `server.documents` has them for those with a key.
        openapi_url=None,
    )
    app.state.demur = state
    install_handlers(app)
    app.include_router(routes.scored)
    app.include_router(openai_routes.generated)
    app.include_router(osd_routes.administered)
    app.include_router(routes.told)
    app.include_router(routes.open_to_all)
    app.include_router(documents.documents)
    app.add_middleware(
        RequestContext,
        max_body_bytes=settings.max_body_bytes,
        body_timeout_s=settings.body_timeout_s,
    )
    _drop_stock_validation_error(app)
    return app


def _drop_stock_validation_error(app: FastAPI) -> None:
    """FastAPI documents a 422 of its own for each body; here that is a 400 of the contract."""
    document = app.openapi()
    for path in document["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        document["components"]["schemas"].pop(name, None)
