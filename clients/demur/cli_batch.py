"""`demur score --jsonl`: items in lines, scores in lines, in the same order.

A line of output is {"index", "id" if the item has one, "score" or null, "error" or null}.
"""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from demur._cli_common import SOME_FAILED, usage
from demur.client import Client
from demur.errors import (
    APIConnectionError,
    APIError,
    APITimeoutError,
    AuthenticationError,
    DemurError,
    PermissionDeniedError,
)
from demur.types import Score


@dataclass
class Tally:
    """What has come of a batch so far; `unreached` counts items in a row that got no answer."""

    scored: int = 0
    failed: int = 0
    unreached: int = 0
    last_unreached: APIConnectionError | None = None
    tokens: float = 0
    epistemic: float = 0

    def add(self, result: Score | DemurError) -> None:
        """Count a result."""
        if isinstance(result, Score):
            self.scored += 1
            self.tokens += result.sequence["n_tokens"]
            self.epistemic += result.sequence["epistemic_sum"]
        else:
            self.failed += 1
        # One that got no answer in time did reach the service.
        unreached = isinstance(result, APIConnectionError) and not isinstance(
            result, APITimeoutError
        )
        self.unreached = self.unreached + 1 if unreached else 0
        if unreached and isinstance(result, APIConnectionError):
            self.last_unreached = result

    def __str__(self) -> str:
        counts = f"{self.scored} scored, {self.failed} failed"
        if not self.tokens:
            return counts
        return f"{counts}, mean epistemic {self.epistemic / self.tokens:.4f} nats a token"


def score_lines(
    file: str, out: Path | None, concurrency: int, *, no_store: bool, base_url: str | None
) -> None:
    """Score the items of a file ("-": standard input) and write each result as it comes.

    Raises:
        typer.Exit: if items failed.
        DemurError: if the service cannot be reached or refuses the key, and so would the others.
            What was written until then stays.
    """
    ids: deque[dict[str, Any]] = deque()
    tally = Tally()
    result: Score | DemurError | None = None
    with ExitStack() as stack:
        lines = sys.stdin.buffer if file == "-" else stack.enter_context(_opened(file))
        target = sys.stdout if out is None else stack.enter_context(_created(out))
        client = stack.enter_context(Client(base_url))
        bar = stack.enter_context(_progress(target))
        task = bar.add_task("", total=None if file == "-" else Path(file).stat().st_size)
        stack.callback(lambda: typer.echo(tally, err=True))
        items = _items(lines, ids, lambda size: bar.advance(task, size), no_store)
        results = stack.enter_context(closing(client.score_iter(items, concurrency=concurrency)))
        for index, result in enumerate(results):
            tally.add(result)
            target.write(_line(index, ids.popleft(), result) + "\n")
            target.flush()  # a stop loses nothing
            bar.update(task, description=str(tally))
            if isinstance(result, AuthenticationError | PermissionDeniedError):
                raise result
            if isinstance(result, DemurError) and tally.unreached >= concurrency:
                raise result
    if tally.last_unreached is not None and not tally.scored:
        # Fewer items than would have ended it above, and none came back with a score.
        raise tally.last_unreached
    if tally.failed:
        raise typer.Exit(SOME_FAILED)


def _items(
    lines: BinaryIO,
    ids: deque[dict[str, Any]],
    read: Callable[[int], None],
    no_store: bool,
) -> Iterator[dict[str, Any] | DemurError]:
    """The item of each line, or what is wrong with it; `ids` gets {"id"} of those that have one."""
    for line in lines:
        read(len(line))
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or brackets no end
            ids.append({})
            yield DemurError(f"the line is not JSON ({error})")
            continue
        if not isinstance(item, dict):
            ids.append({})
            yield DemurError('the line is no object: {"response": …, "question": …} is one')
            continue
        ids.append({"id": item.pop("id")} if "id" in item else {})
        if no_store:
            item["store"] = False
        yield _asked(item)


def _asked(item: dict[str, Any]) -> dict[str, Any] | DemurError:
    """The item with its `question`, if it has one, as messages."""
    if "question" not in item:
        return item
    if "messages" in item:
        return DemurError("the item has question and messages; give one of them")
    return item | {"messages": item.pop("question")}


def _line(index: int, own: dict[str, Any], result: Score | DemurError) -> str:
    score, error = None, None
    if isinstance(result, Score):
        score = result.model_dump(mode="json")
    else:
        error = _error(result)
    # ASCII: an id may hold what no encoding of a terminal can write.
    return json.dumps({"index": index, **own, "score": score, "error": error})


def _error(error: DemurError) -> dict[str, str | None]:
    """The error as the service writes its own; the type of others is their class."""
    own: dict[str, str | None] = {"type": None, "param": None, "code": None}
    if isinstance(error, APIError):
        own = {"type": error.type, "param": error.param, "code": error.code}
    return {"message": str(error), **own, "type": own["type"] or type(error).__name__}


def _progress(target: TextIO) -> Progress:
    """A bar on standard error, unless that is no terminal or the results go there as well."""
    return Progress(
        BarColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
        disable=target.isatty() or not sys.stderr.isatty(),
    )


def _opened(file: str) -> BinaryIO:
    try:
        return open(file, "rb")
    except OSError as error:
        raise usage(f"{file}: {error.strerror}") from error


def _created(out: Path) -> TextIO:
    try:
        return out.open("w", encoding="utf-8")
    except OSError as error:
        raise usage(f"--out {out}: {error.strerror}") from error
