"""The commands that the server adds to `demur`: serve and init."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from drafts.errors import DraftsError
from drafts.init import default_folder, init_default


def init(
    folder: Annotated[Path | None, typer.Argument(help="default: the user's cache folder")] = None,
    drafts: Annotated[
        Literal["residual", "exit"] | None,
        typer.Option(help="residual: the default; exit: those of arXiv 2602.01956"),
    ] = None,
) -> None:
    """Make the default ensemble on this machine."""
    try:
        init_default(folder or default_folder(drafts or "residual"), typer.echo, drafts)
    except (DraftsError, OSError) as error:
        _fail(error)


def serve(
    host: Annotated[str | None, typer.Option(help="default: DEMUR_HOST, 127.0.0.1")] = None,
    port: Annotated[int | None, typer.Option(help="default: DEMUR_PORT, 8000")] = None,
    ensemble: Annotated[Path | None, typer.Option(help="folder with demur.json")] = None,
) -> None:
    """Start the service. Settings: DEMUR_* variables and demur.toml (docs/operations.md)."""
    from drafts.manifest import read_manifest
    from osd.errors import OsdError
    from osd.online_config import read_online_config
    from server.app import create_app
    from server.connections import listening_server, raise_file_limit
    from server.logs import configure_logging
    from server.settings import read_settings
    from server.tracing import configure_tracing

    failed = False

    def stop() -> None:
        nonlocal failed
        failed = True
        server.should_exit = True

    try:
        settings = read_settings(host=host, port=port, ensemble=ensemble)
        settings.check_reachable()
        read_manifest(settings.ensemble.expanduser())
        if settings.osd == "train":
            read_online_config(settings.osd_config)  # the trainer's own, but told at once
        app = create_app(settings, on_failure=stop)
    except (ValueError, DraftsError, OsdError) as error:  # pydantic's, TOML's and ours
        _fail(error)
    configure_logging(settings.log_level, settings.log_format)
    raise_file_limit()
    server = listening_server(app, settings, at_end=configure_tracing())
    # Before the engine is loaded, which takes long: a port in use ends the process at once.
    try:
        listening = server.config.bind_socket()
    except SystemExit:  # uvicorn has logged why
        sys.exit(1)
    # The trainer, which ends a moment after a service that is killed, must not hold its port.
    listening.set_inheritable(False)
    if not settings.has_keys:
        logging.getLogger("server").warning("no keys are set: whoever reaches it may do all")
    if settings.osd != "off":
        logging.getLogger("server").warning(
            "osd is %s: conversations are kept, but those with `store: false`", settings.osd
        )
    server.run(sockets=[listening])
    if failed or not server.started:
        sys.exit(1)


def _fail(error: Exception) -> None:
    typer.echo(f"demur: {error}", err=True)
    raise typer.Exit(1)
