"""The `demur` command against a real server (fake engine) on a port of this machine."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import httpx
import pytest
import typer
import uvicorn
from demur import Client, Span, cli
from demur._cli_common import print_json
from demur.cli_batch import Tally
from demur.cli_conversation import Conversation, Show
from typer.testing import CliRunner, Result

from drafts.text import TextEncoder
from server.app import create_app
from server.settings import Settings
from tests.fake_engine import END, FakeEngine

ASK = ["--question", "Capital?"]
NOBODY = "http://127.0.0.1:9"


class Cli:
    """Runs commands, in this process."""

    def __init__(self, url: str, engine: FakeEngine, encoder: TextEncoder) -> None:
        self.url = url
        self.engine = engine
        self.encoder = encoder

    def __call__(self, *arguments: str | Path, stdin: str | bytes | None = None) -> Result:
        return CliRunner().invoke(cli.app, list(map(str, arguments)), input=stdin)

    def speak(self, text: str) -> None:
        self.engine.answer = [*self.encoder.tokenizer.encode(text).ids, END]


@pytest.fixture(scope="module")
def served(encoder: TextEncoder) -> Iterator[Cli]:
    engine = FakeEngine()

    async def start(_: Settings) -> tuple[str, FakeEngine, TextEncoder]:
        return "tiny", engine, encoder

    settings = Settings(ensemble=Path("unused"), api_keys=["key"], admin_keys=["key"])
    config = uvicorn.Config(create_app(settings, start), port=0, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield Cli(f"http://127.0.0.1:{port}", engine, encoder)
    server.should_exit = True
    thread.join()


@pytest.fixture
def run(served: Cli, monkeypatch: pytest.MonkeyPatch) -> Cli:
    monkeypatch.setenv("DEMUR_BASE_URL", served.url)
    monkeypatch.setenv("DEMUR_API_KEY", "key")
    # Wide enough that typer breaks no message into a box of lines.
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("TERMINAL_WIDTH", "300")
    served.speak("Tokyo 🎉.")
    served.engine.fails_after = None
    return served


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_an_answer_from_anywhere(run: Cli, tmp_path: Path) -> None:
    file = tmp_path / "answer.txt"
    file.write_text("\ufeffTokyo 東京.\r\n", encoding="utf-8")
    answers = [
        run("score", "-r", "Tokyo 東京.", *ASK, "--json"),
        run("score", file, *ASK, "--json"),
        run("score", "-", *ASK, "--json", stdin="Tokyo 東京.\n"),
        run("score", *ASK, "--json", stdin="Tokyo 東京."),
    ]
    for answer in answers:
        assert answer.exit_code == 0, answer.output
        assert "".join(t["token"] for t in json.loads(answer.stdout)["tokens"]) == "Tokyo 東京."
    continued = run("score", "-r", "Tokyo", "-p", "")
    assert continued.exit_code == 0, continued.output


def test_heat_maps(run: Cli, tmp_path: Path) -> None:
    page = tmp_path / "map.html"
    done = run("score", "-r", "Tokyo.", *ASK, "--measure", "jsd", "--html", page)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("Tokyo.\n")
    assert "highest jsd" in done.stdout
    assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["score", "-r", "x"], "--question or --prompt"),
        (["score", "-r", "x", *ASK, "-p", "y"], "--question or --prompt"),
        (["score", "no such file", *ASK], "--response"),
        (["score", "file", "-r", "x", *ASK], "not both"),
        (["score", "-r", "x", *ASK, "--measure", "doubt"], "epistemic"),
        (["score", "-r", "x", *ASK, "--out", "y"], "--jsonl"),
        (["score", "-r", "x", *ASK, "--html", "/no/such/folder/x"], "No such file"),
        (["score", "--jsonl", "-r", "x"], "JSON lines alone"),
        (["score", "none.jsonl"], "No such file"),
        (["score", "--jsonl", "-", "--out", "/no/such/folder/x"], "No such file"),
        (["chat", "Hi", "--window", "3"], "--stop-above"),
        (["chat"], "no question"),
    ],
)
def test_wrong_usage(run: Cli, arguments: list[str], says: str) -> None:
    done = run(*arguments, stdin="")
    assert done.exit_code == 2, done.output
    assert says in done.stderr


def test_bytes_that_are_no_text(run: Cli, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"ab\xff")
    done = run("score", tmp_path / "x", *ASK)
    assert done.exit_code == 2
    assert "not UTF-8" in done.stderr


def test_what_the_service_refuses(run: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = run("score", "-r", "word " * 99, *ASK)
    assert refused.exit_code == 1
    assert "413" in refused.stderr
    monkeypatch.setenv("DEMUR_API_KEY", "wrong")
    for arguments in (["score", "-r", "x", *ASK], ["chat", "Hi"], ["models"], ["drafts"]):
        done = run(*arguments)
        assert done.exit_code == 1
        assert "DEMUR_API_KEY" in done.stderr
        assert not isinstance(done.exception, BaseException) or isinstance(
            done.exception, SystemExit
        )


@pytest.mark.usefixtures("no_waiting")
def test_nobody_answers(run: Cli) -> None:
    for arguments in (["score", "-r", "x", *ASK], ["chat", "Hi"], ["models"], ["drafts"]):
        done = run(*arguments, "--base-url", NOBODY)
        assert done.exit_code == 1, done.output
        assert "demur serve" in done.stderr


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("demur.client.wait_before_retry", lambda *_: None)


BATCH = [
    '{"question": "Capital?", "response": "Tokyo.", "id": "a"}',
    "",
    "no JSON",
    "[" * 100_000,
    '["a list"]',
    '{"response": "x", "prompt": "y", "seed": 1, "id": "\\ud800"}',
    '{"response": " Tokyo.", "prompt": "The capital is", "store": false}',
    '{"response": "x", "prompt": "y", "model": "other", "id": 7}',
    '{"response": "x", "question": "y", "messages": "z"}',
]


def test_a_batch(run: Cli, tmp_path: Path) -> None:
    file, out = tmp_path / "items.jsonl", tmp_path / "scores.jsonl"
    file.write_bytes("\n".join(BATCH).encode() + b'\n\xff\n{"response": "last", "prompt": ""}')
    done = run("score", file, "--concurrency", "2")
    assert done.exit_code == 3, done.output
    results = lines(done.stdout)
    assert [result["index"] for result in results] == list(range(10))
    assert [i for i, result in enumerate(results) if result["score"]] == [0, 5, 9]
    assert all(bool(result["score"]) != bool(result["error"]) for result in results)
    assert {i: result["id"] for i, result in enumerate(results) if "id" in result} == {
        0: "a",
        4: "\ud800",
        6: 7,
    }
    assert results[6]["error"]["code"] == "model_not_found"
    assert set(results[1]["error"]) == {"message", "type", "param", "code"}
    assert "3 scored, 7 failed, mean epistemic" in done.stderr
    written = run("score", "--jsonl", "-", "--out", out, stdin=file.read_bytes())
    assert written.exit_code == 3
    assert written.stdout == ""
    assert [r["error"] and r["error"]["code"] for r in lines(out.read_text())] == [
        r["error"] and r["error"]["code"] for r in results
    ]


def test_a_batch_that_went_well(run: Cli) -> None:
    done = run("score", "--jsonl", stdin=(BATCH[0] + "\n") * 50)
    assert done.exit_code == 0, done.output
    scores = [result["score"] for result in lines(done.stdout)]
    assert len(scores) == 50
    mean = scores[0]["sequence"]["epistemic_mean"]
    assert f"mean epistemic {mean:.4f} nats" in done.stderr
    assert run("score", "--jsonl", stdin="\n\n").exit_code == 0


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize(("count", "written"), [(3, 3), (500, 4)])
def test_a_batch_that_nobody_answers_gives_up(run: Cli, count: int, written: int) -> None:
    batch = (BATCH[0] + "\n") * count
    done = run("score", "--jsonl", "--base-url", NOBODY, "--concurrency", "4", stdin=batch)
    assert done.exit_code == 1, done.output
    assert len(lines(done.stdout)) == written
    assert "demur serve" in done.stderr


def test_a_batch_with_a_wrong_key_gives_up(run: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEMUR_API_KEY", "wrong")
    done = run("score", "--jsonl", stdin=(BATCH[0] + "\n") * 500)
    assert done.exit_code == 1, done.output
    assert len(lines(done.stdout)) == 1


def test_a_tally_without_tokens() -> None:
    assert str(Tally()) == "0 scored, 0 failed"


def test_chat(run: Cli) -> None:
    for done in (run("chat", "Capital?"), run("chat", stdin="Capital?\n")):
        assert done.exit_code == 0, done.output
        assert done.stdout == "Tokyo 🎉.\n"
        assert "tokens, epistemic mean" in done.stderr
        assert "complete" in done.stderr
    answer = run("chat", "Capital?", "--json", "--system", "Be short.", "--temperature", "0")
    assert json.loads(answer.stdout)["choices"][0]["message"]["content"] == "Tokyo 🎉."
    assert run.engine.samplings[-1].temperature == 0


def test_chat_says_why_an_answer_ended(run: Cli) -> None:
    assert "cut off" in run("chat", "Hi", "--max-tokens", "2").stderr
    doubted = run("chat", "Hi", "--stop-above", "0", "--window", "2")
    assert "ended by uncertainty" in doubted.stderr
    assert doubted.exit_code == 0


def test_chat_that_breaks_off(run: Cli) -> None:
    run.engine.fails_after = 1
    done = run("chat", "Hi")
    assert done.exit_code == 1
    assert "NaN" in done.stderr


def test_lists(run: Cli) -> None:
    assert "tiny" in run("models").stdout
    assert json.loads(run("models", "--json").stdout)["data"][0]["id"] == "tiny"
    shown = run("drafts").stdout
    assert "draft_b" in shown
    assert "target" in shown
    assert len(json.loads(run("drafts", "--json").stdout)["data"]) == 4


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-c", "from demur.cli import main; main()", *arguments]


def on_terminal(arguments: list[str], typed: str) -> tuple[int, str]:
    """Run a command on a terminal of its own; what it showed."""
    parent, child = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLORTERM": "truecolor"}
    process = subprocess.Popen(
        command(*arguments), stdin=child, stdout=child, stderr=child, env=environment
    )
    os.close(child)
    os.write(parent, typed.encode())
    shown = b""
    while True:
        try:
            shown += os.read(parent, 65536)
        except OSError:  # Linux's way to say that the other end is closed
            break
    os.close(parent)
    return process.wait(), shown.decode()


def test_a_conversation(run: Cli) -> None:
    run.speak("Ja.")
    before = len(run.engine.samplings)
    code, shown = on_terminal(["chat"], "One?\n\nTwo?\n/reset\nThree?\n/exit\n")
    assert code == 0
    assert len(run.engine.samplings) - before == 3
    assert shown.count("complete") == 3
    assert "\x1b[38;2;" in shown  # shaded


def test_a_terminal_with_nothing_to_score_is_no_hang(run: Cli) -> None:
    code, shown = on_terminal(["score", *ASK], "")
    assert code == 2
    assert "there is nothing" in shown
    assert on_terminal(["score", "--jsonl"], "")[0] == 2
    assert on_terminal(["chat", "--json"], "")[0] == 2


def test_a_progress_bar_is_on_a_terminal_alone(run: Cli, tmp_path: Path) -> None:
    file, out = tmp_path / "items.jsonl", tmp_path / "out.jsonl"
    file.write_text((BATCH[0] + "\n") * 3)
    code, shown = on_terminal(["score", str(file), "--out", str(out)], "")
    assert code == 0
    assert "3 scored, 0 failed" in shown
    assert len(lines(out.read_text())) == 3


def test_a_reader_that_has_had_enough(run: Cli, tmp_path: Path) -> None:
    file = tmp_path / "items.jsonl"
    file.write_text((BATCH[0] + "\n") * 200)
    with subprocess.Popen(
        command("score", str(file)), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert json.loads(process.stdout.readline())["index"] == 0
        process.stdout.close()
        told = process.stderr.read().decode()
    assert process.returncode == 0
    assert "Traceback" not in told
    assert "BrokenPipe" not in told


def test_an_interrupt_ends_it_at_once(run: Cli) -> None:
    """Even though requests are under way: the engine is held up until the command has ended."""
    run.engine.release.clear()
    try:
        with subprocess.Popen(
            command("score", "--jsonl"),
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # These tests may themselves run in the background, where interrupts are ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        ) as process:
            assert process.stdin is not None
            process.stdin.write((BATCH[0] + "\n").encode() * 3)
            process.stdin.flush()
            wait_until(lambda: run.engine.running >= 3)
            process.send_signal(signal.SIGINT)
            try:
                assert process.wait(timeout=60) == 130
            finally:
                process.kill()
            assert process.stderr is not None
            assert "Traceback" not in process.stderr.read().decode()
    finally:
        run.engine.release.set()


def test_commands_of_the_server() -> None:
    app = typer.Typer()
    app.command("score")(cli.score)
    ours = EntryPoint("serve", "os:getpid", "demur.commands")
    broken = EntryPoint("init", "no_such_module:init", "demur.commands")
    cli.add_commands(app, [ours, broken], ["serve"])
    assert CliRunner().invoke(app, ["serve"]).exit_code == 0
    missing = CliRunner().invoke(app, ["distill", "--help", "x.yaml"])
    assert missing.exit_code == 2
    assert "pip install 'demur-server[cpu]'" in missing.stderr
    assert "distill" not in CliRunner().invoke(app, ["--help"]).stdout
    with pytest.raises(SystemExit, match="`demur init` cannot be loaded"):
        cli.add_commands(typer.Typer(), [broken], ["init"])


def test_help_is_quick_and_has_the_exit_codes(run: Cli) -> None:
    assert "130" in run("score", "--help").stdout
    check = (
        "import sys; sys.argv = ['demur', '--help']\nfrom demur.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'server', 'drafts', 'osd', 'demur.cli_batch'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("score", "chat", "drafts", "models", "serve"):
        assert name in done.stdout


@pytest.mark.parametrize(
    "arguments", [["models"], ["models", "--json"], ["chat", "Hi"], ["score", "-r", "x", *ASK]]
)
def test_nobody_reads(run: Cli, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # As usual, output goes through a buffer, which is written at the end.
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    with subprocess.Popen(
        command(*arguments),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        told = process.stderr.read().decode()
    assert process.returncode == 0, told
    assert "Traceback" not in told
    assert "Exception" not in told


def test_json_on_a_terminal_commands_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    print_json(Span(start=0, end=1, text="\x1b\x9b\x7f東", epistemic_mean=0, epistemic_max=0))
    shown = capsys.readouterr().out
    assert not set(shown) & set("\x1b\x9b\x7f")
    assert "東" in shown
    assert json.loads(shown)["text"] == "\x1b\x9b\x7f東"


def test_results_are_written_as_they_come(run: Cli, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    before = run.engine.calls
    with subprocess.Popen(
        command("score", "--jsonl", "--out", str(out)), stdin=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        # So few that they fill no buffer. What is done is written once the next item is there.
        for count in range(1, 5):
            process.stdin.write((BATCH[0] + "\n").encode())
            process.stdin.flush()
            wait_until(lambda: run.engine.calls >= before + count)  # noqa: B023
            time.sleep(0.1)  # the answer is on its way
        wait_until(lambda: out.read_text().endswith("\n"))
        assert lines(out.read_text())[0]["index"] == 0
        process.stdin.close()
        assert process.wait(timeout=60) == 0
    assert len(lines(out.read_text())) == 4


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_conversation_remembers() -> None:
    asked: list[Any] = []

    def handle(request: httpx.Request) -> httpx.Response:
        asked.append(json.loads(request.content)["messages"])
        choice = {"index": 0, "delta": {"content": "Ja."}, "finish_reason": "stop"}
        chunk = {"id": "1", "created": 1, "model": "tiny", "choices": [choice]}
        body = f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n"
        return httpx.Response(200, headers={"Content-Type": "text/event-stream"}, text=body)

    client = Client(transport=httpx.MockTransport(handle))
    talk = Conversation(client, {}, "Be short.", Show("epistemic", 0.5))
    talk.ask("One?")
    talk.ask("Two?")
    assert [turn["content"] for turn in asked[1]] == ["Be short.", "One?", "Ja.", "Two?"]
    assert [turn["role"] for turn in asked[1]] == ["system", "user", "assistant", "user"]
