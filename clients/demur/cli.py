"""The `demur` command (extra `cli`). Other installed distributions add commands of their own.

They do it by the entry-point group `demur.commands`: the entry's name is the command's, its object
the function. An entry that cannot be imported is reported when it is called, not before.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from importlib.metadata import EntryPoint, entry_points

try:
    import typer
except ImportError:  # the SDK alone was installed
    sys.exit(
        "the demur command needs its extra: in a clone of the repository, "
        "pip install './clients[cli]'"
    )

from demur._cli_common import INTERRUPTED, USAGE
from demur.cli_chat import chat
from demur.cli_eval import evaluate
from demur.cli_lists import drafts, models
from demur.cli_score import score

# Known, so that who has the SDK alone is told what to install.
SERVER_COMMANDS = ("serve", "init", "demo", "distill", "synthesize", "rivals", "calibrate")

app = typer.Typer(
    help="Token by token, how much a language model does not know what it is saying.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for _command in (score, chat, drafts, models):
    app.command()(_command)
app.command("eval")(evaluate)


def main() -> None:
    """Entry point of the `demur` command."""
    add_commands(app, entry_points(group="demur.commands"), sys.argv[1:2])
    try:
        app()
    except SystemExit as ended:
        if ended.code == INTERRUPTED:
            _leave_at_once()
        raise


def add_commands(app: typer.Typer, entries: Iterable[EntryPoint], called: list[str]) -> None:
    """Add other distributions' commands; `called` is the command's name, if one was given."""
    names = set()
    for entry in entries:
        names.add(entry.name)
        # Imported only if it is asked for: the server's commands take seconds to import.
        if entry.name in called:
            app.command(entry.name)(_load(entry))
        else:
            app.command(entry.name, help=f"(from {entry.dist and entry.dist.name})")(_nothing)
    for name in set(SERVER_COMMANDS) - names:
        anything = {
            "ignore_unknown_options": True,
            "allow_extra_args": True,
            "help_option_names": [],
        }
        app.command(name, hidden=True, context_settings=anything)(_needs_the_server)


def _nothing() -> None:
    """Stands in the list of commands for one that was not asked for."""


def _load(entry: EntryPoint) -> Callable[..., None]:
    try:
        command: Callable[..., None] = entry.load()
    except ImportError as error:
        sys.exit(f"`demur {entry.name}` cannot be loaded: {error}")
    return command


def _needs_the_server(context: typer.Context) -> None:
    typer.echo(
        f"`demur {context.info_name}` is the server's: pip install 'demur-server[cpu]' "
        "(in a clone of the repository: make setup)",
        err=True,
    )
    raise typer.Exit(USAGE)


def _leave_at_once() -> None:
    """After Ctrl-C: threads that wait for the service would else keep the process with them."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(INTERRUPTED)
