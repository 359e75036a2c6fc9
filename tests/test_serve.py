"""`demur serve` as a process with a real engine: bad input, hang-ups, and a clean stop."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.serving import Running, demur, gauge, serving
from tests.test_http import BAD, RAW

pytestmark = pytest.mark.engine
GOOD = {"prompt": "The capital of Japan is", "response": " Tokyo."}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(tmp_path_factory.mktemp("serve"), engine_hang_s="10") as running:
        yield running


def test_bad_input_is_answered_and_the_engine_lives(running: Running) -> None:
    headers = {"Content-Type": "application/json"}
    with httpx.Client(base_url=running.url, timeout=60, headers=headers) as client:
        before = client.post("/v1/score", json=GOOD).json()
        for name, body, status, _ in BAD:
            answer = client.post("/v1/score", json=body)
            if name == "too long":  # for the fake; this model takes it
                continue
            assert answer.status_code == status, (name, answer.text)
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}, name
        for name, content, _ in RAW:
            answer = client.post("/v1/score", content=content)
            assert answer.status_code == 400, (name, answer.text)
        answer = client.post("/v1/score", content=b" " * 10_000_000)
        assert answer.status_code == 413
        answer = client.post("/v1/score", json=GOOD | {"response": "word " * 999})
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "context_length_exceeded"
        items = [{"prompt": "a", "response": f"b{i}"} for i in range(1000)]
        items[13] = {"prompt": "a", "response": "b", "seed": "7"}
        data = client.post("/v1/score", json=items).json()["data"]
        assert [item["index"] for item in data if item["error"]] == [13]
        after = client.post("/v1/score", json=GOOD).json()
        assert before["tokens"] == after["tokens"]
        assert client.get("/ready").status_code == 200
        assert "vllm:" in client.get("/metrics").text


async def test_clients_that_hang_up_free_their_places(running: Running) -> None:
    async with httpx.AsyncClient(base_url=running.url) as client:
        items = [{"prompt": "a " * 50, "response": "b " * 50}] * 500
        for _ in range(3):
            with pytest.raises(httpx.ReadTimeout):
                await client.post("/v1/score", json=items, timeout=0.3)
        for _ in range(50):
            metrics = (await client.get("/metrics")).text
            pending = next(
                line for line in metrics.splitlines() if line.startswith("demur_pending_items ")
            )
            if pending == "demur_pending_items 0.0":
                break
            await asyncio.sleep(0.1)
        assert pending == "demur_pending_items 0.0"
        assert (await client.post("/v1/score", json=GOOD, timeout=30)).status_code == 200


@pytest.mark.parametrize(
    ("process", "number"),
    [("VLLM::Worker", signal.SIGKILL), ("VLLM::EngineCore", signal.SIGSTOP)],
)
def test_an_engine_that_dies_or_hangs_is_started_again(
    running: Running, process: str, number: int
) -> None:
    """What waits is told so, and afterwards it scores as before."""
    with httpx.Client(base_url=running.url, timeout=120) as client:
        before = client.post("/v1/score", json=GOOD).json()
        failures = gauge(running.url, "demur_engine_failures_total")
        engine = engine_processes(running)
        [victim] = [child for child in engine if child.cmdline()[0].startswith(process)]
        victim.send_signal(number)
        refused = client.post("/v1/score", json=GOOD)
        assert refused.status_code == 503, refused.text
        assert refused.json()["error"]["code"] == "not_ready"
        assert int(refused.headers["Retry-After"]) > 0
        assert client.get("/health").status_code == 200
        while client.get("/ready").status_code != 200:
            assert running.process.poll() is None, running.log.read_text()
            time.sleep(0.1)
        after = client.post("/v1/score", json=GOOD).json()
        assert after["tokens"] == before["tokens"]
        assert gauge(running.url, "demur_engine_failures_total") == failures + 1
        assert "vllm:" in client.get("/metrics").text
    _, left = psutil.wait_procs(engine, timeout=30)
    assert not left, f"processes of the old engine are there still: {left}"
    assert len(engine_processes(running)) == len(engine)


def engine_processes(running: Running) -> list[psutil.Process]:
    children = psutil.Process(running.process.pid).children(recursive=True)
    return [child for child in children if "".join(child.cmdline()[:1]).startswith("VLLM::")]


def test_the_command_line_scores(running: Running) -> None:
    environment = os.environ | {"DEMUR_BASE_URL": running.url}
    command = demur("score", "-r", GOOD["response"], "--prompt", GOOD["prompt"], "--json")
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert json.loads(done.stdout)["estimator"]["drafts"] == 6, done.stderr
    refused = subprocess.run(
        demur("score", "-r", "word " * 999, "--prompt", "a"),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused.returncode == 1
    assert "over the 255 that this model takes" in refused.stderr


def test_a_port_in_use_ends_it_before_the_engine_is_loaded(running: Running) -> None:
    folder = running.folder
    port = running.url.rpartition(":")[2]
    done = subprocess.run(
        demur("serve", "--ensemble", str(folder), "--port", port),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "address already in use" in done.stderr.lower()
    assert "ready:" not in done.stderr
    assert "Traceback" not in done.stderr


def test_it_can_be_stopped_while_it_starts(running: Running) -> None:
    folder = running.folder
    with subprocess.Popen(
        demur("serve", "--ensemble", str(folder), "--port", "0"),
        env=os.environ | {"DEMUR_MAX_MODEL_LEN": "256"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        deadline = time.monotonic() + 60
        while not psutil.Process(process.pid).children(recursive=True):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=60)
    assert process.returncode == 0
    # It did not go on loading first, and does not call it a failure.
    assert "ready:" not in log
    assert "did not start" not in log
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive


def test_zz_stop_is_clean_and_loses_nothing(running: Running) -> None:
    """Last of this file: a request under way is answered, then every process is gone."""
    children = psutil.Process(running.process.pid).children(recursive=True)
    assert children, "the engine runs in processes of its own"
    items = [{"prompt": "a " * 20, "response": "b " * 20}] * 100
    sender = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, json, httpx;"
            "r = httpx.post(sys.argv[1], json=json.loads(sys.argv[2]), timeout=60);"
            "print(sum(1 for item in r.json()['data'] if item['score']))",
            f"{running.url}/v1/score",
            json.dumps(items),
        ],
        stdout=subprocess.PIPE,
    )
    deadline = time.monotonic() + 30
    while "demur_pending_items 100.0" not in httpx.get(f"{running.url}/metrics").text:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    running.process.send_signal(signal.SIGTERM)
    assert sender.communicate(timeout=60)[0].strip() == b"100"
    assert running.process.wait(timeout=60) == 0, running.log.read_text()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    # What vLLM says of the engines that were killed above is not of this end.
    assert "Traceback" not in running.log.read_text().rpartition("ready again")[2]


def test_a_trainer_that_could_not_start_is_told_of_at_once(
    running: Running, tmp_path: Path
) -> None:
    config = tmp_path / "osd.yaml"
    for content, says in (
        (b"publish_evry: 5", "publish_evry: unknown field"),
        (b"[1, 2]", "fields and values are wanted, not a list"),
        (b"\xa2\xff", "cannot be read"),
    ):
        config.write_bytes(content)
        environment = os.environ | {"DEMUR_OSD": "train", "DEMUR_OSD_CONFIG": str(config)}
        done = subprocess.run(
            demur("serve", "--ensemble", str(running.folder)),
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1
        assert says in done.stderr
        assert "Traceback" not in done.stderr


def test_serve_refuses_what_it_cannot_serve(tmp_path: Path) -> None:
    done = subprocess.run(
        demur("serve", "--ensemble", str(tmp_path)), capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "demur init" in done.stderr
    assert "Traceback" not in done.stderr
