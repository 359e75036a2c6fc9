"""`demur eval`: does the doubt find the wrong answers? (extra `eval`)"""

from __future__ import annotations

import asyncio
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from demur._cli_common import FAILED, SOME_FAILED, BaseUrl, complain, outcome, usage, warn

if TYPE_CHECKING:
    from demur.evals.ask import Asking
    from demur.evals.records import Record, Run
    from demur.evals.sets import EvalSet, Question

_MISSING = "demur eval needs its extra: in a clone of the repository, pip install './clients[eval]'"


def evaluate(
    sets: Annotated[
        list[str],
        typer.Argument(
            help="gsm8k, svamp, facts, sums, equations, gsm-symbolic", show_default=False
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="Folder for runs; each goes on where it stopped.")
    ] = Path("eval-runs"),
    report: Annotated[
        Path | None, typer.Option(help="Folder for report.html and report.json.")
    ] = None,
    mode: Annotated[
        Literal["generate", "score"],
        typer.Option(help="Let the target answer, or score given answers that have labels."),
    ] = "generate",
    data: Annotated[
        str | None,
        typer.Option(
            help="Hub id, folder or file, where a set needs one; with --mode score also an earlier "
            "run, whose answers are scored again."
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only so many questions, evenly out of each set.")
    ] = None,
    samples: Annotated[
        int, typer.Option(min=0, max=100, help="Further answers, for self-consistency.")
    ] = 0,
    temperature: Annotated[
        float, typer.Option(min=0.0, max=2.0, help="At which those are drawn.")
    ] = 0.7,
    p_true: Annotated[
        bool, typer.Option("--p-true", help="Ask the target whether its answer is true.")
    ] = False,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Of an answer; default: the set's own.")
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Questions under way at once.")] = 32,
    base_url: BaseUrl = None,
) -> None:
    """Measure on labelled answers how well each estimator tells the wrong from the right.

    Interrupt it when you like: called again, it goes on. A question that the service refuses is
    kept with the reason, counts as done, and makes the exit code 3.
    """
    with outcome():
        try:
            from demur.evals.ask import Asking
            from demur.evals.records import Run, RunError
            from demur.evals.sets import SetError, all_sets

            known = all_sets()
        except ImportError as error:
            complain(f"{error}; {_MISSING}")
            raise typer.Exit(FAILED) from error
        if unknown := [name for name in sets if name not in known]:
            raise usage(f"no set is called {', '.join(unknown)}; there are {', '.join(known)}")
        if samples and mode == "score":
            raise usage("--samples are further answers of the target; leave out --mode score")
        asking = Asking(samples, temperature, p_true, max_tokens)
        runs = []
        refused = 0
        try:
            # All of them before the first is asked, which may take hours.
            asked = {name: _questions(known[name], mode, data, limit) for name in sets}
            for name, questions in asked.items():
                run = Run(out / f"{name}-{mode}")
                asyncio.run(_carry_on(base_url, known[name], questions, run, asking, concurrency))
                refused += _refused(run, questions)
                runs.append(run)
            _conclude(runs, report)
        except BrokenPipeError:
            raise  # `outcome` knows what to do
        except (SetError, RunError, OSError) as error:
            complain(str(error))
            raise typer.Exit(FAILED) from error
        if refused:
            raise typer.Exit(SOME_FAILED)


def _questions(eval_set: EvalSet, mode: str, data: str | None, limit: int | None) -> list[Question]:
    from demur.evals.records import Run
    from demur.evals.sets import SetError

    earlier = Run(Path(data).expanduser()) if data is not None and mode == "score" else None
    if earlier is not None and (begun := earlier.settings()) is not None:
        if begun.get("set") != eval_set.name:
            raise SetError(f"{data} is a run of {begun.get('set')}, not of {eval_set.name}")
        return _some(earlier.given(), limit)
    load = eval_set.questions if mode == "generate" else eval_set.given
    if load is None:
        raise SetError(
            f"{eval_set.name} has no given answers to score; --data takes the folder of an earlier "
            "run of it, with its run.json"
        )
    return _some(load(data), limit)


def _some(found: list[Question], limit: int | None) -> list[Question]:
    """So many, evenly out of all."""
    if limit is None or limit >= len(found):
        return found
    return [found[i * len(found) // limit] for i in range(limit)]


def _refused(run: Run, questions: Sequence[Question]) -> int:
    """How many of the questions the service refused, now or before."""
    ids = {question.id for question in questions}
    refused = [record for record in run.records() if record.error and record.id in ids]
    if refused:
        warn(
            f"{len(refused)} of {len(ids)} questions were refused, and are kept with the reason in "
            f"{run.answers}; {refused[0].id}: {refused[0].error}"
        )
    return len(refused)


def _conclude(runs: Sequence[Run], report: Path | None) -> None:
    """How often the target was right; and the report, if one is wanted."""
    from demur.evals.analysis import load_run, tasks

    loaded = [load_run(run.folder) for run in runs]
    for task in tasks(loaded):
        accuracy = task["accuracy"]
        print(
            f"{task['task']} ({task['mode']}): {task['n']} answers, {accuracy['value']:.1%} right "
            f"({accuracy['low']:.1%} to {accuracy['high']:.1%}): {task['verdict']}"
        )
    if report is not None:
        from demur.evals.findings import find
        from demur.evals.report import write_report

        with _steps() as on_step:
            found = find(loaded, commands=[shlex.join(["demur", *sys.argv[1:]])], on_step=on_step)
        print(f"report: {write_report(found, report)}")


@contextmanager
def _steps() -> Iterator[Callable[[str], None]]:
    """Says on a terminal which table is being made."""
    from rich.console import Console

    with Console(stderr=True).status("report") as status:
        yield lambda title: status.update(f"report: {title}")


async def _carry_on(
    base_url: str | None,
    eval_set: EvalSet,
    questions: Sequence[Question],
    run: Run,
    asking: Asking,
    concurrency: int,
) -> None:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from demur.async_client import AsyncClient
    from demur.evals.ask import TIMEOUT
    from demur.evals.runner import carry_on

    done = run.done()
    n_done = sum(question.id in done for question in questions)
    typer.echo(f"{eval_set.name}: {len(questions)} questions, {n_done} done before", err=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty())
    with bar:
        task = bar.add_task(eval_set.name, total=len(questions), completed=n_done)

        def step(record: Record) -> None:
            bar.advance(task)

        # `ask` is patient enough by itself.
        async with AsyncClient(base_url, timeout=TIMEOUT, max_retries=0) as client:
            await carry_on(
                client, eval_set, questions, run, asking, concurrency=concurrency, on_done=step
            )
