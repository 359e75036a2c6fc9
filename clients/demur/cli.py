"""The `demur` command (extra `cli`). Other installed distributions add commands of their own.

They do it by the entry-point group `demur.commands`: the entry's name is the command's, its object
the function. An entry that cannot be imported is reported when it is called, not before.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import Annotated

try:
    import typer
    from rich.console import Console
except ImportError:  # the SDK alone was installed
    sys.exit("the demur command needs its extra: pip install 'demur[cli]'")

from demur.client import Client
from demur.errors import DemurError
from demur.heatmap import render

app = typer.Typer(
    help="Token by token, how much a language model does not know what it is saying.",
    no_args_is_help=True,
    add_completion=False,
)


@app.command()
def score(
    response: Annotated[str, typer.Argument(help="the answer to score")],
    question: Annotated[str | None, typer.Option(help="the user's question")] = None,
    prompt: Annotated[str | None, typer.Option(help="raw text, in place of a question")] = None,
    base_url: Annotated[str | None, typer.Option(help="default: DEMUR_BASE_URL")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the service's answer")] = False,
) -> None:
    """Score an answer and print its heat map."""
    messages = None if question is None else [{"role": "user", "content": question}]
    try:
        with Client(base_url) as client:
            answer = client.score(response, messages=messages, prompt=prompt)
    except DemurError as error:
        Console(stderr=True).print(str(error), style="red", markup=False)
        raise typer.Exit(1) from error
    if as_json:
        print(answer.model_dump_json(indent=2))
    else:
        Console().print(render(answer))


def main() -> None:
    """Entry point of the `demur` command."""
    for entry in entry_points(group="demur.commands"):
        # Imported only if it is asked for: the server's commands take seconds to import.
        if entry.name in sys.argv[1:2]:
            app.command(entry.name)(_load(entry))
        else:
            app.command(entry.name, help=f"(from {entry.dist and entry.dist.name})")(_nothing)
    app()


def _nothing() -> None:
    """Stands in the list of commands for one that was not asked for."""


def _load(entry: EntryPoint) -> Callable[..., None]:
    try:
        command: Callable[..., None] = entry.load()
    except ImportError as error:
        sys.exit(f"`demur {entry.name}` cannot be loaded: {error}")
    return command
