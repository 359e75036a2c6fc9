"""`demur score`: the heat map of an answer, or the scores of a file of them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from demur._cli_common import (
    EXIT_CODES,
    AsJson,
    BaseUrl,
    MeasureOption,
    NoStore,
    console,
    outcome,
    print_json,
    read_text,
    usage,
    warn,
)


def score(
    file: Annotated[
        str | None,
        typer.Argument(help="File of the answer to score; - or nothing is standard input."),
    ] = None,
    response: Annotated[
        str | None, typer.Option("--response", "-r", help="The answer itself, in place of a file.")
    ] = None,
    question: Annotated[
        str | None, typer.Option("--question", "-q", help="The user's question.")
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", help="Raw text that the answer continues; may be empty."),
    ] = None,
    measure: MeasureOption = "epistemic",
    html: Annotated[
        Path | None, typer.Option(help="Also write the heat map there, as a page.")
    ] = None,
    as_json: AsJson = False,
    jsonl: Annotated[
        bool,
        typer.Option(
            "--jsonl",
            help='The file has an item a line: {"response", "question" or "messages" or "prompt", '
            '"model", "threshold", "store", "id"}, and so has the output, in its order: '
            '{"index", "id", "score", "error"}. A file called .jsonl is taken so.',
        ),
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="File for the output of --jsonl; default: standard output.")
    ] = None,
    concurrency: Annotated[
        int, typer.Option(min=1, help="Items of --jsonl that are under way at once.")
    ] = 8,
    no_store: NoStore = False,
    base_url: BaseUrl = None,
) -> None:
    """Score an answer and print its heat map, or score a file of them (--jsonl)."""
    batch = jsonl or (file is not None and file.endswith(".jsonl"))
    if batch:
        if html or as_json or not (response is question is prompt is None):
            raise usage("--jsonl takes its texts from the file, and writes JSON lines alone")
        _check_input(file, "lines to score")
        from demur.cli_batch import score_lines

        with outcome():
            score_lines(file or "-", out, concurrency, no_store=no_store, base_url=base_url)
        return
    if out is not None:
        raise usage("--out is for --jsonl; --html writes a heat map to a file")
    if (question is None) == (prompt is None):
        raise usage("give what was answered: --question or --prompt")
    if response is None:
        _check_input(file, "an answer to score")
        response = read_text(file or "-")
    elif file is not None:
        raise usage("give FILE or --response, not both")
    with outcome():
        _score_one(response, question, prompt, no_store, base_url, measure, html, as_json)


score.__doc__ = f"{score.__doc__}\n\n{EXIT_CODES}"


def _check_input(file: str | None, what: str) -> None:
    """A command that would wait for somebody to type is a mistake."""
    if file is None and sys.stdin.isatty():
        raise usage(f"there is nothing: give {what} as FILE, by a pipe, or with --response")


def _score_one(
    response: str,
    question: str | None,
    prompt: str | None,
    no_store: bool,
    base_url: str | None,
    measure: MeasureOption,
    html: Path | None,
    as_json: bool,
) -> None:
    from demur.client import Client

    with Client(base_url) as client:
        scored = client.score(
            response, messages=question, prompt=prompt, store=False if no_store else None
        )
    for warning in scored.warnings:
        warn(warning.message)
    heatmap = scored.heatmap(measure=measure)
    if html is not None:
        _write(html, heatmap.to_html())
    if as_json:
        print_json(scored)
    else:
        console().print(heatmap)
        if scored.hallucination_score is not None:
            print(f"probability that it is wrong: {scored.hallucination_score:.2f}")


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise usage(f"--html {path}: {error.strerror}") from error
