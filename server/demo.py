"""`demur demo`: starts the service, scores right and wrong answers, prints heat maps, stops it."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Annotated

import typer
from demur import Client, Score
from rich.console import Console
from rich.markup import escape

from drafts.errors import DraftsError
from drafts.init import default_folder, init_default

_READY_WITHIN_S = 300
_SHIRTS = (
    "A shirt costs 15 dollars. Maria buys 4 shirts and pays with a 100 dollar bill. "
    "How much change does she get?"
)
# Question, right answer, wrong answer.
_EXAMPLES = [
    (
        "What is the capital of Japan?",
        "The capital of Japan is Tokyo.",
        "The capital of Japan is Nairobi.",
    ),
    (
        _SHIRTS,
        "4 shirts cost 4 * 15 = 60 dollars. She gets 100 - 60 = 40 dollars.",
        "4 shirts cost 4 * 15 = 80 dollars. She gets 100 - 80 = 95 dollars.",
    ),
]


def demo(
    svg: Annotated[Path | None, typer.Option(help="also save what is printed as an SVG")] = None,
) -> None:
    """Score a right and a wrong answer to two questions with the default model."""
    console = Console(record=svg is not None, highlight=False)
    try:
        home = str(Path.home())
        init_default(
            default_folder(),
            lambda line: console.print(line.replace(home, "~"), style="dim"),
        )
    except (DraftsError, OSError) as error:
        console.print(f"[red]{escape(str(error))}[/red]")
        raise typer.Exit(1) from error
    with _service(console) as client:
        for question, right, wrong in _EXAMPLES:
            console.rule(escape(question))
            scores = [
                client.score(answer, messages=[{"role": "user", "content": question}])
                for answer in (right, wrong)
            ]
            # One scale for both, so that shades can be compared.
            top = max(token.epistemic for score in scores for token in score.tokens)
            for label, score in zip(("right answer", "wrong answer"), scores, strict=True):
                console.print(f"\n{label}", style="bold")
                console.print(score.heatmap(top=top))
                console.print(_how_likely(score))
        estimator = scores[0].estimator
        console.rule()
        console.print(
            f"{scores[0].model}, {estimator.drafts} drafts, weights {estimator.weights_version}",
            style="dim",
        )
        console.print(
            "Epistemic uncertainty says where the model would go on otherwise if its weights were "
            "a little different. It is no verdict on the answer: a small model can be sure and "
            "wrong; how likely the answer itself is stands in logprob. The probability is "
            "calibrated on the model's own short answers to facts and sums.",
            style="dim",
        )
    if svg is not None:
        picture = console.export_svg(title="make demo")
        # Without the fonts that it would fetch from elsewhere.
        svg.write_text(re.sub(r"@font-face \{.*?\}", "", picture, flags=re.DOTALL))
    console.print("The service has stopped. `make serve` starts one that stays.", style="dim")


def _how_likely(score: Score) -> str:
    if score.hallucination_score is None:
        return "no calibration"
    doubted = ", ".join(warning.code for warning in score.warnings)
    return f"wrong with probability {score.hallucination_score:.2f}" + (
        f" (to be doubted: {doubted})" if doubted else ""
    )


@contextmanager
def _service(console: Console) -> Iterator[Client]:
    """A service of its own on a free port, stopped at the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # An empty working folder: no demur.toml of the user's own.
    with tempfile.TemporaryFile() as log, tempfile.TemporaryDirectory() as empty:
        command = [str(Path(sys.executable).with_name("demur")), "serve", "--port", str(port)]
        # A session of its own, so that Ctrl-C reaches only us and we stop it in order.
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=_environment(), start_new_session=True, cwd=empty
        )
        try:
            with Client(f"http://127.0.0.1:{port}") as client:
                _wait_until_ready(console, client, process, log)
                yield client
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                console.print("[red]the service did not stop in 60 s and was killed[/red]")


def _environment() -> dict[str, str]:
    """The demo shows the default: settings of the user's own service are left out."""
    return {name: value for name, value in os.environ.items() if not name.startswith("DEMUR_")}


def _wait_until_ready(
    console: Console, client: Client, process: subprocess.Popen[bytes], log: IO[bytes]
) -> None:
    started = time.monotonic()
    with console.status("starting the service") as status:
        while not client.ready():
            seconds = time.monotonic() - started
            status.update(f"starting the service: {seconds:.0f} s (about 40 s on two cores)")
            if process.poll() is not None or seconds > _READY_WITHIN_S:
                log.seek(0)
                console.print(log.read().decode(errors="replace")[-4000:], markup=False)
                console.print("[red]the service did not start; its log is above[/red]")
                raise typer.Exit(1)
            time.sleep(0.5)
    console.print(f"service ready after {time.monotonic() - started:.0f} s", style="dim")
