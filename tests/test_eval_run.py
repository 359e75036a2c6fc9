"""`demur eval` asks each question once, whatever happens to it or to the service."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from demur import APITimeoutError, AsyncClient, RateLimitError, ServerError, cli
from demur.evals import ask as asking
from demur.evals.ask import Asking
from demur.evals.gsm8k import GSM8K
from demur.evals.records import Record, Run
from demur.evals.runner import carry_on
from typer.testing import CliRunner, Result

from drafts.text import TextEncoder
from tests.eval_service import (
    Body,
    EvalService,
    Mishap,
    Mishaps,
    findings,
    kept,
    prompt_of,
    write_gsm8k,
)

NOBODY = "http://127.0.0.1:9"
N = 12
CONCURRENCY = 4
# `demur`, telling its time with each line.
DEMUR = (
    "from demur.evals import runner; runner._TELL_TIME_EVERY_S = 0\n"
    "from demur.cli import main; main()"
)


@pytest.fixture
def service(
    encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[EvalService]:
    service = EvalService(encoder)
    monkeypatch.setenv("DEMUR_BASE_URL", service.url)
    monkeypatch.setenv("DEMUR_API_KEY", "key")
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("TERMINAL_WIDTH", "300")
    monkeypatch.chdir(tmp_path)
    yield service
    service.end()


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "_FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(asking, "_LONGEST_WAIT_S", 0.02)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_gsm8k(tmp_path / "gsm8k", N)


def arguments(data: Path, out: Path, *more: str) -> list[str]:
    own = ["--data", str(data), "--out", str(out), "--concurrency", str(CONCURRENCY)]
    return ["eval", "gsm8k", *own, *more]


def evaluate(data: Path, out: Path, *more: str) -> Result:
    return CliRunner().invoke(cli.app, arguments(data, out, *more))


def refused(done: Result, says: str, code: int = 1) -> None:
    """It has ended with a sentence."""
    assert done.exit_code == code, done.output
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert isinstance(done.exception, SystemExit)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_killed_at_any_moment_it_loses_and_repeats_nothing(
    service: EvalService, tmp_path: Path
) -> None:
    n, draw = 120, random.Random(20)
    data = write_gsm8k(tmp_path / "gsm8k", n)
    run = tmp_path / "killed" / "gsm8k-generate"
    command = [sys.executable, "-c", DEMUR, *arguments(data, tmp_path / "killed", "--samples", "2")]
    service.slow_s = 0.02
    for _ in range(5):
        before = {line["prompt"] for line in kept(run)}
        service.asked.clear()
        enough = draw.randint(2, 30)
        # It cannot come to its end, however late the kill comes on a busy machine.
        service.mishap = lambda body: Mishap(None) if len(service.asked) > enough + 10 else None  # noqa: B023
        with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
            wait_until(lambda: len(service.asked) >= enough or process.poll() is not None)  # noqa: B023
            time.sleep(draw.uniform(0, 0.04))
            process.kill()
            told = process.communicate()[1].decode()
        assert process.returncode == -signal.SIGKILL, told
        assert not before & set(service.greedy)
    before = {line["prompt"] for line in kept(run)}
    assert 0 < len(before) < n
    service.mishap = lambda body: None
    service.asked.clear()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(service.greedy) == {line["prompt"] for line in kept(run)} - before
    assert set(findings(run)) == {f"gsm8k/{i}" for i in range(n)}
    assert evaluate(data, tmp_path / "whole", "--samples", "2").exit_code == 0
    assert findings(run) == findings(tmp_path / "whole" / "gsm8k-generate")
    # A session may be killed between a line and the word of its time.
    sessions = json.loads((run / "run.json").read_text())["sessions"]
    assert n - 5 <= sum(session["questions"] for session in sessions) <= n
    assert sum(session["seconds"] for session in sessions) > 0


def test_an_interrupt_ends_it_cleanly(service: EvalService, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "gsm8k-generate"
    service.mishap = lambda body: Mishap(None) if len(service.greedy) > 6 else None
    # As a terminal starts it: a run of tests in the background would hand down that it is ignored.
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    command = [sys.executable, "-c", heard + DEMUR, *arguments(data, tmp_path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        wait_until(lambda: bool(kept(run)) and service.under_way == CONCURRENCY)
        process.send_signal(signal.SIGINT)
        told = process.communicate(timeout=300)[1].decode()
    assert process.returncode == 130, told
    assert "Traceback" not in told
    before = kept(run)
    (session,) = json.loads((run / "run.json").read_text())["sessions"]
    assert session["questions"] == len(before)
    service.mishap = lambda body: None
    service.asked.clear()
    assert evaluate(data, tmp_path).exit_code == 0
    assert len(service.greedy) == N - len(before)
    assert kept(run)[: len(before)] == before
    assert len(findings(run)) == N


def test_a_torn_line_is_cut_off_and_asked_again(
    service: EvalService, data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "gsm8k-generate"
    assert evaluate(data, tmp_path).exit_code == 0
    whole = findings(run)
    answers = run / "answers.jsonl"
    last = kept(run)[-1]
    # Down to a single byte, and within a letter of several bytes.
    for torn in (answers.read_bytes()[:-1], answers.read_bytes()[:-200], b"{", b'{"id":"\xc3'):
        before = b"".join(answers.read_bytes().splitlines(keepends=True)[:-1])
        answers.write_bytes(torn if torn.startswith(before) else before + torn)
        service.asked.clear()
        done = evaluate(data, tmp_path)
        assert done.exit_code == 0, done.output
        assert f"{N} questions, {N - 1} done before" in done.stderr
        assert service.greedy == [last["prompt"]]
        assert findings(run) == whole


def test_reading_a_run_changes_nothing(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    assert run.settings() is None
    assert list(run.records()) == []
    assert not run.folder.exists()
    asked = {"task": "t", "group": "g", "half": "dev", "prompt": "p", "accepted": ["5"]}
    run.write_settings({})
    run.add(Record(id="1", response="\u2028é", **asked))
    written = run.answers.read_bytes()
    run.answers.write_bytes(written + written[:-5])  # as another process has just begun a line
    assert Run(run.folder).done() == {"1"}
    assert run.answers.read_bytes() == written + written[:-5]


@pytest.mark.parametrize("damaged", [b"{}", b"", b"no JSON", b'{"id": "\xff"}', b"[1, 2]"])
def test_a_damaged_line_is_refused(
    service: EvalService, data: Path, tmp_path: Path, damaged: bytes
) -> None:
    assert evaluate(data, tmp_path, "--limit", "3").exit_code == 0
    answers = tmp_path / "gsm8k-generate" / "answers.jsonl"
    first, _, third = answers.read_bytes().splitlines()
    content = b"\n".join((first, damaged, third, b""))
    answers.write_bytes(content)
    service.asked.clear()
    done = evaluate(data, tmp_path)
    refused(done, "answers.jsonl, line 2 is damaged")
    assert len(done.stderr.splitlines()) == 1
    assert service.asked == []
    assert answers.read_bytes() == content


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--samples", "1"], "asking = "),
        (["--temperature", "0.5"], "asking = "),
        (["--p-true"], "asking = "),
        (["--max-tokens", "9"], "asking = "),
    ],
)
def test_other_settings_are_refused_without_the_service(
    service: EvalService, data: Path, tmp_path: Path, more: list[str], says: str
) -> None:
    """Even where nothing is left to ask, and it could be taken for what was asked for."""
    assert evaluate(data, tmp_path).exit_code == 0
    refused(evaluate(data, tmp_path, *more, "--base-url", NOBODY), says)
    assert len(findings(tmp_path / "gsm8k-generate")) == N


def test_other_data_is_refused(service: EvalService, data: Path, tmp_path: Path) -> None:
    assert evaluate(data, tmp_path, "--limit", "3").exit_code == 0
    file = data / "test.jsonl"
    file.write_text(file.read_text().replace("Tom", "Ann"))
    service.asked.clear()
    refused(evaluate(data, tmp_path), "gsm8k/0 is another question")
    assert service.asked == []


@pytest.mark.parametrize("change", [("is_correct", False), ("solution", "A: 99"), ("question", "")])
def test_other_answers_or_labels_are_refused(
    service: EvalService, data: Path, tmp_path: Path, change: tuple[str, object]
) -> None:
    assert evaluate(data, tmp_path, "--mode", "score").exit_code == 0
    file = data / "example_model_solutions.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    key, value = change
    where = rows[1] if key == "question" else rows[1]["6b_finetuning"]
    assert where[key] != value
    where[key] = value
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    service.asked.clear()
    refused(evaluate(data, tmp_path, "--mode", "score"), "solutions/1/6b_finetuning is another")
    assert service.asked == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": "other"}, "model = other, and now it is tiny"),
        ({"weights_version": "v0"}, "weights_version = v0, and now it is fake-1"),
        ({"drafts": 7}, "drafts = 7"),
        ({"calibration": "abc"}, "calibration = abc, and now it is None"),
        ({"set": "svamp"}, "set = svamp"),
    ],
)
def test_another_model_is_refused(
    service: EvalService, data: Path, tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    assert evaluate(data, tmp_path, "--limit", "3").exit_code == 0
    run = Run(tmp_path / "gsm8k-generate")
    run.write_settings((run.settings() or {}) | change)
    service.asked.clear()
    refused(evaluate(data, tmp_path), says)
    assert service.greedy == []


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"{", "damaged"),
        (b"\xff", "damaged"),
        (b"[]", "damaged"),
        (None, "answers and no run.json"),
    ],
)
def test_a_run_without_its_settings_is_refused(
    service: EvalService, data: Path, tmp_path: Path, content: bytes | None, says: str
) -> None:
    assert evaluate(data, tmp_path, "--limit", "3").exit_code == 0
    settings = tmp_path / "gsm8k-generate" / "run.json"
    settings.unlink()
    if content is not None:
        settings.write_bytes(content)
    service.asked.clear()
    refused(evaluate(data, tmp_path), says)
    assert service.asked == []


def test_drafts_that_are_changed_meanwhile_end_the_run(
    service: EvalService, data: Path, tmp_path: Path
) -> None:
    def change(body: Body) -> None:
        if len(service.greedy) > 6:
            service.engine.weights_version = "fake-2"

    service.mishap = change
    refused(evaluate(data, tmp_path), "weights_version = fake-1, and now it is fake-2")
    versions = {line["weights_version"] for line in kept(tmp_path / "gsm8k-generate")}
    assert versions == {"fake-1"}


def test_two_at_once_are_refused(service: EvalService, data: Path, tmp_path: Path) -> None:
    assert evaluate(data, tmp_path, "--limit", "3").exit_code == 0
    service.asked.clear()
    held = os.open(tmp_path / "gsm8k-generate", os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        refused(evaluate(data, tmp_path), "another process")
    finally:
        os.close(held)
    assert service.asked == []
    assert evaluate(data, tmp_path).exit_code == 0


@pytest.mark.parametrize(
    ("n", "more"),
    [(40, ["--samples", "2", "--p-true"]), (12, ["--mode", "score", "--p-true"])],
    ids=["generate", "score"],
)
def test_mishaps_change_no_number(
    service: EvalService,
    tmp_path: Path,
    n: int,
    more: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = write_gsm8k(tmp_path / "gsm8k", n)
    assert evaluate(data, tmp_path / "good", *more).exit_code == 0
    n_asked = len(service.asked)
    monkeypatch.setattr(asking, "TIMEOUT", httpx.Timeout(1.0))
    kinds = (Mishap(500), Mishap(None), Mishap(429), Mishap(429, "1"), Mishap(503), Mishap(504))
    service.mishap = mishaps = Mishaps(seed=5, share=0.1, kinds=kinds)
    done = evaluate(data, tmp_path / "bad", *more)
    assert done.exit_code == 0, done.output
    assert set(mishaps.drawn) == set(kinds)
    assert len(service.asked) - n_asked >= n_asked + sum(mishaps.drawn.values())
    good, bad = (findings(next((tmp_path / out).glob("gsm8k-*"))) for out in ("good", "bad"))
    assert len(good) == (n if "--samples" in more else 4 * n)
    assert bad == good


def test_a_refused_question_is_a_line_and_is_not_asked_again(
    service: EvalService, data: Path, tmp_path: Path
) -> None:
    file = data / "test.jsonl"
    long = {"question": "How many? " * 200, "answer": "#### 5"}
    file.write_text(file.read_text() + json.dumps(long) + "\n")
    service.mishap = lambda body: (
        Mishap(400) if body and "Tom has 5 pens" in prompt_of(body) else None
    )
    done = evaluate(data, tmp_path)
    refused(done, f"2 of {N + 1} questions were refused", code=3)
    errors = {
        line["id"]: line["error"] for line in kept(tmp_path / "gsm8k-generate") if "error" in line
    }
    assert set(errors) == {"gsm8k/5", f"gsm8k/{N}"}
    assert "made up" in errors["gsm8k/5"]
    assert "413" in errors[f"gsm8k/{N}"]
    assert len(service.greedy) == len(set(service.greedy)) == N + 1
    again = evaluate(data, tmp_path, "--base-url", NOBODY)
    refused(again, f"2 of {N + 1} questions were refused", code=3)
    # Of fewer questions, none was.
    assert evaluate(data, tmp_path, "--limit", "2", "--base-url", NOBODY).exit_code == 0


def test_a_run_may_come_to_nothing(service: EvalService, data: Path, tmp_path: Path) -> None:
    service.mishap = lambda body: Mishap(400) if body else None
    refused(evaluate(data, tmp_path), f"{N} of {N} questions were refused", code=3)
    assert len(findings(tmp_path / "gsm8k-generate")) == N


def test_the_answers_of_an_earlier_run_are_scored_again(
    service: EvalService, data: Path, tmp_path: Path
) -> None:
    service.mishap = lambda body: Mishap(400) if "Tom has 5 " in json.dumps(body) else None
    assert evaluate(data, tmp_path).exit_code == 3
    service.mishap = lambda body: None
    first = tmp_path / "gsm8k-generate"
    service.asked.clear()
    service.engine.weights_version = "fake-2"
    assert evaluate(first, tmp_path / "again", "--mode", "score").exit_code == 0
    assert service.greedy == []
    again = {line["id"]: line for line in kept(tmp_path / "again" / "gsm8k-score")}
    answered = [line for line in kept(first) if "error" not in line]
    assert len(again) == len(answered) == N - 1
    for line in answered:
        new = again[line["id"]]
        assert new["weights_version"] == "fake-2"
        for key in ("response", "correct", "half", "group", "accepted"):
            assert new[key] == line[key]
    other = ["eval", "facts", "--mode", "score", "--data", str(first)]
    refused(CliRunner().invoke(cli.app, other), "is a run of gsm8k, not of facts")


def test_given_responses_keep_their_labels_and_may_be_too_long(
    service: EvalService, data: Path, tmp_path: Path
) -> None:
    file = data / "example_model_solutions.jsonl"
    file.write_text(file.read_text().replace("It is 7.", "It is 7. " * 200))
    assert evaluate(data, tmp_path, "--mode", "score").exit_code == 3
    lines = kept(tmp_path / "gsm8k-score")
    assert len(lines) == 4 * N
    assert sum("error" in line for line in lines) == N  # one of each question's four
    scored = [line for line in lines if "error" not in line]
    assert all(line["correct"] == (line["source"] == "6b_finetuning") for line in scored)
    assert all(line["flexible"] == line["correct"] for line in scored)


@pytest.mark.parametrize(
    ("status", "says"), [(401, "DEMUR_API_KEY"), (403, "DEMUR_API_KEY"), (404, "base_url")]
)
def test_what_any_question_would_be_refused_for_stops_the_run(
    service: EvalService, data: Path, tmp_path: Path, status: int, says: str
) -> None:
    service.mishap = lambda body: Mishap(status) if len(service.greedy) > 6 else None
    refused(evaluate(data, tmp_path), says)
    lines = kept(tmp_path / "gsm8k-generate")
    assert not any("error" in line for line in lines)
    # The seventh, and those that were under way with it; none of them twice.
    assert len(service.greedy) == len(set(service.greedy)) < 7 + CONCURRENCY
    service.mishap = lambda body: None
    assert evaluate(data, tmp_path).exit_code == 0
    assert kept(tmp_path / "gsm8k-generate")[: len(lines)] == lines
    assert len(findings(tmp_path / "gsm8k-generate")) == N


def test_a_wrong_key_or_address_asks_nothing(
    service: EvalService, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(evaluate(data, tmp_path, "--base-url", f"{service.url}/elsewhere"), "404")
    monkeypatch.setenv("DEMUR_API_KEY", "wrong")
    refused(evaluate(data, tmp_path), "DEMUR_API_KEY")
    assert service.greedy == []
    # Nothing was begun that a right call could not go on with.
    monkeypatch.setenv("DEMUR_API_KEY", "key")
    assert evaluate(data, tmp_path).exit_code == 0


def test_a_service_that_dies_stops_the_run_and_another_goes_on(
    service: EvalService,
    encoder: TextEncoder,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(asking, "_PATIENCE_S", 0.0)
    service.mishap = lambda body: service.die() if len(service.greedy) > 6 else None
    refused(evaluate(data, tmp_path), "demur serve")
    before = kept(tmp_path / "gsm8k-generate")
    assert 0 < len(before) < N
    assert not any("error" in line for line in before)
    other = EvalService(encoder)
    try:
        assert evaluate(data, tmp_path, "--base-url", other.url).exit_code == 0
    finally:
        other.end()
    assert len(other.greedy) == N - len(before)
    assert kept(tmp_path / "gsm8k-generate")[: len(before)] == before
    assert len(findings(tmp_path / "gsm8k-generate")) == N


def test_nobody_there_is_told_at_once(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(state: Any) -> float:
        raise AssertionError("it waits")

    monkeypatch.setattr(asking, "_wait", never)
    refused(evaluate(data, tmp_path, "--base-url", NOBODY), "demur serve")


def test_a_service_that_is_starting_is_waited_for(
    service: EvalService, data: Path, tmp_path: Path
) -> None:
    service.mishap = lambda body: Mishap(503, "0") if len(service.asked) < 6 else None
    assert evaluate(data, tmp_path).exit_code == 0
    assert service.asked[:6] == [{}] * 6  # what it serves, again and again
    assert len(findings(tmp_path / "gsm8k-generate")) == N


async def test_so_many_questions_are_under_way_and_no_more(
    service: EvalService, data: Path, tmp_path: Path
) -> None:
    service.held = True
    run = Run(tmp_path / "run")
    async with AsyncClient(timeout=asking.TIMEOUT, max_retries=0) as client:
        questions = GSM8K.questions(str(data))
        asked = asyncio.create_task(
            carry_on(client, GSM8K, questions, run, Asking(samples=2, p_true=True), concurrency=3)
        )
        async with asyncio.timeout(300):
            while service.under_way < 3:
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)  # for a fourth, if there were one
        service.held = False
        service.slow_s = 0.01
        assert await asked == N
    assert service.most == 3
    # A question's requests come one after another: the greedy answer, samples, True and False.
    assert len(service.asked) == 1 + 4 * N


@pytest.mark.parametrize(
    "more", [["--samples", "2", "--p-true"], ["--mode", "score", "--p-true"]], ids=" ".join
)
def test_nothing_gets_into_distillation(
    service: EvalService, data: Path, tmp_path: Path, more: list[str]
) -> None:
    assert evaluate(data, tmp_path, *more).exit_code == 0
    (_, *bodies) = service.asked  # the first asks for the model
    assert len(bodies) == (4 * N if "--samples" in more else 4 * 3 * N)
    assert all(body["store"] is False for body in bodies)


def test_samples_and_p_true(service: EvalService, data: Path, tmp_path: Path) -> None:
    assert (
        evaluate(data, tmp_path, "--samples", "2", "--p-true", "--max-tokens", "50").exit_code == 0
    )
    for line in kept(tmp_path / "gsm8k-generate"):
        assert line["samples"] == [line["response"]] * 2  # the fake knows no chance
        assert line["sample_answers"] == [line["extracted"]] * 2
        assert 0 < line["p_true"] < 1
        assert "".join(line["tokens"]["text"]) == line["response"]
        assert {len(column) for column in line["tokens"].values()} == {len(line["tokens"]["text"])}
    sampled = [body for body in service.asked if body.get("n") == 2]
    assert len(sampled) == N
    assert all(body["temperature"] == 0.7 and body["max_tokens"] == 50 for body in sampled)
    # The judge is not told to think step by step, and to answer in one word.
    judged = [text for body in service.asked if "Proposed answer" in (text := json.dumps(body))]
    assert len(judged) == 2 * N
    assert not any("step by step" in text for text in judged)


def test_a_limit_is_spread_evenly_and_can_be_raised(
    service: EvalService, data: Path, tmp_path: Path
) -> None:
    assert evaluate(data, tmp_path, "--limit", "4").exit_code == 0
    run = tmp_path / "gsm8k-generate"
    assert set(findings(run)) == {f"gsm8k/{i}" for i in (0, 3, 6, 9)}
    done = evaluate(data, tmp_path, "--limit", "6")
    assert "6 questions, 2 done before" in done.stderr  # 0 and 6
    assert set(findings(run)) == {f"gsm8k/{i}" for i in (0, 2, 3, 4, 6, 8, 9, 10)}
    assert evaluate(data, tmp_path, "--limit", "99").exit_code == 0
    assert len(service.greedy) == len(findings(run)) == N


def test_what_is_done_needs_no_service(service: EvalService, data: Path, tmp_path: Path) -> None:
    first = evaluate(data, tmp_path)
    assert first.exit_code == 0
    files = {file: file.read_bytes() for file in (tmp_path / "gsm8k-generate").iterdir()}
    again = evaluate(data, tmp_path, "--base-url", NOBODY)
    assert again.exit_code == 0, again.output
    assert f"{N} questions, {N} done before" in again.stderr
    assert again.stdout == first.stdout
    assert {file: file.read_bytes() for file in files} == files


@pytest.mark.parametrize(
    ("given", "code", "says"),
    [
        (["no-such-set"], 2, "no set is called no-such-set; there are gsm8k, svamp, facts"),
        (["gsm8k", "--mode", "guess"], 2, "score"),
        (["gsm8k", "--limit", "0"], 2, "--limit"),
        (["gsm8k", "--concurrency", "0"], 2, "--concurrency"),
        (["gsm8k", "--mode", "score", "--samples", "2", "--data", "gsm8k"], 2, "--samples"),
        (["svamp", "--mode", "score"], 1, "svamp has no given answers"),
        (["gsm8k", "--mode", "score"], 1, "example_model_solutions.jsonl"),
        (["facts", "--data", "gsm8k"], 1, "take no --data"),
        (["sums", "--data", "gsm8k"], 1, "takes no --data"),
        # All that is wrong is told before the first set is asked.
        (["gsm8k", "sums", "--data", "gsm8k"], 1, "takes no --data"),
        (["gsm8k", "--data", "nowhere.jsonl"], 1, "nowhere.jsonl"),
        (["gsm8k", "--data", "gsm8k", "--out", "gsm8k/test.jsonl"], 1, "Not a directory"),
    ],
)
def test_wrong_usage(
    service: EvalService, data: Path, given: list[str], code: int, says: str
) -> None:
    refused(CliRunner().invoke(cli.app, ["eval", *given]), says, code)
    assert service.greedy == []
    assert not Path("eval-runs").exists()


class Line:
    """A client whose requests go through a list of answers; none is waited for in truth."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.waits: list[float] = []
        monkeypatch.setattr(asyncio, "sleep", self._sleep)

    async def _sleep(self, seconds: float) -> None:
        self.waits.append(seconds)

    async def ask(self, answers: list[httpx.Response | httpx.RequestError]) -> Record:
        left = iter(answers)

        def handle(request: httpx.Request) -> httpx.Response:
            answer = next(left)
            if isinstance(answer, httpx.RequestError):
                raise answer
            return answer

        transport = httpx.MockTransport(handle)
        async with AsyncClient("http://localhost", transport=transport, max_retries=0) as client:
            return await asking.ask(client, GSM8K, GSM8K.questions("gsm8k")[0], Asking())


