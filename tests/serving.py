"""`demur serve` as a process of its own, with a tiny random ensemble and a real engine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from prometheus_client import REGISTRY

from tests.tiny import mixed_ensemble

ENVIRONMENT = {
    "DEMUR_DTYPE": "float32",
    "DEMUR_MAX_MODEL_LEN": "256",
    "DEMUR_KV_CACHE_GIB": "0.05",
}


@dataclass
class Running:
    """A service that answers."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path
    folder: Path


def demur(*arguments: str) -> list[str]:
    """The command line of the installed `demur`."""
    return [str(Path(sys.executable).with_name("demur")), *arguments]


@contextmanager
def serving(place: Path, folder: Path | None = None, **settings: str) -> Iterator[Running]:
    """A service, killed at the end if it still runs; it answers while it starts.

    Args:
        folder: of the ensemble; by default one with drafts of all kinds is made.
        settings: without their prefix.
    """
    folder = folder or mixed_ensemble(place / "ensemble")
    place.mkdir(parents=True, exist_ok=True)
    log = place / "log"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | ENVIRONMENT | {"DEMUR_ENSEMBLE": str(folder)}
    environment |= {f"DEMUR_{name.upper()}": value for name, value in settings.items()}
    with log.open("ab") as out:
        process = subprocess.Popen(
            demur("serve", "--port", str(port)), env=environment, stdout=out, stderr=out
        )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait(url, process, log)
        yield Running(url, process, log, folder)
    finally:
        process.kill()


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 180
    answered = False
    while True:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        try:
            answer = httpx.get(f"{url}/ready")
        except httpx.TransportError:
            time.sleep(0.2)
            continue
        if answer.status_code == 200:
            break
        answered = True
        assert answer.json()["error"]["code"] == "not_ready"
        assert httpx.get(f"{url}/health").status_code == 200
        time.sleep(0.2)
    assert answered


def gauge(url: str, name: str) -> float:
    """The value of a metric, summed over its labels."""
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    values = [line.split()[-1] for line in lines if line.split("{")[0].split(" ")[0] == name]
    assert values, f"no metric {name}"
    return sum(map(float, values))


def gauge_of(name: str, **labels: str) -> float:
    """The value of a metric of this process."""
    return REGISTRY.get_sample_value(name, labels) or 0.0
