"""Streams of a running service with a real engine, and the clients that people already have."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from demur import AsyncClient, Client

from tests.serving import Running, demur, gauge, serving

pytestmark = pytest.mark.engine

EXAMPLES = Path(__file__).parents[1] / "clients/examples"
N_STREAMS = 64


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(tmp_path_factory.mktemp("streams")) as running:
        yield running


async def streamed(client: AsyncClient, marker: int, max_tokens: int = 40) -> tuple[str, list[Any]]:
    """Text and token entries of a greedy stream to a prompt with a marker."""
    messages = [{"role": "user", "content": f"Marker {marker}: say {marker * 7919}."}]
    stream = await client.chat(messages, stream=True, temperature=0, max_tokens=max_tokens)
    text, entries, ids = "", [], set()
    async with stream:
        async for chunk in stream:
            ids.add(chunk.id)
            text += chunk.text
            entries += [entry for choice in chunk.choices for entry in choice.tokens]
    assert len(ids) == 1
    assert stream.completion().text == text
    return text, entries


async def test_64_streams_do_not_mix(running: Running) -> None:
    """Each gets, token for token, what it gets when it is alone."""
    async with AsyncClient(running.url) as client:
        alone = [await streamed(client, marker) for marker in range(N_STREAMS)]
        together = await asyncio.gather(*(streamed(client, m) for m in range(N_STREAMS)))
    # Were they alike, this would show nothing.
    assert len({text for text, _ in alone}) > N_STREAMS // 2
    for (text, entries), (expected, tokens) in zip(together, alone, strict=True):
        assert text == expected
        assert [entry.token for entry in entries] == [token.token for token in tokens]
        for entry, token in zip(entries, tokens, strict=True):
            assert entry.uncertainty.epistemic == pytest.approx(
                token.uncertainty.epistemic, abs=1e-3
            )
    assert gauge(running.url, "demur_pending_items") == 0


async def test_streams_that_are_left_free_their_places(running: Running) -> None:
    """A client that hangs up in mid-stream, and one that does so before the first token."""
    finished = gauge(running.url, "demur_generations_total")
    async with AsyncClient(running.url) as client:
        for _ in range(10):
            messages = [{"role": "user", "content": "a"}]
            stream = await client.chat(messages, stream=True, max_tokens=200)
            async with stream:
                await anext(stream)
    async with httpx.AsyncClient(base_url=running.url) as http:
        body = {"prompt": ["b " * 50] * 200, "max_tokens": 100}
        with pytest.raises(httpx.ReadTimeout):
            await http.post("/v1/completions", json=body, timeout=0.3)
    deadline = time.monotonic() + 20
    while gauge(running.url, "demur_pending_items") or gauge(
        running.url, "vllm:num_requests_running"
    ):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)
    # They were ended, not waited for.
    assert gauge(running.url, "demur_generations_total") < finished + 100


def test_no_request_kills_the_engine(running: Running) -> None:
    """A seed did (on a CPU), and prompts that are taken in pieces with one."""
    with httpx.Client(base_url=running.url, timeout=60) as http:
        long = "word " * 45
        for body in (
            {"prompt": long, "seed": 7},
            {"prompt": long, "seed": 7, "temperature": 0},
            {"prompt": long, "temperature": 2, "top_p": 1e-9},
            {"prompt": long, "temperature": 1e-9, "logprobs": 20},
            {"prompt": [0], "max_tokens": 255},
            {"prompt": [319] * 254, "max_tokens": 2},
            {"prompt": "a", "stop": ["x" * 1000] * 16},
            {"prompt": "a", "n": 128, "max_tokens": 3},
        ):
            answer = http.post("/v1/completions", json=body)
            seeded = "seed" in body and "temperature" not in body
            assert answer.status_code == (400 if seeded else 200), (body, answer.text)
        assert http.get("/ready").status_code == 200


def test_the_sdk_and_the_command_line_chat(running: Running) -> None:
    with Client(running.url) as client:
        answer = client.chat("Hello", temperature=0, max_tokens=8)
        assert answer.choices[0].tokens
        rule = {"threshold": 0.0, "window": 2}
        stopped = client.chat("Hello", temperature=0, max_tokens=8, uncertainty_stop=rule)
        assert stopped.choices[0].finish_reason == "uncertainty"
        assert len(stopped.choices[0].tokens) == 2
        assert len(client.drafts().data) == 6
    done = subprocess.run(
        demur("chat", "Hello", "--json", "--temperature", "0", "--max-tokens", "8"),
        env=os.environ | {"DEMUR_BASE_URL": running.url},
        capture_output=True,
        text=True,
    )
    assert json.loads(done.stdout)["choices"][0]["message"]["content"] == answer.text, done.stderr


def example(running: Running, name: str, *arguments: str) -> str:
    """Standard output of one of the examples."""
    with Client(running.url) as client:
        model = client.models()[0].id
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        env=os.environ | {"DEMUR_BASE_URL": running.url, "DEMUR_MODEL": model},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_official_openai_client(running: Running) -> None:
    from openai import BadRequestError, OpenAI

    out = example(running, "openai_client.py", "Hello")
    whole, _, streamed = out.partition("streamed:")
    for part in (whole, streamed):
        assert "epistemic" in part
        assert "spans" in part
    with OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
        asked: dict[str, Any] = {"model": client.models.list().data[0].id, "max_tokens": 6}
        asked |= {"messages": [{"role": "user", "content": "a"}], "temperature": 0}
        asked["extra_body"] = {"uncertainty": True}
        answer = client.chat.completions.create(**asked)
        chunks = list(client.chat.completions.create(**asked, stream=True))
        whole_entries = answer.choices[0].logprobs.content
        entries = [entry for chunk in chunks for entry in chunk.choices[0].logprobs.content]
        assert [entry.token for entry in entries] == [entry.token for entry in whole_entries]
        for entry, other in zip(entries, whole_entries, strict=True):
            measures = entry.uncertainty
            assert measures["epistemic"] == pytest.approx(other.uncertainty["epistemic"], abs=1e-3)
            assert measures["epistemic"] == pytest.approx(measures["jsd"] + measures["kl"])
        assert chunks[-1].choices[0].uncertainty["sequence"]["n_tokens"] == len(entries)
        with pytest.raises(BadRequestError, match="seed") as refused:
            client.chat.completions.create(**asked | {"seed": 7, "temperature": 1})
        assert refused.value.code == "unsupported_parameter"
        text = client.completions.create(
            model=asked["model"], prompt="a b", max_tokens=4, logprobs=2, temperature=0
        )
        assert len(text.choices[0].logprobs.tokens) == text.usage.completion_tokens


def test_langchain(running: Running) -> None:
    out = example(running, "langchain_chat.py", "Hello")
    assert out.count("epistemic") >= 2
    assert "streamed:" in out


def test_lm_eval(running: Running, tmp_path: Path) -> None:
    """lm-eval's own command, with a task and data that are at hand."""
    done = subprocess.run(
        ["bash", str(EXAMPLES / "lm_eval.sh"), "--limit", "5", "--output_path", str(tmp_path)],
        env=os.environ
        | {"DEMUR_BASE_URL": running.url, "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path)}
        | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = tmp_path.rglob("results_*.json")
    results = json.loads(file.read_text())
    assert results["n-samples"]["demur_sums"]["effective"] == 5
    assert 0 <= results["results"]["demur_sums"]["exact_match,none"] <= 1