@pytest.fixture
def line(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Line:
    monkeypatch.chdir(tmp_path)
    return Line(monkeypatch)


def answer(status: int, **headers: str) -> httpx.Response:
    return httpx.Response(status, json={"error": {"message": "no"}}, headers=headers)


async def test_the_service_says_how_long_to_wait(line: Line) -> None:
    waits = ("7", "0", "299")
    answers = [answer(429, **{"Retry-After": wait}) for wait in waits]
    assert (await line.ask([*answers, answer(400)])).error is not None
    assert line.waits[0] == 7
    assert 0 < line.waits[1] < 7
    assert line.waits[2] == 299
    with pytest.raises(RateLimitError):
        await line.ask([answer(429, **{"Retry-After": "301"})])
    assert len(line.waits) == 3


async def test_patience_has_an_end(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of time, but not before the third try: a time-out alone lasts longer."""
    for failure, kind in ((answer(504), ServerError), (httpx.ReadTimeout("slow"), APITimeoutError)):
        line.waits.clear()
        # Within its time there is no end to the tries.
        assert (await line.ask([failure] * 40 + [answer(413)])).error is not None
        assert len(line.waits) == 40
        with monkeypatch.context() as later:
            later.setattr(asking, "_PATIENCE_S", 0.0)
            with pytest.raises(kind):
                await line.ask([failure] * 3)
        assert len(line.waits) == 42
