"""What the commands have in common: exit codes, options, and how failures are told."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import BaseModel

from demur._measures import Measure
from demur._visible import visible
from demur.errors import DemurError

if TYPE_CHECKING:
    from rich.console import Console

FAILED = 1  # the service could not be reached, or refused
USAGE = 2  # typer's own
SOME_FAILED = 3  # of a batch
INTERRUPTED = 130  # Ctrl-C

EXIT_CODES = """Exit codes: 0 all went well; 1 the service could not be reached or refused; \
2 wrong usage; 3 some items of a batch failed; 130 Ctrl-C."""

BaseUrl = Annotated[
    str | None,
    typer.Option(
        help="Where the service is. Default: DEMUR_BASE_URL, else http://127.0.0.1:8000. "
        "A key is read from DEMUR_API_KEY."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the service's answer as JSON.")]
NoStore = Annotated[
    bool, typer.Option("--no-store", help="Keep the text out of the service's distillation.")
]
MeasureOption = Annotated[Measure, typer.Option(help="What to shade by, in nats.")]


@contextmanager
def outcome() -> Iterator[None]:
    """Turn what can go wrong in a command into a line and an exit code."""
    try:
        yield
        sys.stdout.flush()
    except DemurError as error:
        complain(str(error))
        raise typer.Exit(FAILED) from error
    except BrokenPipeError:
        # Who reads has had enough. What is left in the buffer must not complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(0) from None
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None


def console() -> Console:
    """Standard output with colours, where it is a terminal."""
    from rich.console import Console

    class Output(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # for `outcome`; rich would end the process by itself

    return Output(highlight=False)


def print_json(answer: BaseModel) -> None:
    """The service's answer. DEL and C1 codes, which JSON need not escape, are escaped as well."""
    text = answer.model_dump_json(indent=2)
    print(re.sub("[\x7f-\x9f]", lambda found: f"\\u{ord(found[0]):04x}", text))


def complain(message: str) -> None:
    """A line on standard error, in red on a terminal."""
    typer.secho(f"demur: {visible(message)}", fg="red", err=True)


def warn(message: str) -> None:
    """A line on standard error about what went well, and may mislead."""
    typer.secho(f"demur: warning: {visible(message)}", fg="yellow", err=True)


def usage(message: str) -> typer.BadParameter:
    """The error for a call that makes no sense."""
    return typer.BadParameter(message)


def read_text(file: str) -> str:
    """The text of a file, or of standard input for "-", without the line end it closes with."""
    try:
        raw = sys.stdin.buffer.read() if file == "-" else _bytes_of(file)
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise usage(f"{file} is not UTF-8 ({error.reason} at byte {error.start})") from error
    return text.removesuffix("\n").removesuffix("\r")


def _bytes_of(file: str) -> bytes:
    try:
        with open(file, "rb") as opened:
            return opened.read()
    except OSError as error:
        raise usage(f"{file}: {error.strerror}; a text itself is given with --response") from error
