"""`demur osd`: the online trainer as a process of its own."""

from __future__ import annotations

import logging
import os
import signal
import threading
from pathlib import Path
from typing import Annotated

import typer

from drafts.errors import DraftsError
from drafts.init import default_folder
from drafts.shipped import REFERENCE_NAME
from osd.errors import OsdError

_LOOK_EVERY_S = 1.0


def osd(
    ensemble: Annotated[
        Path | None,
        typer.Option(
            envvar="DEMUR_ENSEMBLE",
            help="folder with demur.json; default: the one of `demur init`",
        ),
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(envvar="DEMUR_DRAFTS_STORE", help="the drafts' versions, folder or URL"),
    ] = None,
    spool: Annotated[
        str | None, typer.Option(envvar="DEMUR_SPOOL", help="path or redis:// URL of the spool")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(help="the trainer's own; default: in the service's `osd_folder`")
    ] = None,
    corpus: Annotated[
        Path | None,
        typer.Option(
            envvar="DEMUR_OSD_CORPUS",
            help="the target's own answers (demur synthesize); default: the ensemble's",
        ),
    ] = None,
    load: Annotated[
        Path | None, typer.Option(help="folder where services here tell how busy they are")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(envvar="DEMUR_OSD_CONFIG", help="YAML file; docs/osd.md has its fields"),
    ] = None,
    osd_folder: Annotated[
        Path | None,
        typer.Option(
            envvar="DEMUR_OSD_FOLDER",
            help="the service's `osd_folder`, in which all is that is not named here",
        ),
    ] = None,
    parent: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """Keep the drafts aligned to the traffic, while services answer it (docs/osd.md)."""
    from osd.online import Places, run
    from osd.online_config import read_online_config

    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s trainer: %(message)s"
    )
    for name in ("transformers", "httpx", "fsspec"):
        logging.getLogger(name).setLevel(logging.ERROR)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent, stop), daemon=True).start()
    chosen = (ensemble or default_folder()).expanduser()
    base = (osd_folder or default_folder().parent / "osd" / chosen.name).expanduser()
    places = Places(
        ensemble=chosen,
        store=store or str(base / "drafts"),
        spool=spool or str(base / "spool.sqlite"),
        folder=(folder or base / "trainer").expanduser(),
        corpus=(corpus or chosen / REFERENCE_NAME).expanduser(),
        load=(load or base / "load").expanduser(),
    )
    try:
        run(read_online_config(config), places, stop)
    except (DraftsError, OsdError, OSError) as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        raise typer.Exit(1) from error


def _end_with(parent: int, stop: threading.Event) -> None:
    """A service that was killed has not told its trainer to stop."""
    while not stop.wait(_LOOK_EVERY_S):
        if os.getppid() != parent:
            logging.getLogger(__name__).warning("the service is gone")
            stop.set()
