"""`demur serve` and `demur osd` as processes, for the benchmarks of online distillation."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from drafts.init import default_folder

_START_S = 300.0


def command(name: str, *arguments: str, cores: Sequence[int] | None = None) -> list[str]:
    """The command line of `demur <name>`, on some cores only."""
    demur = [str(Path(sys.executable).with_name("demur")), name, *arguments]
    if cores is None:
        return demur
    return ["taskset", "-c", ",".join(map(str, cores)), *demur]


@dataclass
class Service:
    """A service that was started here."""

    folder: Path
    settings: dict[str, str]
    cores: Sequence[int] | None = None
    environment: dict[str, str] = field(default_factory=dict)
    port: int = 0
    process: subprocess.Popen[bytes] | None = None
    starts: list[float] = field(default_factory=list)  # seconds until it was ready

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it, and wait until it is ready; at the port that it had before."""
        if not self.port:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                self.port = probe.getsockname()[1]
        environment = os.environ | self.environment
        if self.cores is not None:
            environment["OMP_NUM_THREADS"] = str(len(self.cores))
        environment |= {f"DEMUR_{name.upper()}": value for name, value in self.settings.items()}
        self.folder.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        with (self.folder / "serve.log").open("ab") as log:
            self.process = subprocess.Popen(
                command("serve", "--port", str(self.port), cores=self.cores),
                env=environment,
                stdout=log,
                stderr=log,
            )
        while not self.is_ready():
            if self.process.poll() is not None or time.monotonic() - began > _START_S:
                raise RuntimeError(f"it did not start: see {self.folder / 'serve.log'}")
            time.sleep(0.2)
        self.starts.append(time.monotonic() - began)

    def is_ready(self) -> bool:
        with suppress(httpx.TransportError):
            return httpx.get(f"{self.url}/ready", timeout=5).status_code == 200
        return False

    def osd(self) -> dict[str, Any]:
        """What it says of online distillation."""
        return dict(httpx.get(f"{self.url}/v1/osd", timeout=60).raise_for_status().json())

    def post(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        answer = httpx.post(f"{self.url}{path}", json=body, timeout=300)
        return dict(answer.raise_for_status().json())

    def trainer(self) -> psutil.Process | None:
        """The trainer that it started, if it lives."""
        assert self.process is not None
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.Error):
                if child.cmdline()[1:3] == ["-m", "osd"]:
                    return child
        return None

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(timeout=90)
            except subprocess.TimeoutExpired:
                self.process.kill()


def uncalibrated_ensemble(folder: Path) -> Path:
    """The default ensemble without its calibration, whose check takes minutes of each version."""
    ignored = shutil.ignore_patterns("target", "calibration*")
    shutil.copytree(default_folder(), folder, ignore=ignored)
    (folder / "target").symlink_to(default_folder() / "target")
    return folder


@contextmanager
def serving(
    folder: Path, settings: dict[str, str], cores: Sequence[int] | None = None
) -> Iterator[Service]:
    """A service that is ready; stopped at the end."""
    service = Service(folder, settings, cores)
    try:
        service.start()
        yield service
    finally:
        service.stop()


@contextmanager
def training(
    osd_folder: Path,
    config: Path,
    core: int,
    *,
    ensemble: Path | None = None,
    corpus: Path | None = None,
) -> Iterator[None]:
    """A trainer of its own core, for services that only capture.

    Args:
        osd_folder: as the services have it; the log goes there.
        ensemble: that they serve, if it is not the default.
        corpus: for replay and the reference set; default: the ensemble's.
    """
    osd_folder.mkdir(parents=True, exist_ok=True)
    places = ["--store", str(osd_folder / "drafts"), "--folder", str(osd_folder / "trainer")]
    places += ["--spool", str(osd_folder / "spool.sqlite")]
    places += ["--load", str(osd_folder / "load"), "--config", str(config)]
    if ensemble is not None:
        places += ["--ensemble", str(ensemble)]
    if corpus is not None:
        places += ["--corpus", str(corpus)]
    with (osd_folder / "trainer.log").open("ab") as log:
        trainer = subprocess.Popen(command("osd", *places, cores=[core]), stdout=log, stderr=log)
    try:
        yield
    finally:
        trainer.terminate()
        trainer.wait(timeout=300)


async def closed_loop(
    url: str,
    bodies: Sequence[dict[str, Any]],
    clients: int,
    seconds: float,
    headers: dict[str, str] | None = None,
) -> tuple[list[float], list[int], float]:
    """So many clients score texts one after the other; none begins a request after so long.

    Returns:
        Each request's latency in seconds, its status, and how many seconds all took.
    """
    latencies: list[float] = []
    statuses: list[int] = []
    turn = iter(bodies)
    started = time.monotonic()
    until = started + seconds
    async with httpx.AsyncClient(base_url=url, timeout=300, headers=headers) as client:

        async def run() -> None:
            while time.monotonic() < until:
                body = next(turn, None)
                if body is None:
                    raise RuntimeError("there are too few texts for so long a load")
                began = time.monotonic()
                answer = await client.post("/v1/score", json=body)
                latencies.append(time.monotonic() - began)
                statuses.append(answer.status_code)

        await asyncio.gather(*(run() for _ in range(clients)))
    return latencies, statuses, time.monotonic() - started
