"""Drafts that follow the traffic to another domain, with a real server: OSD on against off.

    python benchmarks/drift_texts.py --data ../shared/data
    demur distill benchmarks/drafts/drift-old.yaml
    demur distill benchmarks/drafts/drift-scratch.yaml
    python benchmarks/online_drift.py

The service has one core and the trainer another. Twelve clients ask for answers, one after the
other: GSM8K questions for some minutes, then problems to be translated, then a flood of degenerate
texts to be scored. After it, a second trainer learns from the same traffic without DDD, for as many
steps. Every version that went live is then measured on texts of both domains that no draft has
seen, against p_T and EU* of many draws, beside the drafts that the service began with (OSD off) and
drafts that were distilled on the new domain from nothing. What was done is kept in `--work`, and
not done again.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import sqlite3
import string
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import yaml
from drift_report import report
from drift_texts import NEW_TRAFFIC, OLD_TRAFFIC
from eu_texts import ask
from online_service import Service, serving, training

from drafts.init import default_folder
from drafts.store import DraftsStore
from osd.control import Control
from osd.prompts import read_prompts

CORES = {"service": 0, "trainer": 1}
CLIENTS = 12
TRAINER: dict[str, Any] = {
    # A core of its own; and more versions than a service needs, to draw a curve.
    "share": 1.0,
    "busy_share": 1.0,
    "learning_rate": 5e-4,  # as in drafts/drift-*.yaml
    "publish_every": 80,
    "keep_versions": 1000,
    "max_backlog": 100_000,
}
# Without DDD, all learn from all traffic; the gate must not hide what becomes of them.
SAME_DATA: dict[str, Any] = {"diverse": False, "gate": {"jsd_floor": 0.0}}
POISON = ("one token repeated", "random bytes", "random Chinese characters")
_SAMPLE_S = 5.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cache = default_folder().parent
    parser.add_argument("--ensemble", type=Path, default=cache / "runs/drift-old/ensemble")
    parser.add_argument("--texts", type=Path, default=cache / "drift")
    parser.add_argument("--scratch", type=Path, default=cache / "runs/drift-scratch/ensemble")
    parser.add_argument("--work", type=Path, default=cache / "online-drift")
    parser.add_argument("--old-minutes", type=float, default=3)
    parser.add_argument("--new-minutes", type=float, default=30)
    parser.add_argument("--poison-minutes", type=float, default=7)
    parser.add_argument("--only", choices=["live", "same-data", "report"], help="one part of it")
    arguments = parser.parse_args()
    if arguments.only in (None, "live"):
        live(arguments)
    if arguments.only in (None, "same-data"):
        same_data(arguments.work, arguments.ensemble, arguments.texts)
    if arguments.only in (None, "report"):
        report(arguments.work, arguments.ensemble, arguments.texts, arguments.scratch, TRAINER)


def live(arguments: argparse.Namespace) -> None:
    """The traffic of all phases, and a trainer that follows it."""
    work, texts = arguments.work, arguments.texts
    if (work / "timeline.json").exists():
        return
    config = write_config(work, "osd.yaml", TRAINER)
    osd = work / "osd"
    settings = {"osd": "capture", "osd_folder": str(osd), "follow_every_s": "1"}
    settings["ensemble"] = str(arguments.ensemble)
    corpus = texts / "old-train"
    phases: dict[str, tuple[Iterator[Request], float]] = {
        "old": (generations(texts / OLD_TRAFFIC), arguments.old_minutes),
        "new": (generations(texts / NEW_TRAFFIC), arguments.new_minutes),
    }
    for kind in POISON:
        phases[kind] = (poison(kind), arguments.poison_minutes / len(POISON))
    with (
        serving(work / "service", settings, [CORES["service"]]) as service,
        training(osd, config, CORES["trainer"], ensemble=arguments.ensemble, corpus=corpus),
    ):
        recorder = Recorder(service, work / "timeline.json")
        with recorder:
            for name, (requests, minutes) in phases.items():
                recorder.begin(name)
                asyncio.run(ask_for(recorder, requests, 60 * minutes))
                if name == "new":
                    copy = work / "same-data" / "spool.sqlite"
                    copy_spool(osd / "spool.sqlite", copy, since=recorder.phases[name])
    recorder.write()


Request = tuple[str, dict[str, Any]]


def generations(file: Path) -> Iterator[Request]:
    """Questions to be answered, again and again in other orders."""
    prompts = list(read_prompts(file))
    for turn in itertools.count():
        order = random.Random(turn).sample(range(len(prompts)), len(prompts))
        for index in order:
            body = {"messages": prompts[index], "max_tokens": 160, "temperature": 1.0}
            yield "/v1/chat/completions", body | {"uncertainty": True}


def poison(kind: str) -> Iterator[Request]:
    """Degenerate answers to be scored, each to a question of its own."""
    rng = random.Random(kind)
    words = string.ascii_lowercase
    while True:
        question = "".join(rng.choices(words, k=12))
        if kind == "one token repeated":
            text = f" {rng.choice(['the', 'yes', 'no', 'one', 'a'])}" * 150
        elif kind == "random bytes":
            text = bytes(rng.randrange(256) for _ in range(150)).decode("latin-1")
        else:
            text = "".join(chr(rng.randrange(0x4E00, 0x9FA5)) for _ in range(60))
        yield "/v1/score", {"messages": ask(question), "response": text}


async def ask_for(recorder: Recorder, requests: Iterator[Request], seconds: float) -> None:
    """Some clients ask one request after the other, for so long."""
    until = time.monotonic() + seconds
    async with httpx.AsyncClient(base_url=recorder.service.url, timeout=300) as client:

        async def run() -> None:
            while time.monotonic() < until:
                path, body = next(requests)
                answer = await client.post(path, json=body)
                recorder.answered(answer)

        await asyncio.gather(*(run() for _ in range(CLIENTS)))


class Recorder:
    """What happened when: phases, answers, and what the service says of the trainer."""

    def __init__(self, service: Service, file: Path) -> None:
        self.service = service
        self.file = file
        self.phases: dict[str, float] = {}
        self.answers: list[dict[str, Any]] = []
        self.samples: list[dict[str, Any]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def begin(self, phase: str) -> None:
        self.phases[phase] = time.time()
        print(f"{time.strftime('%H:%M:%S')} {phase}", flush=True)

    def answered(self, answer: httpx.Response) -> None:
        found: dict[str, Any] = {"time": time.time(), "status": answer.status_code}
        if answer.status_code == 200:
            body = answer.json()
            measured = body["choices"][0]["uncertainty"] if "choices" in body else body
            found["version"] = measured["estimator"]["weights_version"]
        self.answers.append(found)

    def write(self) -> None:
        told = {"phases": self.phases, "answers": self.answers, "samples": self.samples}
        self.file.write_text(json.dumps(told | {"ended": time.time()}))

    def _sample(self) -> None:
        while not self._stop.wait(_SAMPLE_S):
            with suppress(httpx.HTTPError):
                told = self.service.osd()
                self.samples.append({"time": time.time(), "trainer": told["trainer"]})


def copy_spool(spool: Path, copy: Path, since: float) -> None:
    """What came to it after a moment, while it is written to."""
    copy.parent.mkdir(parents=True, exist_ok=True)
    with sqlite3.connect(spool) as source, sqlite3.connect(copy) as target:
        source.backup(target)
        target.execute("DELETE FROM conversations WHERE created < ?", (since,))


def same_data(work: Path, ensemble: Path, texts: Path) -> None:
    """A trainer without DDD on the traffic of the new domain, for as many steps on it."""
    folder = work / "same-data"
    if (folder / "done").exists():
        return
    timeline = json.loads((work / "timeline.json").read_text())
    begins, ends = timeline["phases"]["new"], timeline["phases"][POISON[0]]
    told = [s for s in timeline["samples"] if s["trainer"] and s["time"] < begins]
    versions = DraftsStore(work / "osd" / "drafts").versions()
    steps = max(steps_of(version.about) for version in versions if version.created < ends)
    steps -= told[-1]["trainer"]["step"]
    # One version: no more held-out traffic comes, on which to judge a second.
    config = write_config(work, "same-data.yaml", TRAINER | SAME_DATA | {"publish_every": steps})
    corpus = texts / "old-train"
    with training(folder, config, CORES["trainer"], ensemble=ensemble, corpus=corpus):
        control = Control(DraftsStore(folder / "drafts"))
        while (status := control.status()) is None or not status.published + status.refused:
            time.sleep(_SAMPLE_S)
    (folder / "done").touch()


def steps_of(about: dict[str, Any]) -> int:
    """Of all students, that a version has behind it."""
    return sum(about.get("progress", {}).get("steps", [0]))


def write_config(work: Path, name: str, values: dict[str, Any]) -> Path:
    work.mkdir(parents=True, exist_ok=True)
    file = work / name
    file.write_text(yaml.safe_dump(values))
    return file


if __name__ == "__main__":
    main()
